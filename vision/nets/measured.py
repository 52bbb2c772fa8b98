"""A network's size, counted by running it: layers, parameters and multiply-adds of each stage.

One image goes through the network on the meta device, where shapes are computed and no numbers.
Counted are convolutions and linear layers: an output of a convolution takes one multiply-add for
each weight of its filter, one of a linear layer as many as there are inputs. Products of matrices
elsewhere, as in attention, are found by PyTorch's own counter. Bias vectors, norms, scalars,
activations, poolings, and the additions of shortcuts are not counted, as in He et al. 2015.

A stage is what has one size of output, as in table 1 there. A residual branch belongs to the stage
that it leads to.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.flop_counter import FlopCounterMode

from fixup_core import ResidualBranch, collect_branches
from fixup_core.errors import UserError, one_line

Size = tuple[int, ...]
COUNTED = (_ConvNd, nn.Linear)


@dataclass(frozen=True)
class Layer:
    """One call of a convolution or linear layer.

    Attributes:
        text: Kernel and channels, "3x3 64"; "fc 1000" of a linear layer.
        size: Of its output, without channels; (1, 1) where there is no place.
        multiply_adds: Of one image.
        parameters: That no earlier call has used.
        branch: Number of its residual branch; ``None`` outside all branches.
        projection: Whether it is on the shortcut of a residual block.
    """

    text: str
    size: Size
    multiply_adds: int
    parameters: int
    branch: int | None = None
    projection: bool = False


@dataclass(frozen=True)
class Stage:
    """The layers whose branch or own output has one size, in the order of the calls."""

    size: Size
    layers: tuple[Layer, ...]

    @property
    def parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers)

    @property
    def multiply_adds(self) -> int:
        return sum(layer.multiply_adds for layer in self.layers)

    @property
    def text(self) -> str:
        """Its layers as in He et al.: "3 x [3x3 64, 3x3 64]", without projections."""
        inside = [layer for layer in self.layers if not layer.projection]
        units = []
        for number, run in groupby(inside, key=lambda layer: layer.branch):
            texts = [layer.text for layer in run]
            units += texts if number is None else [f"[{', '.join(texts)}]"]
        counted = ((unit, len(list(run))) for unit, run in groupby(units))
        return ", ".join(unit if count == 1 else f"{count} x {unit}" for unit, count in counted)


@dataclass(frozen=True)
class Description:
    """A network, counted.

    Attributes:
        stages: From the largest output to the smallest.
        parameters: Of the whole network, norms and scalars included.
        other_multiply_adds: Of products that are not those of a convolution or linear layer.
        branches: The m of each residual branch; their number is L.
        declared: False where no module says what its branches are: then L is not known.
    """

    stages: tuple[Stage, ...]
    parameters: int
    other_multiply_adds: int
    branches: tuple[int, ...]
    declared: bool

    @property
    def layers(self) -> int:
        """Weighted layers without projections: the number in a ResNet's name."""
        return sum(not layer.projection for stage in self.stages for layer in stage.layers)

    @property
    def projections(self) -> int:
        return sum(layer.projection for stage in self.stages for layer in stage.layers)

    @property
    def multiply_adds(self) -> int:
        layers = sum(stage.multiply_adds for stage in self.stages)
        return layers + self.other_multiply_adds

    @property
    def other_parameters(self) -> int:
        """Those of norms and scalars: of everything but convolutions and linear layers."""
        return self.parameters - sum(stage.parameters for stage in self.stages)


def measure(net: nn.Module, channels: int, size: int, *, plain: bool = False) -> Description:
    """Run one image through ``net`` and count.

    Args:
        net: On the meta device; it is left in evaluation mode.
        channels: Of the image.
        size: Of the image, height and width.
        plain: Whether the network is known to have no residual branches, so that none need be
            declared.

    Raises:
        UserError: The network cannot be run on such an image.
    """
    branches = collect_branches(net)
    image = torch.empty(1, channels, size, size, device="meta")
    calls, products = _calls(net.eval(), image)
    places = _places(net, branches)
    ends = {places[module][0]: output for module, output in calls if module in places}
    stages: dict[Size, list[Layer]] = {}
    seen: set[int] = set()
    for module, output in calls:
        branch, projection = places.get(module, (None, False))
        layer = _layer(module, output, seen, branch, projection)
        end = layer.size if branch is None else _size(module, ends[branch])
        stages.setdefault(end, []).append(layer)
    layers = sum(layer.multiply_adds for own in stages.values() for layer in own)
    ordered = sorted(stages, key=math.prod, reverse=True)
    return Description(
        tuple(Stage(one, tuple(stages[one])) for one in ordered),
        sum(parameter.numel() for parameter in net.parameters()),
        max(products - layers, 0),
        tuple(branch.layers_per_branch for branch in branches),
        declared=bool(branches) or plain,
    )


def _calls(net: nn.Module, image: Tensor) -> tuple[list[tuple[nn.Module, Tensor]], int]:
    """The convolutions and linear layers in the order of their calls, each with its output, and
    the multiply-adds of all products of matrices.
    """
    calls: list[tuple[nn.Module, Tensor]] = []

    def record(module: nn.Module, _: Any, output: Tensor) -> None:
        calls.append((module, output))

    counted = [module for module in net.modules() if isinstance(module, COUNTED)]
    hooks = [module.register_forward_hook(record) for module in counted]
    try:
        # PyTorch's counter counts a multiply-add as two.
        with torch.no_grad(), torch.device("meta"), FlopCounterMode(display=False) as operations:
            net(image)
    except (RuntimeError, ValueError, TypeError) as error:
        shape, cause = "x".join(map(str, image.shape[1:])), one_line(str(error))
        raise UserError(f"it cannot be run on an image of {shape}: {cause}") from error
    finally:
        for hook in hooks:
            hook.remove()
    return calls, operations.get_total_flops() // 2


def _places(
    net: nn.Module, branches: Iterable[ResidualBranch]
) -> dict[nn.Module, tuple[int | None, bool]]:
    """Of each layer of a residual block: the number of its branch, and if it is a projection."""
    blocks = [module for module in net.modules() if module is not net and _has_branches(module)]
    inside = (part for block in blocks for part in block.modules() if isinstance(part, COUNTED))
    found: dict[nn.Module, tuple[int | None, bool]] = dict.fromkeys(inside, (None, True))
    for number, branch in enumerate(branches):
        found |= {layer.module: (number, False) for layer in branch.layers}
    return found


def _has_branches(module: Any) -> bool:
    declares = hasattr(type(module), "residual_branches")
    return declares and any(True for _ in module.residual_branches())


def _layer(
    module: Any, output: Tensor, seen: set[int], branch: int | None, projection: bool
) -> Layer:
    size = _size(module, output)
    own = {id(parameter): parameter.numel() for parameter in module.parameters()}
    parameters = sum(count for key, count in own.items() if key not in seen)
    seen.update(own)
    if isinstance(module, nn.Linear):
        text, each = f"fc {module.out_features}", module.in_features
    else:
        kernel = torch.Size(module.kernel_size)
        groups = f" in {module.groups} groups" if module.groups > 1 else ""
        text = f"{'x'.join(map(str, kernel))} {module.out_channels}{groups}"
        each = kernel.numel() * module.in_channels // module.groups
    return Layer(text, size, output.numel() * each, parameters, branch, projection)


def _size(module: nn.Module, output: Tensor) -> Size:
    places = output.shape[1:-1] if isinstance(module, nn.Linear) else output.shape[2:]
    return tuple(places) or (1, 1)
