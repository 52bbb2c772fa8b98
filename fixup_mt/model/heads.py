"""What stands on an encoder alone: a head for masked words, and heads for whole sentences.

Shapes: B sentences, T their length, D width, V vocabulary, N masked words.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from fairseq import utils
from torch import Tensor, nn

from fixup_core import Method, WeightLayer
from fixup_core.rules.standards import OUTPUT_NORMAL
from fixup_mt.model.linears import ScalarLinear, TiedProjection
from fixup_mt.model.slots import NORMS


class MaskedHead(nn.Module):
    """Logits of the words under the mask: a layer, an activation and the output layer.

    Before the output layer stands what the method has there: a scalar bias, or a norm, as RoBERTa
    has one.

    Args:
        cfg: The nested configuration.
        embed_tokens: The encoder's embeddings, which the output layer may share.
    """

    def __init__(self, cfg: Any, embed_tokens: nn.Embedding) -> None:
        super().__init__()
        words, width = embed_tokens.weight.shape
        weight: Any = embed_tokens.weight
        method = cfg.fixup.record
        self.dense = _dense(method, width, width)
        self.activation = utils.get_activation_fn(cfg.activation_fn)
        self.layer_norm = NORMS[method.norm](width) if method.norm else method.make_bias()
        if cfg.share_encoder_input_output_embed:
            self.out_proj: nn.Linear = TiedProjection(weight, cfg.fixup.tied_output)
        else:
            self.out_proj = nn.Linear(width, words, bias=False)
        if cfg.fixup.starts_at_frequencies:
            self.out_proj.bias = nn.Parameter(torch.zeros(words))

    def classifier_layers(self) -> Iterator[WeightLayer]:
        """The output layer, tied to the embeddings or not."""
        yield WeightLayer(self.out_proj, standard=OUTPUT_NORMAL)

    def forward(self, features: Tensor, masked: Tensor | None = None) -> Tensor:
        """Logits [B, T, V]; [N, V] of the words at which ``masked`` [B, T] is true."""
        x = features if masked is None else features[masked]
        return self.out_proj(self.layer_norm(self.activation(self.dense(x))))


class SentenceHead(nn.Module):
    """Logits of a sentence's classes, from what stands at its first word, ``<s>``.

    Args:
        cfg: The nested configuration.
        num_classes: Of the logits.
        width: Of the layer before the output layer.
    """

    def __init__(self, cfg: Any, num_classes: int, width: int) -> None:
        super().__init__()
        method = cfg.fixup.record
        self.dropout = nn.Dropout(cfg.pooler_dropout)
        self.dense = _dense(method, cfg.encoder.embed_dim, width)
        self.activation = utils.get_activation_fn(cfg.pooler_activation_fn)
        self.bias = method.make_bias()
        self.out_proj = nn.Linear(width, num_classes)

    def classifier_layers(self) -> Iterator[nn.Module]:
        """The output layer."""
        yield self.out_proj

    def forward(self, features: Tensor) -> Tensor:
        """Logits [B, classes] of features [B, T, D]."""
        x = self.activation(self.dense(self.dropout(features[:, 0])))
        return self.out_proj(self.dropout(self.bias(x)))


def _dense(method: Method, inputs: int, outputs: int) -> ScalarLinear:
    after, vector = method.scalar_bias(), method.bias_vectors
    return ScalarLinear(inputs, outputs, after=after, bias=vector)
