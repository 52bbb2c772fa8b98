"""The encoder and decoder: stacks of layers, what ends them, and the output layer.

Shapes: T target length, S source length, B sentences, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from fairseq.models.transformer import TransformerDecoderBase, TransformerEncoderBase
from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from torch import Tensor, nn

from fixup_core import WeightLayer
from fixup_core.rules.standards import OUTPUT_NORMAL
from fixup_mt.model.beams import reorder_encoder_out
from fixup_mt.model.layers import FixupDecoderLayer, FixupEncoderLayer
from fixup_mt.model.linears import TiedProjection, keep_products
from fixup_mt.model.slots import make_end
from fixup_mt.model.vocabulary import VocabularyDigest


class FixupEncoder(TransformerEncoderBase):
    """fairseq's encoder with Fixup layers; Fixup's ends with a scalar bias and a multiplier."""

    def __init__(self, cfg: Any, dictionary: Any, embed_tokens: nn.Module) -> None:
        super().__init__(cfg, dictionary, embed_tokens)
        self.layer_norm = make_end(cfg.fixup.record, cfg.encoder.embed_dim, multiplier=True)
        self.vocabulary = VocabularyDigest(dictionary, "source")
        self.autocast = cfg.fixup.precision
        self.compiles = cfg.fixup.compile
        # Cross-self-attention joins the sentence to the pieces of every hypothesis.
        self.shares = not cfg.cross_self_attention

    def upgrade_state_dict_named(self, state_dict: dict, name: str) -> dict:
        """Nothing to do: there are no old checkpoints. fairseq's takes a state dict without a
        version, as its moving averages load one, for an old one and drops the closing scalars.
        """
        return state_dict

    def train(self, mode: bool = True) -> nn.Module:
        """As any module's; with ``--fixup-compile`` layers are compiled, one by one, to train.

        Evaluation is eager: step-by-step decoding has other shapes at every step.
        """
        super().train(mode)
        if self.compiles:
            compile_layers_(self.layers, mode)
        return self

    def stack_embeddings(self) -> Iterator[tuple[nn.Module, str]]:
        """What the stack begins with, for methods that scale it by the depth."""
        if isinstance(self.embed_tokens, nn.Embedding):
            yield self.embed_tokens, "encoder"

    def build_encoder_layer(self, cfg: Any) -> nn.Module:
        return _wrap(FixupEncoderLayer(cfg, return_fc=self.return_fc), cfg)

    def reorder_encoder_out(
        self, encoder_out: dict[str, list[Tensor]], new_order: Tensor
    ) -> dict[str, list[Tensor]]:
        """One row for each element of ``new_order``, or for each sentence where its hypotheses
        stand side by side: in place of a copy of the sentence for each of them, ``"group"`` says
        how many share it. Differs: fairseq copies everything, anew for every piece.
        """
        return reorder_encoder_out(encoder_out, new_order, self.shares)

    def forward(self, src_tokens: Tensor, *args: Any, **kwargs: Any) -> dict[str, list[Tensor]]:
        """As fairseq's, under autocast when it is asked for."""
        with precision(self.autocast, src_tokens):
            return super().forward(src_tokens, *args, **kwargs)


class FixupDecoder(TransformerDecoderBase):
    """fairseq's decoder with Fixup layers; Fixup's ends with a bias and an output layer at 0."""

    def __init__(
        self, cfg: Any, dictionary: Any, embed_tokens: nn.Module, no_encoder_attn: bool = False
    ) -> None:
        super().__init__(cfg, dictionary, embed_tokens, no_encoder_attn=no_encoder_attn)
        self.layer_norm = make_end(cfg.fixup.record, cfg.decoder.embed_dim, multiplier=False)
        self.vocabulary = VocabularyDigest(dictionary, "target")
        self.autocast = cfg.fixup.precision
        self.compiles = cfg.fixup.compile

    upgrade_state_dict_named = FixupEncoder.upgrade_state_dict_named

    def train(self, mode: bool = True) -> nn.Module:
        """As the encoder's."""
        super().train(mode)
        if self.compiles:
            compile_layers_(self.layers, mode)
        return self

    def build_decoder_layer(self, cfg: Any, no_encoder_attn: bool = False) -> nn.Module:
        return _wrap(FixupDecoderLayer(cfg, no_encoder_attn), cfg)

    def build_output_projection(self, cfg: Any, dictionary: Any, embed_tokens: Any) -> None:
        super().build_output_projection(cfg, dictionary, embed_tokens)
        if self.adaptive_softmax is not None:
            return
        if self.share_input_output_embed:
            tied = TiedProjection(embed_tokens.weight, cfg.fixup.tied_output)
            self.output_projection = tied
        if cfg.fixup.starts_at_frequencies:
            self.output_projection.bias = nn.Parameter(torch.zeros(len(dictionary)))

    def stack_embeddings(self) -> Iterator[tuple[nn.Module, str]]:
        """What the stack begins with, for methods that scale it by the depth."""
        if isinstance(self.embed_tokens, nn.Embedding):
            yield self.embed_tokens, "decoder"

    def classifier_layers(self) -> Iterator[nn.Module | WeightLayer]:
        """Every layer whose output is a logit, tied to the embeddings or not."""
        if self.adaptive_softmax is None:
            yield WeightLayer(self.output_projection, standard=OUTPUT_NORMAL)
            return
        head = self.adaptive_softmax.head
        yield from (head,) if isinstance(head, nn.Linear) else (head.class_proj,)
        for tail in self.adaptive_softmax.tail:
            if isinstance(tail[-1], nn.Linear):
                yield tail[-1]

    def forward(
        self,
        prev_output_tokens: Tensor,
        encoder_out: dict[str, list[Tensor]] | None = None,
        incremental_state: dict[str, Any] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """As fairseq's, under autocast when it is asked for; the logits are float32 then."""
        given = (prev_output_tokens, encoder_out, incremental_state)
        with (
            precision(self.autocast, prev_output_tokens),
            keep_products(self, incremental_state),
        ):
            x, extra = super().forward(*given, *args, **kwargs)
        return x if self.autocast is None else x.float(), extra


def compile_layers_(layers: nn.Module, training: bool) -> None:
    """Compile each layer for training, for any lengths; or go back to the eager form."""
    for layer in layers.children():
        layer._compiled_call_impl = None
        if training:
            layer.compile(dynamic=True)


def precision(dtype: torch.dtype | None, tokens: Tensor) -> Any:
    """Autocast to ``dtype`` on the tokens' device, or nothing."""
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(tokens.device.type, dtype)


def _forward_in(dtype: torch.dtype | None, forward: Any, x: Tensor, *args: Any, **kwargs: Any):
    with precision(dtype, x):
        return forward(x, *args, **kwargs)


def _wrap(layer: nn.Module, cfg: Any) -> nn.Module:
    """Activation checkpointing, as fairseq wraps its own layers."""
    if not cfg.checkpoint_activations:
        return layer
    # The recomputation happens in the backward pass, where the stack's autocast has ended.
    layer.forward = functools.partial(_forward_in, cfg.fixup.precision, layer.forward)
    return checkpoint_wrapper(layer, offload_to_cpu=cfg.offload_activations)
