"""Functions of fairseq with something of ours around them.

A patch knows the parameters of the function that it was written for and leaves any other function
alone, with a warning. It marks what it has wrapped, so that applying it twice changes nothing.
"""

from __future__ import annotations

import functools
import inspect
import logging
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

MARK = "_fixup_mt_patches"
"""Attribute of a wrapped function: what stood in its place, by the names of the patches."""

Function = Callable[..., Any]
BOUND = (staticmethod, classmethod)
STARS: dict[Any, str] = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}


@dataclass(frozen=True)
class Patch:
    """What goes around one function.

    Attributes:
        name: In the log.
        target: ``"package.module:function"`` or ``"package.module:Class.method"``.
        parameters: Of the function this was written for: their names in order, with the stars.
        wrap: Takes the function and returns what replaces it.
    """

    name: str
    target: str
    parameters: str
    wrap: Callable[[Function], Function]

    def apply(self) -> bool:
        """Put the patch in place; twice is harmless.

        Returns:
            Whether it is in place now. If not, the log says why.
        """
        try:
            owner, attribute, found = self._find()
        except (ImportError, AttributeError):
            logger.warning("%s is left out: there is no %s", self.name, self.target)
            return False
        function = _function(found)
        marks = getattr(function, MARK, {})
        if self.name in marks:
            return True
        parameters = parameters_of(function)
        if parameters != self.parameters:
            text = "%s is left out: %s takes (%s), not (%s)"
            logger.warning(text, self.name, self.target, parameters, self.parameters)
            return False
        replacement: Any = functools.wraps(function)(self.wrap(function))
        setattr(replacement, MARK, marks | {self.name: found})
        kind = type(found) if isinstance(found, BOUND) else _itself
        setattr(owner, attribute, kind(replacement))
        return True

    def undo(self) -> None:
        """Put back what stood there; what has been put around it since goes too."""
        owner, attribute, found = self._find()
        marks = getattr(_function(found), MARK, {})
        if self.name in marks:
            setattr(owner, attribute, marks[self.name])

    def _find(self) -> tuple[Any, str, Any]:
        module, _, path = self.target.partition(":")
        *classes, attribute = path.split(".")
        owner = pkgutil.resolve_name(f"{module}:{'.'.join(classes)}")
        return owner, attribute, inspect.getattr_static(owner, attribute)


def patch(target: str, parameters: str) -> Callable[[Callable[[Function], Function]], Patch]:
    """Make a ``Patch`` of the function below: it takes the original and returns its replacement."""
    return lambda wrap: Patch(wrap.__name__, target, parameters, wrap)


def parameters_of(function: Function) -> str:
    """The names of a function's parameters, as a ``Patch`` records them."""
    parameters = inspect.signature(function).parameters.values()
    return " ".join(STARS.get(parameter.kind, "") + parameter.name for parameter in parameters)


def arguments(function: Function, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The arguments of a call by name, defaults included, however they were passed."""
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


def _function(found: Any) -> Any:
    return found.__func__ if isinstance(found, BOUND) else found


def _itself(function: Any) -> Any:
    return function
