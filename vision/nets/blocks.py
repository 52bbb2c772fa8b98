"""The residual block and its shortcuts. Tensors are [B, C, H, W].

One block serves every network: basic and bottleneck, with and without normalisation, post- and
pre-activation. What differs comes in as a ``Method`` and a ``Design``.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from fixup_core import ResidualBranch, WeightLayer
from fixup_core.errors import UserError
from fixup_core.fuse import ops
from fixup_core.fuse.fold import Floor, floor_of, folded_convolution
from fixup_core.fuse.ops import Around
from vision.nets.folded import FoldedBlock
from vision.nets.methods import Method, make_activation

ORDERS = ("post", "pre")
SHORTCUTS = ("A", "B", "C", "none")


@dataclass(frozen=True)
class Design:
    """What all blocks of a network share.

    Attributes:
        method: Norms, scalars, initialisation.
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
        return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=self.method.vectors)


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
        self.norm = design.method.after_projection(outputs) if post else nn.Identity()

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


class Block(nn.Module):
    """One residual branch and its shortcut.

    ``shifts`` stand before the convolutions, ``norms`` before the activations: with Fixup both
    are scalar biases, with normalisation the shifts are nothing. In post order the last norm
    stands before the activation that follows the addition.

    Args:
        design: What the network's blocks share.
        inputs: Channels of the input.
        width: Channels of the 3x3 convolutions.
        stride: Of the first 3x3 convolution, and of the shortcut.
    """

    def __init__(self, design: Design, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        method, shapes = design.method, design.shapes(inputs, width, stride)
        self.post, self.plain = design.order == "post", design.shortcut == "none"
        self.changes_shape = stride != 1 or inputs != shapes[-1][1]
        self.skips_branch = False
        self.normalised = method.norm is not None
        self.convs = nn.ModuleList(design.convolution(*shape) for shape in shapes)
        self.shifts = nn.ModuleList(method.before_weights() for _ in shapes)
        channels = [shape[1 if self.post else 0] for shape in shapes]
        self.norms = nn.ModuleList(method.before_activation(c) for c in channels)
        self.multiplier = method.end_of_branch()
        self.shortcut = make_shortcut(design, inputs, shapes[-1][1], stride)
        self.activation = make_activation(design.activation)
        self.dropout = nn.Dropout(design.dropout)

    def residual_branches(self) -> Iterator[ResidualBranch]:
        """M = 2, or 3 in a bottleneck; a plain block has none."""
        if not self.plain:
            yield ResidualBranch("branch", tuple(WeightLayer(conv) for conv in self.convs))

    def last_norms(self) -> Iterator[nn.Module]:
        """The normalisation behind the branch's last convolution, which only post order has."""
        if self.post and not self.plain and self.normalised:
            yield self.norms[-1]

    def forward(self, x: Tensor) -> Tensor:
        if self.skips_branch and self.plain:
            return x
        if self.skips_branch:
            out = self.skip(x, self._into(0, x))
            return self.activation(out) if self.post else out
        shifted, out = self.branch(x)
        out = out if self.plain else out + self.skip(x, shifted)
        return self.activation(out) if self.post else out

    def carriable(self) -> bool:
        """Whether the block is still what it was built as, and made of what can be carried."""
        scalars = (*self.norms, *self.shifts, self.multiplier)
        own = type(self) is Block and not self.plain
        return own and ops.carriable(self.convs, scalars, [self.activation])

    def entry(self) -> ops.Number:
        """What the carried route has added to the block's input already: a constant."""
        scalars = self.shifts[:1] if self.post else (self.norms[0], self.shifts[0])
        return ops.constant(*map(ops.value_of, scalars))

    def carried(self, h: Tensor, entry: ops.Number, following: ops.Number) -> Tensor:
        """The forward pass with the scalars carried along (``fixup_core.fuse.ops``).

        Args:
            h: The input plus ``entry``, this block's own.
            entry: What ``h`` carries.
            following: The next block's entry.

        Returns:
            The output plus ``following``.
        """
        shift = ops.value_of(self.shifts[0])
        if self.post:
            first = out = ops.entered(h, shift)
        else:
            first = out = ops.activation(h, ops.value_of(self.norms[0]), shift)
        *inner, last = self._around(entry, following)
        convs: list[Any] = list(self.convs)
        for conv, around in zip(convs[:-1], inner, strict=True):
            out = ops.convolution(conv, out, around)
        return ops.convolution(
            convs[-1],
            self.dropout(out),
            last,
            scale=ops.value_of(self.multiplier, 1.0),
            shortcut=h if self.shortcut is None else self.shortcut(first),
        )

    def _around(self, entry: ops.Number, following: ops.Number) -> list[Around]:
        """The scalars behind each convolution."""
        before = [ops.value_of(norm) for norm in self.norms]
        after = [ops.value_of(shift) for shift in self.shifts]
        before = before if self.post else [*before[1:], 0.0]
        carried = entry if self.shortcut is None else 0.0
        inner = map(Around, before[:-1], after[1:])
        return [*inner, Around(before[-1], following, carried, relu=self.post)]

    def folded(self, entry: ops.Number, following: ops.Number) -> nn.Module:
        """``carried`` for good: a block without scalars."""
        around = self._around(entry, following)
        enter: nn.Module = nn.Identity()
        if not self.post:
            enter = Floor(float(ops.value_of(self.shifts[0])))
        scales = [*[1.0] * (len(around) - 1), ops.value_of(self.multiplier, 1.0)]
        convs: list[Any] = list(self.convs)
        return FoldedBlock(
            enter,
            [folded_convolution(*each) for each in zip(convs, around, scales, strict=True)],
            [floor_of(each) for each in around],
            copy.deepcopy(self.shortcut),
        )

    def left_out_is_defined(self) -> bool:
        """Whether something of the right shape goes round the branch."""
        return not self.plain or not self.changes_shape

    @contextlib.contextmanager
    def left_out(self) -> Iterator[None]:
        """Within this context the block passes its shortcut, or its input, on."""
        self.skips_branch = True
        try:
            yield
        finally:
            self.skips_branch = False

    def branch(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The input of the first convolution, and what the branch adds to the shortcut."""
        shifted = out = self._into(0, x)
        for i in range(len(self.convs) - 1):
            out = self.convs[i](out)
            out = self._into(i + 1, self.norms[i](out) if self.post else out)
        out = self.multiplier(self.convs[-1](self.dropout(out)))
        return shifted, self.norms[-1](out) if self.post else out

    def _into(self, i: int, out: Tensor) -> Tensor:
        """What convolution ``i`` sees; in post order the first one's input is activated already."""
        if not self.post:
            out = self.norms[i](out)
        if i > 0 or not self.post:
            out = self.activation(out)
        return self.shifts[i](out)

    def skip(self, x: Tensor, shifted: Tensor) -> Tensor:
        """The shortcut. Where the shape changes it takes the biased input, as in the authors' code,
        or, in pre order, the activated one, as in He et al. 2016.
        """
        return x if self.shortcut is None else self.shortcut(shifted)
