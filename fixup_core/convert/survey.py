"""What the graph of a network says about where the rules of Fixup apply."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import nn
from torch.fx import Node

from fixup_core.convert.joins import (
    ACTIVATIONS,
    ADDING,
    BOUNDED,
    DROPPING,
    NORMALISING,
    FoundBranch,
    Use,
    find_branches,
    near_joins,
)
from fixup_core.convert.tracing import VIEWS, Trace, operation, owner, stack
from fixup_core.errors import UserError
from fixup_core.probing import Inputs

NEARLY_JOINING = frozenset({"add", "sub", "lerp", "addcmul", "stack", "maximum"})
LEFT_ALONE = ADDING | {"embedding", "prelu", "_prelu_kernel", "index", "masked_fill"}
"""What may be done with a parameter in a branch, besides a weight layer, that needs no rule."""


@dataclass(frozen=True)
class Layer:
    """A weight layer of a network, by names.

    Attributes:
        weight: Of its parameter.
        bias: Of its bias vector, or ``None``.
        unit: Path of the module to which scalars can be attached: the one that holds the weight, or
            the attention it is part of; empty where the weight is used by a function.
        copies: How many factors of the branch it is.
        enters: What comes in flows from the branch's start; not so keys and values of an encoder.
    """

    weight: str
    bias: str | None
    unit: str
    copies: int = 1
    enters: bool = True


class Survey:
    """What ``net`` is made of.

    Args:
        net: Any.
        inputs: To trace it with.
        norm_types: Types of normalisation layers.
        keep_norms: Normalisation stays.
        allow: Paths in branches that need no rule.

    Raises:
        UserError: As ``fixup_core.convert.convert.fixup_`` says.
    """

    def __init__(
        self,
        net: nn.Module,
        inputs: Inputs,
        norm_types: tuple[type[nn.Module], ...],
        keep_norms: bool,
        allow: Sequence[str],
    ) -> None:
        self.net, self.keep_norms, self.allow = net, keep_norms, tuple(allow)
        modules = net.named_modules(remove_duplicate=False)
        self.norms = {path for path, module in modules if isinstance(module, norm_types)}
        self.trace = Trace(net, inputs)
        self.branches = find_branches(self.trace)
        if not self.branches:
            raise UserError(_nothing_found(net, self.trace))
        self.uses = [
            Use(node, *weight)
            for node in self.trace.nodes
            if node in self.trace.visible and (weight := self.trace.weight(node))
        ]
        self._check_shared()
        if not keep_norms:
            self._check_norms()

    def layers(self, branch: FoundBranch) -> list[Layer]:
        """The weight layers of a branch, in order."""
        copies = Counter(use.weight for use in branch.layers)
        layers = []
        for use in dict.fromkeys(branch.layers):
            enters = self.trace.depends(self.trace.flowing(use.node)[0], branch.start)
            layers.append(Layer(use.weight, use.bias, self._unit(use), copies[use.weight], enters))
        return layers

    @cached_property
    def head(self) -> list[Layer]:
        """The weight layers outside the branches that none, and no branch, follows."""
        inner = {u.node for branch in self.branches for u in (*branch.layers, *branch.gates)}
        later = [use.node for use in self.uses] + [branch.join for branch in self.branches]
        ends = {
            use.weight: use
            for use in self.uses
            if use.node not in inner
            and not any(self.trace.depends(n, use.node) for n in later if n is not use.node)
        }
        return [Layer(use.weight, use.bias, self._unit(use)) for use in ends.values()]

    def near_joins(self) -> list[str]:
        """Where a path meets the one it left, and is not taken for a branch."""
        return near_joins(self.trace, {branch.join for branch in self.branches}, NEARLY_JOINING)

    def outside(self) -> list[str]:
        """Weights of the layers outside all branches but the head."""
        inner = {node for branch in self.branches for node in branch.inside}
        head = {layer.weight for layer in self.head}
        return [u.weight for u in self.uses if u.node not in inner and u.weight not in head]

    def by_function(self) -> list[str]:
        """Weights of branches and head to whose layers no scalar can be attached."""
        layers = [layer for branch in self.branches for layer in self.layers(branch)]
        return [layer.weight for layer in (*layers, *self.head) if not layer.unit]

    def gains(self) -> list[str]:
        """Parameters that multiply a branch element by element; every other one in a branch must be
        covered by a rule, or need none.
        """
        gains: list[str] = []
        for branch in self.branches:
            gains += branch.gains
            for node in branch.inside:
                names = self._uncovered(node) - set(branch.gains)
                wrong = [name for name in sorted(names) if not name.startswith(self.allow or "\0")]
                if wrong:
                    raise UserError(
                        f"no rule covers {', '.join(wrong)}, used by {operation(node)} in the "
                        f"residual branch {branch.name!r}: allow={wrong} leaves it as it is"
                    )
        return list(dict.fromkeys(gains))

    def place_activation_biases(self, after: list[str], norms: dict[str, bool]) -> None:
        """Where the scalar bias before each activation goes: in the place of a removed norm, else
        behind the layer, or the branch, whose output is activated.
        """
        gates = {use.node for branch in self.branches for use in branch.gates}
        lasts = {branch.join: self.layers(branch)[-1].unit for branch in self.branches}
        units = {use.node: self._unit(use) for use in self.uses if use.node not in gates}
        for node in self.trace.nodes:
            if operation(node) not in ACTIVATIONS - BOUNDED or node not in self.trace.visible:
                continue
            behind: Node | None = node
            while behind is not None:
                within = self.norms.intersection(stack(behind))
                if within:
                    if not self.keep_norms:
                        norms |= dict.fromkeys(within, True)
                    break
                unit = units.get(behind) or lasts.get(behind)
                if unit:
                    after.append(unit)
                    break
                behind = self._before(behind, first=behind is node)

    def free_norms(self, head: Container[str]) -> dict[str, list[str]]:
        """Norms that a constant can stand for, each with the modules that have the multipliers of
        the branches that it starts: all but those behind a weight layer of a branch, where rule 2
        sets the size, or behind the ``head`` (weights by name), which is 0.
        """
        inner = {u.node for branch in self.branches for u in (*branch.layers, *branch.gates)}
        inner |= {use.node for use in self.uses if use.weight in head}
        flowing = [node for node in self.trace.nodes if node in self.trace.sources]
        calls = [(path, n) for n in flowing for path in self.norms.intersection(stack(n))]
        bound = {path for path, node in calls if inner & self._behind(node)}
        free: dict[str, list[str]] = {path: [] for path, _ in calls if path not in bound}
        for branch in self.branches:
            entering = self.trace.flowing(branch.layers[0].node)[0]
            end = self.layers(branch)[-1].unit
            for path, node in calls:
                starts = node in branch.inside and self.trace.depends(node, branch.start)
                if path in free and starts and self.trace.depends(entering, node):
                    free[path] += [end] if end and end not in free[path] else []
        return free

    @cached_property
    def _ends(self) -> set[Node]:
        """Every weight layer and join."""
        return {use.node for use in self.uses} | {branch.join for branch in self.branches}

    def _behind(self, node: Node) -> set[Node]:
        """The weight layers and joins that ``node`` is made of with none of these between."""
        waiting, seen = [node], set()
        while waiting:
            one = waiting.pop()
            if one not in seen:
                seen.add(one)
                waiting += [] if one in self._ends else self.trace.flowing(one)
        return seen & self._ends

    def _before(self, node: Node, first: bool) -> Node | None:
        """What an activation's input is, moved or dropped at the most."""
        given = self.trace.flowing(node)
        moves = first or operation(node) in VIEWS | DROPPING
        return given[0] if moves and len(given) == 1 else None

    def _unit(self, use: Use) -> str:
        path, holder = owner(use.node), use.weight.rpartition(".")[0]
        module = self.net.get_submodule(path)
        if path == holder or isinstance(module, nn.MultiheadAttention):
            return path
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight is self.net.get_parameter(use.weight):
            return path
        return ""

    def _uncovered(self, node: Node) -> set[str]:
        if self.trace.weight(node) or operation(node) in LEFT_ALONE | VIEWS:
            return set()
        if self.norms.intersection(stack(node)):
            return set()
        given = [self.trace.parameters.get(n, frozenset()) for n in node.all_input_nodes]
        return set().union(*given)

    def _check_shared(self) -> None:
        places: dict[str, list[str]] = {}
        for number, branch in enumerate(self.branches):
            for weight in dict.fromkeys(use.weight for use in branch.layers):
                place = branch.name or "the network itself"
                places.setdefault(weight, []).append(f"{place} (branch {number + 1})")
        inner = {n for branch in self.branches for n in branch.inside}
        for use in self.uses:
            if use.node not in inner and use.weight in places:
                places[use.weight].append(owner(use.node) or "the network itself")
        for weight, where in places.items():
            if len(where) > 1:
                raise UserError(
                    f"{weight} is used in {' and in '.join(where[:3])}: rule 2 is for branches "
                    "with weights of their own; give each its own, or leave blocks out by branches="
                )

    def _check_norms(self) -> None:
        for node in self.trace.nodes:
            if operation(node) in NORMALISING and not self.norms.intersection(stack(node)):
                raise UserError(
                    f"{owner(node) or 'the network itself'} normalises by a function "
                    f"({operation(node)}), which cannot be removed: make it a module, name its "
                    "type in norm_types=, or leave all norms by keep_norms=True"
                )


def _nothing_found(net: nn.Module, trace: Trace) -> str:
    near = ", ".join(near_joins(trace, set(), NEARLY_JOINING | {"cat", "mul"})[:3])
    joined = f"; paths are joined otherwise than by addition in {near}" if near else ""
    return (
        f"{type(net).__name__} has no residual branch, no path that is added to where it "
        f"started from{joined}: name branches by branches= if there are any"
    )
