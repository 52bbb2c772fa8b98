"""``fixup_``: a network with normalisation made one without, by the rules of Fixup, in place.

The branches are found in the network's graph (``convert.joins``), or named. Everything is
planned before anything is changed; where ``fixup_`` raises, the network is as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Generator, nn

from fixup_core.convert.apply import apply_
from fixup_core.convert.calibration import calibrate_
from fixup_core.convert.check import check_alive, seen_before
from fixup_core.convert.plan import Branches, ConversionPlan, Head, declared_plan
from fixup_core.convert.traced_plan import traced_plan
from fixup_core.convert.undo import undone_if_it_fails
from fixup_core.errors import UserError
from fixup_core.probing import Inputs
from fixup_core.rules.branches import Place, collect_branches, collect_places
from fixup_core.rules.init import initialise_
from fixup_core.rules.method import Method
from fixup_core.rules.methods import check_defined, method_named
from fixup_core.rules.parametrised import plain_weights
from fixup_core.rules.placed import placed_constants
from fixup_core.rules.report import ConversionReport, ConvertedBranch, InitReport
from fixup_core.rules.scalars import scalars
from fixup_core.rules.standards import NORMS

WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def fixup_(
    net: nn.Module,
    example_inputs: Inputs | None = None,
    *,
    method: str | Method = "fixup",
    branches: Branches | None = None,
    head: Head = None,
    keep_norms: bool = False,
    norm_types: tuple[type[nn.Module], ...] = (),
    allow: Sequence[str] = (),
    calibrate: bool = False,
    check: bool = True,
    generator: Generator | None = None,
    verbose: bool = True,
) -> ConversionReport:
    """Make ``net`` a Fixup network (Zhang et al. 2019, section 4), in place.

    The residual branches are found. Normalisation layers become the identity. Scalars are attached:
    a bias before every weight layer of a branch, before the head and before every activation, a
    multiplier behind every branch. The weights in the branches are drawn anew by the rules; the
    last layer of each branch and the head are 0. What lies outside the branches (stem, projections,
    embeddings) stays as it is, as do gates; but for layers whose size a removed norm alone had set,
    which are drawn by He's forward rule, and class tokens at 0, which are drawn too. Parameters
    keep their names, and parametrised weights (weight norm's) their parametrisation.

    Differs: m counts the layers whose product a branch is. In attention these are values and
    output, m = 2, where the paper counts queries and keys too, m = 4; with 4 one step's change
    grows with depth (docs/depth-check.md).

    Args:
        net: Any network. Its scalars have the direct form; ``param_groups`` gives them their rate.
        example_inputs: A batch as the network takes it: a tensor, a tuple of arguments or a mapping
            of named ones. The network is traced with it, in training mode, without computing a
            number.
        method: A name in ``METHODS``, or a record, without norms: "fixup" or an ablation of it,
            "fixup_adam" (``METHODS["fixup_adam"].with_base(c)``), "fixup_complete", "skipinit",
            "rezero". Differs: with ReZero every branch has a multiplier of its own.
        branches: For each branch the paths of its weight layers in order, in place of tracing:
            ``{"block1": ["block1.conv1", "block1.conv2"]}``. A network whose modules have
            ``residual_branches()`` needs neither.
        head: Path of the output layer, where it is not the last weight layer; False where there is
            no output layer.
        keep_norms: Leave the normalisation layers.
        norm_types: Types of normalisation layers besides PyTorch's own.
        allow: Paths of modules, or names of parameters, in branches. They are left as they are
            where no rule covers them.
        calibrate: Keep what the norms did to ``example_inputs``, a batch of real data. The biases
            before weight layers start at minus the mean of what comes in; norms outside the
            branches, or before a branch's first layer, become constants (``convert.calibration``).
            Not in the paper; LSUV sets weights by a batch (Mishkin and Matas 2016), this sets
            scalars and constants alone. Clip the gradients of such a network, and where classes
            differ in frequency, as words do, call ``start_at_frequencies_`` next.
        check: Call the network with ``example_inputs``, once as it was and three times converted,
            forward and backward on copies of its parameters, and report what does not learn. It
            takes a few steps' time and memory; on the meta device nothing is called.
        generator: Source of the random numbers; PyTorch's own by default.
        verbose: Print the report.

    Returns:
        What was found and done; ``str()`` of it is a table. Branches that no rule covers stay as
        they are, and the report says which and why: with branches in them, used elsewhere too, of
        weights that are shared or computed.

    Raises:
        UserError: The call fails; there is no branch, or more are left out than there are others; a
            parameter that would be written is frozen, or no rule covers it; a parametrised weight
            cannot take every value (spectral norm's); the network cannot be traced; the method has
            norms, or needs multipliers where a branch can have none; the converted network gives
            numbers that are not finite, or nothing in its branches learns. The network is as it
            was.
    """
    method = check_defined(
        method_named(method),
        "fixup_, which removes norms and leaves what lies outside the branches",
        lambda one: one.norm is None and one.standard is None and not one.only,
    )
    if any(scalars(net)):
        raise UserError(
            f"{type(net).__name__} has Fixup's scalars already: fixup_init_ draws it anew"
        )
    if isinstance(net, WRAPPERS):
        raise UserError(f"convert the network before {type(net).__name__} wraps it")
    if calibrate:
        _check_calibration(method, example_inputs, keep_norms)
    looked = example_inputs if check else None
    before = None if looked is None else seen_before(net, looked)
    norm_types = (*NORMS, *norm_types)
    with plain_weights(net) as parametrised:
        if branches is None and not collect_branches(net):
            redraw = not (keep_norms or calibrate)
            plan = traced_plan(net, example_inputs, head, norm_types, keep_norms, allow, redraw)
        else:
            plan = declared_plan(net, branches, head, norm_types, keep_norms)
        plan.check(net)
        _check_multipliers(method, plan)
        written = {id(net.get_parameter(name)) for name in plan.written()}
        for module in parametrised:
            module.check(written)
        with undone_if_it_fails(net, plan.written()):
            apply_(net, plan, method, frozen=calibrate)
            gains = [net.get_parameter(name) for name in plan.gains]
            kept = _kept(net, written)
            init = initialise_(net, method, keep=kept, gains=gains, generator=generator)
            if calibrate and example_inputs is not None:
                calibrate_(net, example_inputs, plan)
            report = _report(net, plan, method, init, calibrate)
            if before is not None and looked is not None:
                inner = [name for branch in report.branches for name in branch.layers]
                heads = [layer.unit for layer in plan.head]
                notes = check_alive(net, looked, before, inner, heads)
                report = replace(report, notes=(*report.notes, *notes))
    if verbose:
        print(report)
    return report


def _check_calibration(method: Method, example_inputs: Inputs | None, keep_norms: bool) -> None:
    """Raise ``UserError`` where there is nothing that a batch could set."""
    if example_inputs is None or keep_norms:
        raise UserError(
            "calibrate=True needs a batch of real data, example_inputs=, and norms to remove "
            "(keep_norms=False)"
        )
    if not method.biases or method.multiplier is None:
        raise UserError(
            "calibrate=True sets scalar biases and multipliers; the method "
            f"{method.name!r} lacks one of them"
        )
    if not method.multiplier:
        raise UserError(
            "calibrate=True starts multipliers at the size of what enters their branches; those of "
            f"the method {method.name!r} start at 0"
        )


def _check_multipliers(method: Method, plan: ConversionPlan) -> None:
    """Raise where the method lives by multipliers and a branch can have none."""
    bare = [b.layers[-1].weight for b in plan.branches if not b.layers[-1].unit]
    if bare and (method.depth_rule() or method.multiplier == 0):
        raise UserError(
            f"the method {method.name!r} needs a multiplier behind every branch, and {bare[0]} is "
            "used by a function: make it a module's, or take the method 'fixup'"
        )


def _kept(net: nn.Module, written: set[int]) -> list[nn.Parameter]:
    """The parameters that stay: all but scalars and those ``written``, by id."""
    drawn = written | {id(scalar.weight) for scalar in scalars(net)}
    # An output layer that shares an embedding's weight cannot be 0, so that embedding stays.
    tied = {id(m.weight) for m in net.modules() if isinstance(m, nn.Embedding)}
    return [p for p in net.parameters() if id(p) not in drawn or id(p) in tied]


def _report(
    net: nn.Module, plan: ConversionPlan, method: Method, init: InitReport, calibrate: bool
) -> ConversionReport:
    kept = tuple(row.name for row in init.rows if row.role == "kept")
    names = {id(p): name for name, p in net.named_parameters()}
    head = [layer.weight for layer in plan.head] if method.zero_head else []
    tied = [name for name in head if names[id(net.get_parameter(name))] in kept]
    notes = [f"{name} is an embedding too and cannot be 0: it stays" for name in tied]
    notes += _on_branches(net, method)
    if method.head_prior and head:
        notes.append(
            f"{method.name!r} starts the output layer at the classes' frequencies: "
            "fc.start_at_frequencies_(net, labels)"
        )
    frozen = plan.freezable() if calibrate else ()
    if calibrate and not frozen:
        notes.append(
            "no norm was found that a constant could stand for: the batch set biases alone"
        )
    return ConversionReport(
        branches=_converted(net, plan, method),
        head=tuple(name for name in head if name not in tied),
        removed=tuple(norm.path for norm in plan.norms),
        frozen=frozen,
        scalars=sum(1 for _ in scalars(net)),
        kept=kept,
        left_out=plan.left_out,
        notes=(*plan.notes, *notes),
        init=init,
    )


def _on_branches(net: nn.Module, method: Method) -> list[str]:
    """Notes on fixed multipliers, and on learnt ones that start at 0."""
    values = [constant.value() for constant in placed_constants(net)]
    numbers = {value.item() for value in values if not value.is_meta}
    notes = [f"every branch is multiplied by the fixed number {number:.4g}" for number in numbers]
    if method.multiplier == 0:
        notes.append("every branch has a multiplier that starts at 0, and learns")
    return notes


def _converted(net: nn.Module, plan: ConversionPlan, method: Method) -> tuple[ConvertedBranch, ...]:
    places = collect_places(net)
    scaled: dict[int, Place] = {}
    for place in places:
        if not (place.last and method.zero_last):
            scaled.setdefault(id(place.branch), place)
    first = [place for place in places if place.position == 0]
    return tuple(
        ConvertedBranch(
            branch.name,
            place.branch.layers_per_branch,
            method.weight_factor(scaled[id(place.branch)]) if id(place.branch) in scaled else 0.0,
            tuple(layer.weight for layer in branch.layers),
            branch.gates,
        )
        for branch, place in zip(plan.branches, first, strict=True)
    )
