"""The model ``transformer_fixup_encoder``: an encoder alone, for masked words and for sentences.

fairseq's tasks ``masked_lm`` and ``sentence_prediction`` train it as they train ``roberta``.
"""

from __future__ import annotations

import argparse
import logging
from argparse import Namespace
from dataclasses import replace
from typing import Any, Optional

from fairseq import utils
from fairseq.dataclass import ChoiceEnum
from fairseq.dataclass.utils import gen_parser_from_dataclass
from fairseq.models import FairseqEncoderModel, register_model
from fairseq.models.transformer import TransformerConfig, TransformerModelBase
from omegaconf import DictConfig
from torch import Tensor, nn

from fixup_core import anchor_scalars_, anchored_rate, initialise_
from fixup_mt.model.config import OWN_TYPES, config_class, nested, optimizer_name, plain
from fixup_mt.model.heads import MaskedHead, SentenceHead
from fixup_mt.model.model import LosesNorms, initialise_model_
from fixup_mt.model.stacks import FixupEncoder, precision

logger = logging.getLogger(__name__)

HEADS = "classification_heads"
"""As the criterion ``sentence_prediction`` looks for them, and as their weights are named."""
BASE: dict[str, tuple[Any, Any]] = {
    "encoder_layers": (int, 12),
    "encoder_embed_dim": (int, 768),
    "encoder_ffn_embed_dim": (int, 3072),
    "encoder_attention_heads": (int, 12),
    "attention_dropout": (float, 0.1),
    "activation_fn": (ChoiceEnum(utils.get_available_activation_fns()), "gelu"),
}
"""The sizes of ``roberta_base``."""
NEW: dict[str, tuple[Any, Any, str]] = {
    "share_encoder_input_output_embed": (bool, False, "share input and output embeddings"),
    "max_positions": (Optional[int], None, "words of the longest input; default: the task's"),
    "pooler_activation_fn": (
        ChoiceEnum(utils.get_available_activation_fns()),
        "tanh",
        "activation function of classification heads",
    ),
    "pooler_dropout": (float, 0.0, "dropout probability in classification heads"),
    "load_checkpoint_heads": (bool, False, "make the classification heads that a checkpoint has"),
}
OF_DECODERS = ("decoder_", "share_decoder_", "share_all_", "adaptive_", "tie_adaptive_", "cross_")
NOT_OF_ENCODERS = frozenset(
    {
        *("no_cross_attention", "max_target_positions"),
        "max_source_positions",  # max_positions says it, as the tasks have it
        # Norms are taken out of a model with one head, whose logits are held meanwhile.
        *("fixup_from_layernorm", "fixup_remove_norms"),
        *("fixup_removal_updates", "fixup_removal_anchor", "fixup_removal_distil"),
    }
)


def _offered(name: str) -> bool:
    return not (name.startswith(OF_DECODERS) or name in NOT_OF_ENCODERS)


FixupEncoderConfig: Any = config_class(
    "FixupEncoderConfig", TransformerConfig, OWN_TYPES | BASE, NEW, _offered
)


@register_model("transformer_fixup_encoder", dataclass=FixupEncoderConfig)
class FixupEncoderModel(LosesNorms, FairseqEncoderModel):
    """An encoder, what finds masked words on it, and what classifies sentences: L is twice the
    layers.

    Attributes:
        encoder: As that of ``transformer_fixup``.
        lm_head: For masked words.
        classification_heads: For sentences, by name; the task makes them.
        fixup_report: What was written, heads included.
    """

    fixup_report: Any

    def __init__(self, config: Any, encoder: FixupEncoder, optimizer: str) -> None:
        super().__init__(encoder)
        self.config, self.optimizer = config, optimizer
        self.lm_head = MaskedHead(config, encoder.embed_tokens)
        self.classification_heads = nn.ModuleDict()

    @classmethod
    def add_args(cls, parser: argparse.ArgumentParser) -> None:
        gen_parser_from_dataclass(parser, FixupEncoderConfig(), delete_default=True)

    @classmethod
    def build_model(cls, cfg: DictConfig, task: Any) -> FixupEncoderModel:
        positions = cfg.max_positions or task.max_positions()
        config = nested(Namespace(**plain(cfg), max_source_positions=positions))
        sizes, words = config.encoder, task.source_dictionary
        if sizes.layers_to_keep:
            sizes.layers = len(sizes.layers_to_keep.split(","))
        config.checkpoint_activations |= config.offload_activations
        build_embedding = TransformerModelBase.build_embedding
        embedding = build_embedding(config, words, sizes.embed_dim, sizes.embed_path)
        model = cls(config, FixupEncoder(config, words, embedding), optimizer_name(cfg))
        initialise_model_(
            model,
            config.fixup,
            model.optimizer,
            task,
            output=model.lm_head.out_proj,
            keep=embedding.parameters() if sizes.embed_path else (),
        )
        return model

    def forward(
        self,
        src_tokens: Tensor,
        src_lengths: Tensor | None = None,
        features_only: bool = False,
        return_all_hiddens: bool = False,
        classification_head_name: str | None = None,
        masked_tokens: Tensor | None = None,
        **unused: Any,
    ) -> tuple[Tensor, dict[str, Any]]:
        """As RoBERTa's, under autocast when it is asked for; what comes out is float32 then.

        Args:
            src_tokens: Padded on the right, [B, T].
            src_lengths: Not needed.
            features_only: Return the encoder's output, [B, T, D].
            return_all_hiddens: With the stream before and behind every layer, [T, B, D], as
                ``"inner_states"``.
            classification_head_name: Return the logits of this head, [B, classes].
            masked_tokens: Where the words are whose logits [N, V] are asked for, [B, T];
                ``None``: all, [B, T, V].
            unused: What else a task says of a batch.
        """
        encoded = self.encoder(src_tokens, return_all_hiddens=return_all_hiddens)
        x = encoded["encoder_out"][0].transpose(0, 1)
        with precision(self.encoder.autocast, src_tokens):
            if classification_head_name is not None:
                x = self.classification_heads[classification_head_name](x)
            elif not features_only:
                x = self.lm_head(x, masked_tokens)
        states = encoded["encoder_states"] if return_all_hiddens else None
        return x if self.encoder.autocast is None else x.float(), {"inner_states": states}

    def get_normalized_probs(
        self, net_output: Any, log_probs: bool, sample: dict[str, Tensor] | None = None
    ) -> Tensor:
        """Of the last dimension of what ``forward`` returns."""
        logits = net_output[0].float()
        return logits.log_softmax(-1) if log_probs else logits.softmax(-1)

    @property
    def supported_targets(self) -> set[str]:
        return {"self"}

    def register_classification_head(
        self, name: str, num_classes: int, inner_dim: int | None = None, **unused: Any
    ) -> None:
        """Make a head for sentences, or make it anew; all other weights stay.

        Args:
            name: Of it, as ``--classification-head-name``.
            num_classes: Of its logits, which start at 0 where the method's do.
            inner_dim: Width of its first layer; that of the encoder by default.
            unused: What other models take.
        """
        if name in self.classification_heads:
            logger.warning("the classification head %s is made anew", name)
        options = self.config.fixup
        head = SentenceHead(self.config, num_classes, inner_dim or self.config.encoder.embed_dim)
        anchor_scalars_(head, anchored_rate(options.scalar_lr_ratio, self.optimizer))
        self.classification_heads[name] = head
        own = {id(parameter) for parameter in head.parameters()}
        others = [parameter for parameter in self.parameters() if id(parameter) not in own]
        written = initialise_(self, options.record, keep=others).rows
        before = {row.name: row for row in self.fixup_report.rows}
        rows = (row if row.role != "kept" else before.get(row.name, row) for row in written)
        self.fixup_report = replace(self.fixup_report, rows=tuple(rows))

    def upgrade_state_dict_named(self, state_dict: dict[str, Tensor], name: str) -> None:
        """Keep the heads that a checkpoint lacks, and leave out those that the model lacks or has
        in another size; ``load_checkpoint_heads`` makes those that it lacks.
        """
        super().upgrade_state_dict_named(state_dict, name)
        prefix = f"{name}.{HEADS}." if name else f"{HEADS}."
        saved = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        for head in dict.fromkeys(key.partition(".")[0] for key in saved):
            classes, width = shape = saved[f"{head}.out_proj.weight"].shape
            if self.config.load_checkpoint_heads and head not in self.classification_heads:
                self.register_classification_head(head, classes, width)
            own: Any = dict(self.classification_heads.items()).get(head)
            if own is None or own.out_proj.weight.shape != shape:
                why = "none of this name" if own is None else "one of another size"
                text = "the checkpoint's classification head %s, %d -> %d, is left out: there is %s"
                logger.warning(text, head, width, classes, why)
                for key in saved:
                    if key.startswith(f"{head}."):
                        del state_dict[prefix + key]
        for head, module in self.classification_heads.items():
            new = {f"{prefix}{head}.{key}": value for key, value in module.state_dict().items()}
            if not new.keys() & state_dict.keys():
                text = "the classification head %s is not in the checkpoint and stays as it is"
                logger.info(text, head)
                state_dict.update(new)
