"""Calling a network to look at it: nothing of it, and of the random numbers, is different after."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fixup_core.errors import UserError

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any]
"""What a network is called with: one tensor, positional arguments, or named ones."""


def outputs_of(net: nn.Module, inputs: Inputs, replaced: Mapping[str, Tensor] | None = None) -> Any:
    """What ``net`` returns, in its present mode.

    Buffers (running statistics) are copies and random numbers are drawn from where they stand, so
    that each call draws the same dropout and none leaves a trace.

    Args:
        net: Any network.
        inputs: What it takes.
        replaced: Parameters that take other values in this call, by name.
    """
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    values = {**buffers, **_for_every_holder(net, replaced or {})}
    args, options = arguments_of(inputs)
    devices = {p.device for p in net.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices):
        return functional_call(net, values, args, options, tie_weights=False)


def _for_every_holder(net: nn.Module, replaced: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same values under all names of a parameter that several modules share.

    ``functional_call`` would find them itself, but it loses the parameters of a module that has two
    names.
    """
    own = dict(net.named_parameters()) if replaced else {}
    values = {id(own[name]): value for name, value in replaced.items()}
    return {
        f"{path}.{name}" if path else name: values[id(parameter)]
        for path, module in net.named_modules()
        for name, parameter in module._parameters.items()
        if id(parameter) in values
    }


def in_training_mode(net: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Every module of ``net`` in training mode, and in its own again after."""
    return in_mode(net, train=True)


def in_evaluation_mode(net: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Every module of ``net`` in evaluation mode, and in its own again after."""
    return in_mode(net, train=False)


@contextlib.contextmanager
def in_mode(net: nn.Module, train: bool) -> Iterator[None]:
    """Every module of ``net`` in training mode or not, and in its own again after."""
    modes = {module: module.training for module in net.modules()}
    try:
        net.train(train)
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def logits_of(net: nn.Module, inputs: Inputs, replaced: Mapping[str, Tensor] | None = None) -> Any:
    """The same for a classifier: its logits [B, classes].

    Raises:
        UserError: It returns something else.
    """
    logits = outputs_of(net, inputs, replaced)
    if not (isinstance(logits, Tensor) and logits.dim() == 2):
        raise UserError("the bounds are those of a classifier: its output must be [B, classes]")
    return logits


def loss_of(net: nn.Module, inputs: Inputs, targets: Any, loss: Any = F.cross_entropy) -> Tensor:
    """The loss: ``loss(outputs, targets)``, or ``loss(outputs)`` without targets; a number."""
    outputs = outputs_of(net, inputs)
    value = loss(outputs) if targets is None else loss(outputs, targets)
    if value.numel() != 1:
        raise UserError("the loss must be one number: take its mean over the batch")
    return value.reshape(())


def with_gradient(inputs: Inputs) -> Inputs:
    """The same inputs, floating-point tensors as leaves that want a gradient."""
    if isinstance(inputs, Tensor):
        return _leaf(inputs)
    if isinstance(inputs, Mapping):
        return {name: _leaf(value) for name, value in inputs.items()}
    return tuple(_leaf(value) for value in inputs)


def parameters_named(
    net: nn.Module, chosen: Iterable[str | nn.Parameter]
) -> dict[str, nn.Parameter]:
    """Parameters by name, chosen by name or as they are.

    Raises:
        UserError: One that the network does not have, or an empty selection.
    """
    known = dict(net.named_parameters())
    names = {id(parameter): name for name, parameter in known.items()}
    found = [one if isinstance(one, str) else names.get(id(one), "") for one in chosen]
    if not found:
        raise UserError("a parameter set needs at least one parameter")
    for name in found:
        if name not in known:
            raise UserError(f"the network has no parameter {name!r}{_hint(name, known)}")
    return {name: known[name] for name in found}


def modules_named(net: nn.Module, chosen: Iterable[str | nn.Module]) -> dict[nn.Module, str]:
    """Modules and their paths, chosen by path or as they are.

    Raises:
        UserError: One that the network does not have, or an empty selection.
    """
    known = dict(net.named_modules())
    paths = {module: path for path, module in known.items()}
    found: dict[nn.Module, str] = {}
    for one in chosen:
        module = known.get(one) if isinstance(one, str) else one
        if module is None or module not in paths:
            name = one if isinstance(one, str) else type(one).__name__
            raise UserError(f"the network has no module {name!r}{_hint(name, known)}")
        found[module] = paths[module]
    if not found:
        raise UserError("name at least one module")
    return found


def first_tensor(value: Any) -> Tensor | None:
    """The first floating-point tensor of an output: itself, or one in a tuple, list or dict."""
    return next(iter(float_tensors(value)), None)


def arguments_of(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and named arguments."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}


def _leaf(value: Any) -> Any:
    floats = isinstance(value, Tensor) and value.is_floating_point()
    return value.detach().requires_grad_() if floats else value


def _hint(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f"; did you mean {near[0]!r}?" if near else ""


def float_tensors(value: Any) -> list[Tensor]:
    """The floating-point tensors of an output, wherever they are in it."""
    if isinstance(value, Tensor):
        return [value] if value.is_floating_point() else []
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, (tuple, list)):
        return []
    return [tensor for part in value for tensor in float_tensors(part)]


def converted(value: Any, dtype: torch.dtype) -> Any:
    """Floating-point tensors in ``dtype``, everything else as it is."""
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: converted(item, dtype) for key, item in value.items()}
    return tuple(converted(item, dtype) for item in value) if isinstance(value, tuple) else value
