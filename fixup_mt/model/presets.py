"""Named architectures: fairseq's sizes under Fixup's names, one table.

Options given on the command line or in a configuration go before a preset's.
"""

from __future__ import annotations

from typing import Any

from fairseq.models import register_model

from fixup_mt.model.config import FixupLanguageModelConfig, FixupTransformerConfig, with_defaults
from fixup_mt.model.encoder_model import FixupEncoderConfig, FixupEncoderModel
from fixup_mt.model.model import FixupLanguageModel, FixupTransformerModel

Preset = dict[str, Any]


def _sizes(layers: int, width: int, ffn: int, heads: int) -> Preset:
    return {
        "encoder_layers": layers,
        "encoder_embed_dim": width,
        "encoder_ffn_embed_dim": ffn,
        "encoder_attention_heads": heads,
        "decoder_layers": layers,
        "decoder_attention_heads": heads,
    }


def _lm_sizes(layers: int, width: int, ffn: int, heads: int) -> Preset:
    return {
        "decoder_layers": layers,
        "decoder_embed_dim": width,
        "decoder_ffn_embed_dim": ffn,
        "decoder_attention_heads": heads,
    }


BIG = _sizes(6, 1024, 4096, 16) | {"dropout": 0.3}
LM_BIG = _lm_sizes(12, 1024, 4096, 16)
GPT = {"attention_dropout": 0.1, "activation_fn": "gelu"}
ADAPTIVE = {
    "adaptive_input": True,
    "adaptive_input_cutoff": "20000,60000",
    "adaptive_softmax_cutoff": "20000,60000",
    "adaptive_softmax_dropout": 0.2,
    "tie_adaptive_weights": True,
    "tie_adaptive_proj": True,
}

TRANSLATION: dict[str, Preset] = {
    "transformer_fixup_tiny": _sizes(2, 64, 128, 2),
    "transformer_fixup_iwslt_de_en": _sizes(6, 512, 1024, 4),
    "transformer_fixup_wmt_en_de": _sizes(6, 512, 2048, 8),
    "transformer_fixup_wmt_en_de_big": BIG | {"attention_dropout": 0.1},
    "transformer_fixup_vaswani_wmt_en_de_big": BIG,
    "transformer_fixup_wmt_en_de_big_t2t": BIG
    | {"attention_dropout": 0.1, "activation_dropout": 0.1},
}

LANGUAGE_MODELS: dict[str, Preset] = {
    "transformer_fixup_lm_tiny": _lm_sizes(2, 64, 128, 2),
    "transformer_fixup_lm_big": LM_BIG,
    "transformer_fixup_lm_wiki103": _lm_sizes(16, 1024, 4096, 8)
    | ADAPTIVE
    | {"dropout": 0.3, "attention_dropout": 0.1, "activation_dropout": 0.1},
    "transformer_fixup_lm_gbw": _lm_sizes(12, 512, 4096, 16) | {"attention_dropout": 0.1},
    "transformer_fixup_lm_gpt": _lm_sizes(12, 768, 3072, 12) | GPT,
    "transformer_fixup_lm_gpt2_small": _lm_sizes(24, 1024, 4096, 16) | GPT,
    "transformer_fixup_lm_gpt2_medium": _lm_sizes(36, 1280, 5120, 20) | GPT,
    "transformer_fixup_lm_gpt2_big": _lm_sizes(48, 1600, 6400, 25) | GPT,
}

ENCODERS: dict[str, Preset] = {
    "transformer_fixup_encoder_tiny": {
        "encoder_layers": 2,
        "encoder_embed_dim": 64,
        "encoder_ffn_embed_dim": 128,
        "encoder_attention_heads": 2,
    },
}


def register() -> None:
    """Make each preset a model of its own: the same class with other defaults.

    So ``--arch`` and hydra's ``_name`` both find it.
    """
    for model, config, presets in (
        (FixupTransformerModel, FixupTransformerConfig, TRANSLATION),
        (FixupLanguageModel, FixupLanguageModelConfig, LANGUAGE_MODELS),
        (FixupEncoderModel, FixupEncoderConfig, ENCODERS),
    ):
        for name, preset in presets.items():
            dataclass = with_defaults(config, f"{name}_config", preset)
            register_model(name, dataclass=dataclass)(type(model.__name__, (model,), {}))
