"""Attention and Transformer layers without normalisation.

Shapes: T target length, S source length, B sentences, D width, H heads, C = D / H.

fairseq's layers keep their forward pass. Their layer-norm slots, which stand at the start of every
branch (``normalize_before``), hold one scalar bias each; the linear layers bring the other scalars
of rule 3. State dicts therefore have fairseq's own names, with ``*_layer_norm.weight`` the [1]
bias before a branch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, Dict, List, Optional, Tuple

import torch
from fairseq.modules import MultiheadAttention
from fairseq.modules.quant_noise import quant_noise
from fairseq.modules.transformer_layer import (
    TransformerDecoderLayerBase,
    TransformerEncoderLayerBase,
)
from torch import Tensor, nn
from torch.nn import functional as F

from fixup_core import ResidualBranch, ScalarBias, ScalarMultiplier, WeightLayer
from fixup_core.rules.standards import PACKED_XAVIER_UNIFORM
from fixup_mt.model.beams import apart, appended, group_mark, is_identity, sentence_order, together

AUTHORS_CROSS_ATTENTION_BRANCHES = 12
"""The default their code falls back to for cross-attention, whatever the depth."""


# The scalars ride in weights and bias vectors where a pass over a weight is shorter than one over
# the activations: in training, but not when generating a word at a time. fairseq tells its models
# before it generates (``make_generation_fast_``): from then on the products are kept.


class LinearBias(nn.Linear):
    """First layer of a feed-forward branch, with the scalar bias before its activation."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.after = ScalarBias()

    def forward(self, input: Tensor) -> Tensor:
        bias = self.after.value().to(self.weight.dtype).expand(self.out_features)
        return F.linear(input, self.weight, bias)


class LinearMultiplier(nn.Linear):
    """Last layer of an attention branch, with the branch's multiplier.

    Differs: the authors multiply after dropout; the two commute.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.multiplier = ScalarMultiplier()
        keep_for_generation(self, "kept_weight", "kept_bias")

    def forward(self, input: Tensor) -> Tensor:
        if self.kept_weight is not None:
            return F.linear(input, self.kept_weight)
        if input.numel() < self.weight.numel():
            return self.multiplier(F.linear(input, self.weight))
        return F.linear(input, self.weight * self.multiplier.value())

    @torch.jit.unused
    def make_generation_fast_(self, **options: Any) -> None:
        """The weights change no more: multiply them once."""
        with torch.no_grad():
            self.kept_weight = self.weight * self.multiplier.value()


class BiasLinearMultiplier(LinearMultiplier):
    """Last layer of a feed-forward branch, with the bias before it and the multiplier."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.before = ScalarBias()

    def forward(self, input: Tensor) -> Tensor:
        if self.kept_weight is not None:
            return F.linear(input, self.kept_weight, self.kept_bias)
        if input.numel() < self.weight.numel():
            return self.multiplier(F.linear(self.before(input), self.weight))
        weight = self.weight * self.multiplier.value()
        bias = weight.sum(dim=1) * self.before.value()
        return F.linear(input, weight, bias)

    @torch.jit.unused
    def make_generation_fast_(self, **options: Any) -> None:
        super().make_generation_fast_()
        with torch.no_grad():
            self.kept_bias = self.kept_weight.sum(dim=1) * self.before.value()


def keep_for_generation(module: nn.Module, *names: str) -> None:
    """Give ``module`` empty buffers for what it computes once before generating.

    They are not part of its state dict, and are emptied when another one is loaded.
    """
    for name in names:
        module.register_buffer(name, None, persistent=False)
    module.register_load_state_dict_post_hook(functools.partial(_empty, names))


def _empty(names: Tuple[str, ...], module: nn.Module, incompatible_keys: Any) -> None:
    for name in names:
        setattr(module, name, None)


class FixupAttention(MultiheadAttention):
    """Multi-head attention without bias vectors, its output times the branch's multiplier.

    Every path calls the projections as modules (fairseq's own self-attention reads their weights
    past the modules when training but not when generating), and goes through
    ``scaled_dot_product_attention`` unless the attention weights are asked for.

    Keys and values may have fewer rows than the queries: then rows ``i * G`` to ``i * G + G - 1``
    of the queries, the hypotheses of one sentence, share row ``i`` (``fixup_mt.model.beams``).
    """

    def __init__(self, embed_dim: int, num_heads: int, **options: Any) -> None:
        super().__init__(embed_dim, num_heads, bias=False, **options)
        self.out_proj = quant_noise(
            LinearMultiplier(embed_dim, embed_dim),
            options.get("q_noise", 0.0),
            options.get("qn_block_size", 8),
        )
        keep_for_generation(self, "kept_packed")

    def branch(self, name: str, assumed_num_branches: Optional[int] = None) -> ResidualBranch:
        """M = 4: q, k, v and the output projection."""
        inputs = (self.q_proj, self.k_proj, self.v_proj)
        layers = (*(WeightLayer(p, PACKED_XAVIER_UNIFORM) for p in inputs),)
        return ResidualBranch(name, (*layers, WeightLayer(self.out_proj)), assumed_num_branches)

    def forward(
        self,
        query: Tensor,
        key: Optional[Tensor],
        value: Optional[Tensor],
        key_padding_mask: Optional[Tensor] = None,
        incremental_state: Optional[Dict[str, Dict[str, Optional[Tensor]]]] = None,
        need_weights: bool = True,
        static_kv: bool = False,
        attn_mask: Optional[Tensor] = None,
        before_softmax: bool = False,
        need_head_weights: bool = False,
    ) -> Tuple[Tensor, Optional[Tensor]]:
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
        projected: Optional[List[Tensor]] = None
        if not torch.jit.is_scripting():
            projected = self._packed(query, key, value)
        q = self._split_heads(self.q_proj(query) if projected is None else projected[0])
        cache = self._get_input_buffer(incremental_state)
        prev_k: Optional[Tensor] = None
        prev_v: Optional[Tensor] = None
        prev_padding: Optional[Tensor] = None
        if "prev_key" in cache:
            prev_k, prev_v = cache["prev_key"], cache["prev_value"]
            prev_padding = cache["prev_key_padding_mask"]
        if static_kv and prev_k is not None and prev_v is not None:
            k, v, padding = prev_k, prev_v, prev_padding
        else:
            assert key is not None and value is not None
            k = self._split_heads(self.k_proj(key) if projected is None else projected[1])
            v = self._split_heads(self.v_proj(value) if projected is None else projected[2])
            padding = key_padding_mask
            if prev_k is not None and prev_v is not None:
                order = cache["order"]
                padding = _joined_padding(prev_padding, padding, prev_k, k)
                k, v = appended(prev_k, order, k), appended(prev_v, order, v)
        if incremental_state is not None:
            cache["prev_key"], cache["prev_value"] = k, v
            cache["prev_key_padding_mask"] = padding
            cache["order"], cache["group"] = None, group_mark(q.size(0) // k.size(0))
            self._set_input_buffer(incremental_state, cache)
        mask = self._mask(attn_mask, padding, q)
        weights: Optional[Tensor] = None
        rows = q.size(0)
        q = together(q, k.size(0))
        if need_weights or need_head_weights:
            out, weights = self._attend_and_weigh(q, k, v, mask)
            weights = apart(weights, rows)
            weights = weights.transpose(0, 1) if need_head_weights else weights.mean(dim=1)
        else:
            out = self._attend(q, k, v, mask)
        joined = apart(out, rows).permute(2, 0, 1, 3)
        return self.out_proj(joined.reshape(query.size(0), query.size(1), -1)), weights

    @torch.jit.export
    def reorder_incremental_state(
        self,
        incremental_state: Dict[str, Dict[str, Optional[Tensor]]],
        new_order: Tensor,
    ) -> Optional[Dict[str, Dict[str, Optional[Tensor]]]]:
        """Let hypothesis ``i`` go on from what hypothesis ``new_order[i]`` has cached.

        The keys and values of a sentence stay where they are while its hypotheses only change
        places among themselves; those of the hypotheses are moved when the next ones are appended.
        """
        cache = self._get_input_buffer(incremental_state)
        if "prev_key" in cache:
            if self.encoder_decoder_attention:
                _reorder_sentences(cache, new_order)
            else:
                before = cache["order"]
                cache["order"] = new_order if before is None else before[new_order]
                _select(cache, "prev_key_padding_mask", new_order)
            self._set_input_buffer(incremental_state, cache)
        return incremental_state

    def _packed(
        self, query: Tensor, key: Optional[Tensor], value: Optional[Tensor]
    ) -> Optional[List[Tensor]]:
        """Queries, keys and values by one product, where all come from the same tensor and nobody
        looks at, or has replaced, a projection.
        """
        if not self._packs(query, key, value):
            return None
        weight = self._packed_weight() if self.kept_packed is None else self.kept_packed
        return list(F.linear(query, weight).chunk(3, dim=-1))

    def _packs(self, query: Tensor, key: Optional[Tensor], value: Optional[Tensor]) -> bool:
        if key is not query or value is not query or query.size(2) != self.embed_dim:
            return False
        plain = all(_plain_linear(p) for p in (self.q_proj, self.k_proj, self.v_proj))
        return plain and (self.kept_packed is not None or query.numel() >= self.embed_dim**2)

    def _packed_weight(self) -> Tensor:
        return torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight])

    @torch.jit.unused
    def make_generation_fast_(self, **options: Any) -> None:
        """The weights change no more: pack those of self-attention once."""
        if self.self_attention:
            with torch.no_grad():
                self.kept_packed = self._packed_weight()

    def _split_heads(self, x: Tensor) -> Tensor:
        """[T, B, D] -> [B, H, T, C]."""
        return x.view(x.size(0), x.size(1), self.num_heads, self.head_dim).permute(1, 2, 0, 3)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Optional[Tensor]) -> Tensor:
        drops = self.training or self.dropout_module.apply_during_inference
        dropout = self.dropout_module.p if drops else 0.0
        half = q.dtype != torch.float32 and q.dtype != torch.float64
        if torch.jit.is_scripting() or q.device.type != "cpu" or not half:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        else:
            # The CPU's half-precision kernel is ten times slower backward than the float32 one.
            mask = None if mask is None else mask.float()
            with torch.autocast("cpu", enabled=False):
                out = F.scaled_dot_product_attention(
                    q.float(), k.float(), v.float(), attn_mask=mask, dropout_p=dropout
                )
            return out.to(q.dtype)

    def _mask(
        self, attn_mask: Optional[Tensor], padding: Optional[Tensor], q: Tensor
    ) -> Optional[Tensor]:
        """Both masks as one tensor to add to the logits, broadcast to [B, H, T, S]."""
        mask: Optional[Tensor] = None
        if attn_mask is not None:
            mask = attn_mask.to(q.dtype).unsqueeze(0).unsqueeze(0)
        if padding is not None:
            hidden = padding.to(torch.bool).unsqueeze(1).unsqueeze(2)
            hide = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device)
            # Finite, so that a row with no key left stays finite too.
            hide = hide.masked_fill(hidden, -1e4)
            mask = hide if mask is None else mask + hide
        return mask

    def _attend_and_weigh(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Optional[Tensor]
    ) -> Tuple[Tensor, Tensor]:
        logits = torch.matmul(q * self.scaling, k.transpose(2, 3))
        if mask is not None:
            logits = logits + mask
        double = logits.dtype == torch.float64
        dtype = torch.float64 if double else torch.float32
        weights = torch.softmax(logits, dim=-1, dtype=dtype)
        return torch.matmul(self.dropout_module(weights).to(v.dtype), v), weights


class FixupEncoderLayer(TransformerEncoderLayerBase):
    """Self-attention (m = 4) and feed-forward (m = 2), each a Fixup branch."""

    def __init__(self, cfg: Any, return_fc: bool = False) -> None:
        super().__init__(cfg, return_fc=return_fc)
        self.self_attn_layer_norm = ScalarBias()
        self.final_layer_norm = ScalarBias()

    @torch.jit.unused
    def residual_branches(self) -> Iterator[ResidualBranch]:
        yield self.self_attn.branch("self_attn")
        yield _ffn_branch(self)

    def build_fc1(self, input_dim: int, output_dim: int, q_noise: float, size: int) -> nn.Module:
        return quant_noise(LinearBias(input_dim, output_dim), q_noise, size)

    def build_fc2(self, input_dim: int, output_dim: int, q_noise: float, size: int) -> nn.Module:
        return quant_noise(BiasLinearMultiplier(input_dim, output_dim), q_noise, size)

    def build_self_attention(self, embed_dim: int, cfg: Any) -> FixupAttention:
        return FixupAttention(
            embed_dim,
            cfg.encoder.attention_heads,
            dropout=cfg.attention_dropout,
            self_attention=True,
            q_noise=self.quant_noise,
            qn_block_size=self.quant_noise_block_size,
        )


class FixupDecoderLayer(TransformerDecoderLayerBase):
    """Self-attention and, unless ``no_encoder_attn``, cross-attention (m = 4), feed-forward."""

    def __init__(self, cfg: Any, no_encoder_attn: bool = False) -> None:
        super().__init__(cfg, no_encoder_attn)
        self.self_attn_layer_norm = ScalarBias()
        self.final_layer_norm = ScalarBias()
        if self.encoder_attn is not None:
            self.encoder_attn_layer_norm = ScalarBias()
        authors = getattr(cfg, "fixup_compat", "none") == "authors"
        self.cross_attention_branches = AUTHORS_CROSS_ATTENTION_BRANCHES if authors else None

    @torch.jit.unused
    def residual_branches(self) -> Iterator[ResidualBranch]:
        yield self.self_attn.branch("self_attn")
        if self.encoder_attn is not None:
            yield self.encoder_attn.branch("encoder_attn", self.cross_attention_branches)
        yield _ffn_branch(self)

    build_fc1 = FixupEncoderLayer.build_fc1
    build_fc2 = FixupEncoderLayer.build_fc2

    def build_self_attention(
        self, embed_dim: int, cfg: Any, add_bias_kv: bool = False, add_zero_attn: bool = False
    ) -> FixupAttention:
        return self._attention(embed_dim, cfg, self_attention=not cfg.cross_self_attention)

    def build_encoder_attention(self, embed_dim: int, cfg: Any) -> FixupAttention:
        width = cfg.encoder.embed_dim
        return self._attention(
            embed_dim, cfg, kdim=width, vdim=width, encoder_decoder_attention=True
        )

    def _attention(self, embed_dim: int, cfg: Any, **kind: Any) -> FixupAttention:
        return FixupAttention(
            embed_dim,
            cfg.decoder.attention_heads,
            dropout=cfg.attention_dropout,
            q_noise=self.quant_noise,
            qn_block_size=self.quant_noise_block_size,
            **kind,
        )


def _plain_linear(module: nn.Module) -> bool:
    return type(module) is nn.Linear and not module._forward_hooks and not module._forward_pre_hooks


def _ffn_branch(layer: Any) -> ResidualBranch:
    return ResidualBranch("ffn", (WeightLayer(layer.fc1), WeightLayer(layer.fc2)))


def _reorder_sentences(cache: Dict[str, Optional[Tensor]], order: Tensor) -> None:
    key, mark = cache["prev_key"], cache["group"]
    assert key is not None and mark is not None
    sentences, group = sentence_order(order, mark.size(0), key.size(0))
    if not is_identity(sentences, key.size(0)):
        for name in ("prev_key", "prev_value", "prev_key_padding_mask"):
            _select(cache, name, sentences)
    cache["group"] = group_mark(group)


def _select(cache: Dict[str, Optional[Tensor]], name: str, order: Tensor) -> None:
    rows = cache[name]
    if rows is not None:
        cache[name] = rows.index_select(0, order)


def _joined_padding(
    before: Optional[Tensor], now: Optional[Tensor], k_before: Tensor, k_now: Tensor
) -> Optional[Tensor]:
    """Padding of the cached and the new keys together; ``None`` stands for no padding."""
    if before is None and now is None:
        return None
    batch, device = k_now.size(0), k_now.device
    if before is None:
        before = torch.zeros((batch, k_before.size(2)), dtype=torch.bool, device=device)
    if now is None:
        now = torch.zeros((batch, k_now.size(2)), dtype=torch.bool, device=device)
    return torch.cat([before.to(torch.bool), now.to(torch.bool)], dim=1)
