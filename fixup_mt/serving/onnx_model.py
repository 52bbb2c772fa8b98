"""A Transformer as two ONNX files: the encoder, and a decoder that goes step by step.

``encoder.onnx``: ``tokens`` [B, S] int64 to ``memory`` and ``words``. ``decoder.onnx``: ``tokens``
[B], ``past``, ``memory`` and ``words`` to ``logits`` [B, V] and ``present``, the next step's
``past``; the first has a length of 0. The shapes are those of ``serving/plain.py``. The pieces'
names stand in ``source.txt`` and ``target.txt``, a line each; a target begins with ``</s>``. A
language model is a decoder alone, without ``memory`` and ``words``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fixup_core.fuse.onnx_file import write_onnx
from fixup_mt.errors import UserError
from fixup_mt.model.model import FixupLanguageModel
from fixup_mt.serving.fold import fold_transformer, positions
from fixup_mt.serving.plain import PlainDecoderStep, PlainEncoder, score

FILES = {"encoder": "encoder.onnx", "decoder": "decoder.onnx"}
SIDES = {"encoder": "source", "decoder": "target"}
INPUTS = {
    "tokens": {0: "batch"},
    "past": {2: "batch", 4: "past"},
    "memory": {2: "batch", 4: "source"},
    "words": {0: "batch", 1: "source"},
}
"""Of the decoder, and which of their sizes are free."""
EXAMPLE = (2, 5, 3)
"""Sentences, source length and pieces decoded, of the tensors the graphs are traced with."""


def write(folder: Path, model: Any, task: Any) -> None:
    """Write the engine's files into ``folder``, which exists."""
    weights = fold_transformer(model)
    sentences, length, decoded = EXAMPLE
    dictionaries = {"decoder": task.target_dictionary}
    step = PlainDecoderStep(model, weights, positions(model.decoder)).eval()
    past = step.nothing(sentences)
    inputs = [torch.full((sentences,), task.target_dictionary.eos())]
    inputs.append(past.new_zeros(*past.shape[:4], decoded, past.size(5)))
    if not isinstance(model, FixupLanguageModel):
        dictionaries["encoder"] = task.source_dictionary
        tokens = torch.full((sentences, length), task.source_dictionary.eos())
        inputs += _write_encoder(folder, model, weights, tokens, task.source_dictionary.pad())
    names = list(INPUTS)[: len(inputs)]
    write_onnx(
        step,
        inputs,
        folder / FILES["decoder"],
        input_names=names,
        output_names=["logits", "present"],
        free_sizes=[INPUTS[name] for name in names],
    )
    for stack, dictionary in dictionaries.items():
        words = "\n".join(dictionary.symbols)
        (folder / f"{SIDES[stack]}.txt").write_text(f"{words}\n", encoding="utf-8")


def _write_encoder(
    folder: Path, model: Any, weights: dict[str, Tensor], tokens: Tensor, pad: int
) -> list[Tensor]:
    """What it gives for ``tokens``: the decoder's ``memory`` and ``words``."""
    encoder = PlainEncoder(model, weights, positions(model.encoder), pad).eval()
    write_onnx(
        encoder,
        [tokens],
        folder / FILES["encoder"],
        input_names=["tokens"],
        output_names=["memory", "words"],
        free_sizes=[{0: "batch", 1: "source"}],
    )
    with torch.no_grad():
        return list(encoder(tokens))


def log_probabilities(
    folder: Path, source: list[list[str]] | None, target: list[list[str]], model: Any, task: Any
) -> Any:
    """Of each piece of ``target`` and of the sentence's end; all sentences of one length. A
    language model has no ``source``.

    What was written holds all that is needed: ``model`` and ``task`` are not looked at.
    """
    decoder, attended = _session(folder, "decoder"), {}
    if source is not None:
        tokens = _numbers(folder, "encoder", source).numpy()
        found = _session(folder, "encoder").run(None, {"tokens": tokens})
        attended = dict(zip(("memory", "words"), found, strict=True))
    words = _numbers(folder, "decoder", target)
    layers, pair, _, heads, _, width = decoder.get_inputs()[1].shape
    past = torch.zeros(layers, pair, len(words), heads, 0, width).numpy()

    def step(tokens: Tensor, past: Any) -> Any:
        return decoder.run(None, {"tokens": tokens.numpy(), "past": past, **attended})

    return score(step, past, words)


def _numbers(folder: Path, stack: str, rows: list[list[str]]) -> Tensor:
    names = (folder / f"{SIDES[stack]}.txt").read_text("utf-8").split("\n")
    number = {name: i for i, name in enumerate(names)}
    return torch.tensor([[number[name] for name in (*row, "</s>")] for row in rows])


def _session(folder: Path, stack: str) -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise UserError("this wants onnxruntime: pip install onnxruntime") from error
    file = str(folder / FILES[stack])
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
