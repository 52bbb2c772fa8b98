"""What stands in the places of fairseq's layer norms: of a branch, and at the end of a stack."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from fixup_core import Method
from fixup_core.removal.leaving import LeavingNorm
from fixup_core.rules.norms import POINTWISE
from fixup_core.rules.placed import ChannelMultiplier, PlacedConstant
from fixup_core.rules.residual import Residual

NORMS: dict[str, Any] = {"layer": nn.LayerNorm, **POINTWISE}
"""By ``Method.norm``: those that a Transformer can have."""


class Joined(nn.Module):
    """A branch added to its shortcut, and the norm on the sum.

    fairseq's layers apply the slot behind ``residual_connection``, which hands both over as they
    are: so that what is on a shortcut belongs to one branch.
    """

    def __init__(self, residual: Residual) -> None:
        super().__init__()
        self.residual = residual

    def forward(self, pair: tuple[Tensor, Tensor]) -> Tensor:
        """The shortcut and the branch, both [T, B, D]."""
        return self.residual(*pair)


def make_slot(method: Method, width: int) -> nn.Module:
    """Of one branch: a norm or a scalar bias at its start, or a norm on the sum that ends it.

    Args:
        method: Of the registry.
        width: D, of the stream.
    """
    if method.norm is None:
        return method.make_bias()
    norm: nn.Module = NORMS[method.norm](width)
    if method.norm_on_sum:
        return Joined(method.make_residual(norm=norm, multiplier=False, channels=width))
    if method.norm_scale is None:
        return norm
    return nn.Sequential(norm, PlacedConstant(method.norm_scale))


def make_end(method: Method, width: int, *, multiplier: bool) -> nn.Module:
    """Of a stack: a norm where branches have theirs at the start, or a scalar bias.

    Args:
        method: Of the registry.
        width: D, of the stream.
        multiplier: Whether a scalar multiplier follows the bias, as in the encoder.
    """
    if method.norm is not None:
        return nn.Identity() if method.norm_on_sum else NORMS[method.norm](width)
    bias = method.make_bias()
    return nn.Sequential(bias, method.closing_multiplier() or nn.Identity()) if multiplier else bias


@dataclass(frozen=True)
class Parts:
    """What a slot holds, by what an export does with it.

    Attributes:
        norm: Before the branch or on the sum; ``None``: none.
        scalars: What follows the norm, or stands alone before the branch: it can be folded into
            the branch's first layers.
        shortcut: What the shortcut is multiplied by, [] or [D]; ``None``: by nothing.
        gone: What stands on the sum for a norm that was taken out: an affine map.
    """

    norm: nn.Module | None
    scalars: nn.Module
    shortcut: Tensor | None = None
    gone: LeavingNorm | None = None

    @classmethod
    def of(cls, slot: nn.Module) -> Parts:
        """Those of a slot of a branch, or of what ends a stack."""
        if isinstance(slot, Joined):
            joined: Any = slot.residual
            scaled = isinstance(joined.shortcut, PlacedConstant | ChannelMultiplier)
            factor = joined.shortcut.value() if scaled else None
            if isinstance(joined.norm, LeavingNorm):
                return cls(None, nn.Identity(), factor, joined.norm)
            return cls(joined.norm, nn.Identity(), factor)
        kinds = tuple(NORMS.values())
        if isinstance(slot, kinds):
            return cls(slot, nn.Identity())
        if isinstance(slot, nn.Sequential) and isinstance(slot[0], kinds):
            return cls(slot[0], slot[1:])
        return cls(None, slot)
