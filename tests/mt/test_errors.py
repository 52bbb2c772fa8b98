"""One clear line for what a user can get wrong."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
import torch
from torch.multiprocessing import ProcessRaisedException

from fixup_core import errors
from fixup_mt.errors import KNOWN, UserError
from tests.conftest import ENVIRONMENT, ROOT


def explain(error: BaseException) -> str | None:
    return errors.explain(error, KNOWN)


def _raised(inner: BaseException, outer: BaseException) -> BaseException:
    try:
        try:
            raise inner
        except type(inner):
            raise outer  # noqa: B904 (fairseq hides the reason this way)
    except type(outer) as error:
        return error


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (FloatingPointError("gradients are Nan/Inf"), "lower --lr"),
        (pickle.UnpicklingError("Weights only load failed"), "damaged, or holds objects"),
        (RuntimeError("PytorchStreamReader failed reading zip archive"), "truncated"),
        (EOFError("Ran out of input"), "empty"),
        (RuntimeError("Neither args nor cfg exist in state"), "not a fairseq checkpoint"),
        (KeyError("best_loss"), "not a fairseq checkpoint"),
        (RuntimeError("Error(s) in loading state_dict for M:\n size mismatch"), "does not fit"),
        (Exception("Could not infer language pair, please provide it"), "fairseq-preprocess"),
        (FileNotFoundError("Dataset not found: train (bin)"), "Dataset not found: train (bin)"),
        (FileNotFoundError(2, "No such file", "/data/x"), "/data/x does not exist"),
        (IndexError("index out of range in self"), "beyond the dictionary"),
        (AssertionError("Criterion does not match; please reset the optimizer"), "please reset"),
        (ValueError('Incorrect dictionary format, expected: "x"'), "dict.*.txt of the data"),
        (UserError("do this"), "do this"),
    ],
)
def test_known_mistakes_are_one_line(error: BaseException, says: str) -> None:
    line = explain(error)
    assert line is not None and says in line and "\n" not in line


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("boom"), ZeroDivisionError()])
def test_unknown_errors_keep_their_traceback(error: BaseException) -> None:
    assert explain(error) is None


def test_the_reason_behind_fairseqs_own_error_is_told() -> None:
    hidden = _raised(UserError("the source dictionary is another"), Exception("Cannot load model"))
    assert explain(hidden) == "the source dictionary is another"


def _fail(rank: int, kind: type[BaseException], text: str) -> None:
    try:
        raise ZeroDivisionError("the cause")
    except ZeroDivisionError as error:
        raise kind(text) from error


@pytest.mark.parametrize(
    ("kind", "text", "says"),
    [
        (UserError, "mend it", "mend it"),
        (RuntimeError, "Error(s) in loading state_dict for M:\n\tsize mismatch", "does not fit"),
        (RuntimeError, "boom", None),
    ],
)
def test_a_spawned_ranks_mistake_is_told_too(kind: type, text: str, says: str | None) -> None:
    with pytest.raises(ProcessRaisedException) as caught:
        torch.multiprocessing.spawn(_fail, (kind, text), nprocs=1)
    line = explain(caught.value)
    assert line is None if says is None else says in str(line)


def test_every_advice_can_be_written() -> None:
    for kind, _, advice in (*KNOWN, *errors.COMMON):
        assert advice.format(error="e", file="f"), kind


def _dies_of(raised: str, status: int) -> list[str]:
    code = f"from fixup_mt.errors import *\ninstall_hook()\nraise {raised}"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == status
    return [line for line in done.stderr.splitlines() if not line.startswith("INFO:")]


def test_the_hook_prints_one_line_for_a_mistake_and_a_traceback_for_the_rest() -> None:
    assert _dies_of("UserError('mend it')", 2) == ["error: mend it"]
    assert _dies_of("KeyError('x')", 1)[0].startswith("Traceback")
