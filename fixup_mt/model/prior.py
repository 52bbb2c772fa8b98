"""The words' frequencies, which the output layer's bias vector can start at.

While the output layer is 0 all words are equally likely, and the first thing to learn is which are
frequent. That gradient is the same at every position, so that all branches together push the
stream in one direction: under Adam, whose steps do not know how small a gradient is, by far too
much. A bias that starts at the logarithm of the frequencies leaves nothing of it.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fairseq.data import Dictionary, data_utils
from torch import Tensor

logger = logging.getLogger(__name__)

SPLIT = "train"
CHUNK = 2**24
"""Words that are counted at a time."""


def log_frequencies(task: Any, dictionary: Dictionary) -> Tensor:
    """Of the target's words in the training data, [V].

    Where the data are not at hand, those that the dictionary has counted, which in a joined
    dictionary are those of both languages. Every word counts once more than it is found.

    Args:
        task: Of fairseq; it says where the data lie.
        dictionary: Of the target.
    """
    counts = _counted(task, dictionary)
    if counts is None:
        counts = np.asarray(dictionary.count, dtype=np.int64)
        if counts.max(initial=0) <= 1:
            logger.warning("no words were counted: the output's bias starts at equal frequencies")
    frequencies = (counts + 1) / (counts + 1).sum()
    return torch.from_numpy(np.log(frequencies)).float()


def _counted(task: Any, dictionary: Dictionary) -> Any:
    """How often each word stands in the training data; ``None`` where they cannot be read."""
    for prefix in _prefixes(task):
        data = data_utils.load_indexed_dataset(str(prefix), dictionary, default="mmap")
        words = getattr(data, "_bin_buffer_mmap", None)
        if words is not None:
            found = np.frombuffer(words, dtype=data._index.dtype)
            parts = np.array_split(found, len(found) // CHUNK + 1)
            return sum(np.bincount(part, minlength=len(dictionary)) for part in parts)
    return None


def _prefixes(task: Any) -> list[Path]:
    """Where the target's side of the training data may lie; those that are there."""
    cfg = getattr(task, "cfg", None) or getattr(task, "args", None)
    paths = getattr(cfg, "data", None)
    if not paths:
        return []
    folder = Path(str(paths).split(":")[0])
    source, target = getattr(cfg, "source_lang", None), getattr(cfg, "target_lang", None)
    names = [f"{SPLIT}.{a}-{b}.{target}" for a, b in ((source, target), (target, source))]
    found = [folder / name for name in ([SPLIT] if target is None else names)]
    return [prefix for prefix in found if prefix.with_name(f"{prefix.name}.idx").exists()]
