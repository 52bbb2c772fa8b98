"""``NormRemoval``: a trained network made one without norms while it goes on training.

Each norm becomes a mixture of itself and of a fixed affine map with the running size of what enters
it (``removal.leaving``). A schedule says how much of each norm is left; in the end the maps go into
the layers beside them (``removal.folding``).

Sources: one norm at a time, as norms were taken out of GPT-2 (Heimersheim 2024; Baroni et al.
2025); all at once by a global gate, with an anchor in place of the last norm (TaperNorm, 2026).
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fixup_core.convert.apply import attach_scalars_
from fixup_core.convert.convert import WRAPPERS
from fixup_core.convert.traced_plan import traced_plan
from fixup_core.convert.undo import undone_if_it_fails
from fixup_core.errors import UserError
from fixup_core.fuse.converted import replace_
from fixup_core.probing import Inputs, float_tensors, in_evaluation_mode, outputs_of
from fixup_core.removal.anchor import ANCHOR, Anchor
from fixup_core.removal.distilling import divergence, logits_in
from fixup_core.removal.folding import fold_maps_, maps_left
from fixup_core.removal.found import check_called, in_call_order, norms_to_go
from fixup_core.removal.kinds import kind_of
from fixup_core.removal.leaving import WHOLE, LeavingNorm
from fixup_core.removal.schedule import Schedule, in_order, make_schedule
from fixup_core.removal.sides import Seen, look_at, split_
from fixup_core.rules.methods import METHODS
from fixup_core.rules.standards import NORMS

logger = logging.getLogger(__name__)
TOLERANCE = 1e-3
"""Of the largest output: what folding may change."""


@dataclass(frozen=True)
class NormState:
    """A norm on its way out.

    Attributes:
        path: Of it.
        left: The share that is left, in 0..1: for queries and keys, or everything, and for values.
        size: The mean of what it divides by; frozen once it is no longer whole.
        spread: The standard deviation of the tokens' sizes divided by their mean: how much the
            network loses with this norm.
        largest: The largest size divided by the mean.
    """

    path: str
    left: tuple[float, float]
    size: float
    spread: float
    largest: float

    def __str__(self) -> str:
        first, second = self.left
        share = f"{first:.3f}" if first == second else f"{first:.3f} / {second:.3f}"
        return (
            f"{self.path}: {share} left, size {self.size:.4g}, spread {self.spread:.3f}, "
            f"largest {self.largest:.3g}"
        )


class NormRemoval:
    """Takes the norms out of ``net`` while it goes on training.

    Make it before the optimiser where ``scalars`` are asked for, and before DDP or a compiler wraps
    the network. Call ``step`` after every step of the optimiser, and ``finish`` at the end::

        removal = NormRemoval(net, images, schedule="taper", steps=2000)
        for images, labels in data:
            loss = F.cross_entropy(net(images), labels) + removal.loss()
            loss.backward(); optimizer.step(); optimizer.zero_grad()
            removal.step()
        net = removal.finish()

    BatchNorm, GroupNorm, InstanceNorm, LayerNorm and RMSNorm go, and other layers that compute what
    one of the last two does. With ``schedule="at_once"`` a BatchNorm network becomes what it is in
    evaluation, exactly, and goes on from there.

    Args:
        net: A trained network, changed in place. Its outputs are the same until norms go.
        example_inputs: A batch as it takes it. With it the turns follow the forward pass, one norm
            before queries, keys and values goes side by side, norms of other libraries are known,
            and ``finish`` folds. Without it there are PyTorch's norms alone, in module order.
        schedule: "taper": all by one gate, from 1 to 0 by half a cosine, whole in the first tenth.
            "one_by_one": norms of feed-forward branches and others, then the queries' and keys'
            sides, then the values', the last norm of all at the end. "at_once".
        steps: Until the last norm is gone.
        norm_types: Types of norms besides PyTorch's own.
        keep: Paths of norms that stay.
        centring: A token's mean goes on being subtracted where a LayerNorm did: a linear map, which
            folds. False: the running mean of all tokens is, which leaves one number a channel.
        anchor: Weight of ``((size / target) - 1)^2`` in ``loss()``, the size being the root mean
            square of what enters the head and the target its mean while the norms were whole.
            Cross-entropy grows the logits of a network whose last norm is gone. Differs: relative.
        distil: Weight in ``loss()`` of the divergence from the network as it was, whose outputs are
            soft targets. It keeps a copy.
        head: Path of the output layer, where it is not the last weight layer.
        values: Without a batch: for the path of each layer that makes values alone the path of the
            norm that feeds it, and the queries and keys beside it.
        scalars: Attach the scalars of rule 3 at values that change nothing; it needs a batch.

    Attributes:
        net: The network.
        schedule: Which norm goes when.
        steps_done: How often ``step`` was called.

    Raises:
        UserError: The network has no norms, a norm is of no known kind, the schedule is too short,
            or the network is wrapped. It is as it was.
    """

    def __init__(
        self,
        net: nn.Module,
        example_inputs: Inputs | None = None,
        *,
        schedule: str = "taper",
        steps: int = 2000,
        norm_types: Sequence[type[nn.Module]] = (),
        keep: Sequence[str] = (),
        centring: bool = True,
        anchor: float = ANCHOR,
        distil: float = 0.0,
        head: str | None = None,
        values: Mapping[str, str] | None = None,
        scalars: bool = False,
    ) -> None:
        _check(net, example_inputs, anchor, distil, scalars)
        self.net, self.inputs = net, example_inputs
        self.steps_done, self.distil = 0, distil
        norms = norms_to_go(net, example_inputs, (*NORMS, *norm_types), keep)
        seen = Seen(values=dict(values or {}))
        if example_inputs is not None:
            seen = look_at(net, example_inputs, norms)
            check_called(norms, seen)
        order = in_call_order(norms, seen)
        self.schedule: Schedule = make_schedule(
            schedule, in_order(order, list(seen.values.values())), steps
        )
        kinds = {path: kind_of(norm, path, seen.made.get(path)) for path, norm in norms.items()}
        teacher = copy.deepcopy(net).eval().requires_grad_(False) if distil else None
        self._teacher = None if teacher is None else [teacher]  # no part of any module
        with undone_if_it_fails(net, ()):
            self.norms = {path: LeavingNorm(norms[path], kinds[path], centring) for path in order}
            replace_(list(net.modules()), {norms[path]: self.norms[path] for path in order})
            _leave_fast_paths(net)
            self._handles = split_(net, seen.values)
            if scalars and example_inputs is not None:
                plan = traced_plan(net, example_inputs, None, (LeavingNorm,), True, (), False)
                attach_scalars_(net, plan, METHODS["fixup"])
            self.anchor = Anchor(net, head, anchor) if anchor else None

    @property
    def left(self) -> list[str]:
        """The paths of the norms that are not gone."""
        return [path for path, norm in self.norms.items() if any(norm.gates)]

    @property
    def share(self) -> float:
        """How much is left of all norms, in norms: at first their number, 0 in the end."""
        return sum(sum(norm.gates) / 2 for norm in self.norms.values())

    @property
    def done(self) -> bool:
        """Whether all are gone."""
        return not self.left

    def loss(self, outputs: Any = None, inputs: Inputs | None = None) -> Tensor:
        """What to add to the loss: the anchor, and the divergence from the network as it was.

        Args:
            outputs: Of this step, a tensor of logits [..., classes] or what has ``logits``. Needed
                with ``distil`` alone, as are ``inputs``.
            inputs: Those of this step.

        Raises:
            UserError: ``distil`` is set, and one of them is missing.
        """
        device = next(self.net.parameters()).device
        total = torch.zeros((), device=device)
        if self.anchor is not None:
            total = total + self.anchor.loss()
        if self._teacher is not None:
            if outputs is None or inputs is None:
                raise UserError("with distil, give the step's: removal.loss(outputs, inputs)")
            with torch.no_grad():
                targets = logits_in(outputs_of(self._teacher[0].to(device), inputs))
            total = total + self.distil * divergence(logits_in(outputs), targets)
        return total

    def step(self) -> None:
        """Go on to the next step of the schedule.

        Raises:
            UserError: A norm is to go through which no batch has gone.
        """
        self.at(self.steps_done + 1)

    def at(self, step: int) -> None:
        """Put the norms where they are after ``step`` steps; the past is not asked for.

        Raises:
            UserError: As ``step``.
        """
        gates = self.schedule.gates(step)
        unseen = [
            path
            for path, norm in self.norms.items()
            if gates[path] != WHOLE and norm.gates == WHOLE and not norm.observed
        ]
        if unseen:
            raise UserError(
                f"{unseen[0]} cannot go: no batch has gone through it in training mode, so its "
                f"size is not known; train a step before removal.step(), or keep=[{unseen[0]!r}] "
                "where the network never calls it"
            )
        before = set(self.left)
        for path, norm in self.norms.items():
            # All gates fall; a network that was saved later is not taken back.
            was, now = norm.gates, gates[path]
            lower = (min(was[0], now[0]), min(was[1], now[1]))
            if lower != was:
                norm.set_gates_(*lower)
        self.steps_done = step
        whole = all(norm.gates == WHOLE for norm in self.norms.values())
        if self.anchor is not None and self.anchor.calibrating and not whole:
            self.anchor.hold_(next(self.net.parameters()).device)
        for path in sorted(before - set(self.left), key=list(self.norms).index):
            logger.info("step %d: %s", step, self.state_of(path))

    def state_of(self, path: str) -> NormState:
        """Of one norm."""
        norm = self.norms[path]
        own = norm.statistics
        size = norm.size().mean().item()
        return NormState(path, norm.gates, size, own.spread.item(), own.largest.item())

    def states(self) -> list[NormState]:
        """Of all norms, in the order of the forward pass."""
        return [self.state_of(path) for path in self.norms]

    def __str__(self) -> str:
        done = min(self.steps_done, self.schedule.steps)
        gone = len(self.norms) - len(self.left)
        head = (
            f"{self.schedule.name}, step {done} of {self.schedule.steps}: {gone} of "
            f"{len(self.norms)} norms are gone"
        )
        return "\n".join([head, *(f"  {state}" for state in self.states())])

    def state_dict(self) -> dict[str, Any]:
        """What the network's own state dict lacks; with ``distil`` the network's as it was, too."""
        anchor = None if self.anchor is None else self.anchor.state()
        return {
            "schedule": self.schedule.name,
            "steps": self.schedule.steps,
            "norms": list(self.norms),
            "steps_done": self.steps_done,
            "anchor": anchor,
            "teacher": None if self._teacher is None else self._teacher[0].state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another has stopped; load the network's state dict too.

        Raises:
            UserError: It is that of another network or schedule.
        """
        own = self.state_dict()
        for name in ("schedule", "steps", "norms"):
            if state.get(name) != own[name]:
                raise UserError(
                    f"the saved removal has {name}={_short(state.get(name))}, this one "
                    f"{_short(own[name])}: go on with the same network and schedule"
                )
        self.steps_done = int(state["steps_done"])
        if self.anchor is not None and state.get("anchor"):
            self.anchor.load(state["anchor"])
        if self._teacher is not None:
            if not state.get("teacher"):
                raise UserError(
                    "the saved removal has no network to distil from: go on without distil"
                )
            self._teacher[0].load_state_dict(state["teacher"])

    def finish(self, *, force: bool = False, fold: bool = True) -> nn.Module:
        """The network without norms: their maps in the layers beside them, its outputs checked.

        Args:
            force: Do it before the schedule has ended: what is left of the norms goes at once.
            fold: Take the maps into the layers beside them where a batch was given. A map that no
                layer can take in stays, as a ``FixedAffine``, and the log says so.

        Returns:
            ``net``. Parameters that have changed are new ones: make another optimiser to train on.

        Raises:
            UserError: Norms are left; or folding changes the outputs. The network is as it was.
        """
        left = self.left
        if left and not force:
            more = self.schedule.steps - self.steps_done
            raise UserError(
                f"{len(left)} of {len(self.norms)} norms are not gone yet, {more} steps are left: "
                "go on, or finish(force=True)"
            )
        net = self.net
        with self._gates_put_back_if_it_fails(), undone_if_it_fails(net, ()):
            if left:
                self.at(self.schedule.steps)
            plain: dict[nn.Module, nn.Module] = {n: n.plain() for n in self.norms.values()}
            replace_(list(net.modules()), plain)
            folded = self._fold(net) if fold and self.inputs is not None else []
        for handle in self._handles:
            handle.remove()
        if self.anchor is not None:
            self.anchor.remove()
            self.anchor = None
        kept = list(maps_left(net))
        logger.info("%d norms are gone, %d of them into layers", len(plain), len(folded))
        if kept:
            logger.info("affine maps that no layer can take in: %s", ", ".join(kept))
        return net

    @contextlib.contextmanager
    def _gates_put_back_if_it_fails(self) -> Iterator[None]:
        gates, steps = {norm: norm.gates for norm in self.norms.values()}, self.steps_done
        try:
            yield
        except BaseException:
            for norm, before in gates.items():
                norm.write_gates_(before)
            self.steps_done = steps
            raise

    def _fold(self, net: nn.Module) -> list[str]:
        device = next(net.parameters()).device
        inputs = tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, self.inputs)
        before = _outputs(net, inputs)
        folded = fold_maps_(net, inputs)
        after = _outputs(net, inputs)
        largest = max(tensor.abs().max().item() for tensor in before)
        off = max((a - b).abs().max().item() for a, b in zip(after, before, strict=True))
        # Weights that take a map in are rounded anew.
        rounding = max(16 * torch.finfo(tensor.dtype).eps for tensor in before)
        if not off <= max(TOLERANCE, rounding) * largest:
            raise UserError(
                f"folding would change the outputs by {off:.2g}, of {largest:.2g} at the largest: "
                "finish(fold=False) leaves the affine maps"
            )
        return folded


def _check(
    net: nn.Module, inputs: Inputs | None, anchor: float, distil: float, scalars: bool
) -> None:
    if isinstance(net, WRAPPERS) or hasattr(net, "_orig_mod"):
        raise UserError(f"make NormRemoval before {type(net).__name__} wraps the network")
    if any(isinstance(module, LeavingNorm) for module in net.modules()):
        raise UserError("the network's norms are on their way out already: one NormRemoval a net")
    for name, weight in (("anchor", anchor), ("distil", distil)):
        if weight < 0:
            raise UserError(f"{name} is {weight}: it cannot be negative")
    if scalars and inputs is None:
        raise UserError("scalars=True needs a batch, example_inputs=, to find the branches")


def _leave_fast_paths(net: nn.Module) -> None:
    """PyTorch's fast path in evaluation computes the norms itself."""
    for module in net.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


def _outputs(net: nn.Module, inputs: Inputs) -> list[Tensor]:
    with in_evaluation_mode(net), torch.no_grad():
        return [t.clone() for t in float_tensors(outputs_of(net, inputs))]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) < 60 else f"{text[:57]}..."
