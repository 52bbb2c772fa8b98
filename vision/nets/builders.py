"""What builds the networks of each family from the numbers in their names; weights come later.

Each takes the method, ``num_classes`` and options of its family, and raises ``UserError`` for a
depth that its family does not have, or a method that is not defined for it.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from fixup_core import Method
from fixup_core.errors import UserError
from fixup_core.rules.methods import check_defined
from vision.nets.design import Design, make_design
from vision.nets.highway import HighwayConvNet, HighwayMLP
from vision.nets.network import Network
from vision.nets.resnet import ResNet
from vision.nets.vgg import VGG

IMAGENET_COUNTS = {
    18: (False, (2, 2, 2, 2)),
    34: (False, (3, 4, 6, 3)),
    50: (True, (3, 4, 6, 3)),
    101: (True, (3, 4, 23, 3)),
    152: (True, (3, 8, 36, 3)),
}
"""Depth -> bottleneck or not, blocks of each stage (He et al. 2015, table 1)."""

PLAIN_DEPTHS = (18, 34)
"""Of the plain ImageNet networks (He et al. 2015, section 4.1)."""

VGG_COUNTS = {
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}
"""Depth -> convolutions of each stage (Simonyan and Zisserman 2015, table 1)."""

DESIGN_OPTIONS = ("shortcut", "order", "activation", "dropout")


def _design(method: Method, options: dict[str, Any], **defaults: Any) -> Design:
    given = {key: options.pop(key) for key in DESIGN_OPTIONS if key in options}
    return make_design(method, given, **defaults)


def cifar_resnet(depth: int, *, method: Method, **options: Any) -> Network:
    """ResNet-(6n+2): n basic blocks in each of three stages, 16, 32 and 64 wide, shortcut A."""
    count = _blocks_per_stage(depth, 2)
    width = options.pop("width", 16)
    widths = (width, 2 * width, 4 * width)
    return ResNet(_design(method, options), counts=(count,) * 3, widths=widths, **options)


def cifar_wrn(depth: int, factor: int, *, method: Method, **options: Any) -> Network:
    """Wide-ResNet-(6n+4): ``factor`` times as wide, pre order, shortcut B."""
    count = _blocks_per_stage(depth, 4)
    design = _design(method, options, shortcut="B", order="pre")
    widths = (16 * factor, 32 * factor, 64 * factor)
    return ResNet(design, counts=(count,) * 3, widths=widths, stem_width=16, **options)


def imagenet_resnet(depth: int, *, method: Method, **options: Any) -> Network:
    """ResNet-18/34 of basic blocks, 50/101/152 of bottlenecks, shortcut B."""
    _check_depth("imagenet_resnet", depth, IMAGENET_COUNTS)
    bottleneck, counts = IMAGENET_COUNTS[depth]
    design = _design(method, options, shortcut="B", bottleneck=bottleneck)
    return ResNet(design, counts=counts, widths=(64, 128, 256, 512), imagenet=True, **options)


def imagenet_plain(depth: int, *, method: Method, **options: Any) -> Network:
    """ResNet-18/34 without their shortcuts."""
    _check_depth("imagenet_plain", depth, PLAIN_DEPTHS)
    return imagenet_resnet(depth, method=method, shortcut="none", **options)


def imagenet_vgg(depth: int, *, method: Method, **options: Any) -> Network:
    """VGG-11/13/16/19."""
    _check_depth("imagenet_vgg", depth, VGG_COUNTS)
    design = _design(method, {"dropout": 0.5, "shortcut": "none"} | options)
    sizes = {key: options[key] for key in ("num_classes", "in_channels") if key in options}
    return VGG(design, counts=VGG_COUNTS[depth], **sizes)


def _check_depth(family: str, depth: int, known: Collection[int]) -> None:
    if depth not in known:
        depths = ", ".join(map(str, known))
        raise UserError(f"there is no {family}{depth}; the depths are {depths}")


def highway(depth: int, *, method: Method, **options: Any) -> Network:
    """Fully connected highway network, 50 wide."""
    return _gated(HighwayMLP, depth, method, options)


def highway_conv(depth: int, *, method: Method, **options: Any) -> Network:
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
