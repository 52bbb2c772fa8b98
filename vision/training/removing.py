"""Norms taken out of a trained network by ``python -m vision fit --model.remove_norms``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fixup_core import NormRemoval
from fixup_core.errors import UserError
from vision.nets import image_of, is_class_path


def removal_of(net: nn.Module, args: Any) -> NormRemoval | None:
    """What takes the norms out of ``net``, whose norms it wraps; ``None`` where they stay.

    Args:
        net: The classifier's network.
        args: Of ``LitClassifier``.

    Raises:
        UserError: The network has no norms, or the schedule is too short.
    """
    if args.remove_norms == "none":
        return None
    images = None
    if not is_class_path(args.net):
        channels, size = image_of(args.net, **(args.options or {}))
        noise = torch.Generator().manual_seed(0)
        images = torch.randn(2, channels, size, size, generator=noise)
    try:
        return NormRemoval(
            net,
            images,
            schedule=args.remove_norms,
            steps=args.removal_steps,
            anchor=args.removal_anchor,
            distil=args.removal_distil,
        )
    except UserError as error:
        raise UserError(f"--model.remove_norms {args.remove_norms}: {error}") from error


def check_length(removal: NormRemoval, length: int | None) -> None:
    """Raise ``UserError`` where a run of ``length`` steps ends before the last norm is gone."""
    steps = removal.schedule.steps
    if length is not None and length < steps:
        raise UserError(
            f"the run of {length} steps ends before the last norm is gone: give "
            f"--model.removal_steps {int(0.8 * length)}, or more epochs than {steps} steps take"
        )


def measures_of(removal: NormRemoval) -> dict[str, float]:
    """What is logged: how many norms are left, and the mean of what is left of all."""
    share = removal.share / len(removal.norms)
    return {"norms/left": float(len(removal.left)), "norms/share": share}
