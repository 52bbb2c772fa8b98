"""Where a branch joins its shortcut: the one slot that every block here adds through.

``norm?(scale?(shortcut) + end?(multiplier?(branch)))``, each part optional. What a method
puts into the slot is the method's affair (``rules.methods``); a block knows the slot alone.
"""

from __future__ import annotations

from torch import Tensor, nn

from fixup_core.rules.placed import DepthMultiplier, PlacedConstant
from fixup_core.rules.scalars import ScalarBias, ScalarMultiplier

FUSABLE = (ScalarBias, ScalarMultiplier, DepthMultiplier, PlacedConstant, nn.Identity)


class Residual(nn.Module):
    """The sum of a shortcut and a branch.

    Args:
        multiplier: On the branch; ``None``: none, or it has gone into the branch's last layer.
        end: What ends the branch, behind the multiplier: a scalar bias, or a norm.
        shortcut: On the shortcut: a constant, or a vector.
        norm: On the sum.
    """

    def __init__(
        self,
        *,
        multiplier: nn.Module | None = None,
        end: nn.Module | None = None,
        shortcut: nn.Module | None = None,
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.end = end or nn.Identity()
        self.multiplier = multiplier or nn.Identity()
        self.norm = norm or nn.Identity()
        self.shortcut = shortcut or nn.Identity()

    def forward(self, shortcut: Tensor, branch: Tensor) -> Tensor:
        """The sum; both tensors and the result have one shape."""
        return self.norm(self.shortcut(shortcut) + self.only(branch))

    def only(self, branch: Tensor) -> Tensor:
        """The branch's part of the sum: for networks without shortcuts, and for measurements."""
        return self.end(self.multiplier(branch))

    def fusable(self) -> bool:
        """Whether the slot holds scalars alone, which can ride in the last layer's weights."""
        plain = all(type(part) is nn.Identity for part in (self.shortcut, self.norm))
        return plain and all(type(part) in FUSABLE for part in (self.multiplier, self.end))
