"""The divergence of a network from itself as it was, whose outputs are soft targets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from fixup_core.errors import UserError


def logits_in(outputs: Any) -> Tensor:
    """The logits of what a network returns: a tensor, what has ``logits``, or the first of a tuple.

    Raises:
        UserError: There are none.
    """
    found = getattr(outputs, "logits", outputs)
    if isinstance(found, Mapping):
        found = found.get("logits")
    if isinstance(found, (tuple, list)) and found:
        found = found[0]
    if not isinstance(found, Tensor):
        raise UserError("distil needs logits: the network returns something else")
    return found


def divergence(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean Kullback-Leibler divergence of distributions [..., classes] from those of a
    teacher.
    """
    own, other = (x.float().flatten(0, -2).log_softmax(-1) for x in (logits, targets))
    return F.kl_div(own, other, reduction="batchmean", log_target=True)
