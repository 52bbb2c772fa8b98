"""Mistakes among a command's options are missed at its start."""

from __future__ import annotations

from argparse import Namespace

import pytest

from fixup_mt.errors import UserError
from fixup_mt.host.options import check_architecture, check_options


@pytest.mark.parametrize("argv", [["--arch", "transformer_fixpu"], ["--arch=transformer_fixpu"]])
def test_a_misspelt_architecture_names_the_nearest(argv: list[str]) -> None:
    with pytest.raises(UserError, match="nearest: transformer_fixup"):
        check_architecture(argv, ["transformer_fixup", "lstm"])
    check_architecture(["--arch", "lstm", "--lr", "1"], ["lstm"])


@pytest.mark.parametrize(
    ("metric", "lacks"), [("bleu", "eval_bleu"), ("accuracy", "report_accuracy")]
)
def test_a_metric_that_nobody_computes_is_told_at_the_start(metric: str, lacks: str) -> None:
    with pytest.raises(UserError, match=f"{metric} wants --{lacks.replace('_', '-')}"):
        check_options(Namespace(best_checkpoint_metric=metric, **{lacks: False}))
    check_options(Namespace(best_checkpoint_metric=metric, **{lacks: True}))
    check_options(Namespace(best_checkpoint_metric=metric))


def test_a_training_wants_an_optimiser() -> None:
    with pytest.raises(UserError, match="--optimizer is required"):
        check_options(Namespace(optimizer=None, max_epoch=0))
    check_options(Namespace(optimizer="adam", max_epoch=0))
    check_options(Namespace(optimizer=None))


@pytest.mark.parametrize("text", ["(0.9", "print()", "0.9, x"])
def test_a_literal_that_is_none_is_refused_by_the_options_name(text: str) -> None:
    with pytest.raises(UserError, match=r"--adam-betas: .* is not a Python literal"):
        check_options(Namespace(adam_betas=text))
    check_options(Namespace(adam_betas="(0.9, 1 - 0.02)"))
