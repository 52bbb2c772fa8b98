"""The scalars' learning rate: the one place that knows the ratio."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from fixup_core.errors import UserError
from fixup_core.rules.scalars import scalars

SCALAR_LR_RATIO = 0.1
"""Learning rate of the scalars over that of the weights (Zhang et al. 2019, section 5).

A scalar's gradient sums over a whole tensor; at the full rate deep networks diverge.
"""

SGD_LIKE = frozenset({"sgd", "nag"})
"""fairseq's optimisers whose step is proportional to the gradient; all others normalise it."""


def anchored_rate(ratio: float, optimizer: str) -> float:
    """The rate of anchored scalars that makes them learn ``ratio`` times as fast as weights.

    Under Adam the step of ``s = s0 + c p`` is c times the step of p, under SGD c squared times.
    Optimisers that scale a step by the parameter's size (Adafactor, LAMB) keep the scalars almost
    still, since p starts at 0: the ratio means little under them.

    Args:
        ratio: Above 0; 1 is the weights' own speed.
        optimizer: fairseq's name of the optimiser ("adam", "sgd", "nag", ...).

    Raises:
        UserError: ``ratio`` is not above 0.
    """
    if not ratio > 0:
        raise UserError(f"the scalars' learning-rate ratio must be above 0, got {ratio}")
    return math.sqrt(ratio) if optimizer in SGD_LIKE else ratio


def param_groups(
    net: nn.Module,
    *,
    lr: float,
    scalar_lr_ratio: float = SCALAR_LR_RATIO,
    weight_decay: float = 0.0,
    scalar_weight_decay: float | None = None,
    decay_vectors: bool = True,
) -> list[dict[str, Any]]:
    """Optimiser groups that partition the trainable parameters: weights, then scalars; a third
    one of vectors where these are not to decay.

    Args:
        net: Its scalars are found by type and should be in the direct form.
        lr: Learning rate of the weights.
        scalar_lr_ratio: The scalars learn at ``lr * scalar_lr_ratio``.
        weight_decay: Of the weights.
        scalar_weight_decay: Of the scalars; ``None`` takes ``weight_decay``, as the authors'
            code does.
        decay_vectors: Whether weight decay is for gains and bias vectors too, and for scalars
            whose decay is ``None`` (``Method.decays_vectors``).
    """
    scalar_ids = {id(scalar.weight) for scalar in scalars(net)}
    trainable = [p for p in net.parameters() if p.requires_grad]
    decay = scalar_weight_decay
    if decay is None:
        decay = weight_decay if decay_vectors else 0.0
    others = [p for p in trainable if id(p) not in scalar_ids]
    vectors = [] if decay_vectors else [p for p in others if p.dim() <= 1]
    apart = {id(p) for p in vectors}
    groups = [
        {
            "name": "weights",
            "params": [p for p in others if id(p) not in apart],
            "lr": lr,
            "weight_decay": weight_decay,
        },
        {
            "name": "scalars",
            "params": [p for p in trainable if id(p) in scalar_ids],
            "lr": lr * scalar_lr_ratio,
            "weight_decay": decay,
        },
    ]
    if vectors:
        groups.append({"name": "vectors", "params": vectors, "lr": lr, "weight_decay": 0.0})
    return groups
