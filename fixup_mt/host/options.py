"""Reports what is wrong with a command of fairseq's at its start, before minutes of work."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Sequence
from typing import Any

from fixup_mt.errors import UserError
from fixup_mt.host.literals import evaluate

POSITIVE = (
    *("encoder_embed_dim", "encoder_ffn_embed_dim", "encoder_attention_heads"),
    *("decoder_embed_dim", "decoder_ffn_embed_dim", "decoder_attention_heads"),
    *("max_tokens", "batch_size", "update_freq", "beam", "nbest"),
)
PROBABILITIES = ("dropout", "attention_dropout", "activation_dropout", "label_smoothing")
LIMITS: dict[str, tuple[float, float]] = (
    dict.fromkeys(POSITIVE, (1.0, math.inf))
    | dict.fromkeys(PROBABILITIES, (0.0, 1.0))
    | dict.fromkeys(("lr", "num_workers", "clip_norm"), (0.0, math.inf))
)
"""The least and the largest value of fairseq's options that fail late or act silently beyond."""
LITERALS = ("adam_betas", "model_overrides")
"""Options whose text is a Python literal."""
METRICS = {
    "bleu": ("eval_bleu", "--eval-bleu, which computes it"),
    "accuracy": ("report_accuracy", "--report-accuracy"),
}
"""Values of ``--best-checkpoint-metric`` that another option has to compute."""


def check_architecture(argv: Sequence[str], known: Sequence[str]) -> None:
    """Raise ``UserError`` naming the nearest architectures where ``--arch`` names none."""
    for flag, value in zip(argv, [*argv[1:], ""], strict=False):
        name = value if flag in ("--arch", "-a") else flag.removeprefix("--arch=")
        if (flag in ("--arch", "-a") or name != flag) and name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
            raise UserError(
                f"there is no architecture {name!r}; the nearest: {', '.join(near) or 'none'}"
            )


def check_options(args: Any) -> None:
    """Raise ``UserError`` for the first mistake among the parsed options of a command."""
    for check in CHECKS:
        check(args)


def check_precision(args: Any) -> None:
    """Half precision that fairseq runs on a GPU alone, or forgets on a CPU."""
    if not getattr(args, "cpu", False):
        return
    # These two kinds of --fp16 do run on a CPU.
    runs = ("fp16_no_flatten_grads", "memory_efficient_fp16")
    half = any(getattr(args, name, False) for name in runs)
    for name in ("amp",) if half else ("fp16", "amp"):
        if getattr(args, name, False):
            raise UserError(
                f"{_flag(name)} wants a GPU: on a CPU use --fixup-autocast bf16, an option of "
                "the architectures transformer_fixup and transformer_fixup_lm"
            )


def check_optimizer(args: Any) -> None:
    """A training without an optimiser."""
    if hasattr(args, "max_epoch") and getattr(args, "optimizer", "") is None:
        raise UserError("--optimizer is required: adam, or another of fairseq's")


def check_metric(args: Any) -> None:
    """A best checkpoint by what nobody computes."""
    metric = getattr(args, "best_checkpoint_metric", None)
    if metric in METRICS:
        name, wanted = METRICS[metric]
        if not getattr(args, name, True):
            raise UserError(f"--best-checkpoint-metric {metric} wants {wanted}")


def check_ranges(args: Any) -> None:
    """A number out of its range."""
    for name, (low, high) in LIMITS.items():
        value = getattr(args, name, None)
        for each in value if isinstance(value, list | tuple) else [value]:
            if isinstance(each, int | float) and not low <= each <= high:
                end = "or more" if high == math.inf else f"to {high:g}"
                raise UserError(f"{_flag(name)} is {each:g}: give {low:g} {end}")


def check_literals(args: Any) -> None:
    """A text that is not the literal it should be."""
    for name in LITERALS:
        text = getattr(args, name, None)
        if isinstance(text, str):
            literal(name, text)


def literal(name: str, text: str) -> Any:
    """The value of the option ``name``, as ``evaluate`` gives it.

    Raises:
        UserError: It is no literal; the message names the option.
    """
    try:
        return evaluate(text)
    except UserError as error:
        raise UserError(f"{_flag(name)}: {error}") from error


CHECKS: tuple[Callable[[Any], None], ...] = (
    check_precision,
    check_optimizer,
    check_metric,
    check_ranges,
    check_literals,
)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
