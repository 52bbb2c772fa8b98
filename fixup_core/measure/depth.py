"""The depth check: do steps change the network's function as much at any depth?

For depth what the coordinate check of mup (Yang et al. 2022, section 5) is for width. It knows
nothing of a rule: it takes any function that builds a network of a depth. One infinitesimal step
tells of the gradient at the start alone; from the second real step on, layers that have moved
multiply each other, and a rule can be flat in the first sense and grow in the second.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fixup_core.errors import UserError
from fixup_core.measure.figures import Curve, Panel, draw
from fixup_core.measure.line_fit import Slope, fit_slope
from fixup_core.probing import Inputs, converted, first_tensor, modules_named, outputs_of
from fixup_core.rules.branches import WeightLayer, collect_branches, collect_classifiers
from fixup_core.rules.init import draw_zero_heads_
from fixup_core.rules.scalars import scalars

DEPTHS = (4, 8, 16, 32, 64, 128)
SEEDS = 10
TOLERANCE = 0.2
"""Of the slope: over ``DEPTHS``, a span of 32, the size may at most double or halve."""

REAL_STEP = 1e-3
"""Step size where there are several, if none is given: that of Adam in common use."""

Sizes = tuple[tuple[float, ...], ...]
"""For each depth, one number a seed."""
Chosen = str | Callable[[nn.Module], Iterable[nn.Parameter]]


@dataclass(frozen=True)
class DepthCheck:
    """How much steps change the network's function, by depth.

    Attributes:
        depths: As they were asked for.
        num_branches: L of each network, counted; its depth where no branch is declared.
        sizes: For each depth, one number a seed: the root mean square change of the outputs since
            the start, after the last step, divided by the step size.
        tolerance: How far from 0 a flat slope may be.
        earlier: The sizes after the steps before the last, in order.
        moves: For each depth, one number a seed: how far the layers of branches but the last have
            moved, over their size and the step size; empty where no branch is declared, and
            where none of these layers takes the steps.
    """

    depths: tuple[int, ...]
    num_branches: tuple[int, ...]
    sizes: Sizes
    tolerance: float = TOLERANCE
    earlier: tuple[Sizes, ...] = ()
    moves: Sizes = ()

    @cached_property
    def slopes(self) -> tuple[Slope, ...]:
        """After each step: of the logarithm of the size over that of L, and its 95 % interval."""
        return tuple(self._fit(sizes) for sizes in (*self.earlier, self.sizes))

    @cached_property
    def slope(self) -> Slope:
        """The one that is farthest from flat; of one step its own."""
        return max(self.slopes, key=lambda slope: max(abs(slope.low), abs(slope.high)))

    @cached_property
    def movement(self) -> Slope | None:
        """Slope of the relative movement of inner layers over L, both logarithms.

        Where it is negative, deeper networks learn lazily: their inner layers stay what they were
        drawn as. ``None`` where nothing was measured.
        """
        return self._fit(self.moves) if self.moves else None

    @property
    def verdict(self) -> str:
        """What the slope says: one of four words.

        "flat": after every step the whole interval lies within the tolerance. "growing",
        "shrinking": the slope lies outside it, and the interval on one side of 0; a size that is
        infinite or no number counts as growing. "unclear": neither; more seeds or depths would
        tell.
        """
        slope = self.slope
        if -self.tolerance <= slope.low and slope.high <= self.tolerance:
            return "flat"
        if slope.value > self.tolerance and slope.low > 0:
            return "growing"
        return "shrinking" if slope.value < -self.tolerance and slope.high < 0 else "unclear"

    @property
    def flat(self) -> bool:
        return self.verdict == "flat"

    def summary(self) -> str:
        """The slope, its interval and the verdict; of several steps the slope after each too."""
        slope = self.slope
        line = (
            f"slope {slope.value:.2f} (95 % interval {slope.low:.2f} to {slope.high:.2f}; "
            f"flat is within {self.tolerance:g} of 0): {self.verdict}"
        )
        if not self.earlier:
            return line
        each = ", ".join(f"{one.value:.2f}" for one in self.slopes)
        lines = [f"slope after each step: {each}; the worst decides", line]
        if self.movement is not None:
            lines.append(f"relative movement of inner layers: slope {self.movement.value:.2f}")
        return "\n".join(lines)

    def __str__(self) -> str:
        """A table, a line for each depth, and the verdict."""
        cells = [("depth", "branches", "change", "spread over seeds")]
        for depth, branches, sizes in zip(self.depths, self.num_branches, self.sizes, strict=True):
            mean = _mean(sizes)
            spread = math.sqrt(_mean([(size - mean) ** 2 for size in sizes]))
            cells.append((str(depth), str(branches), f"{mean:.4g}", f"{spread:.2g}"))
        lines = ["".join(cell.rjust(10) for cell in row[:3]) + row[3].rjust(20) for row in cells]
        return "\n".join([*lines, self.summary()])

    def _fit(self, sizes: Sizes) -> Slope:
        """Infinite where a size is no number above 0."""
        if not all(math.isfinite(size) and size > 0 for found in sizes for size in found):
            return Slope(math.inf, math.inf, math.inf)
        pairs = zip(self.num_branches, sizes, strict=True)
        return fit_slope([(math.log(L), math.log(size)) for L, found in pairs for size in found])

    def plot(self, file: Path | str) -> None:
        """The figure of this check alone."""
        plot_depth_checks({self.verdict: self}, file)


def plot_depth_checks(checks: Mapping[str, DepthCheck], file: Path | str) -> None:
    """Several checks in one figure, mean sizes on logarithmic axes.

    Args:
        checks: By the name in the legend.
        file: Its ending is the format.

    Raises:
        UserError: matplotlib is not installed.
    """
    curves = [
        Curve(
            f"{name} (slope {check.slope.value:.2f})",
            [(L, _mean(sizes)) for L, sizes in zip(check.num_branches, check.sizes, strict=True)],
        )
        for name, check in checks.items()
    ]
    ticks = sorted({L for check in checks.values() for L in check.num_branches})
    x, y = "residual branches L", "change of the outputs / step size"
    draw([Panel(curves, x, y, log_x=True, log_y=True, ticks=ticks)], file)


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy of logits [..., classes] and whole numbers [...]."""
    return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def depth_check(
    make_net: Callable[[int], nn.Module],
    *,
    batch: tuple[Inputs, Any],
    depths: Sequence[int] = DEPTHS,
    seeds: int = SEEDS,
    steps: int = 1,
    moved: Chosen = "branches",
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
    eta: float | None = None,
    loss: Callable[[Any, Any], Tensor] = cross_entropy,
    head: str | None = None,
    dtype: torch.dtype = torch.float64,
    tolerance: float = TOLERANCE,
    progress: Callable[[str], object] = _to_stderr,
) -> DepthCheck:
    """Measure how much one step, or several, change a network's function, against its depth.

    Each network is built, given a random head where its own is 0 (else the head alone would
    move), stepped on the batch, and compared with itself on the same batch. It stays in the
    mode in which ``make_net`` returns it: batch normalisation is to be measured in training mode;
    masks of dropout are the same before and after the step. PyTorch's random numbers are as before
    when the check is done.

    Args:
        make_net: Builds the network of a depth, one of ``depths``; PyTorch is seeded before each
            call.
        batch: Inputs and targets. Inputs are a tensor, or a tuple or dictionary of arguments.
        depths: Three or more.
        seeds: Networks of each depth.
        steps: How many, one after the other; a rule for Adam shows after the second.
        moved: What takes the steps: "branches", the weights that the blocks declare in
            ``residual_branches()``; "scalars", these and all scalars; "all" parameters; or a
            function from the network to some of its parameters.
        optimizer: Called with parameters and ``lr=``, such as ``torch.optim.Adam``.
        eta: Step size; by default, for one step, the square root of the precision of ``dtype``,
            at which the change is as good as linear in it; for several 1e-3.
        loss: Of outputs and targets; cross-entropy by default. Where the network returns a tuple,
            list or dictionary, the first floating-point tensor in it is the outputs.
        head: Path of the last layer, for a network that declares no ``classifier_layers()``; the
            last linear layer by default.
        dtype: Of the network and the inputs.
        tolerance: How far from 0 a flat slope may be.
        progress: Takes a line after each depth; by default it goes to stderr.

    Raises:
        UserError: A network that declares no branch while ``moved`` is not given, fewer than
            three depths, a head that is not there, or a step that changes nothing, as with a
            multiplier at 0 behind every branch.
    """
    if moved not in MOVED and not callable(moved):
        raise UserError(f"moved is {moved!r}: take {', '.join(MOVED)}, or a function of the net")
    if steps < 1:
        raise UserError(f"a depth check takes at least 1 step, got {steps}")
    if seeds < 1 or min(depths, default=0) < 1 or len(set(depths)) < 3:
        raise UserError("a depth check takes three different depths or more, each at least 1")
    step = _Step(
        batch=converted(batch, dtype),
        choose=moved if callable(moved) else MOVED[moved],
        optimizer=optimizer,
        eta=eta or (math.sqrt(torch.finfo(dtype).eps) if steps == 1 else REAL_STEP),
        steps=steps,
        loss=loss,
        head=head,
    )
    counts: list[int] = []
    found: list[list[_Change]] = []
    for depth in depths:
        found.append([])
        for seed in range(seeds):
            with torch.random.fork_rng(range(torch.cuda.device_count())):
                torch.manual_seed(seed)
                net = make_net(depth).to(dtype)
                found[-1].append(step.change(net))
        counts.append(len(collect_branches(net)) or depth)
        mean = _mean([change.sizes[-1] for change in found[-1]])
        all_depths = ", ".join(map(str, depths))
        progress(f"depth {depth} of {all_depths}: L = {counts[-1]}, change {mean:.4g}")
    if len(set(counts)) < 3:
        raise UserError(f"the networks have {counts} branches: make_net takes no heed of the depth")
    *earlier, sizes = (
        tuple(tuple(change.sizes[k] for change in each) for each in found) for k in range(steps)
    )
    moves = tuple(tuple(c.move for c in each if c.move is not None) for each in found)
    return DepthCheck(
        tuple(depths),
        tuple(counts),
        sizes,
        tolerance,
        tuple(earlier),
        moves if all(moves) else (),
    )


def assert_depth_stable(make_net: Callable[[int], nn.Module], **options: Any) -> None:
    """For tests: what one step changes, or several (``steps=``), does not depend on depth.

    Args:
        make_net: As ``depth_check`` takes it.
        options: As ``depth_check`` takes them; ``batch`` must be given.

    Raises:
        AssertionError: The verdict is not flat; the table says what was measured.
    """
    check = depth_check(make_net, **options)
    if not check.flat:
        what = "one step's change" if options.get("steps", 1) == 1 else "the change by the steps"
        raise AssertionError(f"{what} of the function is {check.verdict}\n{check}")


def branch_weights(net: nn.Module, ending: str = "") -> list[nn.Parameter]:
    """The weights that lie in residual branches; neither their bias vectors nor scalars.

    Args:
        net: Its blocks declare ``residual_branches()``.
        ending: Only those branches whose declared name ends so.

    Raises:
        UserError: There is no such branch.
    """
    branches = collect_branches(net)
    chosen = [branch for branch in branches if branch.name.endswith(ending)]
    if not chosen:
        what = f"no branch whose name ends with {ending!r}" if branches else "no residual branch"
        raise UserError(
            f"{type(net).__name__} declares {what}: give its blocks a residual_branches() "
            "method, or say in moved= which parameters take the step"
        )
    return [p for branch in chosen for layer in branch.layers for p in layer.sources]


def _and_scalars(net: nn.Module) -> list[nn.Parameter]:
    return [*branch_weights(net), *(scalar.weight for scalar in scalars(net))]


MOVED: dict[str, Callable[[nn.Module], Iterable[nn.Parameter]]] = {
    "branches": branch_weights,
    "scalars": _and_scalars,
    "all": nn.Module.parameters,
}


@dataclass(frozen=True)
class _Change:
    """What the steps have changed: the outputs after each, and how far inner layers moved."""

    sizes: tuple[float, ...]
    move: float | None


@dataclass(frozen=True)
class _Step:
    """The steps, and what they change."""

    batch: tuple[Inputs, Any]
    choose: Callable[[nn.Module], Iterable[nn.Parameter]]
    optimizer: Callable[..., torch.optim.Optimizer]
    eta: float
    steps: int
    loss: Callable[[Any, Any], Tensor]
    head: str | None

    def change(self, net: nn.Module) -> _Change:
        """Root mean square change of the outputs over eta, after each step."""
        moved = [p for p in self.choose(net) if p.requires_grad]
        if not moved:
            raise UserError("moved= names no parameter that can take a step")
        draw_zero_heads_(_heads(net, self.head))
        ids = {id(parameter) for parameter in moved}
        inner = [p for p in _inner_weights(net) if id(p) in ids]
        drawn = [p.detach().clone() for p in inner]
        optimizer = self.optimizer(moved, lr=self.eta)
        outputs = before = self._outputs(net)
        sizes = []
        for _ in range(self.steps):
            gradients = torch.autograd.grad(
                self.loss(outputs, self.batch[1]), moved, allow_unused=True, materialize_grads=True
            )
            for parameter, gradient in zip(moved, gradients, strict=True):
                parameter.grad = gradient
            optimizer.step()
            outputs = self._outputs(net)
            change = (outputs - before).detach() / self.eta
            sizes.append(change.square().mean().sqrt().item())
        if sizes[0] == 0:
            raise UserError(
                "the step changes nothing: something at 0 stands between the outputs and what "
                "moves. If it is the last layer, name it in head=; if it is a multiplier or gain "
                "behind each branch, move that too (moved=)"
            )
        moves = [_relative(p, start) / self.eta for p, start in zip(inner, drawn, strict=True)]
        return _Change(tuple(sizes), _mean(moves) if moves else None)

    def _outputs(self, net: nn.Module) -> Tensor:
        outputs = first_tensor(outputs_of(net, self.batch[0]))
        if outputs is None:
            raise UserError(f"{type(net).__name__} must return a floating-point tensor")
        return outputs


def _inner_weights(net: nn.Module) -> list[nn.Parameter]:
    """The weights of branches but the last of each, those that are not 0."""
    layers = [layer for branch in collect_branches(net) for layer in branch.layers[:-1]]
    return [p for layer in layers for p in layer.sources if p.detach().any()]


def _relative(parameter: Tensor, start: Tensor) -> float:
    return ((parameter.detach() - start).norm() / start.norm()).item()


def _heads(net: nn.Module, name: str | None) -> Sequence[nn.Module | WeightLayer]:
    """The declared classifiers, the layer of that name, or the last linear layer."""
    if name is not None:
        return list(modules_named(net, [name]))
    linear = [module for module in net.modules() if isinstance(module, nn.Linear)]
    return collect_classifiers(net) or linear[-1:]


def _mean(sizes: Sequence[float]) -> float:
    return sum(sizes) / len(sizes)
