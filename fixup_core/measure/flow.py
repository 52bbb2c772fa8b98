"""How activations and gradients change along the depth of a network.

``gradient_flow`` measures any network by hooks, ``plot_flows`` draws several into one figure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fixup_core.errors import UserError
from fixup_core.measure import figures
from fixup_core.probing import Inputs, first_tensor, loss_of, modules_named, with_gradient

Loss = Callable[..., Tensor]

QUANTITIES = {
    "gradient_rms": ("Gradient of the activations", "root mean square"),
    "gradient_norm": ("Gradient of the activations", "norm"),
    "activation_rms": ("Activations", "root mean square"),
    "weight_gradient_norm": ("Gradient of the weights", "norm"),
}
"""What a layer is measured by: what it is, and how it is taken."""


@dataclass(frozen=True)
class LayerFlow:
    """One call of one layer.

    Attributes:
        path: Of the module.
        call: 1 for the first call of the module, 2 for the second.
        activation_rms: Root mean square of its output, before anything changes it in place.
        gradient_rms: Of the loss by that output, the same; NaN where none reaches it.
        gradient_norm: Of that gradient over the whole batch.
        weight_gradient_norm: Of all parameters in the module, over all its calls; NaN without any.
    """

    path: str
    call: int
    activation_rms: float
    gradient_rms: float = math.nan
    gradient_norm: float = math.nan
    weight_gradient_norm: float = math.nan


@dataclass(frozen=True)
class GradientFlow:
    """A network's layers in the order in which the forward pass met them, and the loss."""

    rows: tuple[LayerFlow, ...]
    loss: float

    def __iter__(self) -> Iterator[LayerFlow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        """A table."""
        width = max(len(row.path) for row in self.rows)
        lines = [f"{'':{width}} activation   gradient    weights"]
        for row in self.rows:
            numbers = (row.activation_rms, row.gradient_rms, row.weight_gradient_norm)
            lines.append(f"{row.path:{width}} " + " ".join(f"{n:10.3g}" for n in numbers))
        return "\n".join(lines)

    @property
    def decay(self) -> float:
        """The first layer's gradient over the last one's: far below 1 it has vanished, far above 1
        it has exploded on its way down; NaN where the last one is 0, as Fixup's is at first.
        """
        last = self.rows[-1].gradient_rms
        return self.rows[0].gradient_rms / last if last else math.nan

    def plot(self, file: Path, quantity: str = "gradient_rms") -> None:
        """Draw it alone; see ``plot_flows``."""
        plot_flows({"": self}, file, quantities=(quantity,))


def gradient_flow(
    net: nn.Module,
    inputs: Inputs,
    targets: Any = None,
    *,
    loss: Loss = F.cross_entropy,
    layers: Iterable[str | nn.Module] | None = None,
) -> GradientFlow:
    """Measure activations and gradients layer by layer, in one forward and one backward pass.

    No gradient is accumulated, buffers and random numbers stay as they are. A module whose output
    is a tuple, list or dict is measured by the first floating-point tensor in it.

    Args:
        net: Any network, in its present mode.
        inputs: What it is called with: a tensor, a tuple of arguments, or a dict of named ones.
        targets: Second argument of ``loss``.
        loss: ``loss(outputs, targets)``, or ``loss(outputs)`` where there are no targets: a number.
        layers: Modules to measure, or their paths; by default all that own a weight of two or more
            dimensions.

    Raises:
        UserError: No such module, none of them was called, or the loss is no single number.
    """
    watched = modules_named(net, _weight_layers(net) if layers is None else layers)
    records: list[_Record] = []
    with torch.enable_grad():
        leaves = with_gradient(inputs)
        with _recording(watched, records):
            value = loss_of(net, leaves, targets, loss)
        if not records:
            raise UserError("none of the layers was called in the forward pass")
        at = [*(p for p in net.parameters() if p.requires_grad), *_tensors(leaves)]
        gradients = torch.autograd.grad(value, at, allow_unused=True)
    found = zip(at, gradients, strict=True)
    norms = {id(p): g.double().norm().item() for p, g in found if g is not None}
    weights = {path: _total(module, norms) for module, path in watched.items()}
    rows = (replace(r.row, weight_gradient_norm=weights[r.row.path]) for r in records)
    return GradientFlow(tuple(rows), value.item())


def plot_flows(
    flows: Mapping[str, GradientFlow],
    file: Path,
    *,
    quantities: Iterable[str] = ("gradient_rms",),
    relative: bool = False,
) -> None:
    """Draw measurements into one figure, one line each, on a logarithmic scale.

    Args:
        flows: By the names of the lines.
        file: To write; its ending says in which format.
        quantities: Of ``QUANTITIES``, one panel each.
        relative: Divide each line by its value at the last layer, where the gradient enters.

    Raises:
        UserError: An unknown quantity, or matplotlib is missing.
    """
    panels = [panel_of(flows, quantity, relative=relative) for quantity in quantities]
    figures.draw(panels, file)


def panel_of(
    flows: Mapping[str, GradientFlow], quantity: str, *, relative: bool = False
) -> figures.Panel:
    """One panel of ``plot_flows``, for a figure of one's own.

    Raises:
        UserError: An unknown quantity.
    """
    if quantity not in QUANTITIES:
        raise UserError(f"there is no {quantity!r}; choose one of {', '.join(QUANTITIES)}")
    curves = [figures.Curve(n, _points(flow, quantity, relative)) for n, flow in flows.items()]
    what, how = QUANTITIES[quantity]
    axis = f"{how}, over the last layer's" if relative else how
    return figures.Panel(curves, "layer, from the input", axis, what, log_y=True)


@dataclass
class _Record:
    """What is known of a call; its gradient comes later."""

    row: LayerFlow

    def receive(self, gradient: Tensor) -> None:
        norm = gradient.detach().double().norm().item()
        rms = norm / gradient.numel() ** 0.5
        self.row = replace(self.row, gradient_norm=norm, gradient_rms=rms)


@contextmanager
def _recording(watched: Mapping[nn.Module, str], records: list[_Record]) -> Iterator[None]:
    """Within this context the outputs of the modules are recorded.

    The gradient comes by a hook on the tensor, which stays with the value it had when the hook was
    set: what is done to it in place later is part of the rest of the network.
    """
    calls: dict[nn.Module, int] = {}

    def record(module: nn.Module, _: Any, output: Any) -> None:
        tensor = first_tensor(output)
        if tensor is None:
            return
        calls[module] = calls.get(module, 0) + 1
        rms = tensor.detach().double().square().mean().sqrt().item()
        one = _Record(LayerFlow(watched[module], calls[module], rms))
        records.append(one)
        if tensor.requires_grad:
            tensor.register_hook(one.receive)

    hooks = [module.register_forward_hook(record) for module in watched]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _weight_layers(net: nn.Module) -> list[nn.Module]:
    found = [m for m in net.modules() if any(p.dim() > 1 for p in m.parameters(recurse=False))]
    if not found:
        raise UserError("the network has no layer with a weight matrix: name modules in layers=")
    return found


def _total(module: nn.Module, norms: Mapping[int, float]) -> float:
    """Of the parameters that have a gradient."""
    found = [norms[id(p)] for p in module.parameters() if id(p) in norms]
    return math.hypot(*found) if found else math.nan


def _tensors(leaves: Any) -> list[Tensor]:
    """Those of the inputs that want a gradient."""
    parts = leaves.values() if isinstance(leaves, Mapping) else leaves
    found = [leaves] if isinstance(leaves, Tensor) else parts
    return [one for one in found if isinstance(one, Tensor) and one.requires_grad]


def _points(flow: GradientFlow, quantity: str, relative: bool) -> list[tuple[float, float]]:
    values = [getattr(row, quantity) for row in flow.rows]
    whole = values[-1] if relative else 1.0
    return [(i, value / whole if whole else math.nan) for i, value in enumerate(values, 1)]
