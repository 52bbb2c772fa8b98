"""The models ``transformer_fixup`` and ``transformer_fixup_lm``."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterable
from typing import Any

from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import register_model
from fairseq.models.transformer import TransformerModelBase
from fairseq.models.transformer_lm import TransformerLanguageModel
from fairseq.modules import CharacterTokenEmbedder
from omegaconf import DictConfig
from torch import nn

from fixup_core import anchor_scalars_, anchored_rate, initialise_
from fixup_mt.errors import UserError
from fixup_mt.model.config import (
    FixupLanguageModelConfig,
    FixupOptions,
    FixupTransformerConfig,
    nested,
    optimizer_name,
    plain,
)
from fixup_mt.model.prior import log_frequencies
from fixup_mt.model.removing import follow_, remove_norms_
from fixup_mt.model.stacks import FixupDecoder, FixupEncoder

logger = logging.getLogger(__name__)


class LosesNorms:
    """A model whose norms go as fairseq counts its updates, where ``--fixup-remove-norms`` asks."""

    removal: Any = None

    def set_num_updates(self, num_updates: int) -> None:
        super().set_num_updates(num_updates)  # type: ignore[misc]
        if self.removal is not None:
            follow_(self, num_updates)


@register_model("transformer_fixup", dataclass=FixupTransformerConfig)
class FixupTransformerModel(LosesNorms, TransformerModelBase):
    """The Transformer of Zhang et al. 2019 (section 5.3): no normalisation, Fixup throughout."""

    @classmethod
    def add_args(cls, parser: argparse.ArgumentParser) -> None:
        gen_parser_from_dataclass(parser, FixupTransformerConfig(), delete_default=True)

    @classmethod
    def build_model(cls, cfg: DictConfig, task: Any) -> FixupTransformerModel:
        config = nested(cfg)
        try:
            model = super().build_model(config, task)
        except ValueError as error:
            if not str(error).startswith("--share-all-embeddings"):
                raise
            raise UserError(str(error)) from error
        pretrained = [
            stack.embed_tokens
            for stack, path in (
                (model.encoder, config.encoder.embed_path),
                (model.decoder, config.decoder.embed_path),
            )
            if path
        ]
        initialise_model_(
            model,
            config.fixup,
            optimizer_name(cfg),
            task,
            output=model.decoder.output_projection,
            keep=(p for module in pretrained for p in module.parameters()),
        )
        return model

    @classmethod
    def build_encoder(cls, cfg: Any, src_dict: Any, embed_tokens: nn.Module) -> FixupEncoder:
        return FixupEncoder(cfg, src_dict, embed_tokens)

    @classmethod
    def build_decoder(cls, cfg: Any, tgt_dict: Any, embed_tokens: nn.Module) -> FixupDecoder:
        return FixupDecoder(cfg, tgt_dict, embed_tokens, no_encoder_attn=cfg.no_cross_attention)


@register_model("transformer_fixup_lm", dataclass=FixupLanguageModelConfig)
class FixupLanguageModel(LosesNorms, TransformerLanguageModel):
    """A language model of decoder layers without cross-attention: L is twice the layers."""

    @classmethod
    def add_args(cls, parser: argparse.ArgumentParser) -> None:
        gen_parser_from_dataclass(parser, FixupLanguageModelConfig(), delete_default=True)

    @classmethod
    def build_model(cls, cfg: DictConfig, task: Any) -> FixupLanguageModel:
        config = nested(cfg)
        # fairseq builds the embeddings and checks the options; its empty decoder is thrown away.
        empty = plain(cfg) | {
            "decoder_layers": 0,
            "decoder_layers_to_keep": None,
            "decoder_input_dim": config.decoder.input_dim,
            "decoder_output_dim": config.decoder.output_dim,
        }
        host = super().build_model(argparse.Namespace(**empty), task)
        config.max_target_positions = host.decoder.max_target_positions
        model = cls(
            FixupDecoder(
                config, task.target_dictionary, host.decoder.embed_tokens, no_encoder_attn=True
            )
        )
        # A character embedder is a network of its own, outside the residual branches.
        embedder = model.decoder.embed_tokens
        own = isinstance(embedder, CharacterTokenEmbedder)
        initialise_model_(
            model,
            config.fixup,
            optimizer_name(cfg),
            task,
            output=model.decoder.output_projection,
            keep=embedder.parameters() if own else (),
        )
        return model


def initialise_model_(
    model: Any,
    options: FixupOptions,
    optimizer: str,
    task: Any,
    *,
    output: Any,
    keep: Iterable[nn.Parameter] = (),
) -> None:
    """Anchor the scalars at the rate the optimiser needs, then write all weights by the method.

    Args:
        model: Built; its ``fixup_report`` will say what was written.
        options: Of it.
        optimizer: fairseq's name of the optimiser.
        task: Of fairseq; it says where the data lie.
        output: The layer that makes the logits; ``None`` where there are several.
        keep: Parameters to leave as they are.

    Raises:
        UserError: A ratio of learning rates that is none, or an option for one output layer where
            there are several.
    """
    try:
        rate = anchored_rate(options.scalar_lr_ratio, optimizer)
    except ValueError as error:
        raise UserError(f"--fixup-scalar-lr-ratio: {error}") from error
    anchor_scalars_(model, rate)
    if output is None and options.output_bias == "frequencies":
        raise UserError(
            "--fixup-output-bias frequencies is for one output layer: leave it out, or "
            "--adaptive-softmax-cutoff"
        )
    if output is not None and options.starts_at_frequencies:
        output.initial_bias = log_frequencies(task, task.target_dictionary)
    model.fixup_report = initialise_(model, options.record, keep=keep)
    remove_norms_(model, options)
    logger.info("%s: %s", options.method, model.fixup_report.summary())
