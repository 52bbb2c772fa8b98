"""Objects by their class path, as a user gives them: ``package.module.Name``."""

from __future__ import annotations

import importlib
from typing import Any

from fixup_core.errors import UserError, one_line


def import_object(path: str, option: str) -> Any:
    """The object at ``path``.

    Args:
        path: ``package.module.Name``.
        option: That it was given in, for the message.

    Raises:
        UserError: It cannot be imported; the message has the cause.
    """
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # whatever the user's own module raises
        cause = one_line(f"{type(error).__name__}: {error}")
        raise UserError(f"{option} {path} cannot be imported: {cause}") from error
