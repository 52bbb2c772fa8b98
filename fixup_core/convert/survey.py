"""What the graph of a network says about where the rules of Fixup apply. It only reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import nn
from torch.fx import Node

from fixup_core.convert.joins import FoundBranch, Joins, LeftOut, near_joins, with_gates
from fixup_core.convert.norms import all_norm_paths, loses_its_size
from fixup_core.convert.operations import (
    ACTIVATIONS,
    BOUNDED,
    DROPPING,
    LEFT_ALONE,
    MEASURING,
    NEARLY_JOINING,
    NORMALISING,
    VIEWS,
)
from fixup_core.convert.tracing import Trace, Use, holder_of, operation, owner
from fixup_core.errors import UserError
from fixup_core.probing import Inputs


@dataclass(frozen=True)
class Layer:
    """A weight layer of a network, by names.

    Attributes:
        weight: Of its parameter.
        bias: Of its bias vector; ``None`` where there is none.
        unit: Path of the module to which scalars can be attached: the one that holds the weight, or
            the attention it is part of; empty where a function uses the weight.
        copies: How many factors of the branch it is.
        enters: What comes in flows from the branch's start; not so keys and values of an encoder.
        last: No other layer of its branch follows.
        activated: What comes in has gone through an activation.
    """

    weight: str
    bias: str | None
    unit: str
    copies: int = 1
    enters: bool = True
    last: bool = False
    activated: bool = False


@dataclass(frozen=True)
class Activation:
    """What an activation follows: there its scalar bias can stand.

    Attributes:
        norms: Paths of the normalisation layers whose output is activated.
        unit: Path of the layer whose output is activated, or that ends the branch which is; empty
            where it follows neither.
    """

    norms: tuple[str, ...]
    unit: str


class Survey:
    """What ``net`` is made of.

    Args:
        net: Any.
        inputs: To trace it with.
        norm_types: Types of normalisation layers.

    Attributes:
        trace: The network's graph.
        branches: Its residual branches.
        left_out: Those that no rule covers, and why.
        joins: The additions that end any of them.
        uses: Every product with a weight that reaches an output.

    Raises:
        UserError: The network cannot be traced, or has no residual branch that a rule covers.
    """

    def __init__(
        self, net: nn.Module, inputs: Inputs, norm_types: tuple[type[nn.Module], ...]
    ) -> None:
        self.net = net
        self.trace = Trace(net, inputs)
        self.trace.norms = all_norm_paths(net, self.trace, norm_types)
        visible = [node for node in self.trace.nodes if node in self.trace.visible]
        self.uses = [use for node in visible if (use := self.trace.use(node))]
        joins = Joins(self.trace)
        self.joins = joins.all
        self.branches, shared = _with_weights_of_their_own(self.trace, joins.branches, self.uses)
        self.left_out = (*joins.left_out, *shared)
        if not self.branches or len(self.left_out) > len(self.branches):
            raise UserError(_nothing_found(net, self.trace, self.left_out))

    def layers(self, branch: FoundBranch) -> tuple[Layer, ...]:
        """The weight layers of a branch, in order."""
        copies = Counter(use.weight for use in branch.product)
        return tuple(
            Layer(
                use.weight,
                use.bias,
                self.unit(use),
                copies=max(1, copies[use.weight]),
                enters=self.trace.depends(use.given, branch.start),
                last=use in branch.ends,
            )
            for use in branch.layers
        )

    def ends(self, branch: FoundBranch) -> list[str]:
        """The units of a branch's last layers."""
        return [layer.unit for layer in self.layers(branch) if layer.last]

    @cached_property
    def last_layers(self) -> tuple[Layer, ...]:
        """The weight layers outside the branches that none, and no branch, follows; without those
        whose output is divided by its own length, which cannot be 0.
        """
        return tuple(layer for layer in self._followed_by_none if layer not in self.measured)

    @cached_property
    def measured(self) -> tuple[Layer, ...]:
        """The last layers whose output is divided by its own length."""
        ends = {use.weight: use.node for use in self.uses}
        return tuple(
            layer
            for layer in self._followed_by_none
            if loses_its_size(self.trace, ends[layer.weight])
        )

    @cached_property
    def normalising(self) -> list[Node]:
        """The operations that normalise outside of the normalisation layers."""
        return [
            node
            for node in self.trace.nodes
            if operation(node) in NORMALISING | MEASURING
            and node in self.trace.visible
            and node in self.trace.sources
            and not self.trace.norms_of(node)
        ]

    @cached_property
    def _followed_by_none(self) -> tuple[Layer, ...]:
        later = [use.node for use in self.uses] + [branch.join for branch in self.branches]
        ends = {
            use.weight: use
            for use in self.uses
            if use.node not in self.branch_products
            and not use.computed
            and not any(self.trace.depends(n, use.node) for n in later if n is not use.node)
        }
        return tuple(Layer(use.weight, use.bias, self.unit(use)) for use in ends.values())

    @cached_property
    def branch_products(self) -> set[Node]:
        """The products with the weights of branches, of layers and of gates."""
        return {use.node for branch in self.branches for use in (*branch.layers, *branch.gates)}

    @cached_property
    def inside(self) -> set[Node]:
        """The nodes of all branches."""
        return {node for branch in self.branches for node in branch.inside}

    def near_joins(self) -> list[str]:
        """Where a path meets the one it left, and is not taken for a branch."""
        return near_joins(self.trace, self.joins, NEARLY_JOINING)

    def others(self, branch: FoundBranch) -> Iterator[tuple[Node, list[str]]]:
        """The parameters of a branch that are neither weights nor gains nor scales, and the
        operations that use them; without those operations that need no rule.
        """
        for node, names in self._further(branch):
            if operation(node) != "mul":
                yield node, names

    def scales(self, branch: FoundBranch) -> list[str]:
        """The parameters that multiply a branch by something that is computed from them, as
        temperatures do: they stay.
        """
        further = [names for node, names in self._further(branch) if operation(node) == "mul"]
        return [name for names in further for name in names]

    def _further(self, branch: FoundBranch) -> Iterator[tuple[Node, list[str]]]:
        for node in sorted(branch.way, key=self.trace.order.__getitem__):
            needs_none = operation(node) in LEFT_ALONE | VIEWS or self.trace.norms_of(node)
            if needs_none or self.trace.use(node):
                continue
            given = [self.trace.parameters.get(n, frozenset()) for n in node.all_input_nodes]
            names = set().union(*given) - set(branch.gains)
            if names:
                yield node, sorted(names)

    def activations(self) -> Iterator[Activation]:
        """Every activation, in the order of the forward pass."""
        ends = {branch.join: self.ends(branch)[-1] for branch in self.branches}
        gates = {use.node for branch in self.branches for use in branch.gates}
        # Nothing in a gate gets scalars, as it stays what its author made it.
        ends |= {use.node: self.unit(use) for use in self.uses if use.node not in gates}
        for node in self.trace.nodes:
            # What is bounded is a gate or a softmax, no activation of rule 3.
            if operation(node) in ACTIVATIONS - BOUNDED and node in self.trace.visible:
                yield self._activation(node, ends)

    def _activation(self, node: Node, ends: Mapping[Node, str]) -> Activation:
        behind: Node | None = node
        while behind is not None:
            norms, unit = tuple(self.trace.norms_of(behind)), ends.get(behind, "")
            if norms or unit:
                return Activation(norms, unit)
            behind = self._before(behind, first=behind is node)
        return Activation((), "")

    def _before(self, node: Node, first: bool) -> Node | None:
        """The one argument of an activation, or of a view or dropout between it and what it
        follows; a number added there reaches the activation unchanged.
        """
        given = self.trace.flowing(node)
        passes = first or operation(node) in VIEWS | DROPPING
        return given[0] if passes and len(given) == 1 else None

    @cached_property
    def norm_calls(self) -> list[tuple[str, Node]]:
        """The flowing operations of normalisation layers, each with the layer's path."""
        flowing = [node for node in self.trace.nodes if node in self.trace.sources]
        return [(path, node) for node in flowing for path in self.trace.norms_of(node)]

    def behind(self, node: Node) -> set[Node]:
        """The nearest weight layers and joins that ``node`` is computed from."""
        waiting, seen = [node], set()
        while waiting:
            one = waiting.pop()
            if one not in seen:
                seen.add(one)
                waiting += [] if one in self._ends else self.trace.flowing(one)
        return seen & self._ends

    @cached_property
    def _ends(self) -> set[Node]:
        """Every weight layer and join."""
        return {use.node for use in self.uses} | {branch.join for branch in self.branches}

    def unit(self, use: Use) -> str:
        """Path of the module to which the scalars of a weight layer can be attached; else empty."""
        path = owner(use.node)
        module = self.net.get_submodule(path)
        # Attention uses the weights of its output layer without calling it: hooks on that layer
        # would never run.
        if path == holder_of(use.weight) or isinstance(module, nn.MultiheadAttention):
            return path
        # An output layer that shares an embedding's weight, which is named after the embedding.
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight is self.net.get_parameter(use.weight):
            return path
        return ""


def weights_outside(survey: Survey, head: Collection[Layer]) -> list[str]:
    """Weights of the layers outside all branches but those of the ``head``."""
    known = {layer.weight for layer in head}
    return [u.weight for u in survey.uses if u.node not in survey.inside and u.weight not in known]


def _with_weights_of_their_own(
    trace: Trace, branches: list[FoundBranch], uses: list[Use]
) -> tuple[list[FoundBranch], list[LeftOut]]:
    """The branches whose weights are used there alone, and once; and the others."""
    users: dict[str, set[Node]] = {}
    for use in uses:
        users.setdefault(use.weight, set()).add(use.node)
    places = Counter(
        weight
        for branch in branches
        for weight in {use.weight for use in (*branch.layers, *branch.gates)}
    )
    shared = {weight for weight, nodes in users.items() if len(nodes) > 1 or places[weight] > 1}
    branches = [with_gates(trace, branch, shared) for branch in branches]
    owners = Counter(weight for b in branches for weight in {use.weight for use in b.layers})
    own, left_out = [], []
    for branch in branches:
        reason = _shared(branch, users, owners)
        if reason:
            left_out.append(LeftOut(branch.place, f"{reason}: rule 2 is for weights of its own"))
        else:
            own.append(branch)
    return own, left_out


def _shared(branch: FoundBranch, users: Mapping[str, set[Node]], owners: Counter[str]) -> str:
    """Where else a weight of the branch is used; empty where none is."""
    for weight in dict.fromkeys(use.weight for use in branch.layers):
        # A packed matrix of queries, keys and values may be used twice in its own branch.
        elsewhere = users[weight] - branch.inside
        if elsewhere:
            places = sorted({owner(node) or "the network itself" for node in elsewhere})
            return f"{weight} is used in {' and in '.join(places[:3])} too"
        if owners[weight] > 1:
            return f"{weight} lies in {owners[weight]} branches"
    return ""


def _nothing_found(net: nn.Module, trace: Trace, left_out: Collection[LeftOut]) -> str:
    if left_out:
        first, *more = left_out
        others = f" (and {len(more)} more)" if more else ""
        return (
            f"no rule covers most residual branches of {type(net).__name__}: {first}{others}; name "
            "those to be taken by branches="
        )
    near = ", ".join(near_joins(trace, set(), NEARLY_JOINING | {"cat", "mul"})[:3])
    joined = f"; paths are joined otherwise than by addition in {near}" if near else ""
    return (
        f"{type(net).__name__} has no residual branch, no path that is added to where it "
        f"started from{joined}: name branches by branches= if there are any"
    )
