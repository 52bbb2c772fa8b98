"""The only writer of weights: ``fixup_init_``, and the standard initialisations it is held against.

Each makes a plan for every parameter of the built model, and only then writes: where it raises,
the model is as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor, nn

from fixup_core.convert.attach import PackedWeight, constants
from fixup_core.errors import UserError
from fixup_core.rules.branches import (
    WeightLayer,
    collect_branches,
    collect_classifiers,
    collect_last_norms,
    collect_standard_layers,
)
from fixup_core.rules.parametrised import plain_weights
from fixup_core.rules.report import FixupReport, Row
from fixup_core.rules.scalars import scalars
from fixup_core.rules.scaling import branch_scale
from fixup_core.rules.standards import (
    CONVOLUTIONS,
    HE_NORMAL,
    NORMS,
    ORTHOGONAL,
    TORCH_DEFAULT,
    Standard,
    standard_of,
)

Rule = Callable[[int, int], float]


@dataclass(frozen=True)
class _Entry:
    """What will be written into one parameter."""

    parameter: Tensor
    row: Row
    shape: str = "normal"
    constant: float | None = None
    zero_row: int | None = None


def fixup_init_(
    model: nn.Module,
    *,
    rule: Rule = branch_scale,
    zero: bool = True,
    keep: Iterable[nn.Parameter] = (),
    gains: Iterable[nn.Parameter] = (),
    generator: Generator | None = None,
) -> FixupReport:
    """Initialise ``model`` by the Fixup rules (Zhang et al. 2019, section 4).

    L and every m are counted from the branches that the blocks declare. The last layer of each
    branch and the classifier become 0, the other layers of a branch are drawn from their standard
    distribution times ``rule(L, m)``, layers outside the branches from their standard
    distribution, scalars get their initial value and bias vectors 0; what a batch has set
    (``fixup_``'s ``calibrate``) is gone. Everything is drawn anew, so a second call is harmless.

    Differs: a classifier that shares its weight with an embedding cannot be 0; it is drawn as
    the embedding it is, and the report says so.

    Args:
        model: Built, on any device, in any dtype.
        rule: ``rule(L, m)`` is the factor inside a branch; another function is an ablation.
        zero: Rule 1. False is an ablation: the last layer of a branch takes the factor of the
            others, the classifier PyTorch's own initialisation.
        keep: Parameters to leave as they are, such as pretrained embeddings.
        gains: Parameters that multiply element by element, such as layer scales: they start at 1.
        generator: Source of the random numbers; PyTorch's own by default.

    Returns:
        What was written, one row a parameter; ``str()`` of it is a table.

    Raises:
        UserError: A parameter that no rule covers (it is named), a model without branches, or a
            weight that lies in two branches. Nothing has been written then.
    """
    with plain_weights(model) as parametrised:
        kept = {id(parameter): parameter for parameter in keep}
        for module in parametrised:
            kept |= {id(parameter): parameter for parameter in module.plain(kept)}
        plan = _Plan(model, kept.values())
        if not plan.num_branches:
            raise UserError(
                f"{type(model).__name__} declares no residual branch: "
                "give its blocks a residual_branches() method"
            )
        plan.add_scalars()
        for gain in gains:
            plan._constant(gain, "gain", 1.0, 1.0)
        plan.add_branches(rule, zero)
        plan.add_classifiers(zero)
        plan.add_declared()
        plan.add_others()
        for module in parametrised:
            module.check(plan.entries)
        for constant in constants(model):
            constant.reset_()
        return plan.write_(generator)


def standard_init_(
    model: nn.Module,
    *,
    convolution: Standard = HE_NORMAL,
    zero_last_gains: bool = False,
    generator: Generator | None = None,
) -> FixupReport:
    """Initialise ``model`` as a network without Fixup is: what it is compared with.

    Convolutions and linear layers are drawn from ``convolution``, classifiers as PyTorch draws
    them, normalisation layers get gain 1, bias vectors 0.

    Args:
        model: Built, on any device, in any dtype.
        convolution: The distribution, He's or Xavier's.
        zero_last_gains: ZeroInit (Goyal et al. 2017, section 5.1): the normalisation layers that
            the blocks declare in ``last_norms()``, those that end a branch, get gain 0.
        generator: Source of the random numbers; PyTorch's own by default.

    Returns:
        What was written, one row a parameter.

    Raises:
        UserError: A parameter of a type that is not known, or ``zero_last_gains`` where no
            normalisation ends a branch. Nothing has been written then.
    """
    with plain_weights(model) as parametrised:
        plan = _Plan(model, ())
        plan.add_scalars()
        plan.add_norms(zero_last_gains)
        plan.add_classifiers(zero=False)
        plan.add_others(convolution)
        for module in parametrised:
            module.check(plan.entries)
        return plan.write_(generator)


def lsuv_init_(model: nn.Module, *args: Any, generator: Generator | None = None) -> FixupReport:
    """Layer-sequential unit-variance initialisation (Mishkin and Matas 2016, algorithm 1).

    Convolutions and linear layers are drawn orthonormal, then each is divided by the standard
    deviation of its output on one batch, in the order in which the data pass them.

    Differs: the paper repeats the division until the variance is within 0.1 of 1. A layer is linear
    but for its bias, the same number in all channels, which has no part in the variance: one
    division makes it 1, and one pass serves all layers.

    Args:
        model: Built; it is called once, in its present mode.
        args: The batch, as ``model`` takes it.
        generator: Source of the random numbers; PyTorch's own by default.

    Returns:
        What was written; the standard deviations are those after the division.
    """
    report = standard_init_(model, convolution=ORTHOGONAL, generator=generator)
    layers = [
        module for module in model.modules() if isinstance(module, (*CONVOLUTIONS, nn.Linear))
    ]

    def divide(module: Any, inputs: Any, output: Tensor) -> Tensor:
        std = output.std().clamp_min(torch.finfo(output.dtype).tiny)
        module.weight.div_(std)
        return module.forward(*inputs)

    hooks = [layer.register_forward_hook(divide) for layer in layers]
    try:
        with torch.no_grad():
            model(*args)
    finally:
        for hook in hooks:
            hook.remove()
    return _measured(model, report)


def draw_zero_heads_(heads: Iterable[nn.Module], *, generator: Generator | None = None) -> None:
    """Draw those of the layers whose weight is 0 as PyTorch does.

    For measurements on a network that rule 1 has just initialised: behind a head at 0 nothing but
    the head can move.
    """
    for head in heads:
        holder = head.module if isinstance(head, PackedWeight) else head
        with torch.no_grad(), plain_weights(holder):
            weight: Any = head.weight
            if not weight.any():
                row = Row("", "classifier", std=TORCH_DEFAULT.std(head))
                _write_(_Entry(weight, row, shape=TORCH_DEFAULT.shape), generator)


def _measured(model: nn.Module, report: FixupReport) -> FixupReport:
    parameters = dict(model.named_parameters())
    rows = tuple(
        row if row.value is not None else replace(row, std=parameters[row.name].std().item())
        for row in report.rows
    )
    return replace(report, rows=rows)


class _Plan:
    def __init__(self, model: nn.Module, keep: Iterable[nn.Parameter]) -> None:
        self.model = model
        self.branches = collect_branches(model)
        self.num_branches = len(self.branches)
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.kept = {id(p) for p in keep}
        self.entries: dict[int, _Entry] = {}

    def write_(self, generator: Generator | None) -> FixupReport:
        with torch.no_grad():
            for entry in self.entries.values():
                _write_(entry, generator)
        return FixupReport(self.num_branches, self.rows())

    def rows(self) -> tuple[Row, ...]:
        """In the order of the model's parameters."""
        rows = {key: entry.row for key, entry in self.entries.items()}
        rows |= {key: Row(self.names[key], "kept") for key in self.kept if key in self.names}
        return tuple(rows[key] for key in self.names)

    def add_scalars(self) -> None:
        for scalar in scalars(self.model):
            self._constant(scalar.weight, "scalar", scalar.initial_weight(), scalar.initial)

    def add_branches(self, rule: Rule, zero: bool) -> None:
        for branch in self.branches:
            m = branch.layers_per_branch
            depth = branch.assumed_num_branches or self.num_branches
            *scaled, last = branch.layers
            for layer in scaled if zero else branch.layers:
                factor = rule(depth, m)
                self._drawn(layer, "branch", branch=branch.name, m=m, L=depth, factor=factor)
            if zero:
                self._zero(last.module, "branch", branch=branch.name, m=m, L=depth, factor=0.0)

    def add_norms(self, zero_last_gains: bool) -> None:
        zeroed = {id(norm.weight) for norm in collect_last_norms(self.model)}
        if zero_last_gains and not zeroed:
            raise UserError(
                f"no branch of {type(self.model).__name__} ends with a normalisation layer, "
                "whose gain could start at 0"
            )
        for module in self.model.modules():
            if isinstance(module, NORMS) and module.weight is not None:
                gain = 0.0 if zero_last_gains and id(module.weight) in zeroed else 1.0
                self._constant(module.weight, "gain", gain, gain)
                self._bias(module, "gain")

    def add_classifiers(self, zero: bool) -> None:
        embeddings = {
            id(module.weight) for module in self.model.modules() if isinstance(module, nn.Embedding)
        }
        for module in collect_classifiers(self.model):
            if id(module.weight) in embeddings:
                self._drawn(WeightLayer(_embedding_of(self.model, module)), "tied output")
            elif zero:
                self._zero(module, "classifier")
            else:
                self._drawn(WeightLayer(module, TORCH_DEFAULT), "classifier")

    def add_declared(self) -> None:
        for layer in collect_standard_layers(self.model):
            self._drawn(layer, "standard")

    def add_others(self, standard: Standard | None = None) -> None:
        """Everything that is left; ``standard`` replaces the defaults of the types."""
        for module in filter(standard_of, self.model.modules()):
            role = "embedding" if isinstance(module, nn.Embedding) else "standard"
            if not self._done(id(module.weight)):
                chosen = None if isinstance(module, nn.Embedding) else standard
                self._drawn(WeightLayer(module, chosen), role)
            elif not self._done(id(getattr(module, "bias", None))):
                self._bias(module, role)
        missing = [n for key, n in self.names.items() if not self._done(key)]
        if missing:
            raise UserError(
                f"no rule covers the parameter(s) {', '.join(missing)}: declare them in "
                "residual_branches(), classifier_layers() or standard_layers() of their module, "
                "or pass them in keep="
            )

    def _done(self, key: int) -> bool:
        return key in self.entries or key in self.kept

    def _drawn(self, layer: WeightLayer, role: str, **where: Any) -> None:
        module, standard = layer.module, layer.standard or standard_of(layer.module)
        if standard is None:
            raise UserError(
                f"no standard initialisation is known for {type(module).__name__} "
                f"({self.names[id(module.weight)]}): name one in its WeightLayer"
            )
        self._weight(module, standard, role, where)
        self._bias(module, role)

    def _weight(self, module: Any, standard: Standard, role: str, where: dict[str, Any]) -> None:
        weight = module.weight
        std = standard.std(module) * where.get("factor", 1.0)
        row = Row(self.names[id(weight)], role, std=std, standard=standard.name, **where)
        padding = getattr(module, "padding_idx", None)
        self._add(_Entry(weight, row, shape=standard.shape, zero_row=padding))

    def _zero(self, module: Any, role: str, **where: Any) -> None:
        row = Row(self.names[id(module.weight)], role, std=0.0, **where)
        self._add(_Entry(module.weight, row, constant=0.0))
        self._bias(module, role)

    def _bias(self, module: Any, role: str) -> None:
        if getattr(module, "bias", None) is not None:
            value = getattr(module, "initial_bias", 0.0)
            self._constant(module.bias, f"{role} bias vector", value, value)

    def _constant(self, parameter: Tensor, role: str, stored: float, value: float) -> None:
        row = Row(self.names[id(parameter)], role, std=0.0, value=value)
        self._add(_Entry(parameter, row, constant=stored))

    def _add(self, entry: _Entry) -> None:
        key = id(entry.parameter)
        if key in self.kept:
            return
        if key in self.entries:
            raise UserError(
                f"{entry.row.name} would be written twice, as {self.entries[key].row.role} "
                f"and as {entry.row.role}: declare it once"
            )
        self.entries[key] = entry


def _embedding_of(model: nn.Module, classifier: nn.Module) -> nn.Module:
    return next(
        module
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module.weight is classifier.weight
    )


def _write_(entry: _Entry, generator: Generator | None) -> None:
    parameter, std = entry.parameter, entry.row.std
    if entry.constant is not None:
        parameter.fill_(entry.constant)
    elif entry.shape == "uniform":
        bound = math.sqrt(3) * std
        parameter.uniform_(-bound, bound, generator=generator)
    elif entry.shape == "orthogonal":
        # PyTorch's wants a contiguous matrix, which channels_last weights are not.
        drawn = torch.empty_like(parameter, memory_format=torch.contiguous_format)
        parameter.copy_(nn.init.orthogonal_(drawn, generator=generator))
    else:
        parameter.normal_(0.0, std, generator=generator)
    if entry.zero_row is not None:
        parameter[entry.zero_row].zero_()
