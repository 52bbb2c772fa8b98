"""Scalars attached to the modules of a network that was written without them.

A module keeps its class, its forward pass and the names of its parameters; the scalars are
submodules of it under new names, applied by hooks. Hooks are functions of this module and hold
nothing, so that a network can still be copied, pickled and loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from fixup_core.rules.scalars import ScalarBias, ScalarMultiplier

BEFORE, MULTIPLIER, AFTER = "fixup_before", "fixup_multiplier", "fixup_after"


class Declared:
    """What a network declares by a method that was given to it: an iterator over ``items``."""

    def __init__(self, items: Iterable[Any]) -> None:
        self.items = tuple(items)

    def __call__(self) -> Iterator[Any]:
        return iter(self.items)


def attach_before_(module: nn.Module) -> None:
    """A scalar bias on what comes in: on the query of attention, and on keys and values that are
    the same tensor.
    """
    module.add_module(BEFORE, ScalarBias())
    module.register_forward_pre_hook(_add_before, with_kwargs=True)


def attach_multiplier_(module: nn.Module, initial: float = 1.0) -> None:
    """A scalar multiplier on what goes out."""
    module.add_module(MULTIPLIER, ScalarMultiplier(initial))
    module.register_forward_hook(_multiply)


def attach_after_(module: nn.Module) -> None:
    """A scalar bias on what goes out, behind the multiplier."""
    module.add_module(AFTER, ScalarBias())
    module.register_forward_hook(_add_after)


def _add_before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    entering = args[0] if args else kwargs.get("query", next(iter(kwargs.values())))
    shifted = module.get_submodule(BEFORE)(entering)
    args = tuple(shifted if given is entering else given for given in args)
    return args, {k: shifted if given is entering else given for k, given in kwargs.items()}


def _multiply(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return _on_first(module.get_submodule(MULTIPLIER), output)


def _add_after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return _on_first(module.get_submodule(AFTER), output)


def _on_first(scalar: nn.Module, output: Any) -> Any:
    if isinstance(output, tuple):
        return (scalar(output[0]), *output[1:])
    return scalar(output)
