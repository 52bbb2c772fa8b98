"""Multi-head attention with the branch's multiplier, and what it caches while decoding.

Shapes: T target length, S source length, B sentences, D width, H heads, C = D / H, N rows of a
batch, G hypotheses of a sentence.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from fairseq.modules import MultiheadAttention
from fairseq.modules.quant_noise import quant_noise
from torch import Tensor, nn
from torch.nn import functional as F

from fixup_core import ResidualBranch, ScalarMultiplier, WeightLayer
from fixup_core.rules.method import Multiplier
from fixup_core.rules.standards import PACKED_XAVIER_UNIFORM
from fixup_mt.model.beams import apart, appended, is_identity, sentence_order, together
from fixup_mt.model.linears import Products, ScalarLinear

QK_EPSILON = 1e-6
"""Added to the mean square of a query or key before its root."""


@dataclass(frozen=True)
class KeyValueCache:
    """Keys and values that step-by-step decoding does not compute again.

    Attributes:
        keys: [N, H, S, C].
        values: As ``keys``.
        padding: [N, S], true at padding, or ``None`` where there is none.
        order: [N'], which of the N rows each hypothesis goes on from: carried out together with the
            next append, by one copy. ``None`` leaves the rows as they are.
        group: G, how many hypotheses share a row.
    """

    keys: Tensor
    values: Tensor
    padding: Tensor | None
    order: Tensor | None = None
    group: int = 1

    @classmethod
    def of(cls, buffer: dict[str, Any]) -> KeyValueCache | None:
        """The cache in fairseq's buffer of an attention module, ``None`` before the first step."""
        if "prev_key" not in buffer:
            return None
        return cls(
            buffer["prev_key"],
            buffer["prev_value"],
            buffer.get("prev_key_padding_mask"),
            buffer.get("order"),
            buffer.get("group", 1),
        )

    def buffer(self) -> dict[str, Any]:
        """Under the names that fairseq's decoder layer reads."""
        return {
            "prev_key": self.keys,
            "prev_value": self.values,
            "prev_key_padding_mask": self.padding,
            "order": self.order,
            "group": self.group,
        }

    def append(self, keys: Tensor, values: Tensor, padding: Tensor | None) -> KeyValueCache:
        """The rows in their new order, with the latest keys and values behind the cached ones."""
        return KeyValueCache(
            appended(self.keys, self.order, keys),
            appended(self.values, self.order, values),
            _joined_padding(self.padding, padding, self.keys, keys),
        )

    def reorder_hypotheses(self, order: Tensor) -> KeyValueCache:
        """Let hypothesis ``i`` go on from hypothesis ``order[i]``; nothing is copied yet."""
        padding = _rows(self.padding, order)
        order = order if self.order is None else self.order[order]
        return KeyValueCache(self.keys, self.values, padding, order)

    def reorder_sentences(self, order: Tensor) -> KeyValueCache:
        """The same for keys and values of sentences, which stay where they are while the
        hypotheses of a sentence only change places among themselves.
        """
        rows = self.keys.size(0)
        sentences, group = sentence_order(order, self.group, rows)
        if is_identity(sentences, rows):
            return KeyValueCache(self.keys, self.values, self.padding, group=group)
        keys, values = (x.index_select(0, sentences) for x in (self.keys, self.values))
        return KeyValueCache(keys, values, _rows(self.padding, sentences), group=group)


class FixupAttention(MultiheadAttention):
    """Multi-head attention, its output times the branch's multiplier.

    Every path calls the projections as modules (fairseq's own self-attention reads their weights
    past the modules when training but not when generating), and goes through
    ``scaled_dot_product_attention`` unless the attention weights are asked for.

    Keys and values may have fewer rows than the queries: then rows ``i * G`` to ``i * G + G - 1``
    of the queries, the hypotheses of one sentence, share row ``i`` (``fixup_mt.model.beams``).

    With ``qk_norm`` each query and key of a head is divided by its root mean square, and the logits
    are ``temperature / sqrt(C)`` times their product: a learnable number that starts at 1, so that
    the first logits have the usual scale. Keys are cached normalised. Differs: Qwen3 and Gemma 3
    have a gain for each of the C elements, OLMo 2 normalises all heads together with D gains,
    ViT-22B has layer norms with gains; Henry et al. 2020 have the one number, too, but unit length.

    Args:
        embed_dim: D.
        num_heads: H.
        multiplier: Of the branch; ``None`` for a branch without one.
        bias: Whether the projections have bias vectors.
        qk_norm: Whether queries and keys are normalised.
        logit_cap: C; logits ``x`` become ``C * tanh(x / C)`` before the mask, as in Gemma 2. The
            fused kernels have no such thing, so that the plain product is taken. 0: none.
        options: As fairseq's.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        *,
        multiplier: Multiplier | None = None,
        bias: bool = False,
        qk_norm: bool = False,
        logit_cap: float = 0.0,
        q_noise: float = 0.0,
        qn_block_size: int = 8,
        **options: Any,
    ) -> None:
        noise = {"q_noise": q_noise, "qn_block_size": qn_block_size}
        super().__init__(embed_dim, num_heads, bias=bias, **noise, **options)
        # Differs: the authors multiply after dropout; the two commute.
        last = ScalarLinear(embed_dim, embed_dim, multiplier=multiplier, bias=bias)
        self.out_proj = quant_noise(last, q_noise, qn_block_size)
        self.temperature = ScalarMultiplier() if qk_norm else None
        self.logit_cap = logit_cap
        self.kept: Products | None = None

    def branch(self, name: str, stack: str, *parts: nn.Module) -> ResidualBranch:
        """M = 4: queries, keys, values and the output projection; ``parts`` as the branch has."""
        inputs = {"query": self.q_proj, "key": self.k_proj, "value": self.v_proj}
        layers = [
            WeightLayer(projection, role=role, standard=PACKED_XAVIER_UNIFORM)
            for role, projection in inputs.items()
        ]
        kind = "cross_attention" if self.encoder_decoder_attention else "self_attention"
        last = WeightLayer(self.out_proj, role="out")
        return ResidualBranch(name, (*layers, last), kind, stack, (self.out_proj, *parts))

    def forward(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        key_padding_mask: Tensor | None = None,
        incremental_state: dict[str, dict[str, Any]] | None = None,
        need_weights: bool = True,
        static_kv: bool = False,
        attn_mask: Tensor | None = None,
        before_softmax: bool = False,
        need_head_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            query: [T, B, D].
            key: [S, B, D], or [S, B / G, D] where G hypotheses share a sentence; may be ``None``
                when ``static_kv`` and the keys are cached.
            value: As ``key``.
            key_padding_mask: [B, S], true at padding.
            incremental_state: Caches of step-by-step decoding.
            need_weights: Also return the weights, [B, T, S], averaged over heads.
            static_kv: Keys and values never change (cross-attention): compute them once.
            attn_mask: [T, S], added to the logits.
            before_softmax: Not supported.
            need_head_weights: Also return the weights of every head, [H, B, T, S].

        Returns:
            The output [T, B, D], and the weights or ``None``.
        """
        assert not before_softmax, "before_softmax is not supported"
        cache = KeyValueCache.of(self._get_input_buffer(incremental_state))
        if static_kv and cache is not None:
            q = self._unit(self._split_heads(self.q_proj(query)))
        else:
            q, k, v = (self._split_heads(x) for x in self._project(query, key, value))
            q, k = self._unit(q), self._unit(k)
            if cache is None:
                cache = KeyValueCache(k, v, key_padding_mask, group=q.size(0) // k.size(0))
            else:
                cache = cache.append(k, v, key_padding_mask)
            if incremental_state is not None:
                self._set_input_buffer(incremental_state, cache.buffer())
        rows = q.size(0)
        mask = self._mask(attn_mask, cache.padding, q.dtype)
        q = together(q if self.temperature is None else self.temperature(q), cache.keys.size(0))
        weights: Tensor | None = None
        if self.logit_cap or need_weights or need_head_weights:
            out, weights = self._attend_and_weigh(q, cache.keys, cache.values, mask)
        else:
            out = self._attend(q, cache.keys, cache.values, mask)
        if need_weights or need_head_weights:
            assert weights is not None
            weights = apart(weights, rows)
            weights = weights.transpose(0, 1) if need_head_weights else weights.mean(dim=1)
        else:
            weights = None
        return self.out_proj(apart(out, rows).permute(2, 0, 1, 3).flatten(2)), weights

    def reorder_incremental_state(
        self, incremental_state: dict[str, dict[str, Any]], new_order: Tensor
    ) -> dict[str, dict[str, Any]]:
        """Let hypothesis ``i`` go on from what hypothesis ``new_order[i]`` has cached."""
        cache = KeyValueCache.of(self._get_input_buffer(incremental_state))
        if cache is not None:
            of_sentences = self.encoder_decoder_attention
            reorder = cache.reorder_sentences if of_sentences else cache.reorder_hypotheses
            self._set_input_buffer(incremental_state, reorder(new_order).buffer())
        return incremental_state

    def products(self) -> Products | None:
        """What ``kept`` holds while a batch is decoded: self-attention's weights, packed."""
        return self._packed() if self.self_attention and self._plain else None

    def _project(self, query: Tensor, key: Any, value: Any) -> tuple[Tensor, ...]:
        """Queries, keys and values; by one product, where all come from the same tensor and nobody
        looks at, or has replaced, a projection.
        """
        if not self._packs(query, key, value):
            return self.q_proj(query), self.k_proj(key), self.v_proj(value)
        return F.linear(query, *(self.kept or self._packed())).chunk(3, dim=-1)

    def _packs(self, query: Tensor, key: Tensor | None, value: Tensor | None) -> bool:
        if key is not query or value is not query or query.size(2) != self.embed_dim:
            return False
        return self._plain and (self.kept is not None or query.numel() >= self.embed_dim**2)

    @property
    def _plain(self) -> bool:
        return all(_plain_linear(p) for p in (self.q_proj, self.k_proj, self.v_proj))

    def _packed(self) -> Products:
        inputs = (self.q_proj, self.k_proj, self.v_proj)
        biases = [p.bias for p in inputs if p.bias is not None]
        return torch.cat([p.weight for p in inputs]), torch.cat(biases) if biases else None

    def _split_heads(self, x: Tensor) -> Tensor:
        """[T, B, D] -> [B, H, T, C]."""
        return x.view(x.size(0), x.size(1), self.num_heads, self.head_dim).permute(1, 2, 0, 3)

    def _unit(self, x: Tensor) -> Tensor:
        """Queries or keys of each head at a root mean square of 1, where that is asked for."""
        return x if self.temperature is None else unit_rms(x)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        drops = self.training or self.dropout_module.apply_during_inference
        dropout = self.dropout_module.p if drops else 0.0
        half = q.dtype != torch.float32 and q.dtype != torch.float64
        if q.is_cuda and not torch.compiler.is_compiling():
            with without_cudnn():
                return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        if q.device.type != "cpu" or not half:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        # The CPU's half-precision kernel is ten times slower backward than the float32 one.
        mask = None if mask is None else mask.float()
        with torch.autocast("cpu", enabled=False):
            out = F.scaled_dot_product_attention(
                q.float(), k.float(), v.float(), attn_mask=mask, dropout_p=dropout
            )
        return out.to(q.dtype)

    def _mask(
        self, attn_mask: Tensor | None, padding: Tensor | None, dtype: torch.dtype
    ) -> Tensor | None:
        """Both masks as one tensor to add to the logits, broadcast to [B, H, T, S]."""
        mask = None if attn_mask is None else attn_mask.to(dtype)[None, None]
        if padding is None:
            return mask
        hidden = padding.to(torch.bool)[:, None, None]
        # Finite, so that a row with no key left stays finite too.
        hide = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill(
            hidden, -1e4
        )
        return hide if mask is None else mask + hide

    def _attend_and_weigh(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        logits = torch.matmul(q * self.scaling, k.transpose(2, 3))
        logits = capped(logits, self.logit_cap)
        if mask is not None:
            logits = logits + mask
        double = logits.dtype == torch.float64
        dtype = torch.float64 if double else torch.float32
        weights = torch.softmax(logits, dim=-1, dtype=dtype)
        return torch.matmul(self.dropout_module(weights).to(v.dtype), v), weights


@contextmanager
def without_cudnn() -> Iterator[None]:
    """Attention by PyTorch's own kernels, those of them that are allowed outside.

    cuDNN's, the first choice on an H100, plan anew for each pair of lengths, and sentences have
    many: on an H200 a step of the first epoch took 300 ms, of a later one 40.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def unit_rms(x: Tensor) -> Tensor:
    """``x`` divided by the root mean square of its last dimension, in its own type."""
    wide = x if x.dtype == torch.float64 else x.float()
    square = wide.square().mean(dim=-1, keepdim=True)
    return (wide * torch.rsqrt(square + QK_EPSILON)).to(x.dtype)


def capped(logits: Tensor, cap: float) -> Tensor:
    """Between ``-cap`` and ``cap``, near 0 as they are; 0: as they are."""
    if not cap:
        return logits
    # In half precision the logits near the cap would be one.
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return cap * torch.tanh(wide / cap)


def _plain_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear and not module._forward_hooks and not module._forward_pre_hooks


def _rows(x: Tensor | None, order: Tensor) -> Tensor | None:
    return None if x is None else x.index_select(0, order)


def _joined_padding(
    before: Tensor | None, now: Tensor | None, k_before: Tensor, k_now: Tensor
) -> Tensor | None:
    """Padding of the cached and the new keys together; ``None`` stands for no padding."""
    if before is None and now is None:
        return None
    batch, device = k_now.size(0), k_now.device
    if before is None:
        before = torch.zeros((batch, k_before.size(2)), dtype=torch.bool, device=device)
    if now is None:
        now = torch.zeros((batch, k_now.size(2)), dtype=torch.bool, device=device)
    return torch.cat([before.to(torch.bool), now.to(torch.bool)], dim=1)
