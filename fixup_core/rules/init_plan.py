"""What an initialisation will write: planned for every parameter, then written.

Where planning raises, the network is as it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor, nn

from fixup_core.errors import UserError
from fixup_core.rules.branches import (
    Place,
    WeightLayer,
    collect_branches,
    collect_classifiers,
    collect_last_norms,
    collect_places,
    collect_stack_embeddings,
    collect_standard_layers,
)
from fixup_core.rules.method import Method
from fixup_core.rules.norms import Pointwise
from fixup_core.rules.placed import channel_multipliers, placed_constants
from fixup_core.rules.report import InitReport, Row
from fixup_core.rules.scalars import scalars
from fixup_core.rules.standardised import standardised
from fixup_core.rules.standards import (
    NORMS,
    TORCH_DEFAULT,
    standard_of,
)


@dataclass(frozen=True)
class Entry:
    """What will be written into one parameter."""

    parameter: Tensor
    row: Row
    shape: str = "normal"
    constant: float | Tensor | None = None
    zero_row: int | None = None


class InitPlan:
    """What ``initialise_`` will write: an entry for every parameter of ``net``."""

    def __init__(self, net: nn.Module, method: Method, keep: Iterable[nn.Parameter]) -> None:
        self.net, self.method = net, method
        self.num_branches = len(collect_branches(net))
        self.names = {id(p): name for name, p in net.named_parameters()}
        self.kept = {id(p) for p in keep}
        self.entries: dict[int, Entry] = {}
        self.places = collect_places(net)
        self.stacks = collect_stack_embeddings(net)

    def write_(self, generator: Generator | None) -> InitReport:
        with torch.no_grad():
            self._write_constants_()
            for entry in self.entries.values():
                write_(entry, generator)
        return InitReport(self.num_branches, self._rows(), self.method.name)

    def _write_constants_(self) -> None:
        """Each for the branch that has it; one that no branch names knows the depth alone."""
        place_of = {
            id(constant): place
            for place in reversed(self.places)
            for constant in placed_constants(*place.branch.parts)
        }
        for constant in placed_constants(self.net) if self.places else ():
            constant.write_(place_of.get(id(constant), self.places[0]))

    def _rows(self) -> tuple[Row, ...]:
        """In the order of the network's parameters."""
        rows = {key: entry.row for key, entry in self.entries.items()}
        rows |= {key: Row(self.names[key], "kept") for key in self.kept if key in self.names}
        return tuple(rows[key] for key in self.names)

    def add_everything(self, gains: Iterable[nn.Parameter]) -> None:
        """Plan all parameters; the order is that of the random draws."""
        if self.method.needs_branches and not self.num_branches:
            raise UserError(
                f"{type(self.net).__name__} declares no residual branch: "
                "give its blocks a residual_branches() method"
            )
        if self.method.depth_rule() and not any(placed_constants(self.net)):
            raise UserError(
                f"{type(self.net).__name__} has no fixed multipliers, which the method "
                f"{self.method.name!r} puts on its branches: build it by "
                "Method.branch_multiplier(), or convert it by fixup_"
            )
        for scalar in scalars(self.net):
            self._constant(scalar.weight, "scalar", scalar.initial_weight(), scalar.initial)
        for gain in (*gains, *(part.gain for part in standardised(self.net))):
            self._constant(gain, "gain", 1.0, 1.0)
        for place in self.places:
            self._add_vectors(place)
        if self.method.norm is not None:
            self._add_norms()
        # A method with one distribution for all layers knows no branch.
        if self.method.standard is None:
            self._add_branches()
        self._add_classifiers()
        if self.method.standard is None:
            for layer in collect_standard_layers(self.net):
                self._drawn(layer, "standard")
        self._add_others()

    def _add_branches(self) -> None:
        for place in self.places:
            where = {
                "branch": place.branch.name,
                "m": place.branch.layers_per_branch,
                "L": place.num_branches,
            }
            if place.last and self.method.zero_last:
                self._zero(place.layer, "branch", factor=0.0, **where)
            else:
                factor = self.method.weight_factor(place)
                self._drawn(place.layer, "branch", factor=factor, **where)

    def _add_vectors(self, place: Place) -> None:
        """The vectors on a branch and on its shortcut, once for each branch."""
        for vector in channel_multipliers(*place.branch.parts) if place.position == 0 else ():
            start = vector.start(place)
            self._constant(vector.weight, "gain", start, start)

    def _add_norms(self) -> None:
        zeroed = {id(norm.weight) for norm in collect_last_norms(self.net)}
        if self.method.zero_last_gains and not zeroed:
            raise UserError(
                f"no branch of {type(self.net).__name__} ends with a normalisation layer, "
                "whose gain could start at 0"
            )
        for module in self.net.modules():
            known: Any = module
            if isinstance(module, (*NORMS, Pointwise)) and known.weight is not None:
                zero = self.method.zero_last_gains and id(known.weight) in zeroed
                gain = 0.0 if zero else 1.0
                self._constant(known.weight, "gain", gain, gain)
                self._bias(WeightLayer(module), "gain")
            if isinstance(module, Pointwise):
                for parameter, start in module.starts():
                    self._constant(parameter, "gain", start, start)

    def _add_classifiers(self) -> None:
        embeddings = [m for m in self.net.modules() if isinstance(m, nn.Embedding)]
        for layer in collect_classifiers(self.net):
            tied = [m for m in embeddings if m.weight is layer.parameter]
            if tied:
                embedding = WeightLayer(tied[0])
                self._drawn(embedding, "tied output", **self._embedding_factor(embedding))
            elif self.method.zero_head:
                self._zero(layer, "classifier")
            else:
                standard = layer.standard or TORCH_DEFAULT
                self._drawn(replace(layer, standard=standard), "classifier")

    def _add_others(self) -> None:
        """Everything that is left."""
        for module in filter(standard_of, self.net.modules()):
            embedding = isinstance(module, nn.Embedding)
            role = "embedding" if embedding else "standard"
            layer = WeightLayer(module, standard=None if embedding else self.method.standard)
            if id(layer.parameter) not in self.names:
                continue  # a hook computes it from parameters of other names
            if not self._done(id(layer.parameter)):
                self._drawn(layer, role, **self._embedding_factor(layer))
            elif not self._done(id(layer.bias_vector)):
                self._bias(layer, role)
        missing = [n for key, n in self.names.items() if not self._done(key)]
        if missing:
            raise UserError(
                f"no rule covers the parameter(s) {', '.join(missing)}: declare them in "
                "residual_branches(), classifier_layers() or standard_layers() of their module, "
                "or pass them in keep="
            )

    def _embedding_factor(self, layer: WeightLayer) -> dict[str, float]:
        """What the report says of the embeddings that a stack begins with."""
        stacks = self.stacks.get(id(layer.parameter))
        if stacks is None or not self.places:
            return {}
        factor = self.method.embedding_factor(stacks, self.places[0])
        return {} if factor is None else {"factor": factor}

    def _done(self, key: int) -> bool:
        return key in self.entries or key in self.kept

    def _drawn(self, layer: WeightLayer, role: str, **where: Any) -> None:
        weight, module = layer.parameter, layer.module
        standard = layer.standard or standard_of(module)
        if standard is None:
            raise UserError(
                f"no standard initialisation is known for {type(module).__name__} "
                f"({self.names[id(weight)]}): name one in its WeightLayer"
            )
        std = standard.std(weight, module) * where.get("factor", 1.0)
        row = Row(self.names[id(weight)], role, std=std, standard=standard.name, **where)
        padding = getattr(module, "padding_idx", None)
        self._add(Entry(weight, row, shape=standard.shape, zero_row=padding))
        self._bias(layer, role)

    def _zero(self, layer: WeightLayer, role: str, **where: Any) -> None:
        row = Row(self.names[id(layer.parameter)], role, std=0.0, **where)
        self._add(Entry(layer.parameter, row, constant=0.0))
        self._bias(layer, role)

    def _bias(self, layer: WeightLayer, role: str) -> None:
        bias = layer.bias_vector
        if bias is not None:
            start: Any = getattr(layer.module, "initial_bias", 0.0)
            value = start.mean().item() if isinstance(start, Tensor) else start
            self._constant(bias, f"{role} bias vector", start, value)

    def _constant(self, parameter: Tensor, role: str, stored: float | Tensor, value: float) -> None:
        row = Row(self.names[id(parameter)], role, std=0.0, value=value)
        self._add(Entry(parameter, row, constant=stored))

    def _add(self, entry: Entry) -> None:
        key = id(entry.parameter)
        if key in self.kept:
            return
        if key in self.entries:
            raise UserError(
                f"{entry.row.name} would be written twice, as {self.entries[key].row.role} "
                f"and as {entry.row.role}: declare it once"
            )
        self.entries[key] = entry


def write_(entry: Entry, generator: Generator | None) -> None:
    parameter, std = entry.parameter, entry.row.std
    if entry.constant is not None:
        parameter.copy_(torch.as_tensor(entry.constant))
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
