"""The graph of what a network computes, made by ``torch.export``, with names of parameters.

Every node is an ATen operation; ``torch.export`` says which module called it. Nodes are told apart
by what they depend on: *flowing* ones on the network's inputs, the others on parameters alone.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from fixup_core.errors import UserError, one_line
from fixup_core.probing import Inputs, arguments_of, in_training_mode

PRODUCTS = frozenset(
    """linear conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d
    matmul mm bmm addmm baddbmm einsum""".split()
)
"""Operations that make a weight layer of a parameter."""
VIEWS = frozenset(
    """t transpose permute view reshape select slice split split_with_sizes chunk getitem unbind
    contiguous clone squeeze unsqueeze expand flatten unflatten alias detach movedim
    _to_copy to""".split()
)
"""Operations that move numbers and leave them as they are."""
UNLEARNT = frozenset(
    """new_empty empty_like rand_like randn_like new_zeros new_ones zeros_like ones_like new_full
    full_like bernoulli lt gt le ge eq ne logical_not logical_and logical_or argmax sign""".split()
)
"""Operations that pass no gradient on, as those that make masks: what they give is a constant."""


class Trace:
    """What ``net`` does with ``inputs``.

    Args:
        net: It is traced in training mode, with no numbers computed, and left as it was.
        inputs: A tensor, a tuple of arguments or a mapping of named ones.

    Attributes:
        nodes: In the order of the forward pass; ``order`` is each one's number.
        parameters: For a node that depends on parameters alone, their names.
        sources: For a flowing node, itself and the flowing nodes that it depends on, as the bits of
            their numbers.
        outputs: The nodes that the network returns.
        visible: The nodes that these depend on.

    Raises:
        UserError: The network cannot be traced.
    """

    def __init__(self, net: nn.Module, inputs: Inputs) -> None:
        program = _exported(net, inputs)
        signature = program.graph_signature
        own = dict(signature.inputs_to_parameters)
        entering = set(signature.user_inputs)
        self.nodes = list(program.graph.nodes)
        self.order = {node: number for number, node in enumerate(self.nodes)}
        self.parameters: dict[Node, frozenset[str]] = {}
        self.sources: dict[Node, int] = {}
        for node in self.nodes:
            if node.name in own:
                self.parameters[node] = frozenset({own[node.name]})
            elif node.name in entering:
                self.sources[node] = 1 << self.order[node]
            elif node.op == "call_function":
                self._add(node)
        self.outputs = {node for node in self.nodes if node.name in signature.user_outputs}
        self.visible = self._reaching_outputs()

    def _reaching_outputs(self) -> set[Node]:
        """The nodes that an output depends on; running statistics are none."""
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

    def weight(self, node: Node) -> tuple[str, str | None] | None:
        """The parameters whose product with what flows a node is: those of weight and bias.

        Raises:
            UserError: The weight is computed, and not by views, of parameters.
        """
        if operation(node) not in PRODUCTS or len(self.flowing(node)) != 1:
            return None
        constant = [n for n in node.all_input_nodes if self.parameters.get(n)]
        matrices = [n for n in constant if shape_of(n) is not None and len(shape_of(n) or ()) > 1]
        if not matrices:
            return None
        names = self.parameters[matrices[0]]
        if len(names) > 1 or not is_view(matrices[0]):
            raise UserError(
                f"the weight of {owner(node) or 'the network'} is computed from "
                f"{', '.join(sorted(names))}: make it a parameter first "
                "(for weight norm: torch.nn.utils.remove_weight_norm)"
            )
        name = next(iter(names))
        others = [n for n in constant if n is not matrices[0] and is_view(n)]
        biases = sorted(
            b for n in others for b in self.parameters[n] if _holder(b) == _holder(name)
        )
        return name, biases[0] if biases else None


def operation(node: Node) -> str:
    """The name of a node's operation, without its overload: ``add``, ``conv2d``."""
    target: Any = node.target
    packet = getattr(target, "overloadpacket", target)
    return str(getattr(packet, "__name__", packet)).rsplit(".", 1)[-1].removesuffix("_")


def owner(node: Node) -> str:
    """The path of the innermost module that calls a node's operation; empty for the network."""
    return stack(node)[-1] if stack(node) else ""


def stack(node: Node) -> list[str]:
    """The paths of the modules around a node's operation, the innermost last."""
    return [_clean(path) for path, _ in node.meta.get("nn_module_stack", {}).values()]


def shape_of(node: Node) -> tuple[int, ...] | None:
    """The shape of what a node computes; ``None`` where that is no tensor."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _clean(path: str) -> str:
    return path.removeprefix("L['self'].").removeprefix("L['self']").split("@")[0]


def _holder(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def is_view(node: Node) -> bool:
    """Whether a node is a parameter, moved at the most."""
    while node.op != "placeholder":
        if operation(node) not in VIEWS or not node.all_input_nodes:
            return False
        node = node.all_input_nodes[0]
    return True


def _exported(net: nn.Module, inputs: Inputs) -> Any:
    args, kwargs = arguments_of(inputs)
    try:
        with warnings.catch_warnings(), _masks_taken_as_told(), in_training_mode(net):
            warnings.simplefilter("ignore")
            program = torch.export.export(net, args, kwargs, strict=False)
            return program.run_decompositions({})
    except Exception as error:
        raise UserError(
            f"{type(net).__name__} cannot be traced, so its residual branches must be named: "
            "branches={'block1': ['block1.conv1', 'block1.conv2'], ...} "
            f"(torch.export: {one_line(str(error))[:200]})"
        ) from error


@contextlib.contextmanager
def _masks_taken_as_told() -> Iterator[None]:
    """``nn.TransformerEncoder`` looks into a mask for whether it is causal, which has no numbers
    while it is traced; what it does then is the same.
    """
    module: Any = nn.modules.transformer
    looking = module._detect_is_causal_mask
    module._detect_is_causal_mask = lambda mask, is_causal=None, size=None: bool(is_causal)
    try:
        yield
    finally:
        module._detect_is_causal_mask = looking
