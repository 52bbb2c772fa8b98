"""The way back from the end of a residual branch to where it starts.

The weight layers of a branch are those whose *product* it is. What goes through a softmax or a
sigmoid before it multiplies something, the queries and keys of attention or the gate of
squeeze-and-excite, is a *gate*: its size does not reach the branch's output.
"""

from __future__ import annotations

from collections.abc import Container

from torch.fx import Node

from fixup_core.convert.operations import (
    ATTENTION,
    BOUNDED,
    DROPPING,
    KEEPING_BOUNDS,
    MULTIPLYING,
    RECTIFYING,
    SATURATING,
    VIEWS,
)
from fixup_core.convert.tracing import Trace, Use, floating, is_view, operation

HIGHEST = 8
"""Of the powers that are counted as products."""


class Walk:
    """The way back from the end of a branch to where it starts.

    Args:
        trace: The network's graph.
        start: Where it ends.
        joins: Where it ends as well.

    Attributes:
        seen: The nodes on the way, each with the longest product of weight layers that it is.
        found: Every weight layer on the way.
        gains: Names of parameters that multiply what is on the way element by element.
        nested: The joins of other branches on the way.
        rectified: What follows the last layers passes no gradient on where they are 0; known once
            ``ends`` has been asked.
    """

    def __init__(self, trace: Trace, start: Node, joins: Container[Node]) -> None:
        self.trace, self.start, self.joins = trace, start, joins
        self.seen: dict[Node, tuple[Use, ...]] = {}
        self.found: dict[Use, None] = {}
        self.gains: list[str] = []
        self.nested: set[Node] = set()
        self.rectified = False

    def layers(self, node: Node) -> tuple[Use, ...]:
        """The weight layers of the longest product that ``node`` is, from the start on."""
        if self._stops(node):
            return ()
        if node not in self.seen:
            self.seen[node] = self._layers(node)
        return self.seen[node]

    def ends(self, node: Node) -> set[Use]:
        """The last weight layers on the way: what makes ``node`` 0 where they are."""
        if self._stops(node):
            return set()
        use = self.trace.use(node)
        if use is not None:
            return {use}
        self.rectified |= _rectifies(node)
        parts = [part for part in self._main(node) if self.layers(part)]
        if _multiplies(self.trace, node):
            # One factor is enough, and with two at 0 neither would have a gradient.
            parts = parts[-1:]
        return {end for part in parts for end in self.ends(part)}

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

    def _layers(self, node: Node) -> tuple[Use, ...]:
        use = self.trace.use(node)
        if use is not None:
            self.found[use] = None
            given = use.given
            # What made a signal from the side, as an encoder's output, is no part of this branch.
            beside = not self.trace.depends(given, self.start)
            return (use,) if beside else (*self.layers(given), use)
        main = self._main(node)
        parts = {given: self.layers(given) for given in main}
        self._note_gain(node)
        if _multiplies(self.trace, node):
            return tuple(use for given in main for use in parts[given])
        # What is added from the side, as a time embedding, is no longer product of the branch.
        own = [n for n in main if self.trace.depends(n, self.start)] or main
        return max((parts[given] for given in own), key=len, default=())

    def _stops(self, node: Node) -> bool:
        if node is self.start or node not in self.trace.sources:
            return True
        if node in self.joins:
            # A join that was computed from the start is one within this branch.
            if self.trace.depends(node, self.start):
                self.nested.add(node)
            return True
        return False

    def _main(self, node: Node) -> list[Node]:
        """The arguments whose size that of ``node`` is in proportion to; places are none."""
        given = floating(self.trace.flowing(node))
        op = operation(node)
        # A norm will be gone, and the identity in its place has one factor.
        if self.trace.norms_of(node):
            return given
        if op == ATTENTION:
            # Queries and keys set the weights of an average; its size is that of the values.
            value = node.args[2]
            return [value] if isinstance(value, Node) and value in self.trace.sources else []
        if op == "pow":
            return given * _power(node)
        if op in MULTIPLYING:
            return self._factors(node)
        if op in ("div", "masked_fill"):
            return given[:1]
        return given

    def _factors(self, node: Node) -> list[Node]:
        """The factors of a product but for gates; a tensor that is squared counts twice."""
        # ``all_input_nodes`` has each node once; the arguments have "h" and "h" of "h * h".
        twice = [n for n in node.args if isinstance(n, Node) and n in self.trace.sources]
        given = twice or self.trace.flowing(node)
        # A softmax beside a tanh is the gate; only where no factor is bounded does the tanh count.
        for operations in (BOUNDED, SATURATING):
            free = [n for n in given if not is_made_by(self.trace, n, operations)]
            if free and len(free) < len(given):
                given = free
                break
        # A condition from the side multiplies the branch as a gate does.
        own = [n for n in given if self.trace.depends(n, self.start)]
        return own or given

    def _note_gain(self, node: Node) -> None:
        if operation(node) == "mul" and len(self.trace.flowing(node)) == 1:
            if self.trace.norms_of(node):
                return
            for given in node.all_input_nodes:
                if self.trace.parameters.get(given) and is_view(given):
                    self.gains.extend(self.trace.parameters[given])


def is_made_by(trace: Trace, node: Node, operations: frozenset[str]) -> bool:
    """Whether one of the ``operations`` has made it, whatever weight layers, views, dropout,
    constant scales and constant shifts came since.
    """
    while True:
        op, given = operation(node), floating(trace.flowing(node))
        if op in operations or not given:
            return op in operations
        # What is divided by another signal, as by its own mean, has no size of its own.
        if op == "div" and len(given) > 1:
            return True
        passes = op in VIEWS | DROPPING | KEEPING_BOUNDS or trace.use(node) is not None
        if not passes or (len(given) != 1 and op != "masked_fill"):
            return False
        node = given[0]


def _multiplies(trace: Trace, node: Node) -> bool:
    return operation(node) in MULTIPLYING and not trace.norms_of(node)


def _power(node: Node) -> int:
    """How often a power multiplies what it is of."""
    exponent = node.args[1]
    whole = isinstance(exponent, (int, float)) and 1 <= exponent <= HIGHEST
    return int(exponent) if whole and float(exponent).is_integer() else 1  # type: ignore[arg-type]


def _rectifies(node: Node) -> bool:
    """Whether it passes no gradient on where its input is 0."""
    if operation(node) not in RECTIFYING:
        return False
    low = node.args[1] if len(node.args) > 1 else node.kwargs.get("min", 0)
    return operation(node) in ("relu", "relu6") or bool(low == 0)
