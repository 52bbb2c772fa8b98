"""The affine maps that are left of norms, taken into the linear layers beside them.

Behind a map, ``W (s P x + t) + b = (W s P) x + (b + W t)``, P the subtraction of a token's mean: a
weight takes the map in where it sees nothing else. Before it, ``s P (W x + b) + t`` likewise. What
has no such neighbour stays: a norm on the residual stream itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from fixup_core.convert.operations import VIEWS
from fixup_core.convert.tracing import Trace, Use, holder_of, operation, shape_of, stack
from fixup_core.fuse.constants import Affine, Unnormalised
from fixup_core.fuse.layers import computes_as, is_transposed_linear
from fixup_core.probing import Inputs
from fixup_core.removal.leaving import FixedAffine

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
PACKED = "in_proj_weight"


@dataclass(frozen=True)
class Neighbour:
    """A layer that can take a map in.

    Attributes:
        module: It holds the weight.
        weight: The name of that in it; ``bias`` likewise.
        transposed: The weight is [inputs, outputs].
    """

    module: nn.Module
    weight: str
    bias: str
    transposed: bool

    def sees(self, channels: int) -> bool:
        """Whether every output is made of all ``channels``, and of nothing beside them."""
        padded = any(getattr(self.module, "_reversed_padding_repeated_twice", ()))
        inputs = self._weight.size(0 if self.transposed else 1)
        return inputs == channels and self.groups == 1 and not padded

    @property
    def groups(self) -> int:
        """Of a convolution; 1 for a linear layer."""
        return getattr(self.module, "groups", 1)

    @property
    def outputs(self) -> int:
        """Their number."""
        return self._weight.size(1 if self.transposed else 0)

    @property
    def _weight(self) -> Tensor:
        weight = self.module._parameters[self.weight]
        assert weight is not None
        return weight


@torch.no_grad()
def fold_maps_(net: nn.Module, inputs: Inputs) -> list[str]:
    """Fold every ``FixedAffine`` of ``net`` that a neighbour can take in.

    Args:
        net: Changed in place; layers that take a map in get new parameters.
        inputs: A batch of it.

    Returns:
        The paths of those that are gone; the identity stands there, or an activation.
    """
    paths = {path: m for path, m in net.named_modules() if isinstance(m, FixedAffine)}
    if not paths:
        return []
    graph = _Graph(net, Trace(net, inputs))
    folded = []
    for path, fixed in paths.items():
        if path in graph.repeated:
            continue
        # An activation that was part of the norm stands between the map and what is behind.
        then = {n: m for n, m in fixed.named_children() if type(m) is not nn.Identity}
        behind = [] if then else graph.behind(path, fixed)
        before = graph.before(path, fixed)
        for neighbour in behind:
            _take_in_behind_(neighbour, fixed)
        if not behind and before is not None:
            _take_in_before_(before, fixed)
        if behind or before is not None:
            net.set_submodule(path, Affine(None, None, then) if then else Unnormalised())
            folded.append(path)
    return folded


class _Graph:
    """Which layers stand beside a map, and see nothing else.

    Attributes:
        repeated: Paths of the modules that are called more than once.
    """

    def __init__(self, net: nn.Module, trace: Trace) -> None:
        self.net, self.trace = net, trace
        self.uses: dict[str, list[Use]] = {}
        self.known: dict[Node, Use] = {}
        for node in trace.nodes:
            use = trace.use(node)
            if use is not None:
                self.known[node] = use
                self.uses.setdefault(use.weight, []).append(use)
        self.repeated = {
            path.split("@")[0]
            for node in trace.nodes
            for path, _ in node.meta.get("nn_module_stack", {}).values()
            if "@" in path
        }
        self.holders: dict[int, int] = {}
        for module in net.modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    self.holders[id(parameter)] = self.holders.get(id(parameter), 0) + 1

    def behind(self, path: str, fixed: FixedAffine) -> list[Neighbour]:
        """The linear layers that alone see what the map makes; empty where anything else does."""
        end = self._end(path)
        found = self._seeing(end)
        if end is None or not found or len(fixed.kind.dims) > 1:
            return []
        shape = shape_of(end) or ()
        layers = [self._neighbour(use, _kinds(fixed, shape)) for use in found]
        weights = {use.weight for use in found}
        # All uses of a weight must be of this map.
        alone = all(use in found for weight in weights for use in self.uses[weight])
        channels = shape[fixed.kind.dims[0]]
        known = [layer for layer in layers if layer is not None and layer.sees(channels)]
        if not alone or len(known) < len(layers):
            return []
        return list({(id(one.module), one.weight): one for one in known}.values())

    def before(self, path: str, fixed: FixedAffine) -> Neighbour | None:
        """The layer whose output goes into the map alone."""
        own = self._nodes(path)
        entering = {n for node in own for n in self.trace.flowing(node) if n not in own}
        if len(entering) != 1:
            return None
        start = node = entering.pop()
        added: set[str] = set()
        while operation(node) in VIEWS | {"add"} and node not in self.known:
            given = self.trace.flowing(node)
            if len(given) != 1 or not self._alone(node, own):
                return None
            if operation(node) == "add":
                added |= {n for c in node.all_input_nodes for n in self.trace.parameters.get(c, ())}
            own, node = own | {node}, given[0]
        use = self.known.get(node)
        if use is None or not self._alone(node, own) or len(self.uses[use.weight]) > 1:
            return None
        shape = shape_of(start) or ()
        if not added <= {use.bias} or len(fixed.kind.dims) > 1:
            return None
        layer = self._neighbour(use, _kinds(fixed, shape))
        if layer is None or shape[fixed.kind.dims[0]] != layer.outputs:
            return None
        # A mean over channels needs every channel to be made of the same inputs.
        return None if fixed.centring and layer.groups > 1 else layer

    def _alone(self, node: Node, users: set[Node]) -> bool:
        return all(user in users or user not in self.trace.visible for user in node.users)

    def _nodes(self, path: str) -> set[Node]:
        return {n for n in self.trace.nodes if n in self.trace.sources and path in stack(n)}

    def _end(self, path: str) -> Node | None:
        own = self._nodes(path)
        ends = {n for n in own if any(user not in own for user in n.users)}
        return ends.pop() if len(ends) == 1 else None

    def _seeing(self, end: Node | None) -> list[Use]:
        """The products that what ``end`` makes goes into; empty where it goes elsewhere too."""
        if end is None or end in self.trace.outputs:
            return []
        found, waiting = [], [user for user in end.users if user in self.trace.visible]
        while waiting:
            node = waiting.pop()
            use = self.known.get(node)
            if use is not None:
                found.append(use)
            elif operation(node) in VIEWS and node not in self.trace.outputs:
                waiting += [user for user in node.users if user in self.trace.visible]
            else:
                return []
        return found

    def _neighbour(self, use: Use, kinds: tuple[type, ...]) -> Neighbour | None:
        """The layer of a product, if its weight is a parameter of its own."""
        module = self.net.get_submodule(holder_of(use.weight))
        name = use.weight.rpartition(".")[2]
        parameter = module._parameters.get(name)
        if use.computed or parameter is None or self.holders.get(id(parameter), 1) > 1:
            return None
        if isinstance(module, nn.MultiheadAttention):
            return Neighbour(module, name, "in_proj_bias", False) if name == PACKED else None
        if nn.Linear in kinds and is_transposed_linear(module):
            return Neighbour(module, name, "bias", True)
        plain = any(computes_as(module, kind) for kind in kinds)
        return Neighbour(module, name, "bias", False) if plain else None


def _take_in_behind_(layer: Neighbour, fixed: FixedAffine) -> None:
    """The map comes first, then the layer."""
    weight, scale, shift = _numbers(layer, fixed)
    inputs, summed = weight.size(1), weight.reshape(*weight.shape[:2], -1).sum(2)
    added = None if shift is None else summed @ shift.expand(inputs)
    weight = weight * scale.expand(inputs).view(-1, *[1] * (weight.dim() - 2))
    if fixed.centring:
        weight = weight - weight.mean(1, keepdim=True)
    _write_(layer, weight, _bias(layer), added)


def _take_in_before_(layer: Neighbour, fixed: FixedAffine) -> None:
    """The layer comes first, then the map."""
    weight, scale, shift = _numbers(layer, fixed)
    rows = scale.expand(weight.size(0))
    bias = _bias(layer)
    if fixed.centring:
        weight = weight - weight.mean(0, keepdim=True)
        bias = None if bias is None else bias - bias.mean()
    weight = weight * rows.view(-1, *[1] * (weight.dim() - 1))
    bias = None if bias is None else bias * rows
    _write_(layer, weight, bias, None if shift is None else shift.expand(weight.size(0)))


def _numbers(layer: Neighbour, fixed: FixedAffine) -> tuple[Tensor, Tensor, Tensor | None]:
    """The weight [outputs, inputs, ...], the map's scale and its shift, in float64."""
    own: Any = layer.module._parameters[layer.weight]
    weight = _double(own.t() if layer.transposed else own)
    shift = None if fixed.bias is None else _double(fixed.bias)
    return weight, _double(fixed.weight), shift


def _bias(layer: Neighbour) -> Tensor | None:
    bias = layer.module._parameters.get(layer.bias)
    return None if bias is None else _double(bias)


def _write_(layer: Neighbour, weight: Tensor, bias: Tensor | None, added: Tensor | None) -> None:
    own: Any = layer.module._parameters[layer.weight]
    weight = weight.t() if layer.transposed else weight
    parts = [part for part in (bias, added) if part is not None]
    new = nn.Parameter(weight.contiguous().to(own), requires_grad=own.requires_grad)
    layer.module._parameters[layer.weight] = new
    if parts:
        total = torch.stack(parts).sum(0).to(own)
        layer.module._parameters[layer.bias] = nn.Parameter(total, requires_grad=own.requires_grad)


def _kinds(fixed: FixedAffine, shape: Sequence[int]) -> tuple[type, ...]:
    """The layers whose features lie where the map's do, in a signal of this shape."""
    return (nn.Linear,) if fixed.kind.dims[0] in (-1, len(shape) - 1) else CONVOLUTIONS


def _double(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float64)


def maps_left(net: nn.Module) -> Iterator[str]:
    """The paths of the affine maps that no layer has taken in."""
    return (path for path, module in net.named_modules() if isinstance(module, FixedAffine))
