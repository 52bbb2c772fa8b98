"""Write a trained Transformer for other engines, its scalars folded away.

``--format ctranslate2``: a folder that ``python -m fixup_mt translate`` serves, and any other
program that uses CTranslate2. ``onnx``: ``encoder.onnx``, ``decoder.onnx`` for one step with its
cache (``serving/plain.py`` says what goes in and out), and the pieces' names. ``fairseq``: the
folded weights as a state dict, under the names of fairseq's pre-norm transformer. An engine's files
are held against the model's own log-probabilities, in float32, before they may be quantised.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fairseq.checkpoint_utils import load_checkpoint_to_cpu, load_model_ensemble_and_task
from fairseq.tasks.translation import TranslationConfig, TranslationTask

from fixup_mt.errors import UserError
from fixup_mt.scoring.average import save_atomically
from fixup_mt.serving import ctranslate2_model, onnx_model
from fixup_mt.serving.fold import fold_transformer

TOLERANCE = 1e-3
"""Of the log-probability of a piece, in float32."""
PIECES_CHECKED = 24
SENTENCEPIECE = "sentencepiece.model"
FORMATS = ("ctranslate2", "onnx", "fairseq")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="FILE", help="of fairseq-train")
    add("--data-bin", type=Path, required=True, metavar="DIR", help="its data: the dictionaries")
    add("--output", type=Path, required=True, metavar="PATH", help="folder, or file, to write")
    add("--format", choices=FORMATS, default="ctranslate2", help="default: %(default)s")
    add(
        "--sentencepiece",
        type=Path,
        metavar="FILE",
        help="model of the pieces, kept in the folder, so that translate takes plain text",
    )
    add(
        "--quantization",
        choices=("int8", "int8_float32", "int16", "bfloat16"),
        help="of the weights on disk (ctranslate2 alone; default: float32)",
    )


def run(args: argparse.Namespace) -> None:
    if args.output.exists():
        raise UserError(f"{args.output} exists: remove it, or give another --output")
    for file in (args.checkpoint, args.sentencepiece):
        if file and not file.is_file():
            raise UserError(f"{file} does not exist: check the path")
    if args.quantization and args.format != "ctranslate2":
        raise UserError("--quantization belongs to --format ctranslate2")
    if args.sentencepiece and args.format == "fairseq":
        raise UserError("--sentencepiece belongs to the formats that are folders")
    model, task = load(args.checkpoint, args.data_bin)
    export(model, task, args)
    print(f"written: {args.output}")


def load(checkpoint: Path, data_bin: Path) -> tuple[Any, Any]:
    """The model of a checkpoint, in evaluation mode, and a translation task of its languages."""
    if not data_bin.is_dir():
        raise UserError(f"{data_bin} does not exist: give the folder of fairseq-preprocess")
    trained = load_checkpoint_to_cpu(str(checkpoint))["cfg"]["task"]
    languages = {name: trained.get(name) for name in ("source_lang", "target_lang")}
    config = TranslationConfig(data=str(data_bin), **languages)
    task = TranslationTask.setup_task(config)
    # In float32, whatever it was trained in.
    exact = {"fixup_autocast": "none", "checkpoint_activations": False}
    models, _, _ = load_model_ensemble_and_task([str(checkpoint)], arg_overrides=exact, task=task)
    return models[0].eval(), task


def export(model: Any, task: Any, args: argparse.Namespace) -> None:
    """Write ``args.output``, all of it or nothing."""
    args.output.parent.mkdir(parents=True, exist_ok=True)
    if args.format == "fairseq":
        save_atomically({"model": fold_transformer(model)}, args.output)
        return
    folder = Path(tempfile.mkdtemp(dir=args.output.parent, prefix=f".{args.output.name}."))
    engine: Any = {"ctranslate2": ctranslate2_model, "onnx": onnx_model}[args.format]
    try:
        engine.write(folder, model, task)
        off = difference(engine.log_probabilities, folder, model, task)
        if not off <= TOLERANCE:
            raise UserError(
                f"the log-probabilities of {args.format} differ from the model's by up to "
                f"{off:.1e}: nothing is written"
            )
        print(f"log-probabilities differ from the model's by {off:.1e} at the most (float32)")
        if args.quantization:
            engine.write(folder, model, task, args.quantization)
        if args.sentencepiece:
            shutil.copy(args.sentencepiece, folder / SENTENCEPIECE)
        folder.chmod(0o755)
        folder.rename(args.output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def difference(log_probabilities: Callable[..., Any], folder: Path, model: Any, task: Any) -> float:
    """The largest difference of a piece's log-probability, the engine's against the model's."""
    generator = torch.Generator().manual_seed(0)
    sides = (task.source_dictionary, task.target_dictionary)
    stacks = (model.encoder, model.decoder)
    length = min(PIECES_CHECKED, *(int(stack.max_positions()) - 1 for stack in stacks))
    source, target = (_random_words(words, length, generator) for words in sides)
    names = [
        [[words.symbols[i] for i in row] for row in rows]
        for words, rows in zip(sides, (source, target), strict=True)
    ]
    ours = _log_probabilities(model, task.target_dictionary.eos(), source, target)
    theirs = torch.tensor(log_probabilities(folder, *names))
    return (theirs - ours).abs().max().item()


def _random_words(dictionary: Any, length: int, generator: torch.Generator) -> list[list[int]]:
    low, high = dictionary.nspecial, len(dictionary)
    return torch.randint(low, high, (4, length), generator=generator).tolist()


def _log_probabilities(
    model: Any, eos: int, source: list[list[int]], target: list[list[int]]
) -> torch.Tensor:
    words = torch.tensor([[*row, eos] for row in target])
    with torch.no_grad():
        logits, _ = model(
            torch.tensor([[*row, eos] for row in source]),
            torch.full((len(source),), len(source[0]) + 1),
            words.roll(1, dims=1),  # the decoder begins with the end of a sentence
        )
        return logits.float().log_softmax(dim=-1).gather(2, words.unsqueeze(2)).squeeze(2)
