"""Residual branches found in the graph of a network: additions of a path to the path it left.

A *join* is an addition of two flowing tensors of one shape, one of which, the *shortcut*, comes
from where the other, the *branch*, starts: it is that tensor itself, or made from it with fewer
weight layers (a projection, a pooling, a padding).

The weight layers of a branch are those whose *product* it is. What goes through a softmax or a
sigmoid before it multiplies something, the queries and keys of attention or the gate of
squeeze-and-excite, is a *gate*: its size does not reach the branch's output.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import combinations

from torch.fx import Node

from fixup_core.convert.operations import (
    ADDING,
    ATTENTION,
    BOUNDED,
    DROPPING,
    JOINING,
    KEEPING_BOUNDS,
    MULTIPLYING,
    PASSING,
    SATURATING,
    VIEWS,
)
from fixup_core.convert.tracing import Trace, Use, is_view, operation, owner, place_of, shape_of
from fixup_core.errors import UserError


@dataclass(frozen=True)
class FoundBranch:
    """A branch in the graph.

    Attributes:
        join: The addition.
        start: Where branch and shortcut part.
        layers: Whose product the branch is, in the order of the forward pass; a matrix that
            multiplies more than once stands there as often.
        gates: Weight layers that it depends on otherwise.
        gains: Names of parameters that multiply it element by element.
        inside: Every node that the branch depends on and the shortcut does not.
    """

    join: Node
    start: Node
    layers: tuple[Use, ...]
    gates: tuple[Use, ...]
    gains: tuple[str, ...]
    inside: frozenset[Node] = field(repr=False)

    @property
    def name(self) -> str:
        """The path of the module that adds; empty for the network itself."""
        return owner(self.join)


def find_branches(trace: Trace) -> list[FoundBranch]:
    """All residual branches, in the order of the forward pass.

    Raises:
        UserError: A branch that the rules do not cover (its module is named).
    """
    found: list[FoundBranch] = []
    joins: set[Node] = set()
    for node in trace.nodes:
        if operation(node) not in JOINING or node not in trace.sources:
            continue
        branch = _branch_of(trace, node, joins)
        if branch is not None:
            found.append(branch)
            # Later walks stop here: what lies behind an earlier join is the residual stream.
            joins.add(node)
    return found


def near_joins(trace: Trace, taken: set[Node], operations: frozenset[str]) -> list[str]:
    """Modules that put a path together with the path it left by one of the ``operations``, without
    being among the joins ``taken``.
    """
    near = []
    for node in trace.nodes:
        given = sorted(trace.flowing(node), key=trace.order.__getitem__)
        known = operation(node) in operations and node in trace.visible and node not in taken
        parted = known and len(given) == 2 and trace.depends(given[1], given[0])
        if parted and _Walk(trace, given[0], taken).layers(given[1]):
            near.append(place_of(node))
    return list(dict.fromkeys(near))


def _branch_of(trace: Trace, join: Node, joins: set[Node]) -> FoundBranch | None:
    given = trace.flowing(join)
    # An addition that broadcasts adds a bias or a position, and ends no residual branch.
    if len(given) != 2 or len({shape_of(join), *map(shape_of, given)}) > 1:
        return None
    parted = _parted(trace, given[0], given[1], joins)
    if parted is None:
        return None
    start, end = parted
    # "branch - x" turns the sign of the residual stream: no identity at the start.
    if operation(join) == "sub" and end is not join.args[1]:
        return None
    walk = _Walk(trace, start, joins)
    layers = walk.layers(end)
    # A position, a bias or a mask is added without weight layers.
    if not layers:
        return None
    if walk.nested:
        raise UserError(
            f"the residual branch that ends in {place_of(join)} holds other residual branches: "
            "no rule covers branches within branches; name those to be taken by branches="
        )
    _check_uses(join, layers)
    region = walk.region(end)
    _check_users(trace, join, region, walk)
    uses = [use for node in region if (use := trace.use(node))]
    gates = sorted((u for u in uses if u not in layers), key=lambda u: trace.order[u.node])
    return FoundBranch(join, start, layers, tuple(gates), tuple(walk.gains), frozenset(region))


def _parted(trace: Trace, a: Node, b: Node, joins: set[Node]) -> tuple[Node, Node] | None:
    """Where two paths part, and the branch's end; ``None`` if they are no shortcut and branch."""
    if a is b:
        return None
    # The shortcut is the residual stream itself where the other path is computed from it.
    for shortcut, end in ((a, b), (b, a)):
        if trace.depends(end, shortcut):
            return shortcut, end
    # Else something lies on the shortcut too: it is the path with fewer weight layers.
    start = trace.parting(a, b)
    if start is None:
        return None
    counts = [len(_Walk(trace, start, joins).layers(end)) for end in (a, b)]
    if counts[0] == counts[1]:
        return None  # a sum of parallel layers
    shortcut, end = (a, b) if counts[0] < counts[1] else (b, a)
    return (start, end) if _passes(trace, shortcut, start, joins) else None


def _passes(trace: Trace, node: Node, start: Node, joins: set[Node]) -> bool:
    """Whether the way back from ``node`` to ``start``, or to a join on it, is a shortcut's."""
    if node is start or node in joins or not trace.depends(node, start):
        return True
    known = operation(node) in PASSING
    return known and all(_passes(trace, given, start, joins) for given in trace.flowing(node))


class _Walk:
    """The way back from the end of a branch to where it starts.

    Attributes:
        seen: The nodes on the way, each with the weight layers whose product it is.
        gains: Names of parameters that multiply what is on the way element by element.
        nested: Another branch ends on the way.
    """

    def __init__(self, trace: Trace, start: Node, joins: set[Node]) -> None:
        self.trace, self.start, self.joins = trace, start, joins
        self.seen: dict[Node, tuple[Use, ...]] = {}
        self.gains: list[str] = []
        self.nested = False

    def layers(self, node: Node) -> tuple[Use, ...]:
        """The weight layers whose product ``node`` is, from the start on."""
        if self._stops(node):
            return ()
        if node not in self.seen:
            self.seen[node] = ()  # holds its place: a message names what lies nearest to the join
            self.seen[node] = self._layers(node)
        return self.seen[node]

    def _layers(self, node: Node) -> tuple[Use, ...]:
        use = self.trace.use(node)
        if use is not None:
            given = self.trace.flowing(node)[0]
            # What made a signal from the side, as an encoder's output, is no part of this branch.
            beside = not self.trace.depends(given, self.start)
            return (use,) if beside else (*self.layers(given), use)
        # A norm that is written out multiplies its input by a function of it and by its own gain;
        # it will be gone, and the identity in its place has one factor.
        in_norm = bool(self.trace.norms_of(node))
        main = self.trace.flowing(node) if in_norm else _main(self.trace, node)
        parts = [part for part in map(self.layers, main) if part]
        if in_norm:
            return max(parts, key=len, default=())
        self._note_gain(node)
        if operation(node) in ADDING:
            return self._only(node, parts)
        if operation(node) in MULTIPLYING:
            return tuple(use for part in parts for use in part)
        return max(parts, key=len, default=())

    def _only(self, node: Node, parts: list[tuple[Use, ...]]) -> tuple[Use, ...]:
        """The layers of a sum, whose summands must have the same ones.

        So have those of rotary positions, which add two views of one product.
        """
        distinct = list(dict.fromkeys(parts))
        if len(distinct) > 1:
            raise UserError(
                f"{place_of(node)} puts weight layers side by side together in a residual "
                "branch: the rules are for layers one behind the other; name them by branches="
            )
        return distinct[0] if distinct else ()

    def _stops(self, node: Node) -> bool:
        if node is self.start or node not in self.trace.sources:
            return True
        if node in self.joins:
            # A join that was computed from the start is one within this branch.
            self.nested |= self.trace.depends(node, self.start)
            return True
        return False

    def _note_gain(self, node: Node) -> None:
        if operation(node) == "mul" and len(self.trace.flowing(node)) == 1:
            for given in node.all_input_nodes:
                if self.trace.parameters.get(given) and is_view(given):
                    self.gains.extend(self.trace.parameters[given])

    def region(self, end: Node) -> set[Node]:
        """Every node that the branch depends on and the shortcut does not."""
        waiting, region = [end], set()
        while waiting:
            node = waiting.pop()
            if node in region or self._stops(node):
                continue
            region.add(node)
            # What flows in from the side, as an encoder's output does, is the branch's own up to
            # its first weight layer.
            if self.trace.use(node) is None or self.trace.depends(node, self.start):
                waiting += self.trace.flowing(node)
        return region


def _check_users(trace: Trace, join: Node, region: set[Node], walk: _Walk) -> None:
    """Raise unless what weight layers make of the branch goes into its join alone."""
    for node, layers in walk.seen.items():
        if not layers or not trace.depends(node, walk.start):
            continue
        outside = [u for u in node.users if u is not join and u not in region]
        outside = [u for u in outside if u in trace.visible and u in trace.sources]
        if outside or node in trace.outputs:
            place = f"in {place_of(outside[0])}" if outside else "as an output"
            raise UserError(
                f"what {place_of(node)} computes in a residual branch is used outside of it too, "
                f"{place}: the branch reaches the output twice; leave this block out by naming the "
                "others in branches="
            )


def _main(trace: Trace, node: Node) -> list[Node]:
    """The arguments whose size that of ``node`` is in proportion to."""
    given = trace.flowing(node)
    if operation(node) == ATTENTION:
        # Queries and keys set the weights of an average; its size is that of the values.
        value = node.args[2]
        return [value] if isinstance(value, Node) and value in trace.sources else []
    if operation(node) == "pow" and node.args[1] in (2, 3, 4):
        return given * int(str(node.args[1]))
    if operation(node) in MULTIPLYING:
        return _free_factors(trace, node)
    if operation(node) in ("div", "masked_fill"):
        return given[:1]
    return given


def _free_factors(trace: Trace, node: Node) -> list[Node]:
    """The factors of a product but for gates; a tensor that is squared counts twice."""
    # ``all_input_nodes`` has each node once; the arguments have "h" and "h" of "h * h".
    twice = [n for n in node.args if isinstance(n, Node) and n in trace.sources]
    given = twice or trace.flowing(node)
    # A softmax beside a tanh is the gate; only where no factor is bounded does the tanh count.
    for operations in (BOUNDED, SATURATING):
        free = [n for n in given if not is_made_by(trace, n, operations)]
        if free and len(free) < len(given):
            return free
    return given


def is_made_by(trace: Trace, node: Node, operations: frozenset[str]) -> bool:
    """Whether one of the ``operations`` has made it, whatever views, dropout, constant scales and
    constant shifts came since.
    """
    while operation(node) in (VIEWS | DROPPING | KEEPING_BOUNDS) - operations:
        given = trace.flowing(node)
        if len(given) != 1 and operation(node) not in ("div", "masked_fill"):
            return False
        node = given[0]
    return operation(node) in operations


def _check_uses(join: Node, layers: tuple[Use, ...]) -> None:
    if len(layers) < 2:
        raise UserError(
            f"the residual branch that ends in {place_of(join)} has one weight layer, "
            f"{layers[0].weight}: rule 2 is for two or more; leave this block out by naming the "
            "others in branches="
        )
    for one, other in combinations(layers, 2):
        if one.weight == other.weight and one.node is not other.node:
            raise UserError(
                f"{one.weight} is used twice in the residual branch that ends in {place_of(join)}: "
                "the rules are for weights of their own; leave this block out by naming the others "
                "in branches="
            )
