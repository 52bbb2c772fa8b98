"""Parametrised weights (``torch.nn.utils.parametrize``: weight norm and others) as plain ones,
while rules are applied to them.

The rules write weights. A parametrised weight is computed from other parameters, so its
parametrisation has to find those that give what is written (``right_inverse``). Weights that a
method standardises stay as they are: there the rules draw what is standardised.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Container, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import is_parametrized

from fixup_core.errors import UserError, one_line
from fixup_core.rules.standardised import is_standardised


class Parametrised:
    """A module with computed weights, which are plain parameters between ``off_`` and ``on_``.

    Args:
        path: The module's path.
        module: The module.
    """

    def __init__(self, path: str, module: Any) -> None:
        self.path, self.module, self.own_class = path, module, type(module)
        self.lists, self.order = module.parametrizations, list(module._modules)
        with torch.no_grad():  # of copies: spectral norm takes a step whenever it is computed
            self.before = {name: copy.deepcopy(own)().clone() for name, own in self.lists.items()}

    def plain(self, sources: Container[int]) -> list[nn.Parameter]:
        """The plain parameters of those weights whose ``sources``, by id, are all among these."""
        made = [
            n for n, own in self.lists.items() if all(id(p) in sources for p in own.parameters())
        ]
        return [self.module.get_parameter(name) for name in made]

    def check(self, written: Container[int]) -> None:
        """Raise unless each weight among those ``written``, by id, can take any value, and 0.

        Raises:
            UserError: A weight cannot (it is named). Nothing has been written.
        """
        for name, before in self.before.items():
            if id(self.module.get_parameter(name)) in written:
                drawn = torch.linspace(-1.0, 1.0, before.numel()).to(before).view_as(before)
                for value in (drawn, torch.zeros_like(before)):
                    _give_(copy.deepcopy(self.lists[name]), value, self._full(name))

    def off_(self) -> None:
        """Make the weights parameters of the module."""
        del self.module._modules["parametrizations"]
        self.module.__class__ = self.own_class.__bases__[0]  # as remove_parametrizations does
        for name, before in self.before.items():
            learnt = any(part.requires_grad for part in self.lists[name].parameters())
            self.module.register_parameter(name, nn.Parameter(before.clone(), learnt))

    def on_(self) -> dict[str, Tensor]:
        """Have the weights computed again, and return what they were just before."""
        module = self.module
        values = {name: module._parameters.pop(name).detach() for name in self.before}
        module.__class__ = self.own_class
        modules = {"parametrizations": self.lists, **module._modules}
        # In the order they had: a state dict lists them by it.
        modules = {name: modules[name] for name in self.order if name in modules} | modules
        module._modules.clear()
        module._modules.update(modules)
        return values

    def give_(self, values: Mapping[str, Tensor]) -> None:
        """Give the parametrisations the ``values`` that have been written.

        A weight that nobody wrote keeps the very parameters it had.
        """
        for name, value in values.items():
            if not torch.equal(value, self.before[name]):
                _give_(self.lists[name], value, self._full(name))

    def _full(self, name: str) -> str:
        return f"{self.path}.{name}" if self.path else name


@contextlib.contextmanager
def plain_weights(net: nn.Module) -> Iterator[list[Parametrised]]:
    """Within this context the parametrised weights of ``net`` are ordinary parameters.

    After it they are computed again, from parameters that give what has been written. Where
    something is raised, they are computed from the parameters that were there.
    """
    found = [
        Parametrised(path, module)
        for path, module in net.named_modules()
        if is_parametrized(module) and not is_standardised(module)
    ]
    for one in found:
        one.off_()
    try:
        yield found
    except BaseException:
        for one in found:
            one.on_()
        raise
    written = [one.on_() for one in found]
    for one, values in zip(found, written, strict=True):
        one.give_(values)


def plain_copy(net: nn.Module) -> nn.Module:
    """A copy of ``net`` that computes the same, from ordinary weights.

    PyTorch's ``remove_parametrizations`` on a copy would take the original's weights too: both have
    one class.
    """
    plain = copy.deepcopy(net)
    for path, module in list(plain.named_modules()):
        if is_parametrized(module):
            Parametrised(path, module).off_()
    return plain


@torch.no_grad()
def _give_(parts: Any, value: Tensor, weight: str) -> None:
    """Set the parameters of a parametrisation so that it computes ``value``."""
    types = ", ".join(type(part).__name__.lstrip("_") for part in parts)
    try:
        if len(parts) == 1 and isinstance(parts[0], parametrizations._WeightNorm):
            _give_to_weight_norm_(parts, value)
        else:
            parts.right_inverse(value)
        reached = torch.allclose(parts(), value, rtol=1e-2, atol=1e-6)
    except (RuntimeError, NotImplementedError, ValueError) as error:
        raise UserError(f"{_refusal(weight, types)} ({one_line(str(error))[:100]})") from error
    if not reached:
        raise UserError(_refusal(weight, types))


def _give_to_weight_norm_(parts: Any, value: Tensor) -> None:
    """Length and direction; a weight of 0 has no direction, and keeps the one that was there."""
    length = torch.norm_except_dim(value, 2, parts[0].dim)
    parts.original0.copy_(length)
    parts.original1.copy_(torch.where(length > 0, value, parts.original1))


def _refusal(weight: str, types: str) -> str:
    return (
        f"{weight} is parametrised by {types}, which cannot take the values that the rules give: "
        "remove that first (torch.nn.utils.parametrize.remove_parametrizations)"
    )
