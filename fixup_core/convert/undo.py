"""A network put back as it was where its conversion fails."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from fixup_core.errors import UserError, one_line


@contextlib.contextmanager
def undone_if_it_fails(net: nn.Module, written: Iterable[str]) -> Iterator[None]:
    """Within this context modules of ``net`` may change, and the parameters named ``written``.

    Where something is raised, everything is put back: the modules' parts, hooks and attributes, and
    the parameters' numbers. A ``ValueError`` becomes a ``UserError``.
    """
    before = _Parts(net)
    parameters = [net.get_parameter(name) for name in written]
    numbers = [parameter.detach().clone() for parameter in parameters]
    try:
        yield
    except BaseException as error:
        before.put_back_()
        with torch.no_grad():
            for parameter, number in zip(parameters, numbers, strict=True):
                parameter.copy_(number)
        if type(error) is ValueError:  # of a rule, as one that has no factor for this L and m
            raise UserError(one_line(str(error))) from error
        raise


class _Parts:
    """The attributes of every module, and what their dictionaries hold."""

    def __init__(self, net: nn.Module) -> None:
        self.attributes = {module: dict(vars(module)) for module in net.modules()}
        owned = (value for own in self.attributes.values() for value in own.values())
        self.dictionaries = [(one, one.copy()) for one in owned if isinstance(one, dict)]

    def put_back_(self) -> None:
        for module, own in self.attributes.items():
            vars(module).clear()
            vars(module).update(own)
        # The same objects: the handle of a user's hook removes it from the dictionary it knows.
        for one, copy in self.dictionaries:
            one.clear()
            one.update(copy)
