"""Scalars attached to the modules of a network that was written without them.

A module keeps its class, its forward pass and the names of its parameters; the scalars are
submodules of it under new names, applied by hooks. Hooks are functions of this module and hold
nothing, so that a network can still be copied, pickled and loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

from torch import nn

from fixup_core.rules.scalars import ScalarBias

BEFORE, MULTIPLIER, AFTER = "fixup_before", "fixup_multiplier", "fixup_after"
ATTACHED = (BEFORE, MULTIPLIER, AFTER)
T = TypeVar("T")


class Declared(Generic[T]):
    """A method of one network that declares ``items``, as ``residual_branches()`` does."""

    def __init__(self, items: Iterable[T]) -> None:
        self.items = tuple(items)

    def __call__(self) -> Iterator[T]:
        return iter(self.items)


def attach_before_(module: nn.Module) -> None:
    """Add a scalar bias to what comes in.

    In attention it is added to the query, and to keys and values that are the same tensor.
    """
    _attach_(module, BEFORE, ScalarBias())
    module.register_forward_pre_hook(_add_before, with_kwargs=True)


def attach_multiplier_(module: nn.Module, multiplier: nn.Module) -> None:
    """Multiply what goes out."""
    _attach_(module, MULTIPLIER, multiplier)
    module.register_forward_hook(_multiply)


def attach_after_(module: nn.Module) -> None:
    """Add a scalar bias to what goes out, behind the multiplier."""
    _attach_(module, AFTER, ScalarBias())
    module.register_forward_hook(_add_after)


def _attach_(module: nn.Module, name: str, scalar: nn.Module) -> None:
    module.add_module(name, scalar.train(module.training))


def _add_before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return on_entering(module.get_submodule(BEFORE), args, kwargs)


def _multiply(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return on_first(module.get_submodule(MULTIPLIER), output)


def _add_after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    return on_first(module.get_submodule(AFTER), output)


def on_entering(
    change: Callable[[Any], Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call, the first one changed, and others that are the same tensor."""
    entering = args[0] if args else kwargs.get("query", next(iter(kwargs.values())))
    changed = change(entering)
    args = tuple(changed if given is entering else given for given in args)
    return args, {k: changed if given is entering else given for k, given in kwargs.items()}


def on_first(scalar: Callable[[Any], Any], output: Any) -> Any:
    """What a call returns, changed; of a tuple, the first."""
    if isinstance(output, tuple):  # attention returns its weights too
        return (scalar(output[0]), *output[1:])
    return scalar(output)
