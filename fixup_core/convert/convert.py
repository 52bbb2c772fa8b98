"""``fixup_``: a network with normalisation made one without, by the rules of Fixup, in place.

The branches are found in the network's graph (``convert.joins``), or named. Everything is
planned before anything is changed; where ``fixup_`` raises, the network is as it was.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Generator, nn

from fixup_core.convert.attach import (
    Declared,
    attach_after_,
    attach_before_,
    attach_multiplier_,
)
from fixup_core.convert.calibration import calibrate_
from fixup_core.convert.plan import Branches, Plan, check, declared_plan, traced_plan
from fixup_core.convert.survey import Layer
from fixup_core.errors import UserError, one_line
from fixup_core.probing import Inputs
from fixup_core.rules.branches import (
    ResidualBranch,
    WeightLayer,
    collect_branches,
    collect_classifiers,
    collect_places,
)
from fixup_core.rules.frozen import RemovedNorm, frozen_norms
from fixup_core.rules.init import initialise_
from fixup_core.rules.methods import METHODS, Method, method_named
from fixup_core.rules.parametrised import plain_weights
from fixup_core.rules.report import ConversionReport, ConvertedBranch, InitReport
from fixup_core.rules.scalars import scalars
from fixup_core.rules.standards import CONVOLUTIONS, HE_PER_GROUP, NORMS, XAVIER_UNIFORM


def fixup_(
    net: nn.Module,
    *,
    example_inputs: Inputs | None = None,
    method: str | Method = "fixup",
    branches: Branches | None = None,
    head: str | bool | None = None,
    keep_norms: bool = False,
    norm_types: tuple[type[nn.Module], ...] = (),
    allow: Sequence[str] = (),
    calibrate: bool = False,
    generator: Generator | None = None,
    verbose: bool = True,
) -> ConversionReport:
    """Make ``net`` a Fixup network (Zhang et al. 2019, section 4), in place.

    Its residual branches are found; normalisation layers become the identity; scalars are
    attached: a bias before every weight layer of a branch, before the head and before every
    activation, a multiplier behind every branch; the weights in the branches are drawn anew by the
    rules, the last layer of each branch and the head are 0. Parameters that stay keep their names.
    What lies outside the branches (stem, projections, embeddings) stays as it is, as do gates.
    Parametrised weights (weight norm's) stay parametrised, and are given what the rules draw.

    Differs: m counts the layers whose product a branch is. In attention these are values and
    output, m = 2, where the paper counts queries and keys too, m = 4; with 4 one step's change
    grows with depth (docs/depth-check.md).

    Args:
        net: Any; with its scalars in the direct form (``param_groups`` gives them their rate).
        example_inputs: A batch as the network takes it: a tensor, a tuple of arguments or a mapping
            of named ones. It is traced with it, in training mode; no number is computed.
        method: Of the registry, one without norms that scales branches: "fixup" or an ablation.
        branches: Instead of tracing: for each branch the paths of its weight layers in order,
            ``{"block1": ["block1.conv1", "block1.conv2"]}``. A network whose modules have
            ``residual_branches()`` needs neither.
        head: Path of the output layer, where it is not the last weight layer; False for none.
        keep_norms: Leave the normalisation layers.
        norm_types: More types of normalisation layers than PyTorch's.
        allow: Paths of modules or parameters in branches that no rule covers, to be left as they
            are.
        calibrate: ``example_inputs`` are a batch of real data, and what the norms have done to it
            stays: the biases before weight layers start at minus the mean of what comes in, and
            norms outside the branches, or before a branch's first layer, become constants
            (``convert.calibration``). Not in the paper; data-dependent as LSUV is (Mishkin and
            Matas 2016), of scalars and constants only. Clip the gradients of such a network.
        generator: Source of the random numbers; PyTorch's own by default.
        verbose: Print the report.

    Returns:
        What was found and done; ``str()`` of it is a table.

    Raises:
        UserError: No branch, a branch of one weight layer, branches in branches, layers side by
            side, a weight that is frozen or used twice, a branch used elsewhere, a parameter that
            no rule covers, a parametrised weight that cannot take every value (spectral norm's), a
            network that cannot be traced, a method that is not for networks without norms. The
            network is as it was.
    """
    method = _without_norms(method)
    if any(scalars(net)):
        raise UserError(
            f"{type(net).__name__} has Fixup's scalars already: fixup_init_ draws it anew"
        )
    if calibrate and (example_inputs is None or keep_norms):
        raise UserError(
            "calibrate=True needs a batch of real data, example_inputs=, and norms to take away "
            "(keep_norms=False)"
        )
    norm_types = (*NORMS, *norm_types)
    with plain_weights(net) as parametrised:
        if branches is None and not collect_branches(net):
            plan = traced_plan(net, example_inputs, head, norm_types, keep_norms, allow)
        else:
            plan = declared_plan(net, branches, head)
        check(net, plan)
        written = {id(net.get_parameter(name)) for name in plan.written()}
        for module in parametrised:
            module.check(written)
        if not keep_norms:
            modules = net.named_modules(remove_duplicate=False)
            found = [path for path, module in modules if isinstance(module, norm_types)]
            plan.norms |= {path: plan.norms.get(path, False) for path in found}
        with _undone_if_it_fails(net, plan):
            _apply_(net, plan, method, calibrate)
            init = initialise_(
                net,
                method,
                keep=_kept(net, plan),
                gains=[net.get_parameter(name) for name in plan.gains],
                generator=generator,
            )
            if calibrate and example_inputs is not None:
                calibrate_(net, example_inputs, plan.before, plan.constant)
        report = _report(net, plan, method, init, calibrate)
    if verbose:
        print(report)
    return report


def _without_norms(method: str | Method) -> Method:
    """The record, of a method that ``fixup_`` can apply."""

    def fits(method: Method) -> bool:
        return method.norm is None and method.standard is None

    chosen = method_named(method)
    if not fits(chosen):
        known = ", ".join(m.name for m in METHODS.values() if fits(m))
        raise UserError(f"fixup_ cannot apply the method {chosen.name!r}; choose one of {known}")
    return chosen


def _apply_(net: nn.Module, plan: Plan, method: Method, calibrate: bool) -> None:
    replaced: dict[int, RemovedNorm] = {}
    frozen = {id(net.get_submodule(path)) for path in plan.constant if calibrate}
    weights = {id(layer): _weight_layer(net, layer) for layer in plan.layers()}
    for path, biased in plan.norms.items():
        norm = net.get_submodule(path)
        there = RemovedNorm(norm, biased=biased and method.biases, frozen=id(norm) in frozen)
        replaced.setdefault(id(norm), there)
        net.set_submodule(path, replaced[id(norm)])
    for module in net.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # a fast path past our scalars
    for path in plan.before if method.biases else ():
        attach_before_(net.get_submodule(path))
    if method.multiplier is not None:
        for path in plan.multiplied:
            attach_multiplier_(net.get_submodule(path), method.multiplier)
    for path in plan.after if method.biases else ():
        attach_after_(net.get_submodule(path))
    for added in (*scalars(net), *frozen_norms(net)):
        added.to(next(net.parameters()).device)
    if not collect_branches(net):
        net.residual_branches = Declared(  # type: ignore[assignment]
            ResidualBranch(name, tuple(weights[id(layer)] for layer in layers))
            for name, layers, _ in plan.branches
        )
    if not collect_classifiers(net):
        net.classifier_layers = Declared(  # type: ignore[assignment]
            weights[id(layer)] for layer in plan.head
        )


def _weight_layer(net: nn.Module, layer: Layer) -> WeightLayer:
    path, _, name = layer.weight.rpartition(".")
    module = net.get_submodule(path)
    if isinstance(module, nn.Embedding) and layer.unit:
        module = net.get_submodule(layer.unit)  # an output layer that shares it
    bias = layer.bias.rpartition(".")[2] if layer.bias else "bias" if name == "weight" else ""
    many = getattr(module, name).dim() > 2
    standard = HE_PER_GROUP if isinstance(module, CONVOLUTIONS) or many else XAVIER_UNIFORM
    return WeightLayer(module, name, bias, standard=standard, copies=layer.copies)


def _kept(net: nn.Module, plan: Plan) -> list[nn.Parameter]:
    drawn = {id(net.get_parameter(name)) for name in plan.written()}
    drawn |= {id(scalar.weight) for scalar in scalars(net)}
    tied = {id(m.weight) for m in net.modules() if isinstance(m, nn.Embedding)}
    return [p for p in net.parameters() if id(p) not in drawn or id(p) in tied]


def _report(
    net: nn.Module, plan: Plan, method: Method, init: InitReport, calibrate: bool
) -> ConversionReport:
    kept = {row.name for row in init.rows if row.role == "kept"}
    names = {id(p): name for name, p in net.named_parameters()}
    first = [place for place in collect_places(net) if place.position == 0]
    converted = []
    for (name, layers, gates), place in zip(plan.branches, first, strict=True):
        weights = tuple(layer.weight for layer in layers)
        m, factor = place.branch.layers_per_branch, method.factor(place)
        converted.append(ConvertedBranch(name, m, factor, weights, tuple(gates)))
    head = [layer.weight for layer in plan.head]
    tied = [name for name in head if names[id(net.get_parameter(name))] in kept]
    notes = [f"{name} is an embedding too and cannot be 0: it stays" for name in tied]
    if calibrate and not plan.constant:
        notes.append(
            "no norm was found that a constant could stand for: the batch set biases alone"
        )
    return ConversionReport(
        branches=tuple(converted),
        head=tuple(name for name in head if name not in tied),
        removed=tuple(plan.norms),
        frozen=tuple(p for p in plan.norms if calibrate and p in plan.constant),
        scalars=sum(1 for _ in scalars(net)),
        kept=tuple(row.name for row in init.rows if row.role == "kept"),
        notes=(*plan.notes, *notes),
        init=init,
    )


@contextlib.contextmanager
def _undone_if_it_fails(net: nn.Module, plan: Plan) -> Iterator[None]:
    """Put every module's parts and numbers back where what happens within this context raises."""
    parts = {module: dict(vars(module)) for module in net.modules()}
    inner = [d for own in parts.values() for d in own.values() if isinstance(d, dict)]
    copies = [d.copy() for d in inner]
    written = [net.get_parameter(name) for name in plan.written()]
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
