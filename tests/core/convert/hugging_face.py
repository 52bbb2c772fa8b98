"""Small networks of transformers, and what ``fixup_`` should find in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Small:
    """A network.

    Attributes:
        model: Its class in transformers.
        options: Of its configuration.
        inputs: Names of its inputs.
        m: Of its branches, in the order of the forward pass.
        head: Its output layer starts at 0; one that shares an embedding's weight cannot.
    """

    model: str
    options: dict[str, Any]
    inputs: tuple[str, ...]
    m: tuple[int, ...]
    head: bool = True

    def make(self) -> tuple[nn.Module, dict[str, Tensor]]:
        """The network, as its authors initialise it, and a batch."""
        library = pytest.importorskip("transformers")
        torch.manual_seed(0)
        kind = getattr(library, self.model)
        config = kind.config_class(**self.options)
        if hasattr(config, "use_cache"):
            config.use_cache = False
        return kind(config), {name: EXAMPLES[name] for name in self.inputs}


DRAWN = torch.Generator().manual_seed(0)
IDS = torch.randint(3, 20, (2, 6), generator=DRAWN)
EXAMPLES = {
    "input_ids": IDS,
    "decoder_input_ids": IDS.flip(1),
    "pixel_values": torch.randn(2, 3, 32, 32, generator=DRAWN),
    "input_features": torch.randn(2, 8, 32, generator=DRAWN),
}
WORDS = {"vocab_size": 20, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
TEXT = {
    **WORDS,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}
IMAGE = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 5,
}
SEQUENCES = {
    **WORDS,
    "decoder_start_token_id": 1,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}
GPT2 = {**WORDS, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
T5 = {**WORDS, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "num_labels": 5, "window_size": 4}
CONVNEXT = {"hidden_sizes": [4, 8, 12, 16], "depths": [1, 1, 2, 1], "num_labels": 5}
WHISPER = {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 16}
TRANSLATION = ("input_ids", "decoder_input_ids")

NETS = {
    "gpt2": Small("GPT2LMHeadModel", GPT2, ("input_ids",), (2,) * 4, head=False),
    "llama": Small("LlamaForCausalLM", TEXT, ("input_ids",), (2, 3) * 2),
    "qwen2": Small(
        "Qwen2ForCausalLM", {**TEXT, "num_key_value_heads": 1}, ("input_ids",), (2, 3) * 2
    ),
    "bert": Small("BertForMaskedLM", TEXT, ("input_ids",), (2,) * 4, head=False),
    "t5": Small(
        "T5ForConditionalGeneration",
        {**T5, "decoder_start_token_id": 0},
        TRANSLATION,
        (2,) * 10,
        head=False,
    ),
    "bart": Small("BartForConditionalGeneration", SEQUENCES, TRANSLATION, (2,) * 10, head=False),
    "vit": Small("ViTForImageClassification", IMAGE, ("pixel_values",), (2,) * 4),
    "deit": Small("DeiTForImageClassification", IMAGE, ("pixel_values",), (2,) * 4),
    "swin": Small(
        "SwinForImageClassification",
        {**SWIN, "depths": [1, 2], "num_heads": [2, 2]},
        ("pixel_values",),
        (2,) * 6,
    ),
    "convnext": Small("ConvNextForImageClassification", CONVNEXT, ("pixel_values",), (3,) * 5),
    "whisper": Small(
        "WhisperForConditionalGeneration",
        {**SEQUENCES, **WHISPER},
        ("input_features", "decoder_input_ids"),
        (2,) * 10,
        head=False,
    ),
}
