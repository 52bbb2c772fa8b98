"""The learning rate over a training."""

from __future__ import annotations

import math
from typing import Any

from fixup_core.errors import UserError


def rate_at(args: Any, step: int, per_epoch: int, length: int | None) -> float:
    """The learning rate of a step over the peak rate, in 0..1.

    Args:
        args: Of ``LitClassifier``: ``schedule``, ``milestones`` and ``warmup_epochs``.
        step: From 0 upwards.
        per_epoch: Steps of an epoch.
        length: As ``length_of`` gives it.
    """
    epoch = step / per_epoch
    ahead = (step + 1) / per_epoch  # the first step learns something too
    warm = min(1.0, ahead / args.warmup_epochs) if args.warmup_epochs else 1.0
    if args.schedule == "step":
        return warm * 0.1 ** sum(epoch >= milestone for milestone in args.milestones)
    if length is not None:
        return warm * 0.5 * (1 + math.cos(math.pi * min(1.0, step / length)))
    return warm


def length_of(args: Any, per_epoch: int, trainer: Any) -> int | None:
    """The steps that a schedule is laid out over; ``None`` where its shape does not depend on them.

    Raises:
        UserError: A cosine that ends nowhere.
    """
    if args.schedule != "cosine":
        return None
    length = run_length(per_epoch, trainer)
    if length is None:
        raise UserError("--model.schedule cosine needs an end: set --trainer.max_epochs")
    return length


def run_length(per_epoch: int, trainer: Any) -> int | None:
    """The steps of a run; ``None`` where it has no end."""
    epochs, steps = trainer.max_epochs or -1, trainer.max_steps
    return min((limit for limit in (epochs * per_epoch, steps) if limit > 0), default=None)


def steps_per_epoch(trainer: Any, data: Any) -> int:
    """Not Lightning's estimate of all steps, which makes the loader too early to be resumed.

    Raises:
        UserError: No batch is left to train on.
    """
    loader = data.train_dataloader()
    batches = getattr(loader, "limit", None)
    if batches is None:  # of a data module of the user's own
        limit = trainer.limit_train_batches
        batches = min(len(loader), limit if isinstance(limit, int) else int(len(loader) * limit))
    if not batches:
        raise UserError("no batch to train on: raise --trainer.limit_train_batches")
    return math.ceil(batches / trainer.accumulate_grad_batches)
