"""The encoder and decoder: stacks of Fixup layers, their closing scalars and the output layer.

Shapes: T target length, S source length, B sentences, D width, V vocabulary.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, Dict, List, Optional

import torch
from fairseq.models.transformer import TransformerDecoderBase, TransformerEncoderBase
from fairseq.modules.checkpoint_activations import checkpoint_wrapper
from torch import Tensor, nn
from torch.nn import functional as F

from fixup_core import ScalarBias, ScalarMultiplier
from fixup_mt.model.beams import reorder_encoder_out
from fixup_mt.model.layers import FixupDecoderLayer, FixupEncoderLayer
from fixup_mt.model.vocabulary import VocabularyDigest

DTYPES = {"none": None, "bf16": torch.bfloat16}


class TiedProjection(nn.Linear):
    """Output layer that shares the embeddings and so cannot start at 0 (rule 1).

    Args:
        weight: The embeddings, [V, D].
        how: "leave": the logits are those of any tied Transformer. "scale": they are multiplied by
            ``D ** -0.5``. "gain": by a scalar that starts at 0, so that they start at 0 as rule 1
            asks.
    """

    def __init__(self, weight: nn.Parameter, how: str) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False)
        self.weight = weight
        self.scale = weight.shape[1] ** -0.5 if how == "scale" else 1.0
        self.gain = ScalarMultiplier(0.0) if how == "gain" else nn.Identity()

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(self.gain(input * self.scale), self.weight)


class FixupEncoder(TransformerEncoderBase):
    """fairseq's encoder with Fixup layers; it ends with a scalar bias and a multiplier."""

    def __init__(self, cfg: Any, dictionary: Any, embed_tokens: nn.Module) -> None:
        super().__init__(cfg, dictionary, embed_tokens)
        self.layer_norm = nn.Sequential(ScalarBias(), ScalarMultiplier())
        self.vocabulary = VocabularyDigest(dictionary, "source")
        self.autocast = DTYPES[str(cfg.fixup_autocast)]
        self.compiles = bool(cfg.fixup_compile)
        # Cross-self-attention joins the sentence to the pieces of every hypothesis.
        self.shares = not cfg.cross_self_attention

    def upgrade_state_dict_named(self, state_dict: dict, name: str) -> dict:
        """Nothing to do: there are no old checkpoints. fairseq's takes a state dict without a
        version, as its moving averages load one, for an old one and drops the closing scalars.
        """
        return state_dict

    @torch.jit.unused
    def train(self, mode: bool = True) -> nn.Module:
        """As any module's; with ``--fixup-compile`` layers are compiled, one by one, to train.

        Evaluation is eager: step-by-step decoding has other shapes at every step.
        """
        super().train(mode)
        if self.compiles:
            compile_layers_(self.layers, mode)
        return self

    def build_encoder_layer(self, cfg: Any) -> nn.Module:
        return _wrap(FixupEncoderLayer(cfg, return_fc=self.return_fc), cfg)

    @torch.jit.export
    def reorder_encoder_out(
        self, encoder_out: Dict[str, List[Tensor]], new_order: Tensor
    ) -> Dict[str, List[Tensor]]:
        """One row for each element of ``new_order``, or for each sentence where its hypotheses
        stand side by side: in place of a copy of the sentence for each of them, ``"group"`` says
        how many share it. Differs: fairseq copies everything, anew for every piece.
        """
        return reorder_encoder_out(encoder_out, new_order, self.shares)

    def forward(
        self,
        src_tokens: Tensor,
        src_lengths: Optional[Tensor] = None,
        return_all_hiddens: bool = False,
        token_embeddings: Optional[Tensor] = None,
    ):  # no annotation: TorchScript infers the type
        """As fairseq's, under autocast when it is asked for."""
        if torch.jit.is_scripting():
            return self.forward_scriptable(
                src_tokens, src_lengths, return_all_hiddens, token_embeddings
            )
        else:
            with precision(self.autocast, src_tokens):
                return self.forward_scriptable(
                    src_tokens, src_lengths, return_all_hiddens, token_embeddings
                )


class FixupDecoder(TransformerDecoderBase):
    """fairseq's decoder with Fixup layers; it ends with a scalar bias and an output layer at 0."""

    def __init__(
        self, cfg: Any, dictionary: Any, embed_tokens: nn.Module, no_encoder_attn: bool = False
    ) -> None:
        super().__init__(cfg, dictionary, embed_tokens, no_encoder_attn=no_encoder_attn)
        self.layer_norm = ScalarBias()
        self.vocabulary = VocabularyDigest(dictionary, "target")
        self.autocast = DTYPES[str(cfg.fixup_autocast)]
        self.compiles = bool(cfg.fixup_compile)

    upgrade_state_dict_named = FixupEncoder.upgrade_state_dict_named

    @torch.jit.unused
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
        if self.adaptive_softmax is None and self.share_input_output_embed:
            tied = TiedProjection(embed_tokens.weight, str(cfg.fixup_tied_output))
            self.output_projection = tied

    @torch.jit.unused
    def classifier_layers(self) -> Iterator[nn.Module]:
        """Every layer whose output is a logit, tied to the embeddings or not."""
        if self.adaptive_softmax is None:
            yield self.output_projection
            return
        head = self.adaptive_softmax.head
        yield from (head,) if isinstance(head, nn.Linear) else (head.class_proj,)
        for tail in self.adaptive_softmax.tail:
            if isinstance(tail[-1], nn.Linear):
                yield tail[-1]

    def forward(
        self,
        prev_output_tokens: Tensor,
        encoder_out: Optional[Dict[str, List[Tensor]]] = None,
        incremental_state: Optional[Dict[str, Dict[str, Optional[Tensor]]]] = None,
        features_only: bool = False,
        full_context_alignment: bool = False,
        alignment_layer: Optional[int] = None,
        alignment_heads: Optional[int] = None,
        src_lengths: Optional[Any] = None,
        return_all_hiddens: bool = False,
    ):  # no annotation: TorchScript infers the type
        """As fairseq's, under autocast when it is asked for; the logits are float32 then."""
        if torch.jit.is_scripting():
            x, extra = self.extract_features(
                prev_output_tokens,
                encoder_out,
                incremental_state,
                full_context_alignment,
                alignment_layer,
                alignment_heads,
            )
            return x if features_only else self.output_layer(x), extra
        else:
            with precision(self.autocast, prev_output_tokens):
                x, extra = self.extract_features(
                    prev_output_tokens,
                    encoder_out,
                    incremental_state,
                    full_context_alignment,
                    alignment_layer,
                    alignment_heads,
                )
                x = x if features_only else self.output_layer(x)
            return x if self.autocast is None else x.float(), extra


def compile_layers_(layers: nn.Module, training: bool) -> None:
    """Compile each layer for training, for any lengths; or go back to the eager form."""
    for layer in layers.children():
        layer._compiled_call_impl = None
        if training:
            layer.compile(dynamic=True)


def precision(dtype: Optional[torch.dtype], tokens: Tensor) -> Any:
    """Autocast to ``dtype`` on the tokens' device, or nothing."""
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(tokens.device.type, dtype)


def _forward_in(dtype: Optional[torch.dtype], forward: Any, x: Tensor, *args: Any, **kwargs: Any):
    with precision(dtype, x):
        return forward(x, *args, **kwargs)


def _wrap(layer: nn.Module, cfg: Any) -> nn.Module:
    """Activation checkpointing, as fairseq wraps its own layers."""
    if not cfg.checkpoint_activations:
        return layer
    # The recomputation happens in the backward pass, where the stack's autocast has ended.
    layer.forward = functools.partial(_forward_in, DTYPES[str(cfg.fixup_autocast)], layer.forward)
    return checkpoint_wrapper(layer, offload_to_cpu=cfg.offload_activations)
