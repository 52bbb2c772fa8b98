"""The Transformer as it was, norms and all, as a teacher: ``--fixup-removal-distil``."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from fairseq import models
from torch import Tensor, nn

from fixup_core.removal.distilling import divergence, logits_in
from fixup_mt.errors import UserError
from fixup_mt.model.removing import load_layernorm_


class Teacher:
    """A trained model whose words are soft targets. It is no part of the model that learns, so that
    no checkpoint holds it.

    Args:
        model: The trained one.
        weight: Of the divergence in the loss.
        padding: The piece that fills sentences up.
    """

    def __init__(self, model: nn.Module, weight: float, padding: int) -> None:
        self.model, self.weight, self.padding = model.eval().requires_grad_(False), weight, padding

    def divergence(self, seen: Sequence[Any], sample: Mapping[str, Any]) -> Tensor:
        """Of what the learner returned in a step, a mean over the words of a batch.

        Raises:
            UserError: It was not called once.
        """
        if len(seen) != 1:
            raise UserError(
                f"--fixup-removal-distil: the criterion calls the model {len(seen)} times a step; "
                "take one that calls it once, or leave the teacher out"
            )
        with torch.no_grad():
            targets = logits_in(self.model(**sample["net_input"]))
        words = sample["target"].ne(self.padding)
        words = words.repeat(len(targets) // len(words), 1)  # R-Drop has every sentence twice
        return divergence(logits_in(seen[0])[words], targets[words])

    def __deepcopy__(self, memo: Any) -> Teacher:
        # fairseq's moving average is a copy of the model; one teacher is enough.
        return self


def make_teacher(trainer: Any, saved: Mapping[str, Tensor], file: str, weight: float) -> Teacher:
    """The model of a run as its checkpoint with norms has it.

    Args:
        trainer: Of the run.
        saved: The weights with norms.
        file: Where they are from, for messages.
        weight: Of the divergence.
    """
    settings = copy.deepcopy(trainer.cfg.model)
    settings.fixup_remove_norms, settings.fixup_removal_distil = "none", 0.0
    settings.fixup_logit_cap = 0.0
    # Not the task's build_model, which would go on to translate with this one.
    model: Any = models.build_model(settings, trainer.task)
    load_layernorm_(model, saved, file)
    halves = {"fp16": torch.float16, "bf16": torch.bfloat16}
    half = next((dtype for name, dtype in halves.items() if trainer.cfg.common[name]), None)
    return Teacher(model.to(trainer.device, half), weight, trainer.task.target_dictionary.pad())


@contextmanager
def outputs_seen(model: nn.Module) -> Iterator[list[Any]]:
    """What the model returns in the block, call by call."""
    seen: list[Any] = []
    handle = model.register_forward_hook(lambda module, given, outputs: seen.append(outputs))
    try:
        yield seen
    finally:
        handle.remove()
