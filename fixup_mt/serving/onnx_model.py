"""A Transformer as two ONNX files: the encoder, and a decoder that goes step by step.

``encoder.onnx``: ``tokens`` [B, S] int64 to ``memory`` and ``words``. ``decoder.onnx``: ``tokens``
[B], ``past``, ``memory`` and ``words`` to ``logits`` [B, V] and ``present``, the next step's
``past``; the first has a length of 0. The shapes are those of ``serving/plain.py``. The pieces'
names stand in ``source.txt`` and ``target.txt``, a line each; a target begins with ``</s>``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fixup_core.fuse.onnx_file import write_onnx
from fixup_mt.errors import UserError
from fixup_mt.serving.fold import fold_transformer, positions
from fixup_mt.serving.plain import PlainDecoderStep, PlainEncoder

FILES = ("encoder.onnx", "decoder.onnx")
SIDES = ("source", "target")
EXAMPLE = (2, 5, 3)
"""Sentences, source length and pieces decoded, of the tensors the graphs are traced with."""


def write(folder: Path, model: Any, task: Any) -> None:
    """Write the engine's files into ``folder``, which exists."""
    weights, pad = fold_transformer(model), task.source_dictionary.pad()
    encoder = PlainEncoder(model, weights, positions(model.encoder), pad).eval()
    step = PlainDecoderStep(model, weights, positions(model.decoder)).eval()
    sentences, length, decoded = EXAMPLE
    tokens = torch.full((sentences, length), task.source_dictionary.eos())
    with torch.no_grad():
        memory, words = encoder(tokens)
    past = memory[:, :, :, :, :decoded].clone()
    write_onnx(
        encoder,
        [tokens],
        folder / FILES[0],
        input_names=["tokens"],
        output_names=["memory", "words"],
        free_sizes=[{0: "batch", 1: "source"}],
    )
    write_onnx(
        step,
        [tokens[:, 0], past, memory, words],
        folder / FILES[1],
        input_names=["tokens", "past", "memory", "words"],
        output_names=["logits", "present"],
        free_sizes=[
            {0: "batch"},
            {2: "batch", 4: "past"},
            {2: "batch", 4: "source"},
            {0: "batch", 1: "source"},
        ],
    )
    for side, dictionary in zip(
        SIDES, (task.source_dictionary, task.target_dictionary), strict=True
    ):
        names = "\n".join(dictionary.symbols)
        (folder / f"{side}.txt").write_text(f"{names}\n", encoding="utf-8")


def log_probabilities(
    folder: Path, source: list[list[str]], target: list[list[str]], model: Any, task: Any
) -> Any:
    """Of each piece of ``target`` and of the sentence's end; all sentences of one length.

    What was written holds all that is needed: ``model`` and ``task`` are not looked at.
    """
    encoder, decoder = (_session(folder / file) for file in FILES)
    names = [(folder / f"{side}.txt").read_text("utf-8").split("\n") for side in SIDES]
    numbers = [{name: i for i, name in enumerate(each)} for each in names]
    tokens, words = (
        torch.tensor([[number[name] for name in (*row, "</s>")] for row in rows])
        for number, rows in zip(numbers, (source, target), strict=True)
    )
    memory, mask = encoder.run(None, {"tokens": tokens.numpy()})
    past, found = memory[:, :, :, :, :0], []
    for before, now in zip(words.roll(1, dims=1).unbind(1), words.unbind(1), strict=True):
        inputs = {"tokens": before.numpy(), "past": past, "memory": memory, "words": mask}
        logits, past = decoder.run(None, inputs)
        chosen = torch.from_numpy(logits).log_softmax(dim=1).gather(1, now[:, None])
        found.append(chosen)
    return torch.cat(found, dim=1).tolist()


def _session(file: Path) -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise UserError("this wants onnxruntime: pip install onnxruntime") from error
    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
