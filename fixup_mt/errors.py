"""What a user can get wrong with fairseq, each explained in one line."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any, NoReturn

from fixup_core.command_line import report
from fixup_core.errors import Advice, UserError

__all__ = ["KNOWN", "UserError", "install_hook"]


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
    (
        FileExistsError,
        r"^[^\[].*dict\..*txt$",
        "{error} exists: give another --destdir, or use it by --srcdict and --tgtdict",
    ),
    (AssertionError, "^--trainpref must be set|^cannot use both --srcdict", "{error}"),
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
