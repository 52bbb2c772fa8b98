"""Models that fairseq has trained, and the batches they are tried on."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fairseq import checkpoint_utils, utils

import fixup_mt


def load(checkpoint: Path, data_bin: Path, device: str) -> tuple[Any, Any]:
    """The model, in evaluation mode on the device, and its task."""
    fixup_mt.register()
    utils.import_user_module(argparse.Namespace(user_dir=str(Path(__file__).parent)))
    models, _, task = checkpoint_utils.load_model_ensemble_and_task(
        [str(checkpoint)], arg_overrides={"data": str(data_bin)}
    )
    return models[0].eval().to(device), task


def batches(task: Any, subset: str, words: int, device: str) -> Iterator[Any]:
    """Of a subset, on the device; ``words`` in one at the most."""
    if subset not in task.datasets:
        task.load_dataset(subset)
    found = task.get_batch_iterator(task.dataset(subset), max_tokens=words)
    for sample in found.next_epoch_itr(shuffle=False):
        yield utils.move_to_cuda(sample) if device == "cuda" else sample
