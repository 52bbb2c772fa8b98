"""What a user can get wrong with fairseq, each explained in one line."""

from __future__ import annotations

import ast
import difflib
import math
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any, NoReturn

from fixup_core.command_line import report
from fixup_core.errors import Advice, UserError

__all__ = ["KNOWN", "UserError", "check_architecture", "check_options", "install_hook"]


KNOWN: tuple[Advice, ...] = (
    (
        FloatingPointError,
        "",
        "training diverged ({error}). No checkpoint was harmed: lower --lr, lengthen "
        "--warmup-updates or set --clip-norm, and start again",
    ),
    (
        (RuntimeError, KeyError),
        "Neither args nor cfg exist|^'(best_loss|extra_state|optimizer_history)'$",
        "this file is not a fairseq checkpoint: it lacks what fairseq-train writes. Use one "
        "that it wrote",
    ),
    (
        RuntimeError,
        r"Error\(s\) in loading state_dict",
        "the checkpoint does not fit the model: it was trained with another --arch, other sizes "
        "or another dictionary. Use the settings and the data directory it was trained with",
    ),
    (
        Exception,
        "Cannot load model parameters",
        "{error} Use the --arch, sizes and data directory it was trained with",
    ),
    (
        Exception,
        "Could not infer language pair",
        "no fairseq data in this directory: give the folder that fairseq-preprocess wrote, or "
        "--source-lang and --target-lang",
    ),
    (OSError, "^Model file not found", "{error}: check --path"),
    (AssertionError, "--path required", "--path is required: give a checkpoint"),
    (AssertionError, "world size is .* available devices", "{error}: --distributed-world-size"),
    (FileNotFoundError, "Dataset not found", "{error}: run fairseq-preprocess for this split"),
    (AssertionError, "Source and target must contain", "{error}: prepare the data again"),
    (AssertionError, "^(Criterion|Optimizer) does not match", "{error}"),
    (AssertionError, "--replace-unk requires", "{error}, or fairseq-interactive"),
    (
        Exception,
        "Incorrect dictionary format|Duplicate word found when loading|Incorrect encoding detected",
        "a dict.*.txt of the data is damaged ({error}): prepare the data again",
    ),
    (
        IndexError,
        "index out of range in self",
        "the data hold a word id beyond the dictionary, or a sentence beyond the learned "
        "positions: prepare the data again, or raise --max-source-positions",
    ),
)
"""What to say of errors that fairseq lets through."""


def check_architecture(argv: Sequence[str], known: Sequence[str]) -> None:
    """Raise ``UserError`` naming the nearest architectures where ``--arch`` names none."""
    for flag, value in zip(argv, [*argv[1:], ""], strict=False):
        name = value if flag in ("--arch", "-a") else flag.removeprefix("--arch=")
        if (flag in ("--arch", "-a") or name != flag) and name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
            raise UserError(
                f"there is no architecture {name!r}; the nearest: {', '.join(near) or 'none'}"
            )


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


def check_options(args: Any) -> None:
    """Raise ``UserError`` for a parsed option of fairseq's that is out of range or no literal, that
    does not act on a CPU, or that wants another one.
    """
    # These two kinds of half precision do run on a CPU.
    runs = getattr(args, "fp16_no_flatten_grads", False) or getattr(
        args, "memory_efficient_fp16", False
    )
    for name in ("amp",) if runs else ("fp16", "amp"):
        if getattr(args, "cpu", False) and getattr(args, name, False):
            raise UserError(
                f"{_flag(name)} wants a GPU: on a CPU use --fixup-autocast bf16, an option of "
                "the architectures transformer_fixup and transformer_fixup_lm"
            )
    if hasattr(args, "max_epoch") and getattr(args, "optimizer", "") is None:
        raise UserError("--optimizer is required: adam, or another of fairseq's")
    metric = getattr(args, "best_checkpoint_metric", None)
    if metric == "bleu" and not getattr(args, "eval_bleu", True):
        raise UserError("--best-checkpoint-metric bleu wants --eval-bleu, which computes it")
    if metric == "accuracy" and not getattr(args, "report_accuracy", True):
        raise UserError("--best-checkpoint-metric accuracy wants --report-accuracy")
    for name, (low, high) in LIMITS.items():
        value = getattr(args, name, None)
        for each in value if isinstance(value, list | tuple) else [value]:
            if isinstance(each, int | float) and not low <= each <= high:
                end = "or more" if high == math.inf else f"to {high:g}"
                raise UserError(f"{_flag(name)} is {each:g}: give {low:g} {end}")
    for name in LITERALS:
        text = getattr(args, name, None)
        if isinstance(text, str):
            check_literal(name, text)


def check_literal(name: str, text: str) -> Any:
    """The value of an option that is a Python literal; anything else is a ``UserError``."""
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{_flag(name)} is {text!r}: that is no Python literal") from error


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def install_hook(parser: Any = None) -> None:
    """Let a fairseq command end as the project's own do (``fixup_core.command_line``).

    The plugin is imported in the midst of the command, so that only what Python does with an error
    that nobody has caught can be changed.

    Args:
        parser: The command's; its mistakes are one line too, without the usage before it.
    """
    if parser is not None:
        parser.error = _mistake
        arch = parser._option_string_actions.get("--arch")
        if arch is not None and arch.default is None:
            arch.required = True  # without one, fairseq raises an empty error
    before = sys.excepthook
    if getattr(before, "explains", False):
        return

    def hook(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        status = report(error, KNOWN)
        if status is None:
            before(kind, error, traceback)
        else:
            raise SystemExit(status)  # Python takes the status from it, and ends in order

    hook.explains = True  # type: ignore[attr-defined]
    sys.excepthook = hook


def _mistake(message: str) -> NoReturn:
    raise UserError(f"{message}; see --help")
