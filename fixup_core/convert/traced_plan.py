"""The plan for a network whose branches are found in its graph: what a ``Survey`` asks for."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

from fixup_core.convert.joins import FoundBranch
from fixup_core.convert.operations import NORMALISING
from fixup_core.convert.plan import (
    ConversionPlan,
    Head,
    PlannedBranch,
    PlannedNorm,
    distinct,
    planned_head,
)
from fixup_core.convert.survey import Layer, Survey, weights_outside
from fixup_core.convert.tracing import operation, owner, place_of
from fixup_core.convert.trunk import empty_tokens, unsized_layers
from fixup_core.errors import UserError
from fixup_core.probing import Inputs


def traced_plan(
    net: nn.Module,
    inputs: Inputs | None,
    head: Head,
    norm_types: tuple[type[nn.Module], ...],
    keep_norms: bool,
    allow: Sequence[str],
    redraw: bool,
) -> ConversionPlan:
    """What the network's graph asks for; the arguments are those of ``fixup_``.

    ``redraw``: draw the layers outside the branches anew that only a norm had sized.

    Raises:
        UserError: As ``fixup_core.convert.convert.fixup_`` says.
    """
    if inputs is None:
        raise UserError("give fixup_ a batch, example_inputs=, or name the branches= yourself")
    survey = Survey(net, inputs, norm_types)
    if not keep_norms:
        _check_functions(survey)
    _check_covered(survey, allow)
    branches = tuple(_planned(survey, n, b) for n, b in enumerate(survey.branches, start=1))
    named = planned_head(net, head)
    last_layers = survey.last_layers if named is None else named
    # Keys and values that an encoder hands over are no part of the stream that a bias centres.
    before = [layer.unit for b in branches for layer in b.layers if layer.enters]
    activations = list(survey.activations())
    biased = {path for activation in activations for path in activation.norms}
    return ConversionPlan(
        branches=branches,
        head=last_layers,
        before=distinct([*before, *(layer.unit for layer in last_layers)]),
        multiplied=distinct(layer.unit for branch in branches for layer in branch.ends),
        # Where a norm was, the bias takes its place.
        after=distinct(a.unit for a in activations if not a.norms),
        norms=() if keep_norms else _norms(survey, last_layers, biased),
        gains=distinct(name for branch in survey.branches for name in branch.gains),
        trunk=unsized_layers(survey, last_layers) if redraw else (),
        tokens=empty_tokens(survey),
        left_out=tuple(map(str, survey.left_out)),
        notes=tuple(_notes(survey, branches, last_layers, keep_norms)),
    )


def _planned(survey: Survey, number: int, found: FoundBranch) -> PlannedBranch:
    gates = tuple(use.weight for use in found.gates)
    name = found.name or f"addition {number}"
    return PlannedBranch(name, survey.layers(found), gates, found.m, zero=not found.rectified)


def _norms(
    survey: Survey, head: Collection[Layer], biased: Collection[str]
) -> tuple[PlannedNorm, ...]:
    freezable = _freezable(survey, {layer.weight for layer in head})
    starting: dict[str, list[str]] = {path: [] for path in freezable}
    for branch in survey.branches:
        for path in _norms_before_the_first_layer(survey, branch) & freezable:
            starting[path] += survey.ends(branch)
    return tuple(
        PlannedNorm(path, path in biased, path in freezable, distinct(starting.get(path, ())))
        for path in survey.trace.norms
    )


def _freezable(survey: Survey, head: Collection[str]) -> set[str]:
    """Norms that constants can stand for.

    Not those behind a weight layer of a branch, where rule 2 sets the size, nor those behind the
    ``head`` (weights by name): it is 0, and a batch says nothing about its output.
    """
    sized = survey.branch_products | {use.node for use in survey.uses if use.weight in head}
    # A norm that is called twice is frozen only where both calls allow it: it has one scale.
    bound = {path for path, node in survey.norm_calls if sized & survey.behind(node)}
    return {path for path, _ in survey.norm_calls} - bound


def _norms_before_the_first_layer(survey: Survey, branch: FoundBranch) -> set[str]:
    """The norms between a branch's start and its first weight layer: their scale is on the whole
    branch.
    """
    trace = survey.trace
    entering = branch.layers[0].given
    return {
        path
        for path, node in survey.norm_calls
        if node in branch.inside
        and trace.depends(node, branch.start)  # not a norm on a signal from the side
        and trace.depends(entering, node)
    }


def _notes(
    survey: Survey, branches: Sequence[PlannedBranch], head: Sequence[Layer], keep_norms: bool
) -> list[str]:
    notes, outside = [], weights_outside(survey, head)
    if not survey.last_layers:
        notes.append("no weight layer follows the last branch: there is no head to be 0")
    if len(outside) > len(branches) and not keep_norms:
        notes.append(
            f"{len(outside)} weight layers lie outside the branches, more than there are branches; "
            "without norms nothing keeps the size of what they pass on"
        )
    notes += [
        f"{layer.weight} stays: what it gives is divided by its own length"
        for layer in survey.measured
    ]
    if not keep_norms and survey.normalising:
        places = list(dict.fromkeys(map(place_of, survey.normalising)))
        notes.append(
            f"normalisation is left where no layer does it alone: {', '.join(places[:3])}"
            + (f" and {len(places) - 3} more" if len(places) > 3 else "")
        )
    scales = sorted({name for branch in survey.branches for name in survey.scales(branch)})
    if scales:
        shown = ", ".join(scales[:3])
        notes.append(f"{len(scales)} parameters scale branches by a function of theirs: {shown}")
    returned = [branch.name for branch in survey.branches if branch.returned]
    if returned:
        notes.append(
            f"the network also returns what is computed within its branches ({returned[0]})"
        )
    rectified = [b.name or f"addition {n}" for n, b in enumerate(survey.branches) if b.rectified]
    if rectified:
        notes.append(
            "an activation that is 0 at 0 follows the last layers of "
            f"{', '.join(rectified[:3])}: they are scaled like the others and not 0"
        )
    notes += [f"not taken for a residual branch: {place}" for place in survey.near_joins()]
    layers = [layer for branch in branches for layer in branch.layers]
    functions = [layer.weight for layer in (*layers, *head) if not layer.unit]
    if functions:
        notes.append(
            f"{len(functions)} weights are used by functions, not by modules of their own: they "
            f"have no scalars ({', '.join(functions[:3])}, ...)"
        )
    return notes


def _check_covered(survey: Survey, allow: Sequence[str]) -> None:
    """Raise unless a rule covers every parameter of the branches, or none is needed."""
    refused: dict[str, str] = {}
    for branch in survey.branches:
        for node, names in survey.others(branch):
            for name in names:
                if not any(name == path or name.startswith(f"{path}.") for path in allow):
                    place = f"used by {operation(node)} in the residual branch {branch.name!r}"
                    refused.setdefault(name, place)
    if refused:
        first, place = next(iter(refused.items()))
        more = f", nor {len(refused) - 1} more parameters" if len(refused) > 1 else ""
        raise UserError(
            f"no rule covers {first}, {place}{more}: allow={list(refused)} leaves them as they are"
        )


def _check_functions(survey: Survey) -> None:
    """Raise unless all normalisation but that of gates is done by modules."""
    gates = {node for branch in survey.branches for node in branch.inside - branch.way}
    for node in survey.trace.nodes:
        if node in gates or node not in survey.trace.sources:
            continue
        if operation(node) in NORMALISING and not survey.trace.norms_of(node):
            raise UserError(
                f"{owner(node) or 'the network itself'} normalises by a function "
                f"({operation(node)}), which cannot be removed: make it a module, name its "
                "type in norm_types=, or leave all norms by keep_norms=True"
            )
