"""A Transformer's folded weights as a file, under the names of fairseq's pre-norm transformer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fixup_mt.serving.fold import fold_transformer, positions
from fixup_mt.serving.plain import PlainDecoderStep, PlainEncoder


def write(file: Path, model: Any, task: Any) -> None:
    """Write ``model``'s folded weights; ``task`` is not needed."""
    torch.save({"model": fold_transformer(model)}, file)


def log_probabilities(
    file: Path, source: list[list[str]], target: list[list[str]], model: Any, task: Any
) -> Any:
    """Of each piece of ``target`` and of the sentence's end; all sentences of one length.

    The weights come from ``file``; the sizes, which it does not hold, are those of ``model``.
    """
    weights = torch.load(file, weights_only=True)["model"]
    pad = task.source_dictionary.pad()
    encoder = PlainEncoder(model, weights, positions(model.encoder), pad).eval()
    step = PlainDecoderStep(model, weights, positions(model.decoder)).eval()
    tokens, words = (
        torch.tensor([[*map(dictionary.index, row), dictionary.eos()] for row in rows])
        for dictionary, rows in (
            (task.source_dictionary, source),
            (task.target_dictionary, target),
        )
    )
    with torch.no_grad():
        memory, mask = encoder(tokens)
        past, found = memory[:, :, :, :, :0], []
        # The decoder begins with the end of a sentence.
        for before, now in zip(words.roll(1, dims=1).unbind(1), words.unbind(1), strict=True):
            logits, past = step(before, past, memory, mask)
            found.append(logits.log_softmax(dim=1).gather(1, now[:, None]))
    return torch.cat(found, dim=1).tolist()
