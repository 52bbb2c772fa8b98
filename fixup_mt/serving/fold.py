"""Transformers without scalars: everything folded into weights and biases, for other engines.

The result is the state dict of fairseq's pre-norm ``transformer``, or ``transformer_lm``, without
its layer norms: the same names, a bias vector for every projection. Linear layers fold their own
scalars and those of the slots before them (``fixup_mt.model.linears``). What ends the encoder goes
into the keys and values of the cross-attention, what ends the decoder into the output layer.

Where norms behind the sums are gone, a map stands on the residual stream itself, x' = s (x + f(x))
+ t. Then the stream is written in other coordinates, x = d z + e, in which it is a sum again:
z' = z + f(d z + e) / d, with d' = s d and e' = s e + t.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fixup_core.errors import UserError
from fixup_mt.model.linears import folded
from fixup_mt.model.model import FixupLanguageModel, FixupTransformerModel
from fixup_mt.model.slots import Joined

_NOT_FOLDED = {"layer": "layer norms", "dyt": "tanh functions", "derf": "erf functions"}
PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def fold_transformer(model: nn.Module) -> dict[str, Tensor]:
    """The weights of ``model`` without scalars, on the CPU, in float32.

    Args:
        model: A ``transformer_fixup`` or ``transformer_fixup_lm``; it is left as it is.

    Returns:
        fairseq's names without those of layer norms, and ``decoder.output_projection.bias``.

    Raises:
        UserError: The model has a part that cannot be folded (it is named).
    """
    check(model)
    module: Any = model
    decoder = module.decoder
    result: dict[str, Tensor] = {}
    # What stands between the end of a stack and the layers that read it.
    closing: dict[str, Before] = {"encoder": (Stream(), nn.Identity())}
    with torch.no_grad():
        for name, stack in stacks(module).items():
            result[f"{name}.embed_tokens.weight"] = stack.embed_tokens.weight
            stream = Stream()
            for number, layer in enumerate(stack.layers):
                stream = _fold_layer(
                    result, f"{name}.layers.{number}", layer, stream, closing["encoder"]
                )
            closing[name] = (stream, stack.layer_norm)
        _fold(result, "decoder.output_projection", decoder.output_projection, closing["decoder"])
    # Copies: a weight that no scalar multiplies is the model's own until here.
    return {name: t.detach().to("cpu", torch.float32, copy=True) for name, t in result.items()}


def stacks(model: Any) -> dict[str, Any]:
    """The encoder, which a language model has not, and the decoder."""
    return {name: getattr(model, name) for name in ("encoder", "decoder") if hasattr(model, name)}


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
    if not isinstance(model, FixupTransformerModel | FixupLanguageModel):
        raise UserError(
            "only transformer_fixup and transformer_fixup_lm models are folded and exported, not "
            f"{type(model).__name__}"
        )
    if model.training:
        raise UserError("only a model in evaluation mode is folded: call eval() first")
    translates = isinstance(model, FixupTransformerModel)
    module: Any = model
    decoder: Any = module.decoder
    method = decoder.layers[0].method
    if module.removal is not None:
        left = module.removal.left
        if left:
            raise UserError(
                f"{len(left)} of {len(module.removal.norms)} norms are not gone yet: train the "
                "model to the end of --fixup-removal-updates first"
            )
    elif not method.foldable:
        raise UserError(
            f"a model of --fixup-method {method.name} has {_NOT_FOLDED.get(method.norm, 'norms')} "
            "that no weight can take in: only models without norms are folded and exported"
        )
    refused = {
        "--quant-noise-pq": any(s.quant_noise is not None for s in stacks(model).values()),
        "--adaptive-softmax-cutoff": decoder.adaptive_softmax is not None,
        "--adaptive-input or --character-embeddings": type(decoder.embed_tokens)
        is not nn.Embedding,
        "--decoder-input-dim": decoder.project_in_dim is not None,
        "--decoder-output-dim": decoder.project_out_dim is not None,
        "--no-cross-attention": translates and any(not _attends(i) for i in decoder.layers),
        "--cross-self-attention": decoder.cross_self_attention,
    }
    for option, used in refused.items():
        if used:
            raise UserError(f"a model with {option} cannot be exported exactly")


def _attends(layer: Any) -> bool:
    """Whether a decoder's layer has cross-attention."""
    return getattr(layer, "encoder_attn", None) is not None


@dataclass(frozen=True)
class Stream:
    """The coordinates of a residual stream: ``x = scale * z + shift``, [D] or one number."""

    scale: Tensor | float = 1.0
    shift: Tensor | float = 0.0

    def through(self, slot: nn.Module) -> Stream:
        """Behind a sum, where ``slot`` stood as a norm, if it did."""
        if not isinstance(slot, Joined):
            return self
        norm: Any = slot.residual.norm
        scale, shift = norm.constants()
        return Stream(scale * self.scale, scale * self.shift + (0.0 if shift is None else shift))


Before = tuple[Stream, nn.Module]
"""What the input of a layer goes through first: the stream's coordinates, and a slot."""


IDENTITY = nn.Identity()
STANDING = Stream()


def _fold_layer(
    result: dict[str, Tensor], path: str, layer: Any, stream: Stream, memory: Before
) -> Stream:
    """``memory`` is what keys and values of cross-attention go through; the stream behind."""
    slot = layer.self_attn_layer_norm
    own = (stream, slot)
    _fold_attention(result, f"{path}.self_attn", layer.self_attn, own, own)
    stream = stream.through(slot)
    if _attends(layer):
        slot = layer.encoder_attn_layer_norm
        _fold_attention(result, f"{path}.encoder_attn", layer.encoder_attn, (stream, slot), memory)
        stream = stream.through(slot)
    slot = layer.final_layer_norm
    _fold(result, f"{path}.fc1", layer.fc1, (stream, slot))
    _fold(result, f"{path}.fc2", layer.fc2, out=stream)
    return stream.through(slot)


def _fold_attention(
    result: dict[str, Tensor], path: str, attention: Any, query: Before, memory: Before
) -> None:
    """``query`` and ``memory`` are what the queries, and the keys and values, go through first."""
    for name in PROJECTIONS:
        before = query if name == "q_proj" else memory
        _fold(result, f"{path}.{name}", getattr(attention, name), before)
    _fold(result, f"{path}.out_proj", attention.out_proj, out=query[0])


def _fold(
    result: dict[str, Tensor],
    path: str,
    layer: Any,
    before: Before = (STANDING, IDENTITY),
    out: Stream = STANDING,
) -> None:
    """``out``: of the stream that the layer's output is added to."""
    stream, slot = before
    weight, bias = folded(layer, *(() if isinstance(slot, Joined) else (slot,)))
    bias = bias + (weight * stream.shift).sum(1)
    weight = weight * stream.scale
    if isinstance(out.scale, Tensor):
        weight, bias = weight / out.scale[:, None], bias / out.scale
    result[f"{path}.weight"], result[f"{path}.bias"] = weight, bias
