"""A folded Transformer as plain PyTorch: an encoder, and a decoder that goes step by step.

For engines that run graphs, such as onnxruntime: no scalars, no norms, no fairseq. Shapes: B
sentences, S source length, T pieces decoded so far, D width, H heads, C = D / H, V vocabulary,
N decoder layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Multi-head attention with bias vectors."""

    def __init__(self, weights: dict[str, Tensor], path: str, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.out = (
            _linear(weights, f"{path}.{name}")
            for name in ("q_proj", "k_proj", "v_proj", "out_proj")
        )

    def split(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, H, T, C]."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def keys_and_values(self, x: Tensor) -> Tensor:
        """[B, S, D] -> [2, B, H, S, C]."""
        return torch.stack([self.split(self.k(x)), self.split(self.v(x))])

    def forward(self, x: Tensor, kv: Tensor, mask: Tensor | None) -> Tensor:
        """[B, T, D] over keys and values [2, B, H, S, C]; ``mask`` [B, 1, 1, S]: true at words."""
        out = F.scaled_dot_product_attention(self.split(self.q(x)), kv[0], kv[1], attn_mask=mask)
        return self.out(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear layers with an activation between them."""

    def __init__(self, weights: dict[str, Tensor], path: str, activation: Any) -> None:
        super().__init__()
        self.fc1, self.fc2 = _linear(weights, f"{path}.fc1"), _linear(weights, f"{path}.fc2")
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Embedding(nn.Module):
    """Pieces, scaled, and their positions."""

    positions: Tensor

    def __init__(self, weight: Tensor, scale: float, positions: Tensor) -> None:
        super().__init__()
        self.pieces = nn.Embedding.from_pretrained(weight)
        self.scale = scale
        self.register_buffer("positions", positions)

    def forward(self, tokens: Tensor, places: Tensor) -> Tensor:
        return self.scale * self.pieces(tokens) + self.positions[places]


class PlainEncoder(nn.Module):
    """Source pieces to the keys and values that every decoder layer attends to.

    Args:
        model: A ``transformer_fixup``.
        weights: Of ``fold_transformer``.
        positions: Of the source, [maximum, D].
        pad: Number of the padding piece.
    """

    def __init__(self, model: Any, weights: dict[str, Tensor], positions: Tensor, pad: int) -> None:
        super().__init__()
        stack = model.encoder
        self.pad = pad
        self.embedding = _embedding(weights, "encoder", stack, positions)
        self.attentions = _attentions(weights, "encoder", stack, "self_attn")
        self.ffns = _ffns(weights, "encoder", stack)
        self.memories = _attentions(weights, "decoder", model.decoder, "encoder_attn")

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S], padded on either side -> [N, 2, B, H, S, C], and [B, S], true at words."""
        words = tokens.ne(self.pad)
        x = self.embedding(tokens, (words.long().cumsum(1) - 1).clamp(min=0))
        mask = words[:, None, None, :]
        layers: Any = zip(self.attentions, self.ffns, strict=True)
        for attention, ffn in layers:
            x = x + attention(x, attention.keys_and_values(x), mask)
            x = x + ffn(x)
        memories: Any = self.memories
        return torch.stack([memory.keys_and_values(x) for memory in memories]), words


class PlainDecoderStep(nn.Module):
    """One step of the decoder.

    Args:
        model: A ``transformer_fixup``.
        weights: Of ``fold_transformer``.
        positions: Of the target, [maximum, D].
    """

    def __init__(self, model: Any, weights: dict[str, Tensor], positions: Tensor) -> None:
        super().__init__()
        stack = model.decoder
        self.embedding = _embedding(weights, "decoder", stack, positions)
        self.attentions = _attentions(weights, "decoder", stack, "self_attn")
        self.ffns = _ffns(weights, "decoder", stack)
        self.crosses = _attentions(weights, "decoder", stack, "encoder_attn")
        self.output = _linear(weights, "decoder.output_projection")

    def forward(
        self, tokens: Tensor, past: Tensor, memory: Tensor, words: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The newest piece [B], what was cached [N, 2, B, H, T, C], and the encoder's outputs, to
        logits [B, V] and the cache [N, 2, B, H, T + 1, C].
        """
        place = torch.zeros_like(tokens) + past.size(4)
        x = self.embedding(tokens, place)[:, None]
        mask, present = words[:, None, None, :], []
        layers: Any = zip(self.attentions, self.crosses, self.ffns, past, memory, strict=True)
        for attention, cross, ffn, cached, attended in layers:
            kv = torch.cat([cached, attention.keys_and_values(x)], dim=3)
            x = x + attention(x, kv, None)
            x = x + cross(x, attended, mask)
            x = x + ffn(x)
            present.append(kv)
        return self.output(x[:, 0]), torch.stack(present)


def _attentions(weights: dict[str, Tensor], name: str, stack: Any, attention: str) -> nn.ModuleList:
    return nn.ModuleList(
        Attention(
            weights, f"{name}.layers.{number}.{attention}", getattr(layer, attention).num_heads
        )
        for number, layer in enumerate(stack.layers)
    )


def _ffns(weights: dict[str, Tensor], name: str, stack: Any) -> nn.ModuleList:
    return nn.ModuleList(
        FeedForward(weights, f"{name}.layers.{number}", layer.activation_fn)
        for number, layer in enumerate(stack.layers)
    )


def _embedding(weights: dict[str, Tensor], name: str, stack: Any, positions: Tensor) -> Embedding:
    return Embedding(weights[f"{name}.embed_tokens.weight"], stack.embed_scale, positions)


def _linear(weights: dict[str, Tensor], path: str) -> nn.Linear:
    weight = weights[f"{path}.weight"]
    layer = nn.Linear(weight.size(1), weight.size(0))
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(weights[f"{path}.bias"])
    return layer.requires_grad_(False)
