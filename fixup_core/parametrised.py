"""Parametrised weights (``torch.nn.utils.parametrize``: weight norm and others) made plain ones,
while rules are applied to them.

The rules write weights. A parametrised weight is computed, so what is to be written is handed back
to its parametrisation, which finds parameters for it (``right_inverse``).
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from fixup_core.errors import UserError, one_line


class Parametrised:
    """A weight that a module computes; plain between ``off_`` and ``on_``.

    Args:
        module: That has it.
        path: Of the module.
        name: Of the weight in it.
    """

    def __init__(self, module: Any, path: str, name: str) -> None:
        self.module, self.name = module, name
        self.weight = f"{path}.{name}" if path else name
        self.parts: Any = module.parametrizations[name]
        with torch.no_grad():
            self.before = getattr(module, name).detach().clone()

    def check(self) -> None:
        """Raise unless the parametrisation can take any value, and 0."""
        drawn = torch.linspace(0.5, 1.0, self.before.numel()).to(self.before)
        for value in (drawn.view_as(self.before), torch.zeros_like(self.before)):
            _give_(copy.deepcopy(self.parts), value, self.weight)

    def plain(self) -> nn.Parameter:
        """The weight as a parameter of its own."""
        learnt = any(part.requires_grad for part in self.parts.parameters())
        return nn.Parameter(self.before.clone(), requires_grad=learnt)

    def write_back_(self, value: Tensor) -> None:
        """Give the parametrisation what has been written, if anything has."""
        if not torch.equal(value, self.before):
            _give_(self.parts, value, self.weight)


def parameters_of_weight(module: Any) -> list[nn.Parameter]:
    """What ``module.weight`` is made of: itself, or the parameters that it is computed from."""
    if isinstance(module, nn.Module) and parametrize.is_parametrized(module, "weight"):
        parts: Any = module.parametrizations
        return list(parts["weight"].parameters())
    return [module.weight]


@contextlib.contextmanager
def plain_weights(network: nn.Module) -> Iterator[dict[str, Parametrised]]:
    """Within this context the parametrised weights of ``network`` are ordinary parameters, which
    the context has by name. After it they are computed again, from parameters that give what has
    been written; where it raises, from those that were there.
    """
    modules = [(path, m) for path, m in network.named_modules() if parametrize.is_parametrized(m)]
    found = {m: [Parametrised(m, path, name) for name in _names(m)] for path, m in modules}
    classes = {module: type(module) for module in found}
    lists = {module: module.parametrizations for module in found}
    for module, weights in found.items():
        del module._modules["parametrizations"]
        module.__class__ = type(module).__bases__[0]  # as remove_parametrizations does
        for weight in weights:
            module.register_parameter(weight.name, weight.plain())
    written: list[tuple[Parametrised, Tensor]] = []
    try:
        yield {weight.weight: weight for weights in found.values() for weight in weights}
        written = [
            (w, getattr(m, w.name).detach()) for m, weights in found.items() for w in weights
        ]
    finally:
        for module, weights in found.items():
            for weight in weights:
                del module._parameters[weight.name]
            module.__class__ = classes[module]
            others = dict(module._modules)
            module._modules.clear()
            module._modules.update(parametrizations=lists[module], **others)
    for weight, value in written:
        weight.write_back_(value)


def _names(module: Any) -> list[str]:
    return list(module.parametrizations)


@torch.no_grad()
def _give_(parts: Any, value: Tensor, weight: str) -> None:
    """Set the parameters of a parametrisation so that it computes ``value``."""
    kinds = ", ".join(type(part).__name__.lstrip("_") for part in parts)
    try:
        if len(parts) == 1 and isinstance(parts[0], parametrizations._WeightNorm):
            _give_to_weight_norm_(parts, value)
        else:
            parts.right_inverse(value)
        reached = torch.allclose(parts(), value, rtol=1e-3, atol=1e-6)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise UserError(f"{_refusal(weight, kinds)} ({one_line(str(error))[:100]})") from error
    if not reached:
        raise UserError(_refusal(weight, kinds))


def _give_to_weight_norm_(parts: Any, value: Tensor) -> None:
    """Length and direction; a weight of 0 has no direction, and keeps the one that was there."""
    length = torch.norm_except_dim(value, 2, parts[0].dim)
    parts.original0.copy_(length)
    parts.original1.copy_(torch.where(length > 0, value, parts.original1))


def _refusal(weight: str, kinds: str) -> str:
    return (
        f"{weight} is parametrised by {kinds}, which cannot take the values that the rules give: "
        "remove that first (torch.nn.utils.parametrize.remove_parametrizations)"
    )
