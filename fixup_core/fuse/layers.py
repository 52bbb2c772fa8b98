"""Scalars taken into the weights and biases of the layer that they stand around.

For a layer that is linear in its input up to a bias vector,

    (W (x + b) + bias) * s + a  =  (s W) x + s (bias + b W 1) + a,

where ``W 1`` is what an input of ones becomes. That is the same number at every place of an image
only where padding does not break it: zero padding becomes a border of ``-b``, to which b is then
added like everywhere.

A layer is known by its forward pass, not by its class: a subclass that computes something else is
left as it is, and so is a weight that hooks compute.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fixup_core.fuse.constants import BORDERED, NONE, Numbers, fill_border_
from fixup_core.rules.standards import TRANSPOSED

ALONG = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def fold_into_(layer: Any, numbers: Numbers, attends_to_itself: bool | None) -> Numbers:
    """Take the numbers into the layer's own parameters, which become new ones.

    Args:
        layer: Any module.
        numbers: Those around it.
        attends_to_itself: Of attention: whether keys and values are always the queries; ``None``
            where that is not known.

    Returns:
        What is left, to stand around the layer as constants.
    """
    if numbers == NONE:
        return NONE
    if computes_as(layer, nn.MultiheadAttention) and _has_own_weight(layer.out_proj):
        return _fold_into_attention_(layer, numbers, attends_to_itself)
    if not _has_own_weight(layer):
        return numbers
    if computes_as(layer, nn.Linear):
        _fold_into_weight_(layer, numbers, _double(layer.weight).sum(1))
    elif is_transposed_linear(layer):
        _fold_into_weight_(layer, numbers, _double(layer.weight).sum(0))
    elif any(computes_as(layer, conv) for conv in ALONG):
        return _fold_into_convolution_(layer, numbers)
    elif any(computes_as(layer, conv) for conv in TRANSPOSED):
        return _fold_behind_(layer, numbers)
    else:
        return numbers
    return NONE


def _fold_into_convolution_(conv: Any, numbers: Numbers) -> Numbers:
    padded = conv.padding_mode == "zeros" and any(conv._reversed_padding_repeated_twice)
    if padded and numbers.before:
        if type(conv) not in BORDERED:
            return _fold_behind_(conv, numbers)
        fill_border_(conv, -numbers.before)
    _fold_into_weight_(conv, numbers, _double(conv.weight).flatten(1).sum(1))
    return NONE


def _fold_behind_(conv: Any, numbers: Numbers) -> Numbers:
    """Multiplier and the bias behind it alone.

    What a transposed convolution makes of a constant differs from place to place: at the border,
    and inside by the taps of the kernel that reach it.
    """
    behind = Numbers(0.0, numbers.multiplier, numbers.after)
    _fold_into_weight_(conv, behind, torch.zeros(conv.out_channels, dtype=torch.float64))
    return Numbers(numbers.before)


def _fold_into_attention_(attention: Any, numbers: Numbers, to_itself: bool | None) -> Numbers:
    out, before = attention.out_proj, numbers.before
    behind = Numbers(0.0, numbers.multiplier, numbers.after)
    _fold_into_weight_(out, behind, torch.zeros(out.out_features, dtype=torch.float64))
    if not before or to_itself is None:
        return Numbers(before)
    if attention.in_proj_weight is not None:
        parts = attention.in_proj_weight.chunk(3)
    else:
        parts = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
    query, *others = (_double(part).sum(1) * before for part in parts)
    added = torch.cat([query, *(part * to_itself for part in others)])
    attention.in_proj_bias = _summed(attention.in_proj_bias, added, attention.out_proj.weight)
    if out.bias is None:  # PyTorch's fast path wants both
        out.bias = _summed(None, torch.zeros(out.out_features), out.weight)
    return NONE


def _fold_into_weight_(layer: Any, numbers: Numbers, ones: Tensor) -> None:
    """Give the layer a weight and a bias of its own; ``ones`` is what an input of ones becomes."""
    scale, weight = numbers.multiplier, layer.weight
    if scale != 1:
        layer.weight = nn.Parameter((_double(weight) * scale).to(weight))
    added = numbers.before * scale * ones + numbers.after
    if layer.bias is not None:
        layer.bias = _summed(nn.Parameter(_double(layer.bias) * scale), added, weight)
    elif added.any():
        layer.bias = _summed(None, added, weight)


def _summed(bias: Tensor | None, added: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter((added if bias is None else _double(bias) + added).to(like))


def _double(tensor: Tensor) -> Tensor:
    """On the CPU, for there are devices without float64."""
    return tensor.detach().to("cpu", torch.float64)


def computes_as(layer: nn.Module, base: type[nn.Module]) -> bool:
    """Whether the layer has the forward pass of ``base``, one of PyTorch's classes."""
    methods = ("forward", "_conv_forward", "_output_padding", "_sa_block", "_mha_block")
    return isinstance(layer, base) and not any(
        name in vars(layer) or getattr(type(layer), name, None) is not getattr(base, name, None)
        for name in methods
    )


def _has_own_weight(layer: nn.Module) -> bool:
    """Whether weight and bias are parameters that can be replaced; there may be no bias."""
    own = layer._parameters
    weight = own.get("weight")
    return weight is not None and weight.is_floating_point() and "bias" in own


def is_transposed_linear(layer: Any) -> bool:
    """Hugging Face's ``Conv1D``: a linear layer whose weight is [inputs, outputs]."""
    bias = layer.bias
    return (
        type(layer).__name__ == "Conv1D"
        and "forward" not in vars(layer)
        and layer.weight.dim() == 2
        and bias is not None
        and bias.shape == layer.weight.shape[1:] == (getattr(layer, "nf", None),)
    )
