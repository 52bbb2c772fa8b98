"""Adaptive gradient clipping (Brock et al. 2021, section 4.1): by the size of the weights.

The gradient of an output unit, the row of a matrix or a filter, may not exceed a share of the norm
of the unit's own weights. Norm-free networks learn with larger batches and rates by it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fixup_core.errors import UserError
from fixup_core.rules.branches import collect_classifiers
from fixup_core.rules.scalars import scalars

SHARE, FLOOR = 0.01, 1e-3
"""The authors' clipping threshold, and the least norm that a unit's weights count as."""


def clip_adaptively_(
    net: nn.Module, share: float = SHARE, floor: float = FLOOR, scale: float = 1.0
) -> int:
    """Clip the gradients that the parameters of ``net`` hold, in place.

    Differs: the scalars of rule 3 are left alone, whose stored form need not be their value. The
    head is left alone as in the authors' code.

    Args:
        net: After the backward pass.
        share: Largest norm of a unit's gradient over the norm of its weights; above 0.
        floor: Units whose weights are smaller count as this large: those that start at 0.
        scale: What the gradients are to be multiplied by, where a scaler has not been taken off.

    Returns:
        The number of units that were clipped.

    Raises:
        UserError: ``share`` or ``floor`` is not positive.
    """
    check_share(share)
    if not 0 < floor < math.inf:
        raise UserError(f"the floor of adaptive clipping is above 0, got {floor:g}")
    heads = collect_classifiers(net)
    exempt = {id(scalar.weight) for scalar in scalars(net)}
    exempt |= {id(layer.parameter) for layer in heads} | {id(layer.bias_vector) for layer in heads}
    counts = [
        _clip_(parameter, parameter.grad, share, floor, scale)
        for parameter in net.parameters()
        if parameter.grad is not None and id(parameter) not in exempt
    ]
    return int(torch.stack(counts).sum()) if counts else 0


def check_share(share: float) -> None:
    """Refuse a threshold that makes no sense.

    Raises:
        UserError: It is not above 0.
    """
    if not 0 < share < math.inf:
        raise UserError(
            f"the share of adaptive clipping is above 0, such as {SHARE}, got {share:g}"
        )


@torch.no_grad()
def _clip_(weight: Tensor, gradient: Tensor, share: float, floor: float, scale: float) -> Tensor:
    """Clip one parameter's gradient; how many units were."""
    largest = _unit_norms(weight).clamp(min=floor) * (share / scale)
    norms = _unit_norms(gradient)
    factor = (largest / norms.clamp(min=torch.finfo(norms.dtype).tiny)).clamp(max=1.0)
    gradient.mul_(factor.to(gradient.dtype))
    return (factor < 1).sum()


def _unit_norms(values: Tensor) -> Tensor:
    """[out, 1, ...] of a matrix or filter bank; [1] of a vector as a whole."""
    values = values.detach().float()
    if values.dim() <= 1:
        return values.norm().reshape(1) if values.dim() else values.abs()
    return values.flatten(1).norm(dim=1).view(-1, *[1] * (values.dim() - 1))
