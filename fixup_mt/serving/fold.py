"""Transformers without scalars: everything folded into weights and biases, for other engines.

The result is the state dict of fairseq's pre-norm ``transformer`` without its layer norms: the
same names, a bias vector for every projection. A bias ``s`` before a linear layer adds ``s`` times
the row sums of its weight to its bias vector; a multiplier behind it multiplies both. What ends the
encoder goes into the keys and values of the cross-attention, what ends the decoder into the output
layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fixup_core.errors import UserError
from fixup_core.fuse.ops import Number, value_of
from fixup_mt.model.layers import BiasLinearMultiplier, LinearBias, LinearMultiplier
from fixup_mt.model.model import FixupTransformerModel
from fixup_mt.model.stacks import TiedProjection

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def fold_transformer(model: nn.Module) -> dict[str, Tensor]:
    """The weights of ``model`` without scalars, on the CPU, in float32.

    Args:
        model: A ``transformer_fixup``; it is left as it is.

    Returns:
        fairseq's names without those of layer norms, and ``decoder.output_projection.bias``.

    Raises:
        UserError: The model has a part that cannot be folded (it is named).
    """
    check(model)
    module: Any = model
    folded: dict[str, Tensor] = {}
    with torch.no_grad():
        for name in ("encoder", "decoder"):
            stack = getattr(module, name)
            folded[f"{name}.embed_tokens.weight"] = stack.embed_tokens.weight.clone()
            for number, layer in enumerate(stack.layers):
                path = f"{name}.layers.{number}"
                _fold_attention(folded, f"{path}.self_attn", layer.self_attn, _bias_before(layer))
                if name == "decoder":
                    _fold_cross_attention(folded, path, layer, module.encoder.layer_norm)
                _fold_ffn(folded, path, layer)
        _fold_output(folded, module.decoder)
    return {name: tensor.float().cpu() for name, tensor in folded.items()}


def positions(stack: Any) -> Tensor:
    """The embeddings of the positions of an encoder or decoder, [maximum, D]."""
    table, width = stack.embed_positions, stack.embed_tokens.embedding_dim
    if table is None:
        return torch.zeros(int(stack.max_positions()), width)
    first = int(table.padding_idx or 0) + 1
    if isinstance(table, nn.Embedding):
        return table.weight.detach()[first:].float().cpu()
    weights: Tensor = table.get_embedding(first + int(stack.max_positions()), width, first - 1)
    return weights[first:]


def check(model: nn.Module) -> None:
    """Raise ``UserError`` unless every part of the model can be folded exactly."""
    if not isinstance(model, FixupTransformerModel):
        raise UserError(
            f"only transformer_fixup models are folded and exported, not {type(model).__name__}"
        )
    if model.training:
        raise UserError("only a model in evaluation mode is folded: call eval() first")
    encoder: Any = model.encoder
    decoder: Any = model.decoder
    quantised = encoder.quant_noise is not None or decoder.quant_noise is not None
    refused = {
        "--quant-noise-pq": quantised,
        "--adaptive-softmax-cutoff": decoder.adaptive_softmax is not None,
        "--decoder-input-dim": decoder.project_in_dim is not None,
        "--decoder-output-dim": decoder.project_out_dim is not None,
        "--no-cross-attention": any(layer.encoder_attn is None for layer in decoder.layers),
        "--cross-self-attention": decoder.cross_self_attention,
    }
    for option, used in refused.items():
        if used:
            raise UserError(f"a model with {option} cannot be exported exactly")


def _bias_before(layer: Any) -> Number:
    return value_of(layer.self_attn_layer_norm)


def _linear(
    folded: dict[str, Tensor],
    path: str,
    weight: Tensor,
    *,
    before: Number = 0.0,
    scale: Number = 1.0,
    after: Number = 0.0,
) -> None:
    """``scale * weight @ (x + before) + after``."""
    scaled = weight * scale
    folded[f"{path}.weight"] = scaled
    folded[f"{path}.bias"] = scaled.sum(dim=1) * before + after


def _fold_attention(folded: dict[str, Tensor], path: str, attention: Any, before: Number) -> None:
    for name in PROJECTIONS:
        _linear(folded, f"{path}.{name}", getattr(attention, name).weight, before=before)
    _fold_last(folded, f"{path}.out_proj", attention.out_proj)


def _fold_cross_attention(folded: dict[str, Tensor], path: str, layer: Any, closing: Any) -> None:
    attention, path = layer.encoder_attn, f"{path}.encoder_attn"
    query = value_of(layer.encoder_attn_layer_norm)
    _linear(folded, f"{path}.q_proj", attention.q_proj.weight, before=query)
    bias, multiplier = closing
    for name in ("k_proj", "v_proj"):
        weight = getattr(attention, name).weight
        own = {"before": value_of(bias), "scale": value_of(multiplier, 1.0)}
        _linear(folded, f"{path}.{name}", weight, **own)
    _fold_last(folded, f"{path}.out_proj", attention.out_proj)


def _fold_ffn(folded: dict[str, Tensor], path: str, layer: Any) -> None:
    fc1: LinearBias = layer.fc1
    before, after = value_of(layer.final_layer_norm), value_of(fc1.after)
    _linear(folded, f"{path}.fc1", fc1.weight, before=before, after=after)
    _fold_last(folded, f"{path}.fc2", layer.fc2)


def _fold_last(folded: dict[str, Tensor], path: str, last: LinearMultiplier) -> None:
    before = value_of(last.before) if isinstance(last, BiasLinearMultiplier) else 0.0
    _linear(folded, path, last.weight, before=before, scale=value_of(last.multiplier, 1.0))


def _fold_output(folded: dict[str, Tensor], decoder: Any) -> None:
    projection = decoder.output_projection
    scale: Number = 1.0
    if isinstance(projection, TiedProjection):
        scale = projection.scale * value_of(projection.gain, 1.0)
    before = value_of(decoder.layer_norm)
    _linear(folded, "decoder.output_projection", projection.weight, before=before, scale=scale)
