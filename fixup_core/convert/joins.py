"""Residual branches found in the graph of a network: additions of a path to the path it left.

A *join* is an addition of two flowing tensors of one shape, one of which, the *shortcut*, comes
from where the other, the *branch*, starts: it is that tensor itself, or made from it with fewer
weight layers (a projection, a pooling, a padding).

The weight layers of a branch are those whose *product* it is. What goes through a softmax or a
sigmoid before it is multiplied on, the queries and keys of attention or the gate of
squeeze-and-excite, is a *gate*: its size does not reach the branch's output.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import combinations

from torch.fx import Node

from fixup_core.convert.tracing import VIEWS, Trace, is_view, operation, owner, shape_of
from fixup_core.errors import UserError

BOUNDED = frozenset({"softmax", "_softmax", "_safe_softmax", "sigmoid", "hardsigmoid"})
SATURATING = BOUNDED | {"tanh", "erf", "hardtanh", "clamp", "relu6"}
"""A factor made by one of these is a gate where the other factor is made by none of them, as in an
activation that is written out: ``0.5 * x * (1 + tanh(...))``."""
KEEPING_BOUNDS = frozenset({"add", "mul", "div", "rsub", "masked_fill", "nan_to_num"})
JOINING = frozenset({"add", "sub"})
MULTIPLYING = frozenset({"mul", "pow", "matmul", "bmm", "mm", "einsum", "baddbmm"})
ATTENTION = "scaled_dot_product_attention"
ADDING = frozenset({"add", "cat", "stack", "where", "sub", "addcmul"})
DROPPING = frozenset({"dropout", "native_dropout", "feature_dropout", "alpha_dropout"})
ACTIVATIONS = frozenset(
    """relu gelu silu mish elu selu celu leaky_relu prelu rrelu tanh hardtanh hardswish softplus
    relu6 softsign log_sigmoid threshold sigmoid hardsigmoid""".split()
)
NORMALISING = frozenset(
    """batch_norm layer_norm group_norm instance_norm rms_norm native_batch_norm native_layer_norm
    native_group_norm _native_batch_norm_legit_functional _native_batch_norm_legit
    _fused_rms_norm""".split()
)
PASSING = (
    VIEWS
    | DROPPING
    | NORMALISING
    | frozenset(
        """relu add mul div cat pad constant_pad_nd avg_pool1d avg_pool2d avg_pool3d max_pool2d
        adaptive_avg_pool2d max_pool2d_with_indices zeros_like index conv1d conv2d conv3d linear
        convolution upsample_nearest2d upsample_bilinear2d _upsample_bilinear2d_aa""".split()
    )
)
"""What may lie on a shortcut."""


@dataclass(frozen=True)
class Use:
    """One product with a weight: a node, and the parameters' names."""

    node: Node
    weight: str
    bias: str | None


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
    """

    join: Node
    start: Node
    layers: tuple[Use, ...]
    gates: tuple[Use, ...]
    gains: tuple[str, ...]
    inside: frozenset[Node] = field(repr=False)

    @property
    def name(self) -> str:
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
            joins.add(node)
    return found


def near_joins(trace: Trace, taken: set[Node], kinds: frozenset[str]) -> list[str]:
    """Modules that put a path together with the path it left by one of the operations ``kinds``,
    without being among those ``taken``.
    """
    near = []
    for node in trace.nodes:
        given = sorted(trace.flowing(node), key=trace.order.__getitem__)
        known = operation(node) in kinds and node in trace.visible and node not in taken
        parted = known and len(given) == 2 and trace.depends(given[1], given[0])
        if parted and _Walk(trace, given[0], taken, node).layers(given[1]):
            near.append(_place(node))
    return list(dict.fromkeys(near))


def _branch_of(trace: Trace, join: Node, joins: set[Node]) -> FoundBranch | None:
    given = trace.flowing(join)
    if len(given) != 2 or len({shape_of(join), *map(shape_of, given)}) > 1:
        return None
    parted = _parted(trace, given[0], given[1], joins)
    if parted is None:
        return None
    start, end = parted
    if operation(join) == "sub" and end is not join.args[1]:
        return None
    walk = _Walk(trace, start, joins, join)
    layers = walk.layers(end)
    if not layers:
        return None
    if walk.nested:
        raise UserError(
            f"the residual branch that ends in {_place(join)} holds other residual branches: "
            "no rule covers branches within branches; name those to be taken by branches="
        )
    _check_uses(join, layers)
    region = walk.region(end)
    _check_users(trace, join, region, walk)
    uses = [Use(node, *weight) for node in region if (weight := trace.weight(node))]
    gates = sorted((u for u in uses if u not in layers), key=lambda u: trace.order[u.node])
    return FoundBranch(join, start, layers, tuple(gates), tuple(walk.gains), frozenset(region))


def _parted(trace: Trace, a: Node, b: Node, joins: set[Node]) -> tuple[Node, Node] | None:
    """Where two paths part, and the branch's end; ``None`` if they are no shortcut and branch."""
    if a is b:
        return None
    for shortcut, end in ((a, b), (b, a)):
        if trace.depends(end, shortcut):
            return shortcut, end
    start = trace.parting(a, b)
    if start is None:
        return None
    counts = [len(_Walk(trace, start, joins, None).layers(end)) for end in (a, b)]
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
    """The way back from the end of a branch to where it starts."""

    def __init__(self, trace: Trace, start: Node, joins: set[Node], join: Node | None) -> None:
        self.trace, self.start, self.joins, self.join = trace, start, joins, join
        self.seen: dict[Node, tuple[Use, ...]] = {}
        self.gains: list[str] = []
        self.nested = False

    def layers(self, node: Node) -> tuple[Use, ...]:
        """The weight layers whose product ``node`` is, from the start on."""
        if self._stops(node):
            return ()
        if node not in self.seen:
            self.seen[node] = ()
            self.seen[node] = self._layers(node)
        return self.seen[node]

    def _layers(self, node: Node) -> tuple[Use, ...]:
        weight = self.trace.weight(node)
        main = _main(self.trace, node)
        if weight is not None:
            use = Use(node, *weight)
            inner = main[0]
            beside = not self.trace.depends(inner, self.start)
            return (use,) if beside else (*self.layers(inner), use)
        self._note_gain(node)
        parts = [part for part in map(self.layers, main) if part]
        if operation(node) in ADDING:
            distinct = list(dict.fromkeys(parts))
            if len(distinct) > 1:
                raise UserError(
                    f"{_place(node)} puts weight layers side by side together in a residual "
                    "branch: the rules are for layers one behind the other; name them by branches="
                )
            return distinct[0] if distinct else ()
        if operation(node) in MULTIPLYING:
            return tuple(use for part in parts for use in part)
        return max(parts, key=len, default=())

    def _stops(self, node: Node) -> bool:
        if node is self.start or node not in self.trace.sources:
            return True
        if node in self.joins:
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
            if self.trace.weight(node) is None or self.trace.depends(node, self.start):
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
            place = f"in {_place(outside[0])}" if outside else "as an output"
            raise UserError(
                f"what {_place(node)} computes in a residual branch is used outside of it too, "
                f"{place}: the branch reaches the output twice; leave this block out by naming the "
                "others in branches="
            )


def _main(trace: Trace, node: Node) -> list[Node]:
    """The arguments whose size that of ``node`` is in proportion to."""
    given = trace.flowing(node)
    if operation(node) == ATTENTION:
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
    twice = [n for n in node.args if isinstance(n, Node) and n in trace.sources]
    given = twice or trace.flowing(node)
    for kinds in (BOUNDED, SATURATING):
        free = [n for n in given if not is_made_by(trace, n, kinds)]
        if free and len(free) < len(given):
            return free
    return given


def is_made_by(trace: Trace, node: Node, kinds: frozenset[str]) -> bool:
    """Whether one of the operations ``kinds`` has made it, whatever moved, dropped, scaled or
    shifted it since.
    """
    while operation(node) in (VIEWS | DROPPING | KEEPING_BOUNDS) - kinds:
        given = trace.flowing(node)
        if len(given) != 1 and operation(node) not in ("div", "masked_fill"):
            return False
        node = given[0]
    return operation(node) in kinds


def _check_uses(join: Node, layers: tuple[Use, ...]) -> None:
    if len(layers) < 2:
        raise UserError(
            f"the residual branch that ends in {_place(join)} has one weight layer, "
            f"{layers[0].weight}: rule 2 is for two or more; leave this block out by naming the "
            "others in branches="
        )
    for one, other in combinations(layers, 2):
        if one.weight == other.weight and one.node is not other.node:
            raise UserError(
                f"{one.weight} is used twice in the residual branch that ends in {_place(join)}: "
                "the rules are for weights of their own; leave this block out by naming the others "
                "in branches="
            )


def _place(node: Node) -> str:
    return f"{owner(node) or 'the network itself'} ({operation(node)})"
