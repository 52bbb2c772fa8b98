"""A folded Transformer as plain PyTorch: an encoder, and a decoder that goes step by step.

For engines that run graphs, such as onnxruntime: no scalars, no fairseq. Shapes: B sentences, S
source length, T pieces decoded so far, D width, H heads, C = D / H, V vocabulary, N decoder layers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fixup_mt.model.attention import capped, unit_rms
from fixup_mt.model.slots import Joined, Parts
from fixup_mt.serving.fold import END, PROJECTIONS, SLOTS


class Branch(nn.Module):
    """What a branch has around it: ``behind(x + branch(before(x)))``.

    Args:
        weights: Of ``fold_transformer``.
        path: Of the slot.
        slot: The model's own.
    """

    def __init__(self, weights: dict[str, Tensor], path: str, slot: nn.Module) -> None:
        super().__init__()
        norm, on_sum = norm_of(weights, path, slot), isinstance(slot, Joined)
        self.before = nn.Identity() if on_sum else norm
        self.behind = norm if on_sum else nn.Identity()


class Attention(Branch):
    """Multi-head attention with bias vectors.

    Args:
        weights: Of ``fold_transformer``.
        path: Of the layer.
        name: Of the attention in it.
        layer: The model's own.
    """

    def __init__(self, weights: dict[str, Tensor], path: str, name: str, layer: Any) -> None:
        super().__init__(weights, f"{path}.{SLOTS[name]}", getattr(layer, SLOTS[name]))
        attention = getattr(layer, name)
        self.heads, self.cap = attention.num_heads, attention.logit_cap
        temperature = weights.get(f"{path}.{name}.temperature")
        self.temperature = None if temperature is None else float(temperature)
        self.q, self.k, self.v, self.out = (
            _linear(weights, f"{path}.{name}.{projection}")
            for projection in (*PROJECTIONS, "out_proj")
        )

    def split(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, H, T, C]."""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def keys_and_values(self, x: Tensor) -> Tensor:
        """[B, S, D] -> [2, B, H, S, C]."""
        return torch.stack([self._unit(self.split(self.k(x))), self.split(self.v(x))])

    def forward(self, x: Tensor, kv: Tensor, mask: Tensor | None) -> Tensor:
        """[B, T, D] over keys and values [2, B, H, S, C]; ``mask`` [B, 1, 1, S]: true at words."""
        queries = self._unit(self.split(self.q(self.before(x))))
        if self.temperature is not None:
            queries = self.temperature * queries
        if self.cap:
            out = self._capped(queries, kv, mask)
        else:
            out = F.scaled_dot_product_attention(queries, kv[0], kv[1], attn_mask=mask)
        return self.behind(x + self.out(out.transpose(1, 2).flatten(2)))

    def _unit(self, x: Tensor) -> Tensor:
        return x if self.temperature is None else unit_rms(x)

    def _capped(self, queries: Tensor, kv: Tensor, mask: Tensor | None) -> Tensor:
        logits = torch.matmul(queries * queries.size(3) ** -0.5, kv[0].transpose(2, 3))
        logits = capped(logits, self.cap)
        if mask is not None:
            logits = logits.masked_fill(~mask, -1e4)
        return torch.matmul(logits.softmax(dim=-1), kv[1])


class FeedForward(Branch):
    """Two linear layers with an activation between them."""

    def __init__(self, weights: dict[str, Tensor], path: str, layer: Any) -> None:
        super().__init__(weights, f"{path}.{SLOTS['ffn']}", getattr(layer, SLOTS["ffn"]))
        self.fc1, self.fc2 = _linear(weights, f"{path}.fc1"), _linear(weights, f"{path}.fc2")
        self.activation = layer.activation_fn

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(x + self.fc2(self.activation(self.fc1(self.before(x)))))


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
        self.end = norm_of(weights, f"encoder.{END}", stack.layer_norm)
        self.memories = _attentions(weights, "decoder", model.decoder, "encoder_attn")

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[B, S], padded on either side -> [N, 2, B, H, S, C], and [B, S], true at words."""
        words = tokens.ne(self.pad)
        x = self.embedding(tokens, (words.long().cumsum(1) - 1).clamp(min=0))
        mask = words[:, None, None, :]
        layers: Any = zip(self.attentions, self.ffns, strict=True)
        for attention, ffn in layers:
            x = ffn(attention(x, attention.keys_and_values(attention.before(x)), mask))
        x = self.end(x)
        memories: Any = self.memories
        return torch.stack([memory.keys_and_values(x) for memory in memories]), words


class PlainDecoderStep(nn.Module):
    """One step of the decoder, or of a language model.

    Args:
        model: A ``transformer_fixup`` or ``transformer_fixup_lm``.
        weights: Of ``fold_transformer``.
        positions: Of the target, [maximum, D].
    """

    def __init__(self, model: Any, weights: dict[str, Tensor], positions: Tensor) -> None:
        super().__init__()
        stack = model.decoder
        self.embedding = _embedding(weights, "decoder", stack, positions)
        self.attentions = _attentions(weights, "decoder", stack, "self_attn")
        self.ffns = _ffns(weights, "decoder", stack)
        crosses = hasattr(model, "encoder")
        self.crosses = _attentions(weights, "decoder", stack, "encoder_attn") if crosses else None
        self.end = norm_of(weights, f"decoder.{END}", stack.layer_norm)
        self.output = _linear(weights, "decoder.output_projection")

    def forward(
        self,
        tokens: Tensor,
        past: Tensor,
        memory: Tensor | None = None,
        words: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The newest piece [B], what was cached [N, 2, B, H, T, C], and the encoder's outputs, to
        logits [B, V] and the cache [N, 2, B, H, T + 1, C].
        """
        place = torch.zeros_like(tokens) + past.size(4)
        x = self.embedding(tokens, place)[:, None]
        present = []
        layers: Any = zip(self.attentions, self.ffns, past, strict=True)
        for number, (attention, ffn, cached) in enumerate(layers):
            kv = torch.cat([cached, attention.keys_and_values(attention.before(x))], dim=3)
            x = attention(x, kv, None)
            if self.crosses is not None and memory is not None and words is not None:
                x = self.crosses[number](x, memory[number], words[:, None, None, :])
            x = ffn(x)
            present.append(kv)
        return self.output(self.end(x[:, 0])), torch.stack(present)

    def nothing(self, sentences: int) -> Tensor:
        """What is cached before the first step, [N, 2, B, H, 0, C]."""
        layers: Any = self.attentions
        heads, width = layers[0].heads, layers[0].k.out_features
        return torch.zeros(len(layers), 2, sentences, heads, 0, width // heads)


def score(step: Callable[..., Any], past: Any, words: Tensor) -> list[list[float]]:
    """The log-probabilities of pieces, all sentences of one length.

    Args:
        step: The newest piece [B] and what is cached, to logits [B, V] and the cache.
        past: What is cached before the first step.
        words: [B, T], with the end of the sentences, which decoding begins with, too.
    """
    found = []
    for before, now in zip(words.roll(1, dims=1).unbind(1), words.unbind(1), strict=True):
        logits, past = step(before, past)
        found.append(torch.as_tensor(logits).log_softmax(dim=1).gather(1, now[:, None]))
    return torch.cat(found, dim=1).tolist()


def norm_of(weights: dict[str, Tensor], path: str, slot: nn.Module) -> nn.Module:
    """The norm of a slot, or what stands in its place, with the folded weights."""
    norm = Parts.of(slot).norm
    if norm is None:
        return nn.Identity()
    copied = copy.deepcopy(norm).float().cpu()
    copied.load_state_dict({name: weights[f"{path}.{name}"] for name in norm.state_dict()})
    return copied.requires_grad_(False)


def _attentions(weights: dict[str, Tensor], name: str, stack: Any, attention: str) -> nn.ModuleList:
    return nn.ModuleList(
        Attention(weights, f"{name}.layers.{number}", attention, layer)
        for number, layer in enumerate(stack.layers)
    )


def _ffns(weights: dict[str, Tensor], name: str, stack: Any) -> nn.ModuleList:
    return nn.ModuleList(
        FeedForward(weights, f"{name}.layers.{number}", layer)
        for number, layer in enumerate(stack.layers)
    )


def _embedding(weights: dict[str, Tensor], name: str, stack: Any, positions: Tensor) -> Embedding:
    return Embedding(weights[f"{name}.embed_tokens.weight"], stack.embed_scale, positions)


def _linear(weights: dict[str, Tensor], path: str) -> nn.Linear:
    weight = weights[f"{path}.weight"]
    layer = nn.Linear(weight.size(1), weight.size(0))
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(weights[f"{path}.bias"])
    return layer.requires_grad_(False)
