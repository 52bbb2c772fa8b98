"""Transformer layers without normalisation.

fairseq's layers keep their forward pass. Their layer-norm slots, which stand at the start of every
branch (``normalize_before``), hold one scalar bias each; the linear layers bring the other scalars
of rule 3. State dicts therefore have fairseq's own names, with ``*_layer_norm.weight`` the [1]
bias before a branch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fairseq.modules.quant_noise import quant_noise
from fairseq.modules.transformer_layer import (
    TransformerDecoderLayerBase,
    TransformerEncoderLayerBase,
)
from torch import nn

from fixup_core import ResidualBranch, ScalarBias, ScalarMultiplier, WeightLayer
from fixup_mt.model.attention import FixupAttention
from fixup_mt.model.linears import ScalarLinear

AUTHORS_CROSS_ATTENTION_BRANCHES = 12
"""The default their code falls back to for cross-attention, whatever the depth."""


class FixupEncoderLayer(TransformerEncoderLayerBase):
    """Self-attention (m = 4) and feed-forward (m = 2), each a Fixup branch."""

    def __init__(self, cfg: Any, return_fc: bool = False) -> None:
        super().__init__(cfg, return_fc=return_fc)
        self.self_attn_layer_norm = ScalarBias()
        self.final_layer_norm = ScalarBias()

    def residual_branches(self) -> Iterator[ResidualBranch]:
        yield self.self_attn.branch("self_attn")
        yield _ffn_branch(self)

    def build_fc1(self, input_dim: int, output_dim: int, q_noise: float, size: int) -> nn.Module:
        first = ScalarLinear(input_dim, output_dim, after=ScalarBias())
        return quant_noise(first, q_noise, size)

    def build_fc2(self, input_dim: int, output_dim: int, q_noise: float, size: int) -> nn.Module:
        before, multiplier = ScalarBias(), ScalarMultiplier()
        last = ScalarLinear(input_dim, output_dim, before=before, multiplier=multiplier)
        return quant_noise(last, q_noise, size)

    def build_self_attention(self, embed_dim: int, cfg: Any) -> FixupAttention:
        return _attention(self, embed_dim, cfg, cfg.encoder, self_attention=True)


class FixupDecoderLayer(TransformerDecoderLayerBase):
    """Self-attention and, unless ``no_encoder_attn``, cross-attention (m = 4), feed-forward."""

    def __init__(self, cfg: Any, no_encoder_attn: bool = False) -> None:
        super().__init__(cfg, no_encoder_attn)
        self.self_attn_layer_norm = ScalarBias()
        self.final_layer_norm = ScalarBias()
        if self.encoder_attn is not None:
            self.encoder_attn_layer_norm = ScalarBias()
        authors = cfg.fixup.compat == "authors"
        self.cross_attention_branches = AUTHORS_CROSS_ATTENTION_BRANCHES if authors else None

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
        alone = not cfg.cross_self_attention
        return _attention(self, embed_dim, cfg, cfg.decoder, self_attention=alone)

    def build_encoder_attention(self, embed_dim: int, cfg: Any) -> FixupAttention:
        kind = {"kdim": cfg.encoder.embed_dim, "vdim": cfg.encoder.embed_dim}
        return _attention(self, embed_dim, cfg, cfg.decoder, **kind, encoder_decoder_attention=True)


def _attention(layer: Any, embed_dim: int, cfg: Any, stack: Any, **kind: Any) -> FixupAttention:
    return FixupAttention(
        embed_dim,
        stack.attention_heads,
        multiplier=ScalarMultiplier(),
        dropout=cfg.attention_dropout,
        q_noise=layer.quant_noise,
        qn_block_size=layer.quant_noise_block_size,
        **kind,
    )


def _ffn_branch(layer: Any) -> ResidualBranch:
    return ResidualBranch("ffn", (WeightLayer(layer.fc1), WeightLayer(layer.fc2)))
