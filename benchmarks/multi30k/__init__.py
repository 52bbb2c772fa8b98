"""A fairseq ``--user-dir`` that compares Fixup with LayerNorm under the same arithmetic.

The task ``translation_bf16`` runs any model, fairseq's own ``transformer`` included, under
``torch.autocast`` in bfloat16; parameters, residual stream and loss stay float32.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from fairseq.tasks import register_task
from fairseq.tasks.translation import TranslationConfig, TranslationTask

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import fixup_mt  # noqa: F401 (registers the Fixup models)


@register_task("translation_bf16", dataclass=TranslationConfig)
class Bf16TranslationTask(TranslationTask):
    """Translation with every step of the model under bfloat16 autocast."""

    def train_step(self, *args: Any, **kwargs: Any) -> Any:
        with _autocast():
            return super().train_step(*args, **kwargs)

    def valid_step(self, *args: Any, **kwargs: Any) -> Any:
        with _autocast():
            return super().valid_step(*args, **kwargs)

    def inference_step(self, *args: Any, **kwargs: Any) -> Any:
        with _autocast():
            return super().inference_step(*args, **kwargs)


def _autocast() -> torch.autocast:
    return torch.autocast("cuda" if torch.cuda.is_available() else "cpu", torch.bfloat16)
