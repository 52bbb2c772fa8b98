"""Write a trained Transformer for other engines, its scalars folded away.

``--format ctranslate2``: a folder that ``python -m fixup_mt translate`` serves, and any other
program that uses CTranslate2; a language model's is for ``ctranslate2.Generator``. ``onnx``:
``encoder.onnx``, ``decoder.onnx`` for one step with its cache (``serving/plain.py`` says what goes
in and out), and the pieces' names. ``fairseq``: the folded weights as a state dict, under the names
of fairseq's transformer. Norms, where a method has them, are written as they are.

What is written is held against the model's own log-probabilities, in float32, before it may be
quantised and before it gets its name. Weights are float32, those of a model trained under
``--fixup-autocast`` too.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils
from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask
from fairseq.tasks.translation import TranslationConfig, TranslationTask

from fixup_core.files import refuse_existing, whole_file, whole_folder
from fixup_core.fuse.exports import (
    add_export_options,
    check_checkpoint,
    check_difference,
    describe_export,
)
from fixup_mt import register
from fixup_mt.errors import UserError
from fixup_mt.host.options import literal
from fixup_mt.serving import ctranslate2_model, onnx_model, state_dict
from fixup_mt.serving.fold import stacks

SOURCE = "fairseq-train"
OUTPUTS = "log-probabilities"
TOLERANCE = 1e-3
"""Of the log-probability of a piece, in float32."""
PIECES_CHECKED = 24
SENTENCEPIECE = "sentencepiece.model"
KEPT = {"encoder_layers_to_keep", "decoder_layers_to_keep"}
"""Options of fairseq's pruning."""


@dataclass(frozen=True)
class Format:
    """What a trained model can be written as.

    Attributes:
        module: It has ``write(place, model, task)`` and ``log_probabilities(place, source, target,
            model, task)``, by the engine that runs what was written.
        whole: Makes the place: ``whole_folder`` or ``whole_file``.
    """

    module: Any
    whole: Callable[[Path], AbstractContextManager[Path]] = whole_folder


FORMATS = {
    "ctranslate2": Format(ctranslate2_model),
    "onnx": Format(onnx_model),
    "fairseq": Format(state_dict, whole_file),
}
"""By name, as ``--format`` takes them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add = parser.add_argument
    add_export_options(parser, source=SOURCE, metavar="PATH", help="folder, or file, to write")
    add("--data-bin", type=Path, required=True, metavar="DIR", help="its data: the dictionaries")
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
    add(
        "--model-overrides",
        default="{}",
        metavar="DICT",
        help="options other than the checkpoint's, as of fairseq-generate: "
        "\"{'encoder_layers_to_keep': '0,2', 'decoder_layers_to_keep': '0,2'}\"",
    )


def run(args: argparse.Namespace) -> None:
    """Load, export and check."""
    refuse_existing(args.output, args.overwrite)
    check_checkpoint(args.checkpoint, SOURCE)
    if args.quantization and args.format != "ctranslate2":
        raise UserError("--quantization belongs to --format ctranslate2")
    if args.sentencepiece:
        if FORMATS[args.format].whole is whole_file:
            raise UserError("--sentencepiece belongs to the formats that are folders")
        check_pieces(args.sentencepiece)
    overrides = literal("model_overrides", args.model_overrides)
    if not isinstance(overrides, dict):
        raise UserError(f"--model-overrides is {args.model_overrides!r}: give a dictionary")
    model, task = load(args.checkpoint, args.data_bin, overrides)
    export(model, task, args)


def check_pieces(file: Path) -> None:
    """Raise ``UserError`` unless ``file`` is a model of sentencepiece."""
    import sentencepiece

    if not file.is_file():
        raise UserError(f"{file} does not exist: give a model of sentencepiece")
    try:
        sentencepiece.SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError) as error:
        raise UserError(f"{file} is damaged, or not a model of sentencepiece") from error


def load(
    checkpoint: Path, data_bin: Path, overrides: dict[str, Any] | None = None
) -> tuple[Any, Any]:
    """The model of a checkpoint, in evaluation mode, and a task of its own kind."""
    register()
    if not data_bin.is_dir():
        raise UserError(f"{data_bin} does not exist: give the folder of fairseq-preprocess")
    task = _task(checkpoint_utils.load_checkpoint_to_cpu(str(checkpoint))["cfg"]["task"], data_bin)
    kept = KEPT & set(overrides or {})
    if len(kept) == 1 and isinstance(task, TranslationTask):
        raise UserError(
            f"--model-overrides has {kept.pop()} alone, and fairseq would drop all layers of the "
            f"other side: give {' and '.join(sorted(KEPT))}"
        )
    # In float32, whatever it was trained in.
    exact = {"fixup_autocast": "none", "checkpoint_activations": False}
    models, _, _ = checkpoint_utils.load_model_ensemble_and_task(
        [str(checkpoint)], arg_overrides={**(overrides or {}), **exact}, task=task
    )
    return models[0].eval(), task


def _task(trained: Any, data_bin: Path) -> Any:
    """A task like the checkpoint's, with the dictionaries of ``data_bin``."""
    # A task that fairseq has not moved to its newer configurations keeps a namespace.
    options = trained if hasattr(trained, "get") else vars(trained)
    name = options.get("_name") or options.get("task")
    if name == "translation":
        languages = {name: options.get(name) for name in ("source_lang", "target_lang")}
        return TranslationTask.setup_task(TranslationConfig(data=str(data_bin), **languages))
    if name == "language_modeling":
        if (options.get("output_dictionary_size") or -1) > 0:
            raise UserError("a model with --output-dictionary-size cannot be exported exactly")
        return LanguageModelingTask.setup_task(LanguageModelingConfig(data=str(data_bin)))
    raise UserError(
        f"a model of the task {name} cannot be exported: only those of translation and "
        "language_modeling can"
    )


def export(model: Any, task: Any, args: argparse.Namespace) -> None:
    """Write ``args.output``, all of it or nothing.

    Raises:
        UserError: The log-probabilities differ; nothing is written.
    """
    chosen = FORMATS[args.format]
    with chosen.whole(args.output) as place:
        chosen.module.write(place, model, task)
        off = difference(chosen.module.log_probabilities, place, model, task)
        check_difference(args.format, OUTPUTS, off, TOLERANCE)
        if args.quantization:
            ctranslate2_model.write(place, model, task, args.quantization)
        if args.sentencepiece:
            shutil.copy(args.sentencepiece, place / SENTENCEPIECE)
    print(describe_export(args.output, args.format, OUTPUTS, off))


def difference(log_probabilities: Callable[..., Any], place: Path, model: Any, task: Any) -> float:
    """The largest difference of a piece's log-probability, the engine's against the model's."""
    rows, names = _pieces(model, task)
    ours = _log_probabilities(model, task, rows)
    theirs = log_probabilities(place, names.get("encoder"), names["decoder"], model, task)
    return (torch.tensor(theirs) - ours).abs().max().item()


def _pieces(model: Any, task: Any) -> tuple[dict[str, list[list[int]]], dict[str, Any]]:
    """Random pieces for each stack: their numbers, and their names."""
    generator = torch.Generator().manual_seed(0)
    parts = stacks(model)
    length = min(PIECES_CHECKED, *(int(part.max_positions()) - 1 for part in parts.values()))
    sides = {"encoder": task.source_dictionary, "decoder": task.target_dictionary}
    rows = {part: _random_words(sides[part], length, generator) for part in parts}
    names = {
        part: [[sides[part].symbols[i] for i in row] for row in numbers]
        for part, numbers in rows.items()
    }
    return rows, names


def _random_words(dictionary: Any, length: int, generator: torch.Generator) -> list[list[int]]:
    low, high = dictionary.nspecial, len(dictionary)
    return torch.randint(low, high, (4, length), generator=generator).tolist()


def _log_probabilities(model: Any, task: Any, rows: dict[str, list[list[int]]]) -> torch.Tensor:
    eos = task.target_dictionary.eos()
    words = torch.tensor([[*row, eos] for row in rows["decoder"]])
    before = words.roll(1, dims=1)  # a decoder begins with the end of a sentence
    with torch.no_grad():
        if "encoder" not in rows:
            logits, _ = model(before)
        else:
            tokens = torch.tensor([[*row, eos] for row in rows["encoder"]])
            logits, _ = model(tokens, torch.full((len(tokens),), tokens.size(1)), before)
        return logits.log_softmax(dim=-1).gather(2, words.unsqueeze(2)).squeeze(2)
