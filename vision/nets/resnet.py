"""Residual and plain networks: one skeleton of stem, stages and head. Tensors are [B, C, H, W].

Families: CIFAR ResNet-(6n+2) (He et al. 2015, section 4.2), Wide-ResNet-d-k (Zagoruyko and
Komodakis 2016) and the ImageNet ResNets (He et al. 2015, table 1).

Differs: the stride of a bottleneck lies on its 3x3 convolution, as in the authors' code and in
torchvision, not on the first 1x1.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fixup_core import WeightLayer
from fixup_core.errors import UserError
from fixup_core.fuse import ops
from fixup_core.fuse.fold import floor_of, folded_convolution
from fixup_core.fuse.ops import ActivationScalars
from fixup_core.rules.standards import TORCH_DEFAULT
from vision.nets.blocks import Block, make_block
from vision.nets.design import Design, check_design
from vision.nets.folded import FoldedHead
from vision.nets.network import Network, before_activation, rename_keys_


class Stem(nn.Module):
    """The first convolution; ``imagenet`` has a 7x7 of stride 2 and a pooling.

    In pre order the first block brings the norm and the activation.
    """

    def __init__(self, design: Design, inputs: int, outputs: int, imagenet: bool) -> None:
        super().__init__()
        kernel, stride = (7, 2) if imagenet else (3, 1)
        self.conv = design.convolution(inputs, outputs, kernel, stride)
        self.post = post = design.order == "post"
        before = before_activation(design.method, outputs) if post else nn.Identity()
        self.before_activation = before
        self.activation = design.make_activation() if post else nn.Identity()
        self.pool = nn.MaxPool2d(3, 2, 1) if imagenet else nn.Identity()

    def standard_layers(self) -> Iterator[WeightLayer]:
        """Fixup leaves the stem as PyTorch draws it, as the authors' code does."""
        yield WeightLayer(self.conv, standard=TORCH_DEFAULT)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.activation(self.before_activation(self.conv(x))))

    def fused(self, x: Tensor, following: ops.Number) -> Tensor:
        """The output plus ``following``, the first block's ``input_bias``."""
        return self.pool(ops.convolution(self.conv, x, self._scalars(following)))

    def fusable(self) -> bool:
        """Whether it is made of what can be fused."""
        return ops.fusable([self.conv], [self.before_activation], [self.activation])

    def folded(self, following: ops.Number) -> nn.Module:
        """``fused`` for good."""
        scalars, pool = self._scalars(following), copy.deepcopy(self.pool)
        return nn.Sequential(folded_convolution(self.conv, scalars), floor_of(scalars), pool)

    def _scalars(self, following: ops.Number) -> ActivationScalars:
        before = ops.value_of(self.before_activation)
        return ActivationScalars(before, following, relu=self.post)

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        rename_keys_(state_dict, prefix, {"norm.": "before_activation."})
        super()._load_from_state_dict(state_dict, prefix, *args)


class Head(nn.Module):
    """Average over the image, then the classifier."""

    def __init__(self, design: Design, inputs: int, num_classes: int) -> None:
        super().__init__()
        self.pre = pre = design.order == "pre"
        before = before_activation(design.method, inputs) if pre else nn.Identity()
        self.before_activation = before
        self.activation = design.make_activation() if pre else nn.Identity()
        self.before_fc = design.method.make_bias()
        self.fc = nn.Linear(inputs, num_classes)

    def classifier_layers(self) -> Iterator[nn.Module]:
        yield self.fc

    def forward(self, x: Tensor) -> Tensor:
        x = self.activation(self.before_activation(x))
        return self.fc(self.before_fc(x.mean(dim=(2, 3))))

    def fusable(self) -> bool:
        """Whether it is made of what can be fused."""
        return ops.fusable([], [self.before_activation, self.before_fc], [self.activation])

    def input_bias(self) -> ops.Number:
        """What the fused route has added to the head's input already."""
        return ops.constant(ops.value_of(self.before_activation), ops.value_of(self.before_fc))

    def fused(self, h: Tensor) -> Tensor:
        """The logits of an input to which ``input_bias`` was added."""
        before, after = ops.value_of(self.before_activation), ops.value_of(self.before_fc)
        if self.pre:
            return self.fc(ops.activation(h, before, after).mean(dim=(2, 3)))
        return self.fc(ops.use_fused_bias(h.mean(dim=(2, 3)), after))

    def folded(self) -> nn.Module:
        """``fused`` for good."""
        scalars = ActivationScalars(after=ops.value_of(self.before_fc), relu=self.pre)
        return FoldedHead(floor_of(scalars), copy.deepcopy(self.fc))

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        names = {"norm.": "before_activation.", "shift.": "before_fc."}
        rename_keys_(state_dict, prefix, names)
        super()._load_from_state_dict(state_dict, prefix, *args)


class ResNet(Network):
    """A stack of stages, each halving the image but the first.

    Args:
        design: What all blocks share.
        counts: Blocks of each stage.
        widths: Channels of each stage's 3x3 convolutions.
        num_classes: Of the classifier.
        in_channels: Of the images.
        stem_width: Channels of the stem.
        imagenet: A stem for large images.
        checkpointing: Keep the activations of about the square root of the blocks and compute the
            others again in the backward pass.
    """

    def __init__(
        self,
        design: Design,
        *,
        counts: Sequence[int],
        widths: Sequence[int],
        num_classes: int,
        in_channels: int = 3,
        stem_width: int | None = None,
        imagenet: bool = False,
        checkpointing: bool = False,
    ) -> None:
        super().__init__()
        check_design(design)
        self.design, self.checkpointing = design, checkpointing
        channels = stem_width or widths[0]
        self.stem = Stem(design, in_channels, channels, imagenet)
        self.stages = nn.ModuleList()
        variance, growth = 1.0, (design.method.branch_scale or 0.0) ** 2
        for number, (count, width) in enumerate(zip(counts, widths, strict=True)):
            blocks = nn.Sequential()
            for i in range(count):
                stride = 2 if i == 0 and number > 0 else 1
                block = make_block(design, channels, width, stride, math.sqrt(variance))
                blocks.append(block)
                channels = width * design.expansion
                # A projection sees an input of variance 1, and keeps it.
                variance = (variance if block.shortcut is None else 1.0) + growth
            self.stages.append(blocks)
        self.head = Head(design, channels, num_classes)

    def blocks(self) -> list[Block]:
        """All blocks, in the order of the forward pass."""
        stages: Iterable[Any] = self.stages
        return [block for stage in stages for block in stage]

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, classes]; on the fused route where it may be taken."""
        blocks = self.blocks()
        if not self.fuses(blocks):
            return self.head(self._through(blocks, self.stem(x)))
        biases = self._input_biases(blocks)
        steps = [
            partial(block.fused, own=own, following=following)
            for block, (own, following) in zip(blocks, pairwise(biases), strict=True)
        ]
        return self.head.fused(self._through(steps, self.stem.fused(x, biases[0])))

    def _input_biases(self, blocks: Sequence[Block]) -> list[ops.Number]:
        """What each block, and the head, finds added to its input."""
        return [*(block.input_bias() for block in blocks), self.head.input_bias()]

    def folded(self) -> nn.Module:
        """The plain network of ``fixup_core.fuse.fold``.

        Raises:
            UserError: A method without scalars or with standardised weights, or another activation
                than ReLU.
        """
        if not self.fusable():
            raise UserError(
                "only networks with Fixup's scalars, plain weights and ReLU can be folded"
            )
        blocks = self.blocks()
        biases = self._input_biases(blocks)
        folded = [b.folded(*pair) for b, pair in zip(blocks, pairwise(biases), strict=True)]
        return nn.Sequential(self.stem.folded(biases[0]), *folded, self.head.folded())

    def fuses(self, blocks: Sequence[Block]) -> bool:
        """Whether the fused route is taken now."""
        whole = not any(block.skips_branch for block in blocks)
        return self.fusable() and whole and ops.may_fuse(self)

    def fusable(self) -> bool:
        """Whether there are scalars that can be fused, and folded: with ReLU, and nothing put in
        the place of what ``build_net`` made.
        """
        if not self.design.method.scalars:
            return False
        ends: tuple[Stem | Head, ...] = (self.stem, self.head)
        own = all(type(end) in (Stem, Head) and end.fusable() for end in ends)
        return own and all(block.fusable() for block in self.blocks())

    def _through(self, steps: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> Tensor:
        """The steps one by one, or, with checkpointing, a square root of them at a time."""
        if not (self.checkpointing and torch.is_grad_enabled()):
            return _one_by_one(steps, x)
        size = math.isqrt(len(steps))
        for start in range(0, len(steps), size):
            segment = steps[start : start + size]
            contexts = partial(_once_and_again, segment)
            x = checkpoint(_one_by_one, segment, x, use_reentrant=False, context_fn=contexts)
        return x


def _one_by_one(steps: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> Tensor:
    for step in steps:
        x = step(x)
    return x


def _once_and_again(segment: Sequence[Any]) -> tuple[Any, Any]:
    """Contexts of a segment's forward pass and of its repetition, which leaves the running
    statistics of batch normalisation alone: they have seen the batch.
    """
    return contextlib.nullcontext(), _without_tracking(segment)


@contextlib.contextmanager
def _without_tracking(segment: Sequence[Any]) -> Iterator[None]:
    parts = [m for step in segment if isinstance(step, nn.Module) for m in step.modules()]
    norms = [m for m in parts if isinstance(m, nn.BatchNorm2d) and m.training]
    before = [(norm.momentum, _counter(norm).clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum = momentum
            _counter(norm).copy_(count)


def _counter(norm: nn.BatchNorm2d) -> Tensor:
    return norm.get_buffer("num_batches_tracked")
