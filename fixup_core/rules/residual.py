"""Where a branch joins its shortcut: the one slot that every block here adds through.

``norm?(shortcut_scale * shortcut + end?(multiplier?(branch)))``, each part optional. What a method
puts into the slot is the method's affair (``rules.methods``); a block knows the slot alone.
"""

from __future__ import annotations

from torch import Tensor, nn

from fixup_core.rules.scalars import ScalarBias, ScalarMultiplier

FUSABLE = (ScalarBias, ScalarMultiplier, nn.Identity)


class Residual(nn.Module):
    """The sum of a shortcut and a branch.

    Args:
        multiplier: On the branch; ``None``: none, or it has gone into the branch's last layer.
        end: What ends the branch, behind the multiplier: a scalar bias, or a norm.
        shortcut_scale: A constant on the shortcut.
        norm: On the sum.
    """

    def __init__(
        self,
        *,
        multiplier: nn.Module | None = None,
        end: nn.Module | None = None,
        shortcut_scale: float = 1.0,
        norm: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.end = end or nn.Identity()
        self.multiplier = multiplier or nn.Identity()
        self.norm = norm or nn.Identity()
        self.shortcut_scale = shortcut_scale

    def forward(self, shortcut: Tensor, branch: Tensor) -> Tensor:
        """The sum; both tensors and the result have one shape."""
        branch = self.only(branch)
        if self.shortcut_scale != 1.0:
            shortcut = shortcut * self.shortcut_scale
        return self.norm(shortcut + branch)

    def only(self, branch: Tensor) -> Tensor:
        """The branch's part of the sum: for networks without shortcuts, and for measurements."""
        return self.end(self.multiplier(branch))

    def fusable(self) -> bool:
        """Whether the slot holds scalars alone, which can ride in the last layer's weights."""
        plain = self.shortcut_scale == 1.0 and type(self.norm) is nn.Identity
        return plain and all(type(part) in FUSABLE for part in (self.multiplier, self.end))

    def extra_repr(self) -> str:
        return "" if self.shortcut_scale == 1.0 else f"shortcut_scale={self.shortcut_scale:g}"
