"""The networks by name: ``cifar_resnet20``, ``cifar_wrn40_10``, ``highway50`` and so on.

A family is a pattern whose numbers are depth and width, and a function that builds the network.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fixup_core import Method
from fixup_core.errors import UserError
from fixup_core.rules.methods import method_named
from vision.imports import import_object
from vision.nets import builders
from vision.nets.builders import DESIGN_OPTIONS
from vision.nets.network import Network, write_weights_

AS_IT_IS = "as_it_is"
"""In place of a method: the weights that a network of the user's own has written."""

RESNET_OPTIONS = (*DESIGN_OPTIONS, "in_channels", "checkpointing")
VGG_OPTIONS = ("activation", "dropout", "in_channels")
HIGHWAY_OPTIONS = ("activation", "gate_bias", "in_channels")

OPTION_TYPES: dict[str, type] = {
    **dict.fromkeys(("shortcut", "order", "activation"), str),
    **dict.fromkeys(("dropout", "gate_bias"), float),
    **dict.fromkeys(("in_channels", "image_size", "width", "num_classes"), int),
    "checkpointing": bool,
    "widths": tuple,
}
TYPE_NAMES = {
    str: "a name",
    float: "a number",
    int: "a whole number",
    bool: "true or false",
    tuple: "a list of whole numbers",
}


@dataclass(frozen=True)
class Family:
    """A line of networks.

    Attributes:
        pattern: Of the names; its groups are whole numbers, ``build``'s first arguments.
        build: Makes the network, its weights not yet written.
        options: Names of what ``build`` takes besides.
        example: A name.
        image: Channels and size of an image, for an initialisation that looks at data.
        classes: Of the data set that it was made for.
        residual: Whether its networks have residual branches, so that Fixup is defined for them.
    """

    pattern: str
    build: Callable[..., Network]
    options: tuple[str, ...]
    example: str
    image: tuple[int, int] = (3, 32)
    classes: int = 10
    residual: bool = True


_IMAGENET: dict[str, Any] = {"image": (3, 224), "classes": 1000}
_PLAIN_OPTIONS = tuple(option for option in RESNET_OPTIONS if option != "shortcut")

FAMILIES = (
    Family(
        r"cifar_resnet(\d+)", builders.cifar_resnet, (*RESNET_OPTIONS, "width"), "cifar_resnet20"
    ),
    Family(r"cifar_wrn(\d+)_(\d+)", builders.cifar_wrn, RESNET_OPTIONS, "cifar_wrn40_10"),
    Family(
        r"imagenet_resnet(\d+)",
        builders.imagenet_resnet,
        RESNET_OPTIONS,
        "imagenet_resnet50",
        **_IMAGENET,
    ),
    Family(
        r"imagenet_plain(\d+)",
        builders.imagenet_plain,
        _PLAIN_OPTIONS,
        "imagenet_plain34",
        **_IMAGENET,
        residual=False,
    ),
    Family(
        r"imagenet_vgg(\d+)",
        builders.imagenet_vgg,
        VGG_OPTIONS,
        "imagenet_vgg19",
        **_IMAGENET,
        residual=False,
    ),
    Family(
        r"highway_conv(\d+)",
        builders.highway_conv,
        (*HIGHWAY_OPTIONS, "widths"),
        "highway_conv19",
        residual=False,
    ),
    Family(
        r"highway(\d+)",
        builders.highway,
        (*HIGHWAY_OPTIONS, "width", "image_size"),
        "highway50",
        residual=False,
    ),
)


def build_net(
    name: str,
    *,
    method: str | Method = "fixup",
    num_classes: int = 10,
    base_branches: float | None = None,
    batch: torch.Tensor | None = None,
    **options: Any,
) -> Network:
    """Build a network and write its weights.

    Args:
        name: The family and its numbers: ``cifar_resnet<6n+2>``, ``cifar_wrn<6n+4>_<width>``,
            ``imagenet_resnet<18|34|50|101|152>``, ``imagenet_plain<18|34>``,
            ``imagenet_vgg<11|13|16|19>``, ``highway<depth>``, ``highway_conv<depth>``.
            Or the class path of a network of one's own, ``package.module.Class``, called with
            ``num_classes`` and ``options``.
        method: A name in ``METHODS``, or a record; or ``as_it_is``: the weights that a network of
            one's own has written.
        num_classes: Of the classifier.
        base_branches: c, the residual branches of the network at which the learning rate was tuned,
            for a method with a factor of the depth such as ``fixup_adam``; its own by default.
        batch: Images [B, C, H, W] for a method that looks at data; noise if there are none.
        options: Of the family: ``shortcut``, ``order``, ``activation``, ``dropout``,
            ``in_channels``, ``checkpointing``; ``width`` of a CIFAR ResNet's first stage;
            ``gate_bias``, ``width``, ``image_size`` of a highway network.

    Returns:
        The network; ``report`` on it says how every weight was drawn.

    Raises:
        UserError: An unknown name, method or option, an impossible depth, a method the network
            cannot take, or base branches that are not positive or that the method does not know.
    """
    chosen = _chosen(method, base_branches)
    net = _built(name, chosen, num_classes=num_classes, **options)
    if chosen is None:
        return net
    if chosen.unit_variance and batch is None:
        channels, size = image_of(name, **options)
        batch = torch.randn(16, channels, size, size)
    write_weights_(net, chosen, batch)
    return net


def check_net(
    name: str,
    *,
    method: str | Method = "fixup",
    base_branches: float | None = None,
    **options: Any,
) -> None:
    """Raise what ``build_net`` would raise, without memory for weights."""
    outline(name, method=method, base_branches=base_branches, **options)


def outline(
    name: str,
    *,
    method: str | Method = "fixup",
    num_classes: int = 10,
    base_branches: float | None = None,
    **options: Any,
) -> Network:
    """What ``build_net`` builds, on the meta device: shapes without memory for weights.

    Raises:
        UserError: As ``build_net``.
    """
    chosen = _chosen(method, base_branches)
    with torch.device("meta"):
        net = _built(name, chosen, num_classes=num_classes, **options)
        if chosen is not None and not chosen.unit_variance:
            write_weights_(net, chosen)
    return net


def family_of(name: str) -> Family:
    """The family of a network of that name.

    Raises:
        UserError: There is none, or the network is one of the user's own.
    """
    return _parse(name)[0]


def net_options(name: str) -> tuple[str, ...]:
    """What ``build_net`` takes as ``options`` for a network of that name."""
    return family_of(name).options


def image_of(name: str, **options: Any) -> tuple[int, int]:
    """Channels and size of the images that a network of that name and options is made for."""
    channels, size = family_of(name).image
    return options.get("in_channels", channels), options.get("image_size", size)


def _chosen(method: str | Method, base_branches: float | None) -> Method | None:
    """The record; ``None`` where the network's weights are left as they are."""
    if method != AS_IT_IS:
        return method_named(method).with_base(base_branches)
    if base_branches is not None:
        raise UserError(f"{AS_IT_IS} writes no weights, so it has no base branches")
    return None


def _built(name: str, method: Method | None, **options: Any) -> Network:
    """The network, its weights not yet written."""
    if is_class_path(name):
        return _foreign(name, options)
    family, numbers = _parse(name)
    if method is None:
        raise UserError(f"the method {AS_IT_IS} is for a network of your own, by class path")
    for option, value in options.items():
        _check_option(name, option, value, (*family.options, "num_classes"))
    return family.build(*numbers, method=method, **options)


def is_class_path(name: str) -> bool:
    """Whether a network is one of the user's own."""
    return "." in name


def _foreign(name: str, options: dict[str, Any]) -> Any:
    kind = import_object(name, "--model.net")
    try:
        net = kind(**options)
    except TypeError as error:
        raise UserError(f"{name} does not take num_classes and --model.options: {error}") from error
    if not isinstance(net, nn.Module):
        raise UserError(f"{name} makes no torch.nn.Module")
    return net


def _check_option(name: str, option: str, value: Any, known: tuple[str, ...]) -> None:
    if option not in known:
        near = difflib.get_close_matches(option, known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}"
        raise UserError(f"{name} has no option {option!r}; {hint}")
    kind = OPTION_TYPES[option]
    fits = type(value) is kind or (kind is float and type(value) is int)
    if kind is tuple:
        fits = isinstance(value, (list, tuple)) and bool(value)
        fits = fits and all(type(each) is int for each in value)
    if not fits:
        raise UserError(f"{name}: the option {option} is {value!r}: give {TYPE_NAMES[kind]}")


def _parse(name: str) -> tuple[Family, list[int]]:
    if is_class_path(name):
        raise UserError(f"{name} is a network of your own: this is for the networks of build_net")
    for family in FAMILIES:
        match = re.fullmatch(family.pattern, name)
        if match:
            return family, [int(number) for number in match.groups()]
    examples = [family.example for family in FAMILIES]
    near = difflib.get_close_matches(name, examples, n=1, cutoff=0) or examples
    raise UserError(f"there is no network {name!r}; the nearest family: {near[0]}")
