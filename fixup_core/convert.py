"""``fixup_``: a network with normalisation made one without, by the rules of Fixup, in place.

The branches are found in the network's graph (``fixup_core.residual``), or named. Everything is
planned before anything is changed; where ``fixup_`` raises, the network is as it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, nn

from fixup_core.attached import (
    Declared,
    NoNorm,
    PackedWeight,
    attach_after_,
    attach_before_,
    attach_multiplier_,
)
from fixup_core.branches import ResidualBranch, WeightLayer, collect_branches, collect_classifiers
from fixup_core.errors import UserError, one_line
from fixup_core.init import fixup_init_
from fixup_core.report import ConversionReport, ConvertedBranch
from fixup_core.scalars import scalars
from fixup_core.scaling import branch_scale
from fixup_core.standards import CONVOLUTIONS, HE_PER_GROUP, NORMS, XAVIER_UNIFORM
from fixup_core.survey import Layer, Survey
from fixup_core.tracing import Inputs

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
        notes: What the user should know.
    """

    branches: list[tuple[str, list[Layer], list[str]]] = field(default_factory=list)
    head: list[Layer] = field(default_factory=list)
    gains: list[str] = field(default_factory=list)
    before: list[str] = field(default_factory=list)
    multiplied: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    norms: dict[str, bool] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def fixup_(
    network: nn.Module,
    *,
    example_inputs: Inputs | None = None,
    branches: Branches | None = None,
    head: str | bool | None = None,
    keep_norms: bool = False,
    norms: tuple[type[nn.Module], ...] = (),
    allow: Sequence[str] = (),
    rule: Callable[[int, int], float] = branch_scale,
    generator: Generator | None = None,
    verbose: bool = True,
) -> ConversionReport:
    """Make ``network`` a Fixup network (Zhang et al. 2019, section 4), in place.

    Its residual branches are found; normalisation layers become the identity; scalars are
    attached: a bias before every weight layer of a branch, before the head and before every
    activation, a multiplier behind every branch; the weights in the branches are drawn anew by the
    rules, the last layer of each branch and the head are 0. Parameters that stay keep their names.
    What lies outside the branches (stem, projections, embeddings) stays as it is, as do gates.

    Differs: m counts the layers whose product a branch is. In attention these are values and
    output, m = 2, where the paper counts queries and keys too, m = 4; with 4 one step's change
    grows with depth (docs/depth-check.md).

    Args:
        network: Any; with its scalars in the direct form (``param_groups`` gives them their rate).
        example_inputs: A batch as the network takes it: a tensor, a tuple of arguments or a mapping
            of named ones. It is traced with it, in training mode; no number is computed.
        branches: Instead of tracing: for each branch the paths of its weight layers in order,
            ``{"block1": ["block1.conv1", "block1.conv2"]}``. A network whose modules have
            ``residual_branches()`` needs neither.
        head: Path of the output layer, where it is not the last weight layer; False for none.
        keep_norms: Leave the normalisation layers.
        norms: More types of normalisation layers than PyTorch's.
        allow: Paths of modules or parameters in branches that no rule covers, to be left as they
            are.
        rule: ``rule(L, m)`` is the factor inside a branch.
        generator: Source of the random numbers; PyTorch's own by default.
        verbose: Print the report.

    Returns:
        What was found and done; ``str()`` of it is a table.

    Raises:
        UserError: No branch, a branch of one weight layer, branches in branches, layers side by
            side, a weight that is frozen or used twice, a branch used elsewhere, a parameter that
            no rule covers, a network that cannot be traced. The network is as it was.
    """
    if any(scalars(network)):
        raise UserError(
            f"{type(network).__name__} has Fixup's scalars already: fixup_init_ draws it anew"
        )
    kinds = (*NORMS, *norms)
    if branches is None and not collect_branches(network):
        plan = _traced_plan(network, example_inputs, head, kinds, keep_norms, allow)
    else:
        plan = _declared_plan(network, branches, head)
    _check(network, plan)
    if not keep_norms:
        found = network.named_modules(remove_duplicate=False)
        plan.norms |= {p: plan.norms.get(p, False) for p, m in found if isinstance(m, kinds)}
    with _undone_if_it_fails(network, plan):
        _apply_(network, plan)
        init = fixup_init_(
            network,
            rule=rule,
            keep=_kept(network, plan),
            gains=[network.get_parameter(name) for name in plan.gains],
            generator=generator,
        )
    report = _report(network, plan, init, rule)
    if verbose:
        print(report)
    return report


def _traced_plan(
    network: nn.Module,
    inputs: Inputs | None,
    head: str | bool | None,
    kinds: tuple[type[nn.Module], ...],
    keep_norms: bool,
    allow: Sequence[str],
) -> Plan:
    if inputs is None:
        raise UserError("give fixup_ a batch, example_inputs=, or name the branches= yourself")
    survey = Survey(network, inputs, kinds, keep_norms, allow)
    plan = Plan(gains=survey.gains(), notes=_notes(survey, keep_norms))
    for number, found in enumerate(survey.branches, start=1):
        layers, name = survey.layers(found), found.name or f"addition {number}"
        plan.branches.append((name, layers, [use.weight for use in found.gates]))
        plan.before += [layer.unit for layer in layers if layer.unit and layer.enters]
        if layers[-1].unit:
            plan.multiplied.append(layers[-1].unit)
    plan.head = _named_head(network, head) if head is not None else survey.head()
    plan.before += [layer.unit for layer in plan.head if layer.unit]
    survey.place_activation_biases(plan.after, plan.norms)
    plan.before, plan.after = _once(plan.before), _once(plan.after)
    return plan


def _notes(survey: Survey, keep_norms: bool) -> list[str]:
    notes, outside = [], survey.outside()
    if not survey.head():
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


def _declared_plan(network: nn.Module, branches: Branches | None, head: Any) -> Plan:
    plan = Plan()
    if branches is None:
        paths = {id(module): path for path, module in network.named_modules()}
        found = {b.name: [paths[id(w.module)] for w in b.layers] for b in collect_branches(network)}
    else:
        found = {name: list(layers) for name, layers in branches.items()}
    for name, layers in found.items():
        if len(layers) < 2:
            raise UserError(
                f"the branch {name!r} has {len(layers)} weight layer(s): rule 2 is for two or more"
            )
        plan.branches.append((name, [_layer_at(network, path) for path in layers], []))
        plan.before += layers
        plan.after += layers[:-1]
        plan.multiplied.append(layers[-1])
    declared = list(collect_classifiers(network))
    if head is None and declared:
        paths = {id(module): path for path, module in network.named_modules()}
        plan.head = [_layer_at(network, paths[id(layer)]) for layer in declared]
    elif head is None:
        raise UserError("name the output layer by head=, or say head=False: there is none")
    else:
        plan.head = _named_head(network, head)
    plan.before += [layer.unit for layer in plan.head if layer.unit]
    return plan


def _check(network: nn.Module, plan: Plan) -> None:
    """Raise unless every weight has one place, and may be written."""
    owner: dict[int, str] = {}
    places = [(f"the branch {name!r}", layers) for name, layers, _ in plan.branches]
    for place, layers in [*places, ("the head", plan.head)]:
        for layer in layers:
            weight = network.get_parameter(layer.weight)
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


def _named_head(network: nn.Module, head: str | bool) -> list[Layer]:
    return [] if head is False else [_layer_at(network, str(head))]


def _layer_at(network: nn.Module, path: str) -> Layer:
    try:
        module = network.get_submodule(path)
    except AttributeError as error:
        raise UserError(f"{type(network).__name__} has no module {path!r}") from error
    if not isinstance(getattr(module, "weight", None), nn.Parameter):
        raise UserError(f"{path!r} ({type(module).__name__}) has no weight of its own")
    bias = f"{path}.bias" if getattr(module, "bias", None) is not None else None
    return Layer(f"{path}.weight", bias, path)


def _apply_(network: nn.Module, plan: Plan) -> None:
    replaced: dict[int, NoNorm] = {}
    weights = {id(layer): _weight_layer(network, layer) for layer in _layers(plan)}
    for path, shifted in plan.norms.items():
        norm = network.get_submodule(path)
        replaced.setdefault(id(norm), NoNorm(norm, shifted=shifted))
        network.set_submodule(path, replaced[id(norm)])
    for module in network.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # a fast path past our scalars
    for paths, attach_ in (
        (plan.before, attach_before_),
        (plan.multiplied, attach_multiplier_),
        (plan.after, attach_after_),
    ):
        for path in paths:
            attach_(network.get_submodule(path))
    if not collect_branches(network):
        network.residual_branches = Declared(  # type: ignore[assignment]
            ResidualBranch(name, tuple(weights[id(layer)] for layer in layers))
            for name, layers, _ in plan.branches
        )
    if not collect_classifiers(network):
        network.classifier_layers = Declared(  # type: ignore[assignment]
            weights[id(layer)].module for layer in plan.head
        )


def _layers(plan: Plan) -> list[Layer]:
    return [layer for _, layers, _ in plan.branches for layer in layers] + plan.head


def _weight_layer(network: nn.Module, layer: Layer) -> WeightLayer:
    path, _, name = layer.weight.rpartition(".")
    module: Any = network.get_submodule(path)
    if isinstance(module, nn.Embedding) and layer.unit:
        module = network.get_submodule(layer.unit)  # an output layer that shares it
    if name != "weight":
        bias = layer.bias.rpartition(".")[2] if layer.bias else None
        module = PackedWeight(module, name, bias)
    many = module.weight.dim() > 2
    standard = HE_PER_GROUP if isinstance(module, CONVOLUTIONS) or many else XAVIER_UNIFORM
    return WeightLayer(module, standard, layer.copies)


def _kept(network: nn.Module, plan: Plan) -> list[nn.Parameter]:
    written = {name for layer in _layers(plan) for name in (layer.weight, layer.bias)}
    written |= set(plan.gains)
    drawn = {id(network.get_parameter(name)) for name in written if name}
    drawn |= {id(scalar.weight) for scalar in scalars(network)}
    tied = {id(m.weight) for m in network.modules() if isinstance(m, nn.Embedding)}
    return [p for p in network.parameters() if id(p) not in drawn or id(p) in tied]


def _report(network: nn.Module, plan: Plan, init: Any, rule: Any) -> ConversionReport:
    kept = {row.name for row in init.rows if row.role == "kept"}
    names = {id(p): name for name, p in network.named_parameters()}
    num_branches = len(plan.branches)
    converted = []
    for name, layers, gates in plan.branches:
        m = sum(layer.copies for layer in layers)
        weights = tuple(layer.weight for layer in layers)
        converted.append(ConvertedBranch(name, m, rule(num_branches, m), weights, tuple(gates)))
    head = [layer.weight for layer in plan.head]
    tied = [name for name in head if names[id(network.get_parameter(name))] in kept]
    notes = [f"{name} is an embedding too and cannot be 0: it stays" for name in tied]
    return ConversionReport(
        branches=tuple(converted),
        head=tuple(name for name in head if name not in tied),
        removed=tuple(plan.norms),
        scalars=sum(1 for _ in scalars(network)),
        kept=tuple(row.name for row in init.rows if row.role == "kept"),
        notes=(*plan.notes, *notes),
        init=init,
    )


@contextlib.contextmanager
def _undone_if_it_fails(network: nn.Module, plan: Plan) -> Iterator[None]:
    """Put every module's parts and numbers back where what happens within this context raises."""
    parts = {module: dict(vars(module)) for module in network.modules()}
    inner = [d for own in parts.values() for d in own.values() if isinstance(d, dict)]
    copies = [d.copy() for d in inner]
    names = [*(name for layer in _layers(plan) for name in (layer.weight, layer.bias)), *plan.gains]
    written = [network.get_parameter(name) for name in names if name]
    numbers = [parameter.detach().clone() for parameter in written]
    try:
        yield
    except BaseException as error:
        for module, own in parts.items():
            vars(module).clear()
            vars(module).update(own)
        for here, copied in zip(inner, copies, strict=True):
            here.clear()
            here.update(copied)
        with torch.no_grad():
            for parameter, before in zip(written, numbers, strict=True):
                parameter.copy_(before)
        if type(error) is ValueError:  # of an initialiser
            raise UserError(one_line(str(error))) from error
        raise


def _once(paths: list[str]) -> list[str]:
    return list(dict.fromkeys(paths))
