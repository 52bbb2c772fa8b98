"""The graph of what a network computes, recorded while it runs.

``torch.export`` follows no path that depends on numbers: it has none. Here the network is called,
and every ATen operation is written down as it happens. What is recorded holds for these inputs.
"""

from __future__ import annotations

import contextlib
import operator
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Node
from torch.nn.modules import module as hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fixup_core.probing import Inputs, arguments_of, in_mode, outputs_of

RECURRENT = (nn.RNNBase, nn.RNNCellBase)


@dataclass(frozen=True)
class Traced:
    """A graph, and what its nodes are.

    Attributes:
        nodes: In the order of the forward pass.
        parameters: Name of a node -> name of the parameter that it is.
        inputs: Names of the nodes that are the network's inputs.
        outputs: Names of those that it returns.
    """

    nodes: tuple[Node, ...]
    parameters: dict[str, str]
    inputs: frozenset[str]
    outputs: frozenset[str]

    @property
    def used(self) -> int:
        """How many parameters anything is computed from."""
        return sum(bool(node.users) for node in self.nodes if node.name in self.parameters)


def recorded(net: nn.Module, inputs: Inputs) -> Traced:
    """Call ``net`` and write down what it does. It is as it was after.

    It is called in training mode, and in evaluation mode too: in training whole layers may be left
    out by chance. Where more parameters are used in evaluation, that is what counts.
    """
    training = _recorded(net, inputs, train=True)
    try:
        evaluation = _recorded(net, inputs, train=False)
    except Exception:  # some networks want other inputs there
        return training
    return evaluation if evaluation.used > training.used else training


def _recorded(net: nn.Module, inputs: Inputs, train: bool) -> Traced:
    recorder = _Recorder(net)
    given = tree_leaves(arguments_of(inputs))
    entering = [recorder.enters(tensor) for tensor in given if isinstance(tensor, Tensor)]
    with in_mode(net, train), torch.no_grad(), recorder.following(), recorder:
        outputs = outputs_of(net, inputs)
    leaving = [recorder.known.get(id(t)) for t in tree_leaves(outputs) if isinstance(t, Tensor)]
    return Traced(
        tuple(recorder.graph.nodes),
        recorder.parameters,
        frozenset(node.name for node in entering),
        frozenset(node.name for node in leaving if node is not None),
    )


class _Recorder(TorchDispatchMode):
    """Writes down every operation, and which module calls it.

    Attributes:
        graph: What has been written.
        parameters: Name of a node -> name of the parameter that it is.
        known: Which node a tensor, by id, was made by.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.graph = Graph()
        self.paths = {module: path for path, module in net.named_modules()}
        self.calls: Counter[str] = Counter()
        self.stack: dict[str, tuple[str, type]] = {}
        self.known: dict[int, Node] = {}
        # A tensor that is gone would leave its id to another one.
        self.alive: list[Tensor] = []
        # The last operation that wrote into a storage: all its views see what it wrote.
        self.written: dict[int, Node] = {}
        # The recurrent module that is being called: its steps are one operation.
        self.whole: nn.Module | None = None
        self.parameters: dict[str, str] = {}
        for name, parameter in net.named_parameters():
            self.parameters[self.enters(parameter).name] = name

    def enters(self, tensor: Tensor) -> Node:
        """The node of a tensor that is there before the call."""
        return self._remember(tensor, self.graph.placeholder(f"given_{len(self.alive)}"))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if self.whole is not None:
            return output
        node = self._write(func, tuple(args), output, dict(kwargs or {}))
        for place, argument in enumerate(func._schema.arguments):
            if argument.is_write and place < len(args) and isinstance(args[place], Tensor):
                self.written[_storage(args[place])] = node
                node.meta["at"] = len(self.alive)
        return output

    def _write(self, function: Any, args: Any, output: Any, kwargs: Any = None) -> Node:
        given = tree_map(self._node_of, (args, kwargs or {}))
        node = self.graph.call_function(function, *given)
        node.meta["nn_module_stack"] = dict(self.stack)
        if isinstance(output, Tensor):
            return self._remember(output, node)
        for place, part in enumerate(output if isinstance(output, (tuple, list)) else ()):
            if isinstance(part, Tensor):
                self._remember(part, self._part(node, place))
        return node

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        """Within this context the stack says which modules are being called."""
        before = hooks.register_module_forward_pre_hook(self._enter)
        after = hooks.register_module_forward_hook(self._leave, always_call=True)
        try:
            yield
        finally:
            before.remove()
            after.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        path = self.paths.get(module)
        if isinstance(module, RECURRENT) and self.whole is None:
            self.whole = module
        if path is not None:
            number = self.calls[path]
            self.calls[path] += 1
            name = f"{path}@{number}" if number else path
            self.stack[name] = (name, type(module))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        path = self.paths.get(module)
        if module is self.whole:
            self.whole = None
            self._write(_name_of(module), (*args, *module.parameters()), output)
        last = next(reversed(self.stack), None)
        if last is not None and last.split("@")[0] == path:
            del self.stack[last]

    def _part(self, node: Node, place: int) -> Node:
        part = self.graph.call_function(operator.getitem, (node, place))
        part.meta["nn_module_stack"] = dict(self.stack)
        return part

    def _remember(self, tensor: Tensor, node: Node) -> Node:
        # Its shape and dtype: the numbers can go once the call is over.
        node.meta["val"] = torch.empty_like(tensor, device="meta")
        node.meta["at"] = len(self.alive)
        self.known[id(tensor)] = node
        self.alive.append(tensor)
        return node

    def _node_of(self, value: Any) -> Any:
        """The node that made a tensor; of a buffer or another constant, a node of its own."""
        if not isinstance(value, Tensor):
            return value
        node, writer = self.known.get(id(value)), self.written.get(_storage(value))
        if node is None:
            node = self.enters(value)
        if writer is None or writer.meta["at"] <= node.meta["at"]:
            return node
        both = self.graph.call_function(torch.ops.aten.slice_scatter.default, (node, writer))
        both.meta["nn_module_stack"] = dict(self.stack)
        return self._remember(value, both)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _name_of(module: nn.Module) -> Any:
    """A function of the name of a module's type, to stand for all that it does."""

    def whole(*args: Any) -> None:
        raise NotImplementedError

    whole.__name__ = type(module).__name__.lower()
    return whole
