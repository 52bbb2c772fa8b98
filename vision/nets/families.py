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
from fixup_core.rules.methods import check_defined, method_named
from vision.imports import import_object
from vision.nets.design import Design, make_design
from vision.nets.highway import HighwayConvNet, HighwayMLP
from vision.nets.network import Network, write_weights_
from vision.nets.resnet import ResNet

IMAGENET_COUNTS = {
    18: (False, (2, 2, 2, 2)),
    34: (False, (3, 4, 6, 3)),
    50: (True, (3, 4, 6, 3)),
    101: (True, (3, 4, 23, 3)),
    152: (True, (3, 8, 36, 3)),
}
"""Depth -> bottleneck or not, blocks of each stage (He et al. 2015, table 1)."""

AS_IT_IS = "as_it_is"
"""In place of a method: the weights that a network of the user's own has written."""

DESIGN_OPTIONS = ("shortcut", "order", "activation", "dropout")
RESNET_OPTIONS = (*DESIGN_OPTIONS, "in_channels", "checkpointing")
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


def _design(method: Method, options: dict[str, Any], **defaults: Any) -> Design:
    given = {key: options.pop(key) for key in DESIGN_OPTIONS if key in options}
    return make_design(method, given, **defaults)


def _cifar_resnet(depth: int, *, method: Method, **options: Any) -> Network:
    """ResNet-(6n+2): n basic blocks in each of three stages, 16, 32 and 64 wide, shortcut A."""
    count = _blocks_per_stage(depth, 2)
    width = options.pop("width", 16)
    widths = (width, 2 * width, 4 * width)
    return ResNet(_design(method, options), counts=(count,) * 3, widths=widths, **options)


def _cifar_wrn(depth: int, factor: int, *, method: Method, **options: Any) -> Network:
    """Wide-ResNet-(6n+4): ``factor`` times as wide, pre order, shortcut B."""
    count = _blocks_per_stage(depth, 4)
    design = _design(method, options, shortcut="B", order="pre")
    widths = (16 * factor, 32 * factor, 64 * factor)
    return ResNet(design, counts=(count,) * 3, widths=widths, stem_width=16, **options)


def _imagenet_resnet(depth: int, *, method: Method, **options: Any) -> Network:
    """ResNet-18/34 of basic blocks, 50/101/152 of bottlenecks, shortcut B."""
    if depth not in IMAGENET_COUNTS:
        known = ", ".join(map(str, IMAGENET_COUNTS))
        raise UserError(f"there is no imagenet_resnet{depth}; the depths are {known}")
    bottleneck, counts = IMAGENET_COUNTS[depth]
    design = _design(method, options, shortcut="B", bottleneck=bottleneck)
    return ResNet(design, counts=counts, widths=(64, 128, 256, 512), imagenet=True, **options)


def _highway(depth: int, *, method: Method, **options: Any) -> Network:
    """Fully connected highway network, 50 wide."""
    return _gated(HighwayMLP, depth, method, options)


def _highway_conv(depth: int, *, method: Method, **options: Any) -> Network:
    """Convolutional highway network of 3x3 convolutions, 16, 32 and 64 wide."""
    return _gated(HighwayConvNet, depth, method, options)


def _gated(kind: Any, depth: int, method: Method, options: dict[str, Any]) -> Network:
    check_defined(
        method,
        "highway networks, which have gates in place of norms and residual branches",
        lambda one: one.norm is None and not one.needs_branches and not one.only,
    )
    if depth < 2:
        raise UserError(f"a highway network has at least 2 layers, got {depth}")
    return kind(depth=depth, **options)


def _blocks_per_stage(depth: int, outside: int) -> int:
    count, rest = divmod(depth - outside, 6)
    if rest or count < 1:
        below = 6 * max(count, 1) + outside
        raise UserError(f"a depth of {depth} is not 6n+{outside}: take {below} or {below + 6}")
    return count


@dataclass(frozen=True)
class Family:
    """A line of networks.

    Attributes:
        pattern: Of the names; its groups are whole numbers, ``build``'s first arguments.
        build: Makes the network, its weights not yet written.
        options: Names of what ``build`` takes besides.
        example: A name.
        image: Channels and size of an image, for an initialisation that looks at data.
    """

    pattern: str
    build: Callable[..., Network]
    options: tuple[str, ...]
    example: str
    image: tuple[int, int] = (3, 32)


FAMILIES = (
    Family(r"cifar_resnet(\d+)", _cifar_resnet, (*RESNET_OPTIONS, "width"), "cifar_resnet20"),
    Family(r"cifar_wrn(\d+)_(\d+)", _cifar_wrn, RESNET_OPTIONS, "cifar_wrn40_10"),
    Family(
        r"imagenet_resnet(\d+)", _imagenet_resnet, RESNET_OPTIONS, "imagenet_resnet50", (3, 224)
    ),
    Family(r"highway_conv(\d+)", _highway_conv, (*HIGHWAY_OPTIONS, "widths"), "highway_conv19"),
    Family(r"highway(\d+)", _highway, (*HIGHWAY_OPTIONS, "width", "image_size"), "highway50"),
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
            ``imagenet_resnet<18|34|50|101|152>``, ``highway<depth>``, ``highway_conv<depth>``.
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
    chosen = _chosen(method, base_branches)
    with torch.device("meta"):
        net = _built(name, chosen, num_classes=10, **options)
        if chosen is not None and not chosen.unit_variance:
            write_weights_(net, chosen)


def net_options(name: str) -> tuple[str, ...]:
    """What ``build_net`` takes as ``options`` for a network of that name."""
    return _parse(name)[0].options


def image_of(name: str, **options: Any) -> tuple[int, int]:
    """Channels and size of the images that a network of that name and options is made for."""
    channels, size = _parse(name)[0].image
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
