"""Transformer layers with what a method puts around their weights, in the place of fairseq's norms.

fairseq's layers keep their forward pass. Their layer-norm slots, one for each branch, hold what the
method has there (``fixup_mt.model.slots``); the linear layers bring the other scalars of rule 3.
State dicts therefore have fairseq's own names, with ``*_layer_norm.weight`` Fixup's [1] bias before
a branch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fairseq.modules.quant_noise import quant_noise
from fairseq.modules.transformer_layer import (
    TransformerDecoderLayerBase,
    TransformerEncoderLayerBase,
)
from torch import Tensor, nn

from fixup_core import ResidualBranch, WeightLayer
from fixup_mt.model.attention import FixupAttention
from fixup_mt.model.linears import ScalarLinear
from fixup_mt.model.slots import make_slot


class _FixupLayer(nn.Module):
    """What the layers of both stacks share: what stands around the weights is the method's."""

    stack: str
    fc1: Any
    fc2: Any
    self_attn: Any
    encoder_attn: Any
    embed_dim: int

    def __init__(self, cfg: Any, *args: Any, **options: Any) -> None:
        # fairseq's constructor calls the hooks below, which ask for it.
        self.method = cfg.fixup.record
        super().__init__(cfg, *args, **options)
        self.self_attn_layer_norm = make_slot(self.method, self.embed_dim)
        self.final_layer_norm = make_slot(self.method, self.embed_dim)
        if self.encoder_attn is not None:
            self.encoder_attn_layer_norm = make_slot(self.method, self.embed_dim)
        if self.method.shared_multiplier:
            self._share_multiplier()

    def build_fc1(self, input_dim: int, output_dim: int, q_noise: float, size: int) -> nn.Module:
        after, vector = self.method.scalar_bias(), self.method.bias_vectors
        first = ScalarLinear(input_dim, output_dim, after=after, bias=vector)
        return quant_noise(first, q_noise, size)

    def build_fc2(self, input_dim: int, output_dim: int, q_noise: float, size: int) -> nn.Module:
        last = ScalarLinear(
            input_dim,
            output_dim,
            before=self.method.scalar_bias(),
            multiplier=self.method.branch_multiplier(output_dim),
            bias=self.method.bias_vectors,
        )
        return quant_noise(last, q_noise, size)

    def residual_connection(self, x: Tensor, residual: Tensor) -> Any:
        """Fairseq's hook: ``x`` is the branch, whose multiplier is part of its last layer.

        Where a norm follows the sum, fairseq calls the branch's slot next: it gets both and adds.
        """
        return (residual, x) if self.method.norm_on_sum else residual + x

    def residual_branches(self) -> Iterator[ResidualBranch]:
        """Of attention m = 4, of the feed-forward m = 2."""
        yield self.self_attn.branch("self_attn", self.stack, self.self_attn_layer_norm)
        if self.encoder_attn is not None:
            slot = self.encoder_attn_layer_norm
            yield self.encoder_attn.branch("encoder_attn", self.stack, slot)
        layers = (WeightLayer(self.fc1, role="fc1"), WeightLayer(self.fc2, role="fc2"))
        parts = (self.fc2, self.final_layer_norm)
        yield ResidualBranch("ffn", layers, "feed_forward", self.stack, parts)

    def _share_multiplier(self) -> None:
        """Give all branches of the layer one multiplier."""
        one = self.self_attn.out_proj.multiplier
        lasts = [self.fc2] if self.encoder_attn is None else [self.encoder_attn.out_proj, self.fc2]
        for last in lasts:
            last.multiplier = one


class FixupEncoderLayer(_FixupLayer, TransformerEncoderLayerBase):
    """Self-attention and feed-forward."""

    stack = "encoder"
    encoder_attn = None

    def build_self_attention(self, embed_dim: int, cfg: Any) -> FixupAttention:
        return _attention(self, embed_dim, cfg, cfg.encoder, self_attention=True)


class FixupDecoderLayer(_FixupLayer, TransformerDecoderLayerBase):
    """Self-attention and, unless ``no_encoder_attn``, cross-attention, feed-forward."""

    stack = "decoder"

    def __init__(self, cfg: Any, no_encoder_attn: bool = False) -> None:
        super().__init__(cfg, no_encoder_attn)

    def build_self_attention(
        self, embed_dim: int, cfg: Any, add_bias_kv: bool = False, add_zero_attn: bool = False
    ) -> FixupAttention:
        alone = not cfg.cross_self_attention
        return _attention(self, embed_dim, cfg, cfg.decoder, self_attention=alone)

    def build_encoder_attention(self, embed_dim: int, cfg: Any) -> FixupAttention:
        kind = {"kdim": cfg.encoder.embed_dim, "vdim": cfg.encoder.embed_dim}
        return _attention(self, embed_dim, cfg, cfg.decoder, **kind, encoder_decoder_attention=True)


def _attention(layer: Any, embed_dim: int, cfg: Any, stack: Any, **kind: Any) -> FixupAttention:
    return FixupAttention(
        embed_dim,
        stack.attention_heads,
        multiplier=layer.method.branch_multiplier(embed_dim),
        bias=layer.method.bias_vectors,
        qk_norm=cfg.fixup.qk_norm,
        logit_cap=cfg.fixup.logit_cap,
        dropout=cfg.attention_dropout,
        q_noise=layer.quant_noise,
        qn_block_size=layer.quant_noise_block_size,
        **kind,
    )
