"""Small models and batches, built the way fairseq builds them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from fairseq import models
from fairseq.data import Dictionary
from omegaconf import OmegaConf

import fixup_mt  # noqa: F401 (registers the models)
from fixup_core import scalars

WORDS = 40


def dictionary(words: int = WORDS, prefix: str = "w") -> Dictionary:
    result = Dictionary()
    for i in range(words):
        result.add_symbol(f"{prefix}{i}")
    return result


def task(source: Dictionary | None = None, target: Dictionary | None = None) -> Any:
    source = source or dictionary()
    return SimpleNamespace(source_dictionary=source, target_dictionary=target or source)


def build(arch: str = "transformer_fixup_tiny", on: Any = None, **options: Any) -> Any:
    """A model by architecture and options, through fairseq's own registry."""
    cfg = OmegaConf.create({"_name": arch, **options})
    return models.build_model(cfg, on or task())


def build_lm(arch: str = "transformer_fixup_lm_tiny", **options: Any) -> Any:
    defaults = {"tokens_per_sample": 32, "max_target_positions": 32, "add_bos_token": False}
    return build(arch, **{**defaults, "tpu": False, **options})


def trained(model: Any, seed: int = 0, size: float = 0.1) -> Any:
    """Give every parameter a value that training could have given it: none stays at 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    assert all(scalar.weight.item() != 0 for scalar in scalars(model))
    return model.eval()


def batch(sentences: int = 3, source: int = 7, target: int = 6, seed: int = 0) -> dict[str, Any]:
    """Random tokens; the second sentence is shorter on both sides. Sources are left-padded."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(4, WORDS + 4, (sentences, source + target), generator=generator)
    src, tgt = words[:, :source].clone(), words[:, source:].clone()
    src[:, -1], tgt[:, 0] = 2, 2
    src[1, :3], tgt[1, -2:] = 1, 1
    return {
        "src_tokens": src,
        "src_lengths": src.ne(1).sum(1),
        "prev_output_tokens": tgt,
    }
