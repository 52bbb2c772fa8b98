"""The residual blocks. Tensors are [B, C, H, W].

Basic or bottleneck, with whatever norms or scalars a ``Method`` brings. ``PostBlock`` has its
activation behind the addition, ``PreBlock`` before each convolution; each also without a shortcut,
for plain networks. What a block shares with its network comes in as a ``Design``.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from fixup_core import Method, ResidualBranch, WeightLayer
from fixup_core.fuse import ops
from fixup_core.fuse.fold import Floor, floor_of, folded_convolution
from fixup_core.fuse.ops import ActivationScalars
from fixup_core.rules.standards import NORMS
from vision.nets.design import ORDERS, Design, make_shortcut
from vision.nets.folded import FoldedBlock
from vision.nets.network import (
    Scaled,
    before_activation,
    rename_keys_,
)


class Block(nn.Module):
    """One residual branch and its shortcut: what both orders share.

    Args:
        design: What the network's blocks share.
        inputs: Channels of the input.
        width: Channels of the 3x3 convolutions.
        stride: Of the first 3x3 convolution, and of the shortcut.
        expected: Standard deviation of the input as the method knows it, which the branch's input
            is divided by.

    Attributes:
        convs: The branch's convolutions.
        before_convs: What stands before each: a scalar bias, a fixed number or nothing.
        before_acts: What stands before the activations within the branch: norms, scalar biases or
            nothing.
        residual: Where the branch joins the shortcut.
    """

    convs: Any
    before_convs: Any
    before_acts: Any

    def __init__(
        self, design: Design, inputs: int, width: int, stride: int, expected: float = 1.0
    ) -> None:
        super().__init__()
        method, shapes = design.method, design.shapes(inputs, width, stride)
        self.changes_shape = stride != 1 or inputs != shapes[-1][1]
        self.skips_branch = False
        self.convs = nn.ModuleList(design.convolution(*shape) for shape in shapes)
        self.before_convs = nn.ModuleList(method.make_bias() for _ in shapes)
        if expected != 1.0:
            self.before_convs[0] = Scaled(1 / expected)
        inner, end = self.parts(method, shapes)
        self.before_acts = nn.ModuleList(inner)
        self.residual = method.make_residual(end=end)
        self.shortcut = make_shortcut(design, inputs, shapes[-1][1], stride)
        self.activation = design.make_activation()
        self.dropout = nn.Dropout(design.dropout)

    def parts(self, method: Method, shapes: Any) -> tuple[list[nn.Module], nn.Module]:
        """What stands before the branch's inner activations, and what ends the branch."""
        raise NotImplementedError

    def residual_branches(self) -> Iterator[ResidualBranch]:
        """M = 2, or 3 in a bottleneck."""
        layers = tuple(WeightLayer(conv, role="conv") for conv in self.convs)
        yield ResidualBranch("branch", layers, parts=(self.residual,))

    def last_norms(self) -> Iterator[nn.Module]:
        """The normalisation behind the branch's last convolution, which only post order has."""
        if isinstance(self.residual.end, NORMS):
            yield self.residual.end

    def skip(self, x: Tensor, entering: Tensor) -> Tensor:
        """The shortcut. Where the shape changes it takes what enters the first convolution: the
        biased input, as in the authors' code, or, in pre order, the activated one, as in He et al.
        2016.
        """
        return x if self.shortcut is None else self.shortcut(entering)

    def left_out_is_defined(self) -> bool:
        """Whether something of the right shape goes round the branch."""
        return True

    @contextlib.contextmanager
    def left_out(self) -> Iterator[None]:
        """Within this context the block passes its shortcut, or its input, on."""
        self.skips_branch = True
        try:
            yield
        finally:
            self.skips_branch = False

    def fusable(self) -> bool:
        """Whether the block is still what it was built as, and made of what can be fused."""
        scalars = (*self.before_acts, *self.before_convs)
        own = type(self) in FUSABLE and self.residual.fusable()
        return own and ops.fusable(self.convs, scalars, [self.activation])

    def input_bias(self) -> ops.Number:
        """What the fused route has added to the block's input already: a constant."""
        raise NotImplementedError

    def fused(self, h: Tensor, own: ops.Number, following: ops.Number) -> Tensor:
        """The forward pass on the fused route (``fixup_core.fuse.ops``).

        Args:
            h: The input plus ``own``.
            own: This block's ``input_bias``.
            following: The next block's.

        Returns:
            The output plus ``following``.
        """
        first = out = self._enter(h)
        *inner, last = self._scalars(own, following)
        for conv, scalars in zip(self.convs[:-1], inner, strict=True):
            out = ops.convolution(conv, out, scalars)
        return ops.convolution(
            self.convs[-1],
            self.dropout(out),
            last,
            scale=ops.value_of(self.residual.multiplier, 1.0),
            shortcut=h if self.shortcut is None else self.shortcut(first),
        )

    def folded(self, own: ops.Number, following: ops.Number) -> nn.Module:
        """``fused`` for good: a block without scalars."""
        scalars = self._scalars(own, following)
        scales = [*[1.0] * (len(scalars) - 1), ops.value_of(self.residual.multiplier, 1.0)]
        return FoldedBlock(
            self._folded_enter(),
            [folded_convolution(*each) for each in zip(self.convs, scalars, scales, strict=True)],
            [floor_of(each) for each in scalars],
            copy.deepcopy(self.shortcut),
        )

    def _enter(self, h: Tensor) -> Tensor:
        """What the first convolution sees on the fused route."""
        raise NotImplementedError

    def _folded_enter(self) -> nn.Module:
        """The same for good."""
        raise NotImplementedError

    def _scalars(self, own: ops.Number, following: ops.Number) -> list[ActivationScalars]:
        """The scalars behind each convolution; the last one's are those of the sum."""
        raise NotImplementedError

    def _on_shortcut(self, own: ops.Number) -> ops.Number:
        """The constant that the shortcut holds on the fused route."""
        return own if self.shortcut is None else 0.0

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        rename_keys_(state_dict, prefix, self._names_before())
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _names_before(self) -> dict[str, str]:
        """What parts were called up to version 0.1."""
        return {
            "shifts.": "before_convs.",
            "norms.": "before_acts.",
            "multiplier.": "residual.multiplier.",
        }


class PostBlock(Block):
    """Bias, convolution, norm or bias, activation, ..., addition, activation."""

    def parts(self, method: Method, shapes: Any) -> tuple[list[nn.Module], nn.Module]:
        *inner, end = (before_activation(method, shape[1]) for shape in shapes)
        return inner, end

    def forward(self, x: Tensor) -> Tensor:
        entering = self.before_convs[0](x)
        shortcut = self.skip(x, entering)
        if self.skips_branch:
            return self.activation(shortcut)
        return self.activation(self.residual(shortcut, self.branch(entering)))

    def branch(self, out: Tensor) -> Tensor:
        """From the input of the first convolution to the output of the last."""
        for i, before_act in enumerate(self.before_acts, start=1):
            out = self.activation(before_act(self.convs[i - 1](out)))
            out = self.before_convs[i](out)
        return self.convs[-1](self.dropout(out))

    def input_bias(self) -> ops.Number:
        return ops.constant(ops.value_of(self.before_convs[0]))

    def _enter(self, h: Tensor) -> Tensor:
        return ops.use_fused_bias(h, ops.value_of(self.before_convs[0]))

    def _folded_enter(self) -> nn.Module:
        return nn.Identity()

    def _scalars(self, own: ops.Number, following: ops.Number) -> list[ActivationScalars]:
        before = map(ops.value_of, self.before_acts)
        after = map(ops.value_of, self.before_convs[1:])
        end = ops.value_of(self.residual.end)
        last = ActivationScalars(end, following, self._on_shortcut(own))
        return [*map(ActivationScalars, before, after), last]

    def _names_before(self) -> dict[str, str]:
        return {f"norms.{len(self.convs) - 1}.": "residual.end.", **super()._names_before()}


class PreBlock(Block):
    """Norm or bias, activation, bias, convolution, ..., addition."""

    def parts(self, method: Method, shapes: Any) -> tuple[list[nn.Module], nn.Module]:
        return [before_activation(method, shape[0]) for shape in shapes], nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        entering = self._entering(0, x)
        shortcut = self.skip(x, entering)
        if self.skips_branch:
            return shortcut
        return self.residual(shortcut, self.branch(entering))

    def branch(self, out: Tensor) -> Tensor:
        """From the input of the first convolution to the output of the last."""
        for i in range(1, len(self.convs)):
            out = self._entering(i, self.convs[i - 1](out))
        return self.convs[-1](self.dropout(out))

    def _entering(self, i: int, out: Tensor) -> Tensor:
        """What convolution ``i`` sees."""
        return self.before_convs[i](self.activation(self.before_acts[i](out)))

    def input_bias(self) -> ops.Number:
        parts = (self.before_acts[0], self.before_convs[0])
        return ops.constant(*map(ops.value_of, parts))

    def _enter(self, h: Tensor) -> Tensor:
        before, after = ops.value_of(self.before_acts[0]), ops.value_of(self.before_convs[0])
        return ops.activation(h, before, after)

    def _folded_enter(self) -> nn.Module:
        return Floor(float(ops.value_of(self.before_convs[0])))

    def _scalars(self, own: ops.Number, following: ops.Number) -> list[ActivationScalars]:
        before = map(ops.value_of, self.before_acts[1:])
        after = map(ops.value_of, self.before_convs[1:])
        last = ActivationScalars(0.0, following, self._on_shortcut(own), relu=False)
        return [*map(ActivationScalars, before, after), last]


class _WithoutShortcut(Block):
    """A block of a plain network: the branch alone."""

    def residual_branches(self) -> Iterator[ResidualBranch]:
        return iter(())

    def last_norms(self) -> Iterator[nn.Module]:
        return iter(())

    def left_out_is_defined(self) -> bool:
        return not self.changes_shape


class PlainPostBlock(_WithoutShortcut, PostBlock):
    """Convolution, norm or bias, activation, ..."""

    def forward(self, x: Tensor) -> Tensor:
        if self.skips_branch:
            return x
        return self.activation(self.residual.only(self.branch(self.before_convs[0](x))))


class PlainPreBlock(_WithoutShortcut, PreBlock):
    """Norm or bias, activation, convolution, ..."""

    def forward(self, x: Tensor) -> Tensor:
        return x if self.skips_branch else self.residual.only(self.branch(self._entering(0, x)))


FUSABLE = (PostBlock, PreBlock)


def make_block(
    design: Design, inputs: int, width: int, stride: int, expected: float = 1.0
) -> Block:
    """The block of a design; the arguments are those of ``Block``."""
    plain = design.shortcut == "none"
    kinds = (PlainPostBlock, PlainPreBlock) if plain else (PostBlock, PreBlock)
    return kinds[ORDERS.index(design.order)](design, inputs, width, stride, expected)
