"""Seconds of beam search: Fixup against fairseq's own LayerNorm Transformer, and served.

``python benchmarks/mt_generate.py [--layers 3 --width 256 ...]`` translates one batch of random
words into ``--length`` pieces, no more and no less, with every contestant: fairseq's own
``transformer`` (pre-norm) and ``transformer_fixup`` in ``SequenceGenerator``, as
``fairseq-generate`` runs it, and both exported to CTranslate2, in float32 and int8. The
weights are those of no training, but none is 0; how long a step takes does not depend on them.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fairseq import models
from fairseq.data import Dictionary
from fairseq.sequence_generator import SequenceGenerator
from mt_step import PRE_NORM, parse, sizes, task_of
from omegaconf import OmegaConf
from side_by_side import compare, show, write

import fixup_mt  # noqa: F401 (registers the models)
from fixup_mt.serving import ctranslate2_model

FIXUP = {"_name": "transformer_fixup"}
SERVED_NORMS = FIXUP | {"fixup_method": "prenorm"}
SERVED_BATCH = 16
"""Sentences at a time; every thread takes batches of its own."""
ENGINE = """
import json, sys, ctranslate2
order = json.loads(sys.stdin.readline())
translator = ctranslate2.Translator(intra_threads=1, **order["model"])
for line in sys.stdin:
    translator.translate_batch(order["source"], **order["options"])
    print(flush=True)
"""
"""A process of its own: beside CTranslate2's threads PyTorch's are a third slower."""


def main() -> None:
    args = parse(__doc__, rounds=8, sentences=64, length=20, beam=5)
    logging.disable(logging.WARNING)
    torch.set_num_threads(args.threads)
    task = task_of(args.words)
    words = task.target_dictionary
    shape = (args.sentences, args.length)
    batch = torch.randint(words.nspecial, len(words), shape)
    with tempfile.TemporaryDirectory() as folder:
        layernorm, fixup = (_model(args, task, options) for options in (PRE_NORM, FIXUP))
        steps = {
            "LayerNorm, fairseq": _fairseq(args, task, layernorm, batch),
            "Fixup, fairseq": _fairseq(args, task, fixup, batch),
        }
        served = {"LayerNorm": _model(args, task, SERVED_NORMS), "Fixup": fixup}
        for name, model in served.items():
            target = Path(folder) / name
            target.mkdir()
            ctranslate2_model.write(target, model, task)
            for kind in ("float32", "int8"):
                steps[f"{name}, CTranslate2 {kind}"] = _served(args, words, target, batch, kind)
        summary = compare(steps, args.rounds)
    show(f"{args.sentences} sentences of {args.length} pieces, beam {args.beam}", summary)
    for name, row in summary.items():
        print(f"  {name:28} {args.sentences / row['median']:8.1f} sentences a second")
    write(args, {"seconds": summary})


def _model(args: argparse.Namespace, task: Any, options: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    model = models.build_model(OmegaConf.create(sizes(args) | options), task).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.prepare_for_inference_(OmegaConf.create({"generation": {"print_alignment": None}}))
    return model


def _fairseq(
    args: argparse.Namespace, task: Any, model: Any, batch: torch.Tensor
) -> Callable[[], Any]:
    words = task.target_dictionary
    length = {"max_len_a": 0, "max_len_b": args.length, "min_len": args.length}
    generator: Any = SequenceGenerator([model], words, beam_size=args.beam, **length)
    ends = torch.full((len(batch), 1), words.eos())
    tokens = torch.cat([batch, ends], dim=1)
    lengths = torch.full((len(batch),), tokens.size(1))
    sample = {"net_input": {"src_tokens": tokens, "src_lengths": lengths}}
    return lambda: generator.generate([model], sample)


def _served(
    args: argparse.Namespace, words: Dictionary, folder: Path, batch: torch.Tensor, kind: str
) -> Callable[[], Any]:
    length = {"min_decoding_length": args.length, "max_decoding_length": args.length}
    order = {
        "model": {"model_path": str(folder), "compute_type": kind, "inter_threads": args.threads},
        "source": [[words.symbols[i] for i in row] for row in batch.tolist()],
        "options": {"beam_size": args.beam, "max_batch_size": SERVED_BATCH, **length},
    }
    engine = subprocess.Popen(
        [sys.executable, "-c", ENGINE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert engine.stdin
    assert engine.stdout
    ask, answer = engine.stdin, engine.stdout
    print(json.dumps(order), file=ask, flush=True)

    def translate() -> None:
        print(file=ask, flush=True)
        if not answer.readline():
            raise SystemExit("CTranslate2 has failed")

    return translate


if __name__ == "__main__":
    main()
