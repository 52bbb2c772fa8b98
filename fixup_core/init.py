"""``fixup_init_``: the only writer of weights.

It makes a plan for every parameter of the built model, and only then writes: where it raises,
the model is as it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from fixup_core.branches import (
    WeightLayer,
    collect_branches,
    collect_classifiers,
    collect_standard_layers,
)
from fixup_core.report import FixupReport, Row
from fixup_core.scalars import scalars
from fixup_core.scaling import branch_scale
from fixup_core.standards import Standard, standard_of

Rule = Callable[[int, int], float]


@dataclass(frozen=True)
class _Entry:
    """What will be written into one parameter."""

    parameter: Tensor
    row: Row
    uniform: bool = False
    constant: float | None = None
    zero_row: int | None = None


def fixup_init_(
    model: nn.Module,
    *,
    rule: Rule = branch_scale,
    keep: Iterable[nn.Parameter] = (),
    generator: Generator | None = None,
) -> FixupReport:
    """Initialise ``model`` by the Fixup rules (Zhang et al. 2019, section 4).

    L and every m are counted from the branches that the blocks declare. The last layer of each
    branch and the classifier become 0, the other layers of a branch are drawn from their standard
    distribution times ``rule(L, m)``, layers outside the branches from their standard
    distribution, scalars get their initial value and bias vectors 0. Everything is drawn anew, so a
    second call is harmless.

    Differs: a classifier that shares its weight with an embedding cannot be 0; it is drawn as
    the embedding it is, and the report says so.

    Args:
        model: Built, on any device, in any dtype.
        rule: ``rule(L, m)`` is the factor inside a branch; another function is an ablation.
        keep: Parameters to leave as they are, such as pretrained embeddings.
        generator: Source of the random numbers; PyTorch's own by default.

    Returns:
        What was written, one row a parameter; ``str()`` of it is a table.

    Raises:
        ValueError: A parameter that no rule covers (it is named), a model without branches, or a
            weight that lies in two branches. Nothing has been written then.
    """
    plan = _Plan(model, rule, keep)
    plan.add_scalars()
    plan.add_branches()
    plan.add_classifiers()
    plan.add_others()
    with torch.no_grad():
        for entry in plan.entries.values():
            _write_(entry, generator)
    return FixupReport(plan.num_branches, plan.rows())


class _Plan:
    def __init__(self, model: nn.Module, rule: Rule, keep: Iterable[nn.Parameter]) -> None:
        self.model, self.rule = model, rule
        self.branches = collect_branches(model)
        if not self.branches:
            raise ValueError(
                f"{type(model).__name__} declares no residual branch: "
                "give its blocks a residual_branches() method"
            )
        self.num_branches = len(self.branches)
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.kept = {id(p) for p in keep}
        self.entries: dict[int, _Entry] = {}

    def rows(self) -> tuple[Row, ...]:
        """In the order of the model's parameters."""
        kept = {key: Row(self.names[key], "kept") for key in self.kept if key in self.names}
        written = {key: entry.row for key, entry in self.entries.items()}
        return tuple((written | kept)[key] for key in self.names)

    def add_scalars(self) -> None:
        for scalar in scalars(self.model):
            self._constant(scalar.weight, "scalar", scalar.initial_weight(), scalar.initial)

    def add_branches(self) -> None:
        for branch in self.branches:
            m = branch.layers_per_branch
            depth = branch.assumed_num_branches or self.num_branches
            *scaled, last = branch.layers
            for layer in scaled:
                factor = self.rule(depth, m)
                self._drawn(layer, "branch", branch=branch.name, m=m, L=depth, factor=factor)
            self._zero(last.module, "branch", branch=branch.name, m=m, L=depth, factor=0.0)

    def add_classifiers(self) -> None:
        embeddings = {
            id(module.weight) for module in self.model.modules() if isinstance(module, nn.Embedding)
        }
        for module in collect_classifiers(self.model):
            if id(module.weight) in embeddings:
                self._drawn(WeightLayer(_embedding_of(self.model, module)), "tied output")
            else:
                self._zero(module, "classifier")

    def add_others(self) -> None:
        for layer in collect_standard_layers(self.model):
            self._drawn(layer, "standard")
        for module in filter(standard_of, self.model.modules()):
            role = "embedding" if isinstance(module, nn.Embedding) else "standard"
            if not self._done(id(module.weight)):
                self._drawn(WeightLayer(module), role)
            elif not self._done(id(getattr(module, "bias", None))):
                self._bias(module, role)
        missing = [n for key, n in self.names.items() if not self._done(key)]
        if missing:
            raise ValueError(
                f"no rule covers the parameter(s) {', '.join(missing)}: declare them in "
                "residual_branches(), classifier_layers() or standard_layers() of their module, "
                "or pass them in keep="
            )

    def _done(self, key: int) -> bool:
        return key in self.entries or key in self.kept

    def _drawn(self, layer: WeightLayer, role: str, **where: Any) -> None:
        module, standard = layer.module, layer.standard or standard_of(layer.module)
        if standard is None:
            raise ValueError(
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
        self._add(_Entry(weight, row, uniform=standard.uniform, zero_row=padding))

    def _zero(self, module: Any, role: str, **where: Any) -> None:
        row = Row(self.names[id(module.weight)], role, std=0.0, **where)
        self._add(_Entry(module.weight, row, constant=0.0))
        self._bias(module, role)

    def _bias(self, module: Any, role: str) -> None:
        if getattr(module, "bias", None) is not None:
            self._constant(module.bias, f"{role} bias vector", 0.0, 0.0)

    def _constant(self, parameter: Tensor, role: str, stored: float, value: float) -> None:
        row = Row(self.names[id(parameter)], role, std=0.0, value=value)
        self._add(_Entry(parameter, row, constant=stored))

    def _add(self, entry: _Entry) -> None:
        key = id(entry.parameter)
        if key in self.kept:
            return
        if key in self.entries:
            raise ValueError(
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
    elif entry.uniform:
        bound = math.sqrt(3) * std
        parameter.uniform_(-bound, bound, generator=generator)
    else:
        parameter.normal_(0.0, std, generator=generator)
    if entry.zero_row is not None:
        parameter[entry.zero_row].zero_()
