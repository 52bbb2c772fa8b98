"""What ``fixup_`` will do to a network, made before anything is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fixup_core.convert.survey import Layer, Survey
from fixup_core.errors import UserError
from fixup_core.probing import Inputs, modules_named
from fixup_core.rules.branches import collect_branches, collect_classifiers

Branches = Mapping[str, Sequence[str]]


@dataclass
class Plan:
    """What will be done to a network; modules by their paths.

    Attributes:
        branches: Name, layers in order and gates of each residual branch.
        head: The layers whose outputs are the network's.
        gains: Parameters that multiply a branch element by element.
        before: Modules that get a scalar bias on their input.
        multiplied: Modules that get a multiplier on their output.
        after: Modules that get a scalar bias on their output.
        norms: Normalisation layers to be removed, and whether a scalar bias takes their place.
        constant: Those among them that one batch can make constants, each with the modules whose
            multipliers make up for it, where it starts branches.
        notes: What the user should know.
    """

    branches: list[tuple[str, list[Layer], list[str]]] = field(default_factory=list)
    head: list[Layer] = field(default_factory=list)
    gains: list[str] = field(default_factory=list)
    before: list[str] = field(default_factory=list)
    multiplied: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    norms: dict[str, bool] = field(default_factory=dict)
    constant: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def layers(self) -> list[Layer]:
        """Those of the branches, then the head's."""
        return [layer for _, layers, _ in self.branches for layer in layers] + self.head

    def written(self) -> list[str]:
        """Names of the parameters that will be written."""
        names = [name for layer in self.layers() for name in (layer.weight, layer.bias)]
        return [name for name in names if name] + self.gains


def traced_plan(
    net: nn.Module,
    inputs: Inputs | None,
    head: str | bool | None,
    norm_types: tuple[type[nn.Module], ...],
    keep_norms: bool,
    allow: Sequence[str],
) -> Plan:
    """What the network's graph asks for; the arguments are those of ``fixup_``."""
    if inputs is None:
        raise UserError("give fixup_ a batch, example_inputs=, or name the branches= yourself")
    survey = Survey(net, inputs, norm_types, keep_norms, allow)
    plan = Plan(gains=survey.gains(), notes=_notes(survey, keep_norms))
    for number, found in enumerate(survey.branches, start=1):
        layers, name = survey.layers(found), found.name or f"addition {number}"
        plan.branches.append((name, layers, [use.weight for use in found.gates]))
        plan.before += [layer.unit for layer in layers if layer.unit and layer.enters]
        if layers[-1].unit:
            plan.multiplied.append(layers[-1].unit)
    plan.head = _named_head(net, head) if head is not None else survey.head
    plan.before += [layer.unit for layer in plan.head if layer.unit]
    survey.place_activation_biases(plan.after, plan.norms)
    plan.constant = survey.free_norms({layer.weight for layer in plan.head})
    plan.before, plan.after = list(dict.fromkeys(plan.before)), list(dict.fromkeys(plan.after))
    return plan


def _notes(survey: Survey, keep_norms: bool) -> list[str]:
    notes, outside = [], survey.outside()
    if not survey.head:
        notes.append("no weight layer follows the last branch: there is no head to be 0")
    if len(outside) > len(survey.branches) and not keep_norms:
        notes.append(
            f"{len(outside)} weight layers lie outside the branches, more than there are branches; "
            "without norms nothing keeps the size of what they pass on"
        )
    notes += [f"not taken for a residual branch: {place}" for place in survey.near_joins()]
    functions = survey.by_function()
    if functions:
        notes.append(
            f"{len(functions)} weights are used by functions, not by modules of their own: they "
            f"have no scalars ({', '.join(functions[:3])}, ...)"
        )
    return notes


def declared_plan(net: nn.Module, branches: Branches | None, head: Any) -> Plan:
    """What is named, by the user or by the network's own ``residual_branches()``."""
    plan = Plan()
    paths = {id(module): path for path, module in net.named_modules()}
    if branches is None:
        found = {b.name: [paths[id(w.module)] for w in b.layers] for b in collect_branches(net)}
    else:
        found = {name: list(layers) for name, layers in branches.items()}
    for name, layers in found.items():
        if len(layers) < 2:
            raise UserError(
                f"the branch {name!r} has {len(layers)} weight layer(s): rule 2 is for two or more"
            )
        plan.branches.append((name, [_layer_at(net, path) for path in layers], []))
        plan.before += layers
        plan.after += layers[:-1]
        plan.multiplied.append(layers[-1])
    declared = collect_classifiers(net)
    if head is None and declared:
        plan.head = [_layer_at(net, paths[id(layer.module)]) for layer in declared]
    elif head is None:
        raise UserError("name the output layer by head=, or say head=False: there is none")
    else:
        plan.head = _named_head(net, head)
    plan.before += [layer.unit for layer in plan.head if layer.unit]
    return plan


def check(net: nn.Module, plan: Plan) -> None:
    """Raise unless every weight has one place, and may be written."""
    owner: dict[int, str] = {}
    places = [(f"the branch {name!r}", layers) for name, layers, _ in plan.branches]
    for place, layers in [*places, ("the head", plan.head)]:
        for layer in layers:
            weight = net.get_parameter(layer.weight)
            if id(weight) in owner:
                raise UserError(
                    f"{layer.weight} lies in {owner[id(weight)]} and in {place}: the rules are for "
                    "weights of their own"
                )
            owner[id(weight)] = place
            if not weight.requires_grad:
                raise UserError(
                    f"{layer.weight} is frozen, and would be written: let it learn "
                    "(requires_grad), or leave its block out by naming the others in branches="
                )


def _named_head(net: nn.Module, head: str | bool) -> list[Layer]:
    return [] if head is False else [_layer_at(net, str(head))]


def _layer_at(net: nn.Module, path: str) -> Layer:
    module = next(iter(modules_named(net, [path])))
    if not isinstance(getattr(module, "weight", None), nn.Parameter):
        raise UserError(f"{path!r} ({type(module).__name__}) has no weight of its own")
    bias = f"{path}.bias" if getattr(module, "bias", None) is not None else None
    return Layer(f"{path}.weight", bias, path)
