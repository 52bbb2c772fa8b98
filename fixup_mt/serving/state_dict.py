"""A Transformer's folded weights as a file, under the names of fairseq's transformer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fixup_mt.errors import UserError
from fixup_mt.serving.fold import fold_transformer, positions, refuse_other_attention
from fixup_mt.serving.plain import PlainDecoderStep, PlainEncoder, score


def write(file: Path, model: Any, task: Any) -> None:
    """Write ``model``'s folded weights; ``task`` is not needed.

    Raises:
        UserError: fairseq's transformer has no place for a part of it.
    """
    refuse_other_attention(model, "fairseq's transformer")
    method = model.decoder.layers[0].method
    if method.norm not in (None, "layer") or method.shortcut is not None:
        part = "factors on its shortcuts" if method.shortcut else f"{method.norm} for norms"
        raise UserError(
            f"a model of --fixup-method {method.name} has {part}, for which fairseq's transformer "
            "has no weights: give --format onnx"
        )
    torch.save({"model": fold_transformer(model)}, file)


def log_probabilities(
    file: Path, source: list[list[str]] | None, target: list[list[str]], model: Any, task: Any
) -> Any:
    """Of each piece of ``target`` and of the sentence's end; all sentences of one length. A
    language model has no ``source``.

    The weights come from ``file``; the sizes, which it does not hold, are those of ``model``.
    """
    weights = torch.load(file, weights_only=True)["model"]
    step = PlainDecoderStep(model, weights, positions(model.decoder)).eval()
    words = _numbers(target, task.target_dictionary)
    with torch.no_grad():
        past = step.nothing(len(words))
        if source is None:
            return score(step, past, words)
        pad = task.source_dictionary.pad()
        encoder = PlainEncoder(model, weights, positions(model.encoder), pad).eval()
        memory, mask = encoder(_numbers(source, task.source_dictionary))
        return score(lambda tokens, past: step(tokens, past, memory, mask), past, words)


def _numbers(rows: list[list[str]], dictionary: Any) -> torch.Tensor:
    return torch.tensor([[*map(dictionary.index, row), dictionary.eos()] for row in rows])
