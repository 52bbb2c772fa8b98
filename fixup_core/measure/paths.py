"""The gradient of a residual network, taken apart.

Through a block ``x_(l+1) = x_l + F(x_l)`` it goes by two ways, ``dL/dx_l = dL/dx_(l+1) + J^T
dL/dx_(l+1)`` with the Jacobian J of the branch F: the "+1" of the shortcut, and the branch's part
(``residual_split``). Over all blocks that makes one path for each subset of the L branches, C(L, k)
of them through k branches (Veit et al. 2016), and the gradient is their sum (``path_lengths``).
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F

from fixup_core.errors import UserError
from fixup_core.measure.flow import Loss
from fixup_core.probing import Inputs, loss_of, modules_named, with_gradient


@dataclass(frozen=True)
class BlockGradient:
    """The gradient by a block's input, and its two parts.

    Attributes:
        path: Of the block.
        total: Norm of ``dL/dx_l``.
        shortcut: Norm of ``dL/dx_(l+1)``.
        branch: Norm of the difference.
        cosine: Between the parts, in -1..1; 0 where one of them is 0.
    """

    path: str
    total: float
    shortcut: float
    branch: float
    cosine: float


@dataclass(frozen=True)
class PathLength:
    """All paths of the gradient through a number of branches.

    Attributes:
        length: k.
        count: ``C(L, k)`` paths.
        norm: Of the sum of their gradients by the first block's input: what they contribute.
        share: Of the whole gradient, along its direction; the shares of all lengths sum to 1.
        magnitude: Mean norm of a single path's gradient, over sampled paths; NaN without samples.
    """

    length: int
    count: int
    norm: float
    share: float
    magnitude: float

    @property
    def contribution(self) -> float:
        """Count times magnitude, as Veit et al. 2016 weigh path lengths: an upper bound of the
        norm, which paths that cancel each other fall short of.
        """
        return self.count * self.magnitude


def residual_split(
    net: nn.Module,
    inputs: Inputs,
    targets: Any = None,
    *,
    blocks: Iterable[str | nn.Module],
    loss: Loss = F.cross_entropy,
) -> tuple[BlockGradient, ...]:
    """The shortcut's and the branch's part of the gradient in each block, in forward order.

    Args:
        net: Any network, in its present mode.
        inputs: What it is called with.
        targets: Second argument of ``loss``.
        blocks: Modules that return their input plus a branch, or their paths.
        loss: ``loss(outputs, targets)``, or ``loss(outputs)`` where there are no targets.

    Raises:
        UserError: A block is called twice or never, changes the shape, or does not add to its
            input (one that ends with an activation does not).
    """
    stack = _Stack(net, inputs, targets, blocks, loss)
    at = [tensor for block in stack.blocks for tensor in (block.entered, block.left)]
    gradients = torch.autograd.grad(stack.loss, at)
    pairs = zip(stack.blocks, gradients[::2], gradients[1::2], strict=True)
    return tuple(_parts(block.path, total, shortcut) for block, total, shortcut in pairs)


def path_lengths(
    net: nn.Module,
    inputs: Inputs,
    targets: Any = None,
    *,
    blocks: Iterable[str | nn.Module],
    loss: Loss = F.cross_entropy,
    samples: int = 0,
    seed: int = 0,
) -> tuple[PathLength, ...]:
    """What the paths of each length contribute to the gradient by the first block's input.

    Exact, without enumerating: with ``g_k`` the gradient over all paths that have gone through k
    branches so far, a block makes ``g_k + J^T g_(k-1)`` of it. That takes L^2 / 2 backward passes
    through one block, and as many for each sample.

    Args:
        net: A network whose blocks follow each other.
        inputs: What it is called with.
        targets: Second argument of ``loss``.
        blocks: Modules that return their input plus a branch, or their paths; L of them.
        loss: ``loss(outputs, targets)``, or ``loss(outputs)`` where there are no targets.
        samples: Random paths of each length to measure the magnitude of.
        seed: Of the random paths.

    Returns:
        One entry for each length 0..L.

    Raises:
        UserError: As ``residual_split``, gradient goes round the blocks, or is not finite.
    """
    stack = _Stack(net, inputs, targets, blocks, loss)
    lengths, whole = stack.by_length(), stack.whole()
    _check_sum(lengths, whole)
    size, rng, depth = whole.square().sum().item(), random.Random(seed), len(stack.blocks)
    found = []
    for k, gradient in enumerate(lengths):
        drawn = [set(rng.sample(range(depth), k)) for _ in range(samples)]
        norms = [stack.along(path).norm().item() for path in drawn]
        share = (gradient * whole).sum().item() / size if size else math.nan
        magnitude = sum(norms) / samples if samples else math.nan
        count = math.comb(depth, k)
        found.append(PathLength(k, count, gradient.norm().item(), share, magnitude))
    return tuple(found)


def path_gradient(
    net: nn.Module,
    inputs: Inputs,
    targets: Any = None,
    *,
    blocks: Iterable[str | nn.Module],
    through: Collection[int],
    loss: Loss = F.cross_entropy,
) -> Tensor:
    """The gradient by the first block's input along one path.

    Args:
        net: A network whose blocks follow each other.
        inputs: What it is called with.
        targets: Second argument of ``loss``.
        blocks: Modules that return their input plus a branch, or their paths.
        through: Numbers of the blocks, from 0 in forward order, whose branch the path takes; it
            takes the shortcut of the others.
        loss: ``loss(outputs, targets)``, or ``loss(outputs)`` where there are no targets.
    """
    return _Stack(net, inputs, targets, blocks, loss).along(through)


@dataclass(frozen=True)
class _Passed:
    """A block, what entered it and what left it."""

    path: str
    entered: Tensor
    left: Tensor

    def through_branch(self, gradient: Tensor) -> Tensor:
        """``J^T gradient``, J the Jacobian of the branch."""
        return _vjp(self.left, self.entered, gradient) - gradient


class _Stack:
    """One forward pass, with the blocks it went through."""

    def __init__(
        self,
        net: nn.Module,
        inputs: Inputs,
        targets: Any,
        blocks: Iterable[str | nn.Module],
        loss: Loss,
    ) -> None:
        named = modules_named(net, blocks)
        self.blocks: list[_Passed] = []
        entered: dict[nn.Module, Tensor] = {}

        # Copies: what the rest of the network does with these tensors is no part of a block.
        def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            entered[module] = args[0].clone()
            return (entered[module], *args[1:])

        def leave(module: nn.Module, _: Any, out: Tensor) -> Tensor:
            path = named[module]
            _check(path, entered[module], out, known={block.path for block in self.blocks})
            self.blocks.append(_Passed(path, entered[module], out))
            return out.clone()

        hooks = [m.register_forward_pre_hook(enter) for m in named]
        hooks += [m.register_forward_hook(leave) for m in named]
        try:
            with torch.enable_grad():
                self.loss = loss_of(net, with_gradient(inputs), targets, loss)
        finally:
            for hook in hooks:
                hook.remove()
        _check_all(named, self.blocks)

    def whole(self) -> Tensor:
        """The gradient by the first block's input."""
        return _vjp(self.loss, self.blocks[0].entered, None)

    def along(self, through: Collection[int]) -> Tensor:
        """The gradient along one path."""
        gradient = self._enters()
        for number in reversed(range(len(self.blocks))):
            block = self.blocks[number]
            gradient = block.through_branch(gradient) if number in through else gradient
            gradient = self._before(number, gradient)
        return gradient

    def by_length(self) -> list[Tensor]:
        """The sum over all paths of each length: coefficients of a polynomial that each block
        multiplies by ``1 + t J^T``.
        """
        lengths = [self._enters()]
        for number in reversed(range(len(self.blocks))):
            branch = [self.blocks[number].through_branch(g) for g in lengths]
            sums = [a + b for a, b in zip(lengths[1:], branch[:-1], strict=True)]
            lengths = [self._before(number, g) for g in (lengths[0], *sums, branch[-1])]
        return lengths

    def _enters(self) -> Tensor:
        """The gradient by the last block's output."""
        return _vjp(self.loss, self.blocks[-1].left, None)

    def _before(self, number: int, gradient: Tensor) -> Tensor:
        """Through what lies between a block and the one before it."""
        if number == 0:
            return gradient
        return _vjp(self.blocks[number].entered, self.blocks[number - 1].left, gradient)


def _vjp(output: Tensor, at: Tensor, gradient: Tensor | None) -> Tensor:
    (found,) = torch.autograd.grad(output, at, gradient, retain_graph=True, allow_unused=True)
    return torch.zeros_like(at) if found is None else found


def _parts(path: str, total: Tensor, shortcut: Tensor) -> BlockGradient:
    branch = total - shortcut
    whole, left, right = (part.norm().item() for part in (total, shortcut, branch))
    product = left * right
    cosine = (branch * shortcut).sum().item() / product if product else 0.0
    return BlockGradient(path, whole, left, right, cosine)


def _check(path: str, x: Tensor, out: Any, known: Collection[str]) -> None:
    if path in known:
        raise UserError(f"{path} is called twice: a block must be called once")
    if not isinstance(out, Tensor) or out.shape != x.shape:
        shape = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise UserError(
            f"{path} makes {shape} of {list(x.shape)}: leave out the blocks that change the shape"
        )
    if not _adds_to(out, x):
        raise UserError(
            f"{path} does not return its input plus a branch: nothing may follow the addition "
            "(ResNets of vision: --model.options.order pre)"
        )


def _check_all(named: Mapping[nn.Module, str], blocks: Collection[_Passed]) -> None:
    for path in set(named.values()) - {block.path for block in blocks}:
        raise UserError(f"{path} is not called in the forward pass")


def _adds_to(out: Tensor, x: Tensor) -> bool:
    """Whether ``out`` is a sum of which ``x`` itself is a term, by autograd's graph."""
    term, waiting = get_gradient_edge(x).node, [out.grad_fn]
    while waiting:
        node = waiting.pop()
        if node == term:
            return True
        if node is not None and node.name() == "AddBackward0" and _plain_sum(node):
            waiting += [following for following, _ in node.next_functions]
    return False


def _plain_sum(node: Any) -> bool:
    return getattr(node, "_saved_alpha", 1) == 1


def _check_sum(lengths: list[Tensor], whole: Tensor) -> None:
    """Whether the paths are all there are, up to rounding in parts that are larger than the sum."""
    if not whole.isfinite().all():
        raise UserError("the gradient is not finite: measure the network before it diverges")
    missed = (sum(lengths, torch.zeros_like(whole)) - whole).norm()
    if missed > 1e-3 * max(whole.norm(), *(gradient.norm() for gradient in lengths)):
        raise UserError("gradient goes round the blocks: name blocks that follow each other")
