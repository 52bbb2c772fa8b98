"""Seconds of one training step: Fixup against fairseq's own LayerNorm Transformer, side by side.

``python benchmarks/mt_step.py [--layers 3 --width 256 ...]`` prints the median and the minimum of
each and the ratios to the first. ``--json FILE`` keeps them.

Contestants: fairseq's ``transformer`` (pre-norm) in float32 and under bfloat16 autocast,
``transformer_fixup`` in float32 and with ``--fixup-autocast bf16``. A step is forward, label-
smoothed loss and backward on one batch of random words; the optimiser is the same for all and left
out.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from fairseq import models
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from fairseq.data import Dictionary
from omegaconf import OmegaConf
from side_by_side import add_arguments, compare, show, write

import fixup_mt  # noqa: F401 (registers the models)

SIZES = {"layers": 3, "width": 256, "ffn": 1024, "heads": 4, "words": 5000}
PRE_NORM = {
    "_name": "transformer",
    "encoder_normalize_before": True,
    "decoder_normalize_before": True,
}
CONTESTANTS: dict[str, tuple[dict[str, Any], bool]] = {
    "LayerNorm float32": (PRE_NORM, False),
    "LayerNorm bf16": (PRE_NORM, True),
    "Fixup float32": ({"_name": "transformer_fixup"}, False),
    "Fixup bf16": ({"_name": "transformer_fixup", "fixup_autocast": "bf16"}, False),
}


def main() -> None:
    args = parse(__doc__, rounds=12, sentences=100, length=20)
    logging.disable(logging.WARNING)
    torch.set_num_threads(args.threads)
    steps = {name: _step(args, *settings) for name, settings in CONTESTANTS.items()}
    summary = compare(steps, args.rounds)
    show("a training step of a translation model", summary)
    write(args, {"seconds": summary})


def parse(text: str | None, rounds: int, **numbers: int) -> argparse.Namespace:
    """The command line: the models' sizes, and a benchmark's own ``numbers``, with defaults."""
    parser = argparse.ArgumentParser(description=text)
    for option, value in (SIZES | numbers).items():
        parser.add_argument(f"--{option}", type=int, default=value, help=f"default: {value}")
    add_arguments(parser, rounds)
    return parser.parse_args()


def task_of(words: int) -> Any:
    """What a model is built for: the same words on both sides."""
    dictionary = Dictionary()
    for i in range(words):
        dictionary.add_symbol(f"w{i}")
    return SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)


def _step(
    args: argparse.Namespace, model_options: dict[str, Any], autocast: bool
) -> Callable[[], None]:
    task = task_of(args.words)
    model = models.build_model(OmegaConf.create(sizes(args) | model_options), task).train()
    loss = LabelSmoothedCrossEntropyCriterion(task, sentence_avg=False, label_smoothing=0.1)
    sample = _batch(args, len(task.target_dictionary))

    def step() -> None:
        precision = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
        with precision:
            value, _, _ = loss(model, sample)
        value.backward()
        model.zero_grad()

    return step


def sizes(args: argparse.Namespace) -> dict[str, Any]:
    """The models' sizes, as options."""
    return {"dropout": 0.3} | {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (
            *(("layers", args.layers), ("embed_dim", args.width)),
            *(("ffn_embed_dim", args.ffn), ("attention_heads", args.heads)),
        )
    }


def _batch(args: argparse.Namespace, num_words: int) -> dict[str, Any]:
    shape = (args.sentences, args.length)
    source, target, shifted = (torch.randint(4, num_words, shape) for _ in range(3))
    lengths = torch.full((args.sentences,), args.length)
    return {
        "net_input": {
            "src_tokens": source,
            "src_lengths": lengths,
            "prev_output_tokens": shifted,
        },
        "target": target,
        "ntokens": target.numel(),
    }


if __name__ == "__main__":
    main()
