"""Narrow Transformers for the depth check: ``python -m fixup_core check transformer``.

A depth is a number of layers of the encoder, and of the decoder: L is five times that.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from fairseq import models
from fairseq.data import Dictionary
from omegaconf import OmegaConf
from torch import nn

from fixup_core import branch_scale, fixup_init_
from fixup_core.rules.scaling import unit_scale
from fixup_mt.errors import UserError

DEPTHS = (1, 2, 4, 8, 16, 32)
SENTENCES, SOURCE, TARGET, WORDS = 8, 7, 6, 40
SIZES = {
    f"{stack}_{option}": size
    for stack in ("encoder", "decoder")
    for option, size in (("embed_dim", 32), ("ffn_embed_dim", 64), ("attention_heads", 2))
}


def attention_as_two(num_branches: int, layers_per_branch: int) -> float:
    """The factor of m = 2 for every branch.

    In an attention branch only v and the output projection multiply the output: q and k go
    through the softmax.
    """
    return branch_scale(num_branches, 2)


@dataclass(frozen=True)
class Rule:
    """How a Transformer is scaled: the factor inside a branch, and the model's own option."""

    factor: Callable[[int, int], float] = branch_scale
    compat: str = "none"


RULES = {
    "fixup": Rule(),
    "authors": Rule(compat="authors"),
    "no_factor": Rule(unit_scale),
    "attention_as_two": Rule(attention_as_two),
}


def transformer(rule: str = "fixup") -> dict[str, Any]:
    """Encoder and decoder, 32 wide, without dropout.

    Args:
        rule: "fixup"; "authors": with their slip in cross-attention; "no_factor"; or
            "attention_as_two".

    Raises:
        UserError: There is no such rule.
    """
    if rule not in RULES:
        raise UserError(f"the rule is {rule!r}; choose one of {', '.join(RULES)}")
    chosen = RULES[rule]
    dictionary = Dictionary()
    for i in range(WORDS):
        dictionary.add_symbol(f"w{i}")
    task = SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)

    def make_net(depth: int) -> nn.Module:
        layers = {"encoder_layers": depth, "decoder_layers": depth}
        cfg = {"_name": "transformer_fixup", "fixup_compat": chosen.compat, "dropout": 0.0}
        net = models.build_model(OmegaConf.create(cfg | SIZES | layers), task)
        fixup_init_(net, rule=chosen.factor)
        return net

    return {
        "make_net": make_net,
        "batch": _batch(len(dictionary), dictionary.eos()),
        "depths": DEPTHS,
    }


def _batch(words: int, eos: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Random sentences, [B, S] and [B, T]; the decoder sees the target behind an end mark."""
    generator = torch.Generator().manual_seed(0)
    source = torch.randint(eos + 2, words, (SENTENCES, SOURCE), generator=generator)
    target = torch.randint(eos + 2, words, (SENTENCES, TARGET), generator=generator)
    previous = target.roll(1, dims=1)
    previous[:, 0] = eos
    lengths = torch.full((SENTENCES,), SOURCE)
    inputs = {"src_tokens": source, "src_lengths": lengths, "prev_output_tokens": previous}
    return inputs, target
