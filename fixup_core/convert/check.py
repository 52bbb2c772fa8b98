"""What a conversion reports, held against what the network then does.

The network is called as the user calls it, before anything is looked at and again after the
conversion, forward and backward. The report says what was seen there.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fixup_core.errors import UserError, one_line
from fixup_core.probing import Inputs, float_tensors, in_training_mode, outputs_of

STEPS = 4
"""Until then everything has a gradient: the head's weights have one in the first backward pass, the
last layers in the second, what lies before them in the third; where one last layer follows another,
in the fourth."""
RATE, CLIPPED = 0.05, 1.0
PATIENCE = 15.0
"""Seconds after which no further step is begun."""
FAINT = 100.0
"""The report names a signal that has become smaller or larger by this factor or more."""


@dataclass(frozen=True)
class Seen:
    """What a network did in a few steps of gradient descent from where it stands.

    Attributes:
        learning: Names of the parameters that had a gradient in one of the steps.
        finite: All outputs and gradients were numbers.
        entering: Path of a module with a weight -> standard deviation of what came in, at first.
        broken_off: It took too long.
    """

    learning: frozenset[str]
    finite: bool
    entering: dict[str, float]
    broken_off: bool = False


def seen_before(net: nn.Module, inputs: Inputs) -> Seen | None:
    """What the user's own call of the unconverted ``net`` does; ``None`` where there are no
    numbers, as on the meta device.

    Raises:
        UserError: The call fails, or gives numbers that are not finite.
    """
    if any(parameter.is_meta for parameter in net.parameters()):
        return None  # some networks cannot be called there at all
    try:
        seen = _seen(net, inputs, steps=1)
    except Exception as error:
        raise UserError(
            f"{type(net).__name__} cannot be called with these example_inputs: "
            f"{type(error).__name__}: {one_line(str(error))[:200]}"
        ) from error
    if not seen.finite:
        raise UserError("the example inputs give numbers that are not finite: scale them first")
    return seen


def check_alive(
    net: nn.Module, inputs: Inputs, before: Seen, inner: Sequence[str], head: Sequence[str]
) -> list[str]:
    """Notes on what does not learn in the converted ``net``, and on signals that are faint.

    Args:
        net: Converted.
        inputs: The user's.
        before: Of the network as it was.
        inner: Names of the weights of its branches.
        head: Paths of the layers that make its outputs.

    Raises:
        UserError: The network gives numbers that are not finite, or nothing in its branches learns.
    """
    new = {n for n, p in net.named_parameters() if "fixup_" in n or "scalar_bias" in n}
    own = {name for name, _ in net.named_parameters()} & before.learning
    seen = _seen(net, inputs, steps=STEPS, awaited=own | new)
    if not seen.finite:
        raise UserError(
            f"{type(net).__name__} gives numbers that are not finite once converted: "
            "calibrate=True with a batch of real data keeps the sizes that its norms set; or give "
            "its output layer by head= if another one was taken for it"
        )
    faint = [note for path in head for note in _faint(path, before, seen)]
    if seen.broken_off:
        return [*faint, f"{STEPS} steps take more than {PATIENCE:.0f} s: not checked what learns"]
    dead = sorted((own | new) - seen.learning)
    if not seen.learning.intersection(inner) and before.learning.intersection(inner):
        raise UserError(
            f"nothing in the residual branches of {type(net).__name__} would learn: no gradient "
            f"reaches {dead[0]} and {len(dead) - 1} more parameters within {STEPS} steps"
        )
    notes = []
    if dead:
        shown = ", ".join(dead[:3])
        notes.append(f"no gradient reaches {shown} ({len(dead)} in all) within {STEPS} steps")
    return notes + faint


def _faint(path: str, before: Seen, after: Seen) -> Iterator[str]:
    was, now = before.entering.get(path, 0.0), after.entering.get(path, 0.0)
    if was and not 1 / FAINT < now / was < FAINT:
        yield (
            f"what enters {path or 'the output layer'} is {now / was:.1e} times the size it was: "
            "calibrate=True with a batch of real data restores it"
        )


def _seen(net: nn.Module, inputs: Inputs, steps: int, awaited: Collection[str] = ()) -> Seen:
    """What happens in ``steps``, or until all parameters that are ``awaited`` have a gradient."""
    values = {
        name: (parameter.detach().clone() if steps > 1 else parameter.detach()).requires_grad_(
            parameter.requires_grad
        )
        for name, parameter in net.named_parameters()
    }
    learnt = {name: value for name, value in values.items() if value.requires_grad}
    entering: dict[str, float] = {}
    finite, began = True, time.monotonic()
    learning: set[str] = set()
    for step in range(steps):
        if step and time.monotonic() - began > PATIENCE:
            return Seen(frozenset(learning), finite, entering, broken_off=True)
        with _sizes(net, entering), _training_but_for_dropout(net):
            outputs = float_tensors(outputs_of(net, inputs, values))
        grads = _gradients(outputs, learnt)
        finite &= all(bool(t.isfinite().all()) for t in (*outputs, *grads.values()))
        learning |= {name for name, grad in grads.items() if bool(grad.any())}
        if step + 1 == steps or (awaited and learning.issuperset(awaited)):
            break
        _step_(learnt, grads)
    return Seen(frozenset(learning), finite, entering)


@contextlib.contextmanager
def _training_but_for_dropout(net: nn.Module) -> Iterator[None]:
    """Within this context nothing is dropped: a branch that is dropped would seem not to learn."""
    with in_training_mode(net):
        for module in net.modules():
            if "drop" in type(module).__name__.lower():
                module.eval()
        yield


def _gradients(outputs: Sequence[Tensor], learnt: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the distance from all outputs to fixed random targets."""
    drawn = torch.Generator().manual_seed(0)
    loss: Any = sum(
        (out.float() - torch.randn(out.shape, generator=drawn).to(out.device)).square().mean()
        for out in outputs
        if out.requires_grad
    )
    if not isinstance(loss, Tensor):
        return {}
    found = torch.autograd.grad(loss, list(learnt.values()), allow_unused=True)
    return {n: g for n, g in zip(learnt, found, strict=True) if g is not None}


@torch.no_grad()
def _step_(learnt: dict[str, Tensor], grads: dict[str, Tensor]) -> None:
    """One of gradient descent, clipped."""
    length = sum(float(grad.float().square().sum()) for grad in grads.values()) ** 0.5
    for name, grad in grads.items():
        learnt[name].sub_(RATE * min(1.0, CLIPPED / max(length, 1e-12)) * grad)


@contextlib.contextmanager
def _sizes(net: nn.Module, entering: dict[str, float]) -> Iterator[None]:
    """Within this context the sizes of what enters modules with weights are noted."""

    def note(path: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            first = next(iter(float_tensors(args[:1])), None)
            if first is not None and path not in entering:
                entering[path] = float(first.detach().float().std(correction=0))

        return hook

    owners = [(p, m) for p, m in net.named_modules() if "weight" in m._parameters]
    hooks = [module.register_forward_pre_hook(note(path)) for path, module in owners]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
