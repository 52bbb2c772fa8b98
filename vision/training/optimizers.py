"""The optimiser of a training: SGD, any other of ``torch.optim``, or one by its class path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from fixup_core.errors import UserError
from vision.imports import import_object


def make_optimizer(
    name: str, groups: list[dict[str, Any]], options: Mapping[str, Any]
) -> Optimizer:
    """An optimiser of parameter groups that have their rates and decays.

    Args:
        name: ``SGD``, ``AdamW``, ... of ``torch.optim``, or ``package.module.Class``.
        groups: As ``fixup_core.param_groups`` makes them; empty ones are left out.
        options: More arguments of the class.

    Raises:
        UserError: There is no such optimiser, or it does not take the options.
    """
    short = name.removeprefix("torch.optim.")
    if "." in short:
        kind = import_object(name, "--model.optimizer")
    else:
        kind = getattr(torch.optim, short, None)
    if not (isinstance(kind, type) and issubclass(kind, Optimizer)) or kind is Optimizer:
        raise UserError(
            f"--model.optimizer is {name!r}: take a name in torch.optim, such as AdamW, or the "
            "class path of an optimiser"
        )
    try:
        return kind([group for group in groups if group["params"]], **options)
    except (TypeError, ValueError) as error:
        raise UserError(f"--model.optimizer {name}: {error}") from error
