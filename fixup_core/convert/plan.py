"""What ``fixup_`` will do to a network: made before anything is done, and not changed after."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from fixup_core.convert.norms import norm_paths
from fixup_core.convert.survey import Layer
from fixup_core.errors import UserError
from fixup_core.probing import modules_named
from fixup_core.rules.branches import WeightLayer, collect_branches, collect_classifiers

Branches = Mapping[str, Sequence[str]]
Head = str | Literal[False] | None


@dataclass(frozen=True)
class PlannedBranch:
    """A residual branch.

    Attributes:
        name: Of the module that adds it.
        layers: In the order of the forward pass.
        gates: Names of weights in it that do not multiply it.
        m: Of the rules, where layers stand side by side; 0: all layers.
        zero: Its last layers start at 0.
    """

    name: str
    layers: tuple[Layer, ...]
    gates: tuple[str, ...] = ()
    m: int = 0
    zero: bool = True

    @property
    def ends(self) -> tuple[Layer, ...]:
        """Its last layers."""
        return tuple(layer for layer in self.layers if layer.last) or self.layers[-1:]


@dataclass(frozen=True)
class PlannedNorm:
    """A normalisation layer that will be removed.

    Attributes:
        path: Its own.
        biased: A scalar bias takes its place.
        freezable: A frozen norm can take its place, set by one batch.
        multiplied: The modules whose multipliers make up for the frozen norm's scale, where it
            starts branches.
    """

    path: str
    biased: bool = False
    freezable: bool = False
    multiplied: tuple[str, ...] = ()


@dataclass(frozen=True)
class ConversionPlan:
    """What will be done to a network; modules by their paths.

    Attributes:
        branches: Its residual branches, in the order of the forward pass.
        head: The layers whose outputs are the network's.
        before: Modules that get a scalar bias on their input.
        multiplied: Modules that get a multiplier on their output.
        after: Modules that get a scalar bias on their output.
        norms: Normalisation layers to be removed.
        gains: Parameters that multiply a branch element by element.
        trunk: Layers outside the branches that will be drawn anew.
        tokens: Parameters at 0 that will be drawn.
        left_out: Residual branches that stay as they are, and why.
        notes: What the user should know.
    """

    branches: tuple[PlannedBranch, ...]
    head: tuple[Layer, ...]
    before: tuple[str, ...]
    multiplied: tuple[str, ...]
    after: tuple[str, ...]
    norms: tuple[PlannedNorm, ...]
    gains: tuple[str, ...] = ()
    trunk: tuple[Layer, ...] = ()
    tokens: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def layers(self) -> tuple[Layer, ...]:
        """Those of the branches, then the head's, then those between them."""
        inner = (layer for branch in self.branches for layer in branch.layers)
        return (*inner, *self.head, *self.trunk)

    def written(self) -> tuple[str, ...]:
        """Names of the parameters that will be written."""
        names = [name for layer in self.layers() for name in (layer.weight, layer.bias) if name]
        return (*names, *self.gains, *self.tokens)

    def freezable(self) -> tuple[str, ...]:
        """Paths of the norms that can be frozen."""
        return tuple(norm.path for norm in self.norms if norm.freezable)

    def check(self, net: nn.Module) -> None:
        """Raise unless every weight has one place, and every parameter may be written.

        Raises:
            UserError: A weight has two places, or a parameter is frozen.
        """
        owner: dict[int, str] = {}
        places = [(f"the branch {branch.name!r}", branch.layers) for branch in self.branches]
        for place, layers in [*places, ("the head", self.head)]:
            for layer in layers:
                weight = net.get_parameter(layer.weight)
                if id(weight) in owner:
                    raise UserError(
                        f"{layer.weight} lies in {owner[id(weight)]} and in {place}: the rules are "
                        "for weights of their own"
                    )
                owner[id(weight)] = place
        for name in self.written():
            if not net.get_parameter(name).requires_grad:
                raise UserError(
                    f"{name} is frozen, and would be written: let it learn (requires_grad), or "
                    "leave its block out by naming the others in branches="
                )


def declared_plan(
    net: nn.Module,
    branches: Branches | None,
    head: Head,
    norm_types: tuple[type[nn.Module], ...],
    keep_norms: bool,
) -> ConversionPlan:
    """What is named, by the user or by the network's own ``residual_branches()``.

    The arguments are those of ``fixup_``.
    """
    planned = _declared(net) if branches is None else _named(net, branches)
    last_layers = planned_head(net, head)
    if last_layers is None:
        raise UserError("name the output layer by head=, or say head=False: there is none")
    before = [layer.unit for branch in planned for layer in branch.layers]
    before += [layer.unit for layer in last_layers]
    # The output of a branch's last layer is multiplied; a bias belongs behind the others alone.
    ends = [layer.unit for branch in planned for layer in branch.ends]
    after = [layer.unit for branch in planned for layer in branch.layers]
    paths = () if keep_norms else norm_paths(net, norm_types)
    return ConversionPlan(
        branches=planned,
        head=last_layers,
        before=distinct(before),
        multiplied=distinct(ends),
        after=distinct(unit for unit in after if unit not in ends),
        norms=tuple(PlannedNorm(path) for path in paths),
    )


def planned_head(net: nn.Module, head: Head) -> tuple[Layer, ...] | None:
    """The output layers that are named by ``head`` or that the network declares; ``None`` where
    neither says anything.

    Raises:
        UserError: Both do, and they differ.
    """
    paths = _paths(net)
    declared = tuple(_declared_layer(net, paths, w) for w in collect_classifiers(net))
    if head is None:
        return declared or None
    named = () if head is False else (_layer_at(net, head),)
    if declared and declared != named:
        raise UserError(
            f"{type(net).__name__} declares its output layers in classifier_layers(): leave head= "
            "out"
        )
    return named


def distinct(paths: Iterable[str]) -> tuple[str, ...]:
    """The paths but for empty ones, each once."""
    return tuple(path for path in dict.fromkeys(paths) if path)


def _declared(net: nn.Module) -> tuple[PlannedBranch, ...]:
    paths = _paths(net)
    return tuple(
        _branch(b.name, [_declared_layer(net, paths, layer) for layer in b.layers])
        for b in collect_branches(net)
    )


def _named(net: nn.Module, branches: Branches) -> tuple[PlannedBranch, ...]:
    if collect_branches(net):
        raise UserError(
            f"{type(net).__name__} declares its branches in residual_branches(): leave branches= "
            "out"
        )
    return tuple(
        _branch(name, [_layer_at(net, path) for path in layers])
        for name, layers in branches.items()
    )


def _branch(name: str, layers: Sequence[Layer]) -> PlannedBranch:
    if not layers:
        raise UserError(f"the branch {name!r} has no weight layer: name one or more")
    return PlannedBranch(name, tuple(layers))


def _declared_layer(net: nn.Module, paths: Mapping[int, str], layer: WeightLayer) -> Layer:
    path = paths[id(layer.module)]
    prefix = f"{path}." if path else ""
    bias = f"{prefix}{layer.bias}" if isinstance(layer.bias_vector, nn.Parameter) else None
    return Layer(f"{prefix}{layer.weight}", bias, _unit_at(net, path), layer.copies)


def _layer_at(net: nn.Module, path: str) -> Layer:
    module = next(iter(modules_named(net, [path])))
    if not isinstance(getattr(module, "weight", None), nn.Parameter):
        raise UserError(f"{path!r} ({type(module).__name__}) has no weight of its own")
    bias = f"{path}.bias" if isinstance(getattr(module, "bias", None), nn.Parameter) else None
    return Layer(f"{path}.weight", bias, _unit_at(net, path))


def _unit_at(net: nn.Module, path: str) -> str:
    # Attention uses the weights of its output layer without calling it: hooks there would not run.
    parent = path.rpartition(".")[0]
    return parent if isinstance(net.get_submodule(parent), nn.MultiheadAttention) else path


def _paths(net: nn.Module) -> dict[int, str]:
    return {id(module): path for path, module in net.named_modules()}
