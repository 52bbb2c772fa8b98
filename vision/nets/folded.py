"""Residual networks without scalars, as ``fixup_core.fuse.fold`` makes them.

Tensors are [B, C, H, W].
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn


class FoldedBlock(nn.Module):
    """Convolutions with biases, floors in place of activations, a shortcut.

    Args:
        enter: Before the first convolution.
        convs: With their biases.
        floors: Behind each convolution but the last, and behind the addition.
        shortcut: Of what the first convolution sees; ``None`` passes the block's input on.
    """

    def __init__(
        self,
        enter: nn.Module,
        convs: Sequence[nn.Module],
        floors: Sequence[nn.Module],
        shortcut: nn.Module | None,
    ) -> None:
        super().__init__()
        self.enter, self.shortcut = enter, shortcut
        self.convs, self.floors = nn.ModuleList(convs), nn.ModuleList(floors)

    def forward(self, x: Tensor) -> Tensor:
        first = out = self.enter(x)
        for conv, floor in zip(self.convs[:-1], self.floors[:-1], strict=True):
            out = floor(conv(out))
        out = self.convs[-1](out) + (x if self.shortcut is None else self.shortcut(first))
        return self.floors[-1](out)


class FoldedHead(nn.Module):
    """Floor, average over the image, classifier."""

    def __init__(self, floor: nn.Module, fc: nn.Module) -> None:
        super().__init__()
        self.floor, self.fc = floor, fc

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.floor(x).mean(dim=(2, 3)))
