"""What all blocks of a network share, and their shortcuts. Tensors are [B, C, H, W]."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fixup_core import Method
from fixup_core.errors import UserError
from fixup_core.rules.methods import RESNETS, check_defined
from fixup_core.rules.standardised import standardise_
from vision.nets.network import NORMS, after_projection, choose, make_activation

ORDERS = ("post", "pre")
SHORTCUTS = ("A", "B", "C", "none")


@dataclass(frozen=True)
class Design:
    """What all blocks of a network share.

    Attributes:
        method: Norms, scalars, initialisation: a record of the registry.
        shortcut: He et al. 2015, section 4.1: "A" identity, strided, with zero channels; "B"
            projection where the shape changes; "C" projection everywhere; "none" a plain network.
        order: "post": the activation follows the addition (He et al. 2015). "pre": norm and
            activation come before each convolution (He et al. 2016).
        activation: "relu", "tanh" or "sigmoid".
        bottleneck: 1x1, 3x3, 1x1 convolutions, the last four times as wide, not two 3x3.
        dropout: Probability, before the last convolution of a branch (Zagoruyko 2016).
    """

    method: Method
    shortcut: str = "A"
    order: str = "post"
    activation: str = "relu"
    bottleneck: bool = False
    dropout: float = 0.0

    @property
    def expansion(self) -> int:
        return 4 if self.bottleneck else 1

    def shapes(self, inputs: int, width: int, stride: int) -> list[tuple[int, int, int, int]]:
        """Inputs, outputs, kernel and stride of each convolution of a branch."""
        if not self.bottleneck:
            return [(inputs, width, 3, stride), (width, width, 3, 1)]
        return [(inputs, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1)]

    def convolution(self, inputs: int, outputs: int, kernel: int, stride: int) -> nn.Conv2d:
        bias = self.method.bias_vectors
        conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=bias)
        if self.method.standardised:
            standardise_(conv)
        return conv

    def make_activation(self) -> nn.Module:
        return make_activation(self.activation, unit=self.method.unit_activations)


def make_design(method: Method, given: Mapping[str, Any], **defaults: Any) -> Design:
    """The options that are given, what the method needs, the network's own defaults."""
    needed = {"order": "pre", "shortcut": "B"} if method.preactivation else {}
    return Design(method, **(defaults | needed | dict(given)))


def check_design(design: Design) -> None:
    """Refuse what no network can be built from.

    Raises:
        UserError: An unknown shortcut or order, a dropout that is no probability, or a method that
            is not defined for the design.
    """
    choose("shortcut", design.shortcut, SHORTCUTS)
    choose("order", design.order, ORDERS)
    if not 0 <= design.dropout < 1:
        raise UserError(f"dropout is {design.dropout}: take a number from 0 to below 1")
    plain, norms = design.shortcut == "none", (None, *NORMS)
    check_defined(
        design.method,
        "plain networks, which have no residual branches" if plain else "ResNets",
        lambda one: (
            one.norm in norms and one.only in ("", RESNETS) and not (plain and one.needs_branches)
        ),
    )
    if design.method.preactivation and (design.order != "pre" or design.shortcut not in "BC"):
        raise UserError(
            f"the method {design.method.name!r} is defined for order pre and shortcut B or C, "
            f"where projections see what is activated, not for order {design.order} and shortcut "
            f"{design.shortcut}"
        )


class Subsample(nn.Module):
    """Shortcut A: every ``stride``-th pixel, and zeros for the channels that are new."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.new_channels, self.stride = outputs - inputs, stride

    def forward(self, x: Tensor) -> Tensor:
        # Pooling by one pixel, where slicing would return the gradient in another memory layout.
        picked = F.avg_pool2d(x, 1, self.stride)
        return F.pad(picked, (0, 0, 0, 0, 0, self.new_channels))


class Projection(nn.Module):
    """Shortcuts B and C: a strided 1x1 convolution, in no branch.

    In pre order nothing follows it, as in Zagoruyko's code.
    """

    def __init__(self, design: Design, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv = design.convolution(inputs, outputs, 1, stride)
        post = design.order == "post"
        self.norm = after_projection(design.method, outputs) if post else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


def make_shortcut(design: Design, inputs: int, outputs: int, stride: int) -> nn.Module | None:
    """The shortcut of a block; ``None`` passes the block's own input on, without its bias.

    Raises:
        UserError: Shortcut A where the branch has fewer channels than its input.
    """
    changes = stride != 1 or inputs != outputs
    if design.shortcut == "C" or (design.shortcut == "B" and changes):
        return Projection(design, inputs, outputs, stride)
    if not changes or design.shortcut == "none":
        return None
    if outputs < inputs:
        raise UserError(f"shortcut A cannot go from {inputs} to {outputs} channels")
    return Subsample(inputs, outputs, stride)
