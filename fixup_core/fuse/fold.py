"""Networks without scalars, for inference: everything folded into weights and biases.

A network that ``fixup_`` has converted is folded by what is attached to it (``fuse.converted``).
One that has scalars of its own builds the plain network itself: the fused route
(``fixup_core.fuse.ops``) with its constants written down for good, where a convolution takes the
multiplier into its weight and all biases around it into its bias, and an activation becomes a
floor. Zero padding stays right at the border of an image: the convolution sees what it saw.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fixup_core.errors import UserError
from fixup_core.fuse import ops
from fixup_core.fuse.constants import Affine, Unnormalised
from fixup_core.fuse.converted import fold_converted, is_converted
from fixup_core.fuse.ops import ActivationScalars
from fixup_core.removal.leaving import FixedAffine, LeavingNorm


class Floor(nn.Module):
    """``max(x, floor)``; at 0 a ReLU.

    Args:
        floor: A plain number, kept in the state dict.
    """

    def __init__(self, floor: float) -> None:
        super().__init__()
        self.floor = floor

    def forward(self, x: Tensor) -> Tensor:
        return x.clamp(min=self.floor)

    def get_extra_state(self) -> Tensor:
        """The floor, for a state dict."""
        return torch.tensor(self.floor, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Take the floor of a state dict."""
        self.floor = state.item()

    def extra_repr(self) -> str:
        return f"{self.floor:g}"


def fold(net: nn.Module) -> nn.Module:
    """A plain network with the outputs of ``net`` in evaluation, up to rounding.

    Args:
        net: One that ``fixup_`` has converted, whose norms ``NormRemoval`` has taken out, or that
            has a ``folded()`` method: those of ``vision.nets``, and any that builds one of
            ``folded_convolution`` and ``Floor``. It is left as it is.

    Returns:
        A network of its own weights, in evaluation mode; none of them wants a gradient. What no
        weight of a converted network can hold stays as constants, which ``print`` shows:
        ``Affine``, ``WithConstants`` and a convolution's ``fill`` (``fuse.constants``), and
        ``FixedAffine`` where a norm was.

    Raises:
        UserError: The network is none of these, or has something in it that cannot be folded.
    """
    make: Any = getattr(net, "folded", None)
    if any(isinstance(module, LeavingNorm) for module in net.modules()):
        raise UserError("the network's norms are still on their way out: removal.finish() first")
    if is_converted(net) or _is_without_norms(net):
        make = partial(fold_converted, net)
    if make is None:
        raise UserError(
            f"{type(net).__name__} cannot be folded: give it a folded() method that builds the "
            "plain network (fixup_core/fuse/fold.py), or convert it by fixup_"
        )
    with torch.no_grad():
        plain: nn.Module = make()
    return plain.eval().requires_grad_(False)


def _is_without_norms(net: nn.Module) -> bool:
    """Whether ``NormRemoval`` has finished on it."""
    return any(isinstance(module, (FixedAffine, Affine, Unnormalised)) for module in net.modules())


def floor_of(scalars: ActivationScalars) -> nn.Module:
    """The activation among the scalars; nothing where there is none."""
    return Floor(float(scalars.after)) if scalars.relu else nn.Identity()


def folded_convolution(
    conv: nn.Conv2d, scalars: ActivationScalars, scale: ops.Number = 1.0
) -> nn.Conv2d:
    """A convolution with the multiplier behind it and the biases around it.

    Args:
        conv: With zero padding.
        scalars: Those that follow; its floor is not part of the convolution.
        scale: The multiplier.
    """
    plain = copy.deepcopy(conv)
    zero = conv.weight.new_zeros(conv.out_channels)
    bias = zero if conv.bias is None else conv.bias * scale
    added = ops.constant(scalars.before, scalars.after, -scalars.on_shortcut)
    plain.weight = nn.Parameter(conv.weight * scale)
    plain.bias = nn.Parameter(bias + added)
    return plain
