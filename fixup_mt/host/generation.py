"""Repairs of what today's fairseq does silently wrong, or dies of, while it translates."""

from __future__ import annotations

import math
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy
import torch
from fairseq.data import language_pair_dataset, token_block_dataset
from torch import Tensor

from fixup_mt.errors import UserError
from fixup_mt.host.patches import Patch, arguments, patch

_shards: list[tuple[int, int]] = []
"""Number of shards and one's own, of a command that was given them."""


@patch(
    "fairseq.ngram_repeat_block:NGramRepeatBlock._no_repeat_ngram",
    "self tokens lprobs bsz beam_size step",
)
def repeat_no_ngram(original: Any) -> Any:
    """``--no-repeat-ngram-size`` compares the end of the padded buffer, not of what has been
    decoded, and so does nothing on a CPU (fairseq's issue 5206).
    """

    def _no_repeat_ngram(
        self: Any, tokens: Tensor, lprobs: Tensor, bsz: int, beam_size: int, step: int
    ) -> Tensor:
        size = int(self.no_repeat_ngram_size)
        for row, decoded in enumerate(tokens[:, : step + 1].tolist()):
            end = decoded[len(decoded) - size + 1 :]
            starts = range(len(decoded) - size + 1)
            banned = [decoded[i + size - 1] for i in starts if decoded[i : i + size - 1] == end]
            lprobs[row, torch.tensor(banned, dtype=torch.long)] = -math.inf
        return lprobs

    return _no_repeat_ngram


@patch(
    "fairseq.search:DiverseBeamSearch.step",
    "self step lprobs scores prev_output_tokens original_batch_idxs",
)
def number_sentences_within_their_batch(original: Any) -> Any:
    """``--diverse-beam-groups`` looks up its table of a batch by the sentences' numbers in the
    whole data set: an IndexError in every batch but the first.
    """

    def step(*args: Any, **kwargs: Any) -> Any:
        given = arguments(original, *args, **kwargs)
        search, left = given["self"], given["original_batch_idxs"]
        if left is not None:
            if given["step"] == 0:
                search.numbers = left.clone()
            same = left[:, None] == search.numbers[None, :]
            given["original_batch_idxs"] = same.int().argmax(dim=1)
        return original(**given)

    return step


@patch("fairseq.utils:load_align_dict", "replace_unk")
def copy_unknown_words(original: Any) -> Any:
    """``--replace-unk`` without a file means that words are copied; fairseq then looks for a file
    called ``"@@ "``.
    """

    def load_align_dict(replace_unk: str | None) -> Any:
        return original("" if replace_unk == "@@ " else replace_unk)

    return load_align_dict


@patch(
    "fairseq.checkpoint_utils:load_model_ensemble_and_task",
    "filenames arg_overrides task strict suffix num_shards state",
)
def refuse_weights_that_are_no_numbers(original: Any) -> Any:
    """With a weight that is NaN, no translation ends, and an assertion about lengths fails."""

    def load_model_ensemble_and_task(*args: Any, **kwargs: Any) -> Any:
        files = arguments(original, *args, **kwargs)["filenames"]
        try:
            models, *rest = original(*args, **kwargs)
        except KeyError as error:
            if error.args != ("model",):
                raise
            raise UserError(f"no model in {', '.join(files)}: give a checkpoint") from error
        for model, file in zip(models, files, strict=False):
            bad = [n for n, weight in model.named_parameters() if not weight.isfinite().all()]
            if bad:
                raise UserError(
                    f"{file} holds weights that are NaN or infinite ({bad[0]}): take an earlier "
                    "checkpoint"
                )
        return models, *rest

    return load_model_ensemble_and_task


def share_out(args: Any) -> None:
    """Remember ``--num-shards`` and ``--shard-id``, which ``fairseq-generate`` takes and ignores:
    each of N jobs translates everything (fairseq's issue 1937). ``batches_of_a_shard`` acts on it.
    """
    _shards.clear()
    number, own = getattr(args, "num_shards", 1) or 1, getattr(args, "shard_id", 0) or 0
    if number > 1 and hasattr(args, "beam"):
        _shards.append((int(number), int(own)))


def batches_of_a_shard(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``get_batch_iterator``, with the command's shard where it has one."""
    if not _shards or given["num_shards"] != 1:
        return given
    number, own = _shards[0]
    return given | {"num_shards": number, "shard_id": own}


def give_numpy_its_old_names() -> None:
    """Language models broken at sentences, and all in ``fairseq-interactive``, want
    ``numpy.compat``, which numpy 2 has no more.
    """
    if hasattr(numpy, "compat"):
        return
    older = ModuleType("numpy")
    older.__dict__.update(vars(numpy))
    older.__dict__["compat"] = SimpleNamespace(long=int)
    for module in (language_pair_dataset, token_block_dataset):
        module.np = older


def take_numpys_old_names_away() -> None:
    """As fairseq is installed."""
    for module in (language_pair_dataset, token_block_dataset):
        module.np = numpy


REPAIRS: tuple[Patch, ...] = (
    repeat_no_ngram,
    number_sentences_within_their_batch,
    copy_unknown_words,
    refuse_weights_that_are_no_numbers,
)
