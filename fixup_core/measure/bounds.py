"""What the theory of Fixup says of a network's gradients, next to what is measured.

Of a p.h. set theta (``measure.homogeneous``), with logits z, softmax p, its entropy H(p) and the
cross-entropy l, Euler's theorem gives ``<grad_theta l, theta> = <p - y, z> = l(z, y) - H(p)``, and
Cauchy and Schwarz a lower bound of the gradient (Zhang et al. 2019, section 2). Logits that have
grown with depth make it large; Fixup starts with z = 0, where l = H(p) = log c and the bound is 0.

Everything here returns numbers, in the type of the network, and leaves the network as it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fixup_core.errors import UserError
from fixup_core.measure.homogeneous import (
    FACTORS,
    Homogeneity,
    homogeneity,
    homogeneous_sets,
    is_positively_homogeneous,
)
from fixup_core.probing import (
    Inputs,
    first_tensor,
    logits_of,
    modules_named,
    parameters_named,
    with_gradient,
)


@dataclass(frozen=True)
class EulerIdentity:
    """Both sides of ``<grad_theta l, theta> = l - H(p)``, means over a batch."""

    product: float
    excess: float


@dataclass(frozen=True)
class BoundRow:
    """A gradient and its lower bound.

    Attributes:
        name: Of the parameter set or the block.
        measured: Norm of the gradient; of a block's input its mean over the examples.
        bound: What it cannot fall below, also such a mean; negative where the network is right but
            unsure, NaN where the set is not p.h. and the theorem says nothing.
        expected: The bound in expectation over uniformly random labels; NaN as above, and for
            blocks.
        homogeneity: Of the set.
        tightest: The largest bound / gradient: at most 1. Over the examples for a block.
    """

    name: str
    measured: float
    bound: float
    expected: float
    homogeneity: Homogeneity
    tightest: float

    @property
    def ratio(self) -> float:
        """Gradient / bound: at least 1; infinite where the bound says nothing, being below 0."""
        return self.measured / self.bound if not self.bound <= 0 else math.inf


@dataclass(frozen=True)
class BoundTable:
    """One row for each set or block, and what the batch as a whole has.

    Attributes:
        rows: In the order asked for.
        loss: Mean cross-entropy.
        entropy: Mean entropy of the softmax.
    """

    rows: tuple[BoundRow, ...]
    loss: float
    entropy: float

    def __getitem__(self, name: str) -> BoundRow:
        """The row of that name."""
        return next(row for row in self.rows if row.name == name)

    def __str__(self) -> str:
        """A table."""
        width = max(len(row.name) for row in self.rows)
        lines = [f"{'':{width}}   gradient      bound   expected  deviation"]
        for row in self.rows:
            numbers = (row.measured, row.bound, row.expected, row.homogeneity.deviation)
            lines.append(f"{row.name:{width}} " + " ".join(f"{n:10.3g}" for n in numbers))
        return "\n".join([*lines, f"loss {self.loss:.4g}, entropy {self.entropy:.4g}"])


def euler_identity(
    net: nn.Module, parameters: Iterable[str | nn.Parameter], inputs: Inputs, targets: Tensor
) -> EulerIdentity:
    """The two sides of the identity, which are equal if the parameters are a p.h. set.

    Args:
        net: Maps the inputs to logits [B, classes].
        parameters: Names, or parameters.
        inputs: A batch.
        targets: Classes [B], or probabilities [B, classes].
    """
    chosen = list(parameters_named(net, parameters).values())
    logits = logits_of(net, inputs)
    loss = F.cross_entropy(logits, targets)
    gradients = _gradients(loss, chosen)
    product = sum((g * p).sum().item() for g, p in zip(gradients, chosen, strict=True))
    return EulerIdentity(product, loss.item() - _entropy(logits).mean().item())


def gradient_bounds(
    net: nn.Module,
    inputs: Inputs,
    targets: Tensor,
    *,
    sets: Mapping[str, Iterable[str | nn.Parameter]] | None = None,
) -> BoundTable:
    """Gradient norms of p.h. sets and their lower bounds (Zhang et al. 2019, theorem 2).

    ``|grad_theta l| >= mean(l - H(p)) / |theta|`` for the mean loss of a batch; over random labels
    the expectation of the norm is at least ``(mean(max z) - log c) / |theta|``.

    Differs: the paper's expectation is also over the classifier's weights, which makes the mean
    logit 0; here it is taken off each example's logits, and the bound holds for the network as
    it is.

    Args:
        net: Maps the inputs to logits [B, classes], in its present mode.
        inputs: A batch.
        targets: Classes [B], or probabilities [B, classes].
        sets: Parameters of each set, by name or as they are; the paper's
            (``homogeneous_sets``) if there are none.

    Raises:
        UserError: An unknown parameter, or an output that is no batch of logits.
    """
    found = homogeneous_sets(net, inputs) if sets is None else sets
    chosen = {name: parameters_named(net, each) for name, each in found.items()}
    logits = logits_of(net, inputs)
    loss, excess = F.cross_entropy(logits, targets), _excess(logits, targets).mean().item()
    expected = _expected_excess(logits)
    rows = []
    for name, parameters in chosen.items():
        values = list(parameters.values())
        measured = _norm(_gradients(loss, values, keep=True))
        finding = is_positively_homogeneous(net, list(parameters), inputs)
        size = _norm(values) if finding else math.nan
        bounds = [above / size if size else 0.0 for above in (excess, expected)]
        tightest = bounds[0] / measured if measured else 0.0
        rows.append(BoundRow(name, measured, bounds[0], bounds[1], finding, tightest))
    return BoundTable(tuple(rows), *_loss_and_entropy(logits, loss))


def activation_bounds(
    net: nn.Module, inputs: Inputs, targets: Tensor, *, blocks: Iterable[str | nn.Module]
) -> BoundTable:
    """Gradients of the inputs of blocks and their lower bounds (Zhang et al. 2019, theorem 1).

    ``|grad_x l| >= (l - H(p)) / |x|`` for each example, where x is the input of a block and all
    that follows is p.h. in it.

    Args:
        net: Maps the inputs to logits [B, classes]; its examples do not see each other.
        inputs: A batch.
        targets: Classes [B], or probabilities [B, classes].
        blocks: Paths, or modules; each is called once, its first argument is [B, ...].

    Raises:
        UserError: An unknown module, or one that is not called once with such an argument.
    """
    named = modules_named(net, blocks)
    logits, entered = _entered(net, with_gradient(inputs), named)
    losses = F.cross_entropy(logits, targets, reduction="none")
    gradients = _gradients(losses.sum(), list(entered.values()))
    excess = _excess(logits, targets)
    rows = []
    for (module, x), gradient in zip(entered.items(), gradients, strict=True):
        scaled = {a: _scaled(net, inputs, module, a) for a in FACTORS}
        finding = homogeneity(logits.detach(), scaled)
        measured = gradient.flatten(1).norm(dim=1).double()
        bound = excess / x.detach().flatten(1).norm(dim=1) if finding else excess * math.nan
        tightest = torch.where(bound == 0, 0.0, bound / measured).max().item()
        means = measured.mean().item(), bound.mean().item()
        rows.append(BoundRow(named[module], *means, math.nan, finding, tightest))
    return BoundTable(tuple(rows), *_loss_and_entropy(logits, losses.mean()))


def _excess(logits: Tensor, targets: Tensor) -> Tensor:
    """``l(z, y) - H(p)`` of each example [B], in float64, without the difference of two numbers
    that may be equal: ``<p - y, z>``.
    """
    z = logits.detach().double()
    y = targets if targets.is_floating_point() else F.one_hot(targets, z.shape[1])
    return ((z.softmax(dim=1) - y) * z).sum(dim=1)


def _entropy(logits: Tensor) -> Tensor:
    p = logits.detach().double().softmax(dim=1)
    return -torch.special.xlogy(p, p).sum(dim=1)


def _expected_excess(logits: Tensor) -> float:
    z = logits.detach().double()
    above = z.max(dim=1).values - z.mean(dim=1)
    return (above.mean() - math.log(z.shape[1])).item()


def _loss_and_entropy(logits: Tensor, loss: Tensor) -> tuple[float, float]:
    return loss.item(), _entropy(logits).mean().item()


def _gradients(loss: Tensor, at: list[Any], keep: bool = False) -> list[Tensor]:
    """Zeros where the loss does not depend on it."""
    wanted = [one for one in at if one.requires_grad]
    found = iter(torch.autograd.grad(loss, wanted, retain_graph=keep, allow_unused=True))
    gradients = [next(found) if one.requires_grad else None for one in at]
    return [torch.zeros_like(x) if g is None else g for x, g in zip(at, gradients, strict=True)]


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.hypot(*(tensor.detach().double().norm().item() for tensor in tensors))


def _entered(
    net: nn.Module, inputs: Inputs, blocks: Mapping[nn.Module, str]
) -> tuple[Tensor, dict[nn.Module, Tensor]]:
    """The logits, and the inputs of the blocks in the order of the forward pass."""
    entered: dict[nn.Module, Tensor] = {}

    def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = first_tensor(args[:1])
        if x is None or module in entered:
            raise UserError(f"{blocks[module]} must be called once, with activations")
        entered[module] = x.clone()  # what else becomes of x is no concern of the block
        return (entered[module], *args[1:])

    hooks = [module.register_forward_pre_hook(enter) for module in blocks]
    try:
        logits = logits_of(net, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    for module, path in blocks.items():
        if module not in entered:
            raise UserError(f"{path} is not called in the forward pass")
    return logits, entered


def _scaled(net: nn.Module, inputs: Inputs, module: nn.Module, a: float) -> Tensor:
    """The logits, with the input of a module times ``a``."""
    hook = module.register_forward_pre_hook(lambda _, args: (a * args[0], *args[1:]))
    try:
        with torch.no_grad():
            return logits_of(net, inputs)
    finally:
        hook.remove()
