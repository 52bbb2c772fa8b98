"""Residual branches found in the graph of a network: additions of a path to the path it left.

A *join* is an addition of two flowing tensors of one shape, one of which, the *shortcut*, comes
from where the other, the *branch*, starts: it is that tensor itself, or made from it with fewer
weight layers (a projection, a pooling, a padding). What ends in a sum, as attention and
feed-forward side by side, is a branch for each summand.

The walk from a branch's end to its start is ``convert.walk``; here stands which of the additions
are joins, and which branches no rule covers.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import combinations

from torch.fx import Node

from fixup_core.convert.operations import DROPPING, JOINING, PASSING, VIEWS
from fixup_core.convert.tracing import Trace, Use, operation, owner, place_of, shape_of
from fixup_core.convert.walk import Walk


@dataclass(frozen=True)
class FoundBranch:
    """A branch in the graph.

    Attributes:
        join: The addition.
        start: Where branch and shortcut part.
        identity: The shortcut is what the branch starts from, unchanged.
        layers: Whose product the branch is, in the order of the forward pass. Some may stand side
            by side.
        product: The longest product of them; a matrix that multiplies more than once stands there
            as often.
        ends: The last of the layers, with no other behind it.
        gates: Weight layers that it depends on otherwise.
        gains: Names of parameters that multiply it element by element.
        way: The nodes between its start and its end whose size that of the branch is made of.
        inside: Every node that the branch depends on and the shortcut does not.
        rectified: What follows the last layers passes no gradient on where they are 0.
        returned: The network returns something from within it.
    """

    join: Node
    start: Node
    identity: bool
    layers: tuple[Use, ...]
    product: tuple[Use, ...]
    ends: frozenset[Use]
    gates: tuple[Use, ...]
    gains: tuple[str, ...]
    way: frozenset[Node] = field(repr=False)
    inside: frozenset[Node] = field(repr=False)
    rectified: bool = False
    returned: bool = False

    @property
    def name(self) -> str:
        """The path of the module that adds; empty for the network itself."""
        return owner(self.join)

    @property
    def place(self) -> str:
        """As messages name it."""
        return place_of(self.join)

    @property
    def m(self) -> int:
        """The layers of its longest product."""
        return len(self.product)


@dataclass(frozen=True)
class LeftOut:
    """A residual branch that stays as its author made it, and why."""

    place: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


class Joins:
    """The joins of a network, found in the order of the forward pass.

    Args:
        trace: Its graph.

    Attributes:
        found: Every branch, with why no rule covers it; empty where one does.
        around: The joins around other joins.
    """

    def __init__(self, trace: Trace) -> None:
        self.trace = trace
        self.found: list[tuple[FoundBranch, str]] = []
        self.around: list[Node] = []
        # Walks stop at a join: what lies behind it is the residual stream, its shortcut.
        self.shortcuts: dict[Node, Node] = {}
        for node in trace.nodes:
            if operation(node) in JOINING and node in trace.sources:
                self._add(node)

    @property
    def branches(self) -> list[FoundBranch]:
        """Those that the rules cover, in the order of the forward pass."""
        return [branch for branch, reason in self.found if not reason]

    @property
    def all(self) -> set[Node]:
        """Every addition that ends one or more."""
        return {branch.join for branch, _ in self.found} | set(self.around)

    @property
    def left_out(self) -> list[LeftOut]:
        """Those that they do not."""
        uncovered = [LeftOut(branch.place, reason) for branch, reason in self.found if reason]
        around = "other residual branches lie within it"
        return [*uncovered, *(LeftOut(place_of(join), around) for join in self.around)]

    def _add(self, join: Node) -> None:
        ends = self._ends(join)
        if ends is None:
            return
        shortcut, start, end = ends
        walk = Walk(self.trace, start, self.shortcuts)
        # A position, a bias or a mask is added without weight layers.
        if not walk.layers(end) and not walk.nested:
            return
        if walk.nested and self._dissolve(walk.nested):
            return self._add(join)
        if walk.nested:
            self.around.append(join)
        else:
            self._cover(join, shortcut, start, end)
        self.shortcuts[join] = shortcut
        return None

    def _dissolve(self, nested: set[Node]) -> bool:
        """Take the joins within a branch for sums, if none of them is a residual branch proper."""
        inner = [branch for branch, _ in self.found if branch.join in nested]
        if {b.join for b in inner} != nested or any(b.identity and b.m > 1 for b in inner):
            return False
        self.found = [one for one in self.found if one[0] not in inner]
        for join in nested:
            del self.shortcuts[join]
        return True

    def _cover(self, join: Node, shortcut: Node, start: Node, end: Node) -> None:
        """Add the branches that end in ``join``, each with why no rule covers it."""
        whole = Walk(self.trace, start, self.shortcuts)
        whole.layers(end)
        region = whole.region(end)
        for part in self._summands(start, end):
            branch = self._branch(join, start, part, identity=shortcut is start)
            self.found.append((branch, _uncovered(self.trace, branch, region, whole)))

    def _branch(self, join: Node, start: Node, end: Node, identity: bool) -> FoundBranch:
        walk = Walk(self.trace, start, self.shortcuts)
        product = walk.layers(end)
        region = walk.region(end)
        order = self.trace.order
        layers = sorted(walk.found, key=lambda use: order[use.node])
        uses = [use for node in region if (use := self.trace.use(node))]
        gates = sorted((u for u in uses if u not in walk.found), key=lambda u: order[u.node])
        ends = walk.ends(end)
        return FoundBranch(
            join,
            start,
            identity,
            tuple(layers),
            product,
            frozenset(ends),
            tuple(gates),
            tuple(walk.gains),
            frozenset(node for node, found in walk.seen.items() if found),
            frozenset(region),
            rectified=walk.rectified,
            returned=any(node in self.trace.outputs for node, own in walk.seen.items() if own),
        )

    def _ends(self, join: Node) -> tuple[Node, Node, Node] | None:
        """Shortcut, start and end of what ``join`` adds; ``None`` if it adds no branch."""
        given = self.trace.flowing(join)
        # An addition that broadcasts adds a bias or a position, and ends no residual branch.
        if len(given) != 2 or len({shape_of(join), *map(shape_of, given)}) > 1:
            return None
        parted = self._parted(given[0], given[1])
        # "branch - x" turns the sign of the residual stream: no identity at the start.
        if parted and operation(join) == "sub" and parted[2] is not join.args[1]:
            return None
        return parted

    def _parted(self, a: Node, b: Node) -> tuple[Node, Node, Node] | None:
        if a is b:
            return None
        # The shortcut is the residual stream itself where the other path is computed from it.
        for shortcut, end in ((a, b), (b, a)):
            if self.trace.depends(end, shortcut):
                return shortcut, shortcut, end
        # Else something lies on the shortcut too: it is the path with fewer weight layers.
        start = self.trace.parting(a, b)
        if start is None:
            return None
        counts = [len(Walk(self.trace, start, self.shortcuts).layers(end)) for end in (a, b)]
        if counts[0] == counts[1]:
            return None  # a sum of parallel layers
        shortcut, end = (a, b) if counts[0] < counts[1] else (b, a)
        return (shortcut, start, end) if self._passes(shortcut, start) else None

    def _passes(self, shortcut: Node, start: Node) -> bool:
        """Whether the way back from ``shortcut`` to ``start``, or to a join, is a shortcut's."""
        waiting, seen = [shortcut], set()
        while waiting:
            node = waiting.pop()
            stops = node is start or node in self.shortcuts or not self.trace.depends(node, start)
            if node in seen or stops:
                continue
            if operation(node) not in PASSING and not self.trace.norms_of(node):
                return False
            seen.add(node)
            waiting += self.trace.flowing(node)
        return True

    def _summands(self, start: Node, end: Node) -> list[Node]:
        """The summands of a branch that is a sum of products with layers of their own."""
        node = end
        while self._only_scales(node):
            node = self.trace.flowing(node)[0]
        given = self.trace.flowing(node)
        if operation(node) != "add" or len(given) != 2 or node in self.shortcuts:
            return [end]
        walks = [Walk(self.trace, start, self.shortcuts) for _ in given]
        for walk, one in zip(walks, given, strict=True):
            walk.layers(one)
        found = [{use.weight for use in walk.found} for walk in walks]
        if not all(found) or found[0] & found[1]:
            return [end]
        return [part for one in given for part in self._summands(start, one)]

    def _only_scales(self, node: Node) -> bool:
        """Whether it is a view, dropout, or a product with a number that is not learnt."""
        learnt = any(self.trace.parameters.get(n) for n in node.all_input_nodes)
        known = operation(node) in VIEWS | DROPPING | {"mul", "div"}
        return known and not learnt and len(self.trace.flowing(node)) == 1


def near_joins(trace: Trace, taken: set[Node], operations: frozenset[str]) -> list[str]:
    """Modules that put a path together with the path it left by one of the ``operations``, without
    being among the joins ``taken``.
    """
    near = []
    for node in trace.nodes:
        given = sorted(trace.flowing(node), key=trace.order.__getitem__)
        known = operation(node) in operations and node in trace.visible and node not in taken
        parted = known and len(given) == 2 and trace.depends(given[1], given[0])
        if parted and Walk(trace, given[0], taken).layers(given[1]):
            near.append(place_of(node))
    return list(dict.fromkeys(near))


def with_gates(trace: Trace, branch: FoundBranch, weights: set[str]) -> FoundBranch:
    """The branch with those of its ``weights`` that only add a condition from the side, as one of
    several that share a time embedding's, taken for gates.
    """

    def adds_condition(use: Use) -> bool:
        side = not trace.depends(use.given, branch.start)
        return side and use.weight in weights and use not in (*branch.product, *branch.ends)

    moved = tuple(use for use in branch.layers if adds_condition(use))
    kept = tuple(use for use in branch.layers if use not in moved)
    return replace(branch, layers=kept, gates=(*branch.gates, *moved))


def _uncovered(trace: Trace, branch: FoundBranch, region: set[Node], walk: Walk) -> str:
    """Why no rule covers a branch; empty where one does."""
    for use in branch.layers:
        if use.computed:
            return (
                f"the weight of {owner(use.node) or 'the network'} is computed from "
                f"{use.weight} and others: make it a parameter first (for weight norm: "
                "torch.nn.utils.remove_weight_norm)"
            )
    for one, other in combinations(branch.layers, 2):
        if one.weight == other.weight and one.node is not other.node:
            return f"{one.weight} is used twice in it: the rules are for weights of their own"
    if branch.rectified and branch.m == 1:
        return "its only layer cannot be 0, since what follows passes no gradient on at 0"
    return _used_outside(trace, branch, region, walk)


def _used_outside(trace: Trace, branch: FoundBranch, region: set[Node], walk: Walk) -> str:
    """Whether what weight layers make of the branch goes into more than its join."""
    for node in branch.way:
        if not walk.seen.get(node) or not trace.depends(node, branch.start):
            continue
        users = [u for u in node.users if u is not branch.join and u not in region]
        users = [u for u in users if u in trace.visible and u in trace.sources]
        if users:
            return (
                f"what {place_of(node)} computes in it is used outside of it too, in "
                f"{place_of(users[0])}: the branch reaches the output twice"
            )
    return ""
