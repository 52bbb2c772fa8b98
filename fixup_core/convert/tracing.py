"""The graph of what a network computes, made by ``torch.export``, with names of parameters.

Every node is an ATen operation; ``torch.export`` says which module called it. What a node depends
on sorts it: *flowing* nodes depend on the network's inputs, all others on parameters alone.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import Node

from fixup_core.convert.operations import ATTENTION, PRODUCTS, UNLEARNT, VIEWS
from fixup_core.convert.recording import Traced, recorded
from fixup_core.errors import UserError, one_line
from fixup_core.probing import Inputs, arguments_of, in_mode


@dataclass(frozen=True)
class Use:
    """One product of a signal with a weight: a node, and the parameters' names.

    Attributes:
        node: The product.
        given: The signal.
        weight: Of the weight; of a computed one, of the first parameter that it is computed from.
        bias: Of the bias vector, if there is one.
        computed: The weight is computed from parameters, by more than views.
    """

    node: Node
    given: Node
    weight: str
    bias: str | None
    computed: bool = False


class Trace:
    """What ``net`` does with ``inputs``.

    Args:
        net: Left as it was.
        inputs: A tensor, a tuple of arguments or a mapping of named ones.

    Attributes:
        nodes: In the order of the forward pass; ``order`` is each one's number.
        parameters: For a node that depends on parameters alone, their names.
        sources: For a flowing node, itself and the flowing nodes that it depends on, as the bits of
            their numbers.
        outputs: The nodes that the network returns.
        visible: The nodes that these depend on.
        norms: Paths of the normalisation layers, once ``convert.norms`` has found them.

    Raises:
        UserError: The network cannot be traced.
    """

    def __init__(self, net: nn.Module, inputs: Inputs) -> None:
        self.norms: tuple[str, ...] = ()
        traced = _exported(net, inputs)
        own = traced.parameters
        self.nodes = list(traced.nodes)
        self.order = {node: number for number, node in enumerate(self.nodes)}
        self._sort(own, set(traced.inputs))
        learnt: set[str] = set()
        while found := self._learnt_inputs() - learnt:
            learnt |= found
            flowing = {name for name, parameter in own.items() if parameter in learnt}
            self._sort(own, flowing | traced.inputs)
        self.outputs = {node for node in self.nodes if node.name in traced.outputs}
        self.visible = self._reaching_outputs()

    def _sort(self, own: dict[str, str], entering: set[str]) -> None:
        """Say of every node whether it flows, or which parameters alone it depends on."""
        self.parameters: dict[Node, frozenset[str]] = {}
        self.sources: dict[Node, int] = {}
        for node in self.nodes:
            if node.name in entering:
                self.sources[node] = 1 << self.order[node]
            elif node.name in own:
                self.parameters[node] = frozenset({own[node.name]})
            elif node.op == "call_function":
                self._add(node)

    def _learnt_inputs(self) -> frozenset[str]:
        """Parameters that go through a linear layer, as learnt queries do: they are inputs."""
        for node in self.nodes:
            op = operation(node)
            if node in self.parameters and op in ("linear", "addmm", "mm"):
                signal, weight = node.args[-2:] if op != "linear" else node.args[:2]
                transposed: Any = weight
                if op == "linear" or operation(transposed) in ("t", "transpose"):
                    found = self.parameters.get(signal)  # type: ignore[arg-type]
                    if found:
                        return found
        return frozenset()

    def _reaching_outputs(self) -> set[Node]:
        """The nodes that an output depends on; those of running statistics are left out."""
        waiting, reaching = list(self.outputs), set()
        while waiting:
            node = waiting.pop()
            if node not in reaching:
                reaching.add(node)
                waiting += node.all_input_nodes
        return reaching

    def _add(self, node: Node) -> None:
        flowing = [self.sources[n] for n in node.all_input_nodes if n in self.sources]
        if flowing and operation(node) not in UNLEARNT:
            self.sources[node] = functools.reduce(operator.or_, flowing, 1 << self.order[node])
        else:
            given = [self.parameters.get(n, frozenset()) for n in node.all_input_nodes]
            self.parameters[node] = frozenset().union(*given)

    def norms_of(self, node: Node) -> list[str]:
        """The normalisation layers that a node's operation is part of."""
        return [path for path in stack(node) if path in self.norms]

    def flowing(self, node: Node) -> list[Node]:
        """The arguments of ``node`` that depend on the network's inputs, in their order."""
        return [given for given in node.all_input_nodes if given in self.sources]

    def depends(self, node: Node, on: Node) -> bool:
        """Whether ``node`` is ``on`` or computed from it."""
        return bool(self.sources.get(node, 0) >> self.order[on] & 1)

    def parting(self, a: Node, b: Node) -> Node | None:
        """The last node that two others both depend on."""
        common = self.sources[a] & self.sources[b]
        return self.nodes[common.bit_length() - 1] if common else None

    def use(self, node: Node) -> Use | None:
        """The weight that a node multiplies its one flowing argument by, if it does."""
        flowing = floating(self.flowing(node)) if operation(node) in PRODUCTS else []
        if len(flowing) != 1:
            return None
        constant = [n for n in node.all_input_nodes if self.parameters.get(n)]
        # A vector is a bias, or a gain in the shape of a product: no weight layer.
        matrices = [n for n in constant if len(shape_of(n) or ()) > 1]
        if not matrices:
            return None
        computed = len(self.parameters[matrices[0]]) > 1 or not is_view(matrices[0])
        name = min(self.parameters[matrices[0]])
        vectors = [n for n in constant if n is not matrices[0]] or self._added(node)
        biases = sorted(
            bias
            for vector in vectors
            if is_view(vector)
            for bias in self.parameters[vector]
            if holder_of(bias) == holder_of(name)
        )
        return Use(node, flowing[0], name, biases[0] if biases else None, computed)

    def _added(self, product: Node) -> list[Node]:
        """The parameters that are added to a product behind it, as a bias recorded by itself is."""
        node = product
        while len(node.users) == 1:
            node = next(iter(node.users))
            if operation(node) == "add":
                return [n for n in node.all_input_nodes if self.parameters.get(n)]
            if operation(node) not in VIEWS:
                break
        return []


def operation(node: Node) -> str:
    """The name of a node's operation, without its overload: ``add``, ``conv2d``."""
    target: Any = node.target
    packet = getattr(target, "overloadpacket", target)
    # "add_" changes its argument in place; what it computes is the same.
    name = str(getattr(packet, "__name__", packet)).rsplit(".", 1)[-1].removesuffix("_")
    # Recorded, attention has the name of the kernel that computed it.
    return ATTENTION if "scaled_dot_product" in name else name


def owner(node: Node) -> str:
    """The path of the innermost module that calls a node's operation; empty for the network."""
    return stack(node)[-1] if stack(node) else ""


def place_of(node: Node) -> str:
    """The owner and the operation, as messages name them."""
    return f"{owner(node) or 'the network itself'} ({operation(node)})"


def stack(node: Node) -> list[str]:
    """The paths of the modules that call a node's operation, the innermost last."""
    return list(map(_clean, _calls(node)))


def first_calls(node: Node) -> list[str]:
    """The paths of the modules whose first call has a node's operation."""
    return [path for path in map(_clean, (c for c in _calls(node) if "@" not in c)) if path]


def shape_of(node: Node) -> tuple[int, ...] | None:
    """The shape of what a node computes; ``None`` where that is no tensor."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else None


def floating(nodes: list[Node]) -> list[Node]:
    """Those that are no whole numbers, as the places of experts' tokens are."""
    values = [node.meta.get("val") for node in nodes]
    return [
        node
        for node, value in zip(nodes, values, strict=True)
        if not isinstance(value, Tensor) or value.is_floating_point() or value.is_complex()
    ]


def holder_of(parameter: str) -> str:
    """The path of the module that holds a parameter."""
    return parameter.rpartition(".")[0]


def is_view(node: Node) -> bool:
    """Whether a node is a parameter, or a view of one."""
    while node.op != "placeholder":
        if operation(node) not in VIEWS or not node.all_input_nodes:
            return False
        node = node.all_input_nodes[0]
    return True


def _calls(node: Node) -> list[str]:
    """The modules' calls: a module that is called again has "@1" behind its path."""
    return [path for path, _ in node.meta.get("nn_module_stack", {}).values()]


def _clean(path: str) -> str:
    return path.removeprefix("L['self'].").removeprefix("L['self']").split("@")[0]


def _exported_by(
    net: nn.Module, inputs: Inputs, *, train: bool = True, strict: bool = False
) -> Traced:
    args, kwargs = arguments_of(inputs)
    with warnings.catch_warnings(), _masks_taken_at_their_word(), in_mode(net, train):
        warnings.simplefilter("ignore")
        program = torch.export.export(net, args, kwargs, strict=strict)
        # Without changes in place, so that the arguments say what a node depends on; the empty
        # table takes no operation apart: batch norm stays one node.
        functional: ExportedProgram = program.run_decompositions({})
    signature = functional.graph_signature
    return Traced(
        tuple(functional.graph.nodes),
        dict(signature.inputs_to_parameters),
        frozenset(map(str, signature.user_inputs)),
        frozenset(map(str, signature.user_outputs)),
    )


WAYS: tuple[Callable[[nn.Module, Inputs], Traced], ...] = (
    recorded,
    _exported_by,
    functools.partial(_exported_by, train=False),
    functools.partial(_exported_by, strict=True),
)
"""To trace a network, one after the other: recorded while it runs; without numbers, as on the meta
device, exported as it trains, as it is evaluated, by TorchDynamo."""


def _exported(net: nn.Module, inputs: Inputs) -> Traced:
    first: Exception | None = None
    for traced_by in WAYS:
        try:
            return traced_by(net, inputs)
        except Exception as error:
            first = first or error
    raise UserError(
        f"{type(net).__name__} cannot be traced, so its residual branches must be named: "
        "branches={'block1': ['block1.conv1', 'block1.conv2'], ...} "
        f"(torch.export: {one_line(str(first))[:200]})"
    ) from first


@contextlib.contextmanager
def _masks_taken_at_their_word() -> Iterator[None]:
    """Within this context ``nn.TransformerEncoder`` believes ``is_causal``.

    It would look into the mask itself, which has no numbers while it is traced; the result is the
    same.
    """
    module: Any = nn.modules.transformer
    looking = module._detect_is_causal_mask
    module._detect_is_causal_mask = lambda mask, is_causal=None, size=None: bool(is_causal)
    try:
        yield
    finally:
        module._detect_is_causal_mask = looking
