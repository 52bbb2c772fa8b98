"""Normalisation layers, by their type and by what they compute.

A norm that nobody has named is known by its *degree*: a function f has degree d if f(a x) is
a^d f(x) for every a > 0, up to the small number that keeps a division from 0. What a normalisation
layer makes of its input has degree 0, and it takes a mean, a variance or a length of it on the way.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

from torch import nn
from torch.fx import Node

from fixup_core.convert.operations import NORMALISING, REDUCING, VIEWS
from fixup_core.convert.tracing import Trace, first_calls, operation, shape_of
from fixup_core.rules.frozen import STAYING

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
LARGEST = 60
"""Operations of a norm; what has more is not looked at."""
Degree = Fraction | None


def norm_paths(net: nn.Module, norm_types: tuple[type[nn.Module], ...]) -> tuple[str, ...]:
    """Paths of the layers of these types: all of a shared one, and the outer of two."""
    found: dict[str, None] = {}
    for path, module in net.named_modules(remove_duplicate=False):
        within = any(path.startswith(f"{outer}.") for outer in found)
        if isinstance(module, norm_types) and not within:
            found[path] = None
    return tuple(found)


def all_norm_paths(
    net: nn.Module, trace: Trace, norm_types: tuple[type[nn.Module], ...]
) -> tuple[str, ...]:
    """The same, and paths of the layers that normalise by what they compute, in module order."""
    typed = norm_paths(net, norm_types)
    computed = [
        path
        for path, nodes in _calls(trace).items()
        if not isinstance(net.get_submodule(path), CONTAINERS) and normalises(trace, nodes)
    ]
    # What wraps a norm that is known by its type is only another call of it.
    wrapping = {path.rpartition(".")[0] for path in typed}
    computed = [path for path in computed if not _within(path, typed) and path not in wrapping]
    outer = [path for path in computed if not _within(path.rpartition(".")[0], computed)]
    chosen = {id(net.get_submodule(path)) for path in outer}
    modules = net.named_modules(remove_duplicate=False)
    return tuple(path for path, module in modules if path in typed or id(module) in chosen)


def normalises(trace: Trace, nodes: Sequence[Node]) -> bool:
    """Whether the operations of one module's call are a norm's."""
    if len(nodes) > LARGEST or not any(operation(n) in REDUCING | NORMALISING for n in nodes):
        return False
    own = set(nodes)
    entering = {g for n in nodes for g in trace.flowing(n) if g not in own}
    leaving = {n for n in nodes if n in trace.sources and any(u not in own for u in n.users)}
    leaving &= trace.visible
    if len(entering) != 1 or len(leaving) != 1:
        return False
    start, end = entering.pop(), leaving.pop()
    return shape_of(start) == shape_of(end) and degrees(trace, nodes, start).get(end) == 0


def degrees(trace: Trace, nodes: Iterable[Node], start: Node) -> dict[Node, Degree]:
    """The degree of what each node computes, in what ``start`` does; ``None`` where it has none."""
    found: dict[Node, Degree] = {start: Fraction(1)}
    for node in nodes:
        if node in trace.sources and node not in found:
            found[node] = _degree(trace, node, found)
    return found


def _degree(trace: Trace, node: Node, known: Mapping[Node, Degree]) -> Degree:
    """Of one node, from those of its arguments; constants have degree 0."""
    op = operation(node)
    given = [known.get(n) for n in trace.flowing(node)]
    if not given or any(degree is None for degree in given):
        return None
    if op in NORMALISING:
        return Fraction(0)
    of: Any = [known[a] if a in known else Fraction(0) for a in node.args if isinstance(a, Node)]
    if op == "getitem" and operation(node.all_input_nodes[0]) == "var_mean":
        return of[0] / (1 + int(node.args[1] == 1))
    if op in VIEWS | REDUCING | {"neg", "abs", "sum", "maximum"}:
        return of[0] * (2 if op in ("var", "var_mean") else 1)
    if op in POWERS:
        return of[0] * POWERS[op]
    if op == "pow":
        exponent = node.args[1]
        return of[0] * Fraction(exponent) if isinstance(exponent, (int, float)) else None
    if op == "mul":
        # "x * x" has one argument in ``all_input_nodes`` and two in ``args``.
        return sum(of, Fraction(0))
    if op == "div":
        return of[0] - of[1] if len(of) > 1 else of[0]
    if op in ("add", "sub", "rsub", "clamp", "clamp_min", "addcmul"):
        return _of_sum(node, op, of)
    return None


POWERS = {
    "sqrt": Fraction(1, 2),
    "rsqrt": Fraction(-1, 2),
    "reciprocal": Fraction(-1),
    "square": Fraction(2),
}


def loses_its_size(trace: Trace, start: Node) -> bool:
    """Whether what ``start`` gives is divided by its own size later on, outside of norms."""
    later = [n for n in trace.nodes if trace.depends(n, start) and not trace.norms_of(n)]
    found = degrees(trace, later, start)
    return any(degree == 0 for node, degree in found.items() if node in trace.visible)


def _of_sum(node: Node, op: str, of: list[Any]) -> Degree:
    """A sum of parts of one degree has it; a small number added does not count, a vector does."""
    if op == "addcmul":
        of = [of[0], of[1] + of[2]]
    if len(of) == 1 or op.startswith("clamp"):
        return of[0]
    return of[0] if of[0] == of[1] else None


def _calls(trace: Trace) -> dict[str, list[Node]]:
    """The operations of each module's first call, by the module's path."""
    found: dict[str, list[Node]] = {}
    for node in trace.nodes:
        if node.op == "call_function":
            for path in first_calls(node):
                found.setdefault(path, []).append(node)
    for path, nodes in found.items():
        # An activation or dropout that is part of a norm stays where the norm is removed.
        parts = {f"{path}.{name}" for name in STAYING}
        if any(part in found for part in parts):
            found[path] = [node for node in nodes if not parts.intersection(first_calls(node))]
    return found


def _within(path: str, outer: Collection[str]) -> bool:
    return any(path == one or path.startswith(f"{one}.") for one in outer)
