"""What the attacks share: a small run of each half, commands in forked processes, the figure."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import logging
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tests.conftest import ROOT, fairseq, train_flags, write_parallel_text

LONGEST = 120
"""Seconds that a command may take."""
RECIPE = str(ROOT / "recipes" / "vision" / "digits_fixup_resnet20.yaml")
FIT = (
    *("fit", "--config", RECIPE, "--model.net", "cifar_resnet8", "--trainer.max_epochs", "4"),
    *("--data.train_size", "160", "--data.batch_size", "32", "--data.val_size", "32"),
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
    *("--trainer.log_every_n_steps", "1", "--checkpoint_every", "3"),
)


@dataclass(frozen=True)
class Ended:
    """How a command ended: a signal's number is negative."""

    status: int
    output: str
    error: str

    @property
    def refused(self) -> bool:
        """One line, status 2."""
        lines = [line for line in self.error.splitlines() if line.startswith("error: ")]
        return self.status == 2 and len(lines) == 1 and "Traceback" not in self.error


@dataclass
class Child:
    """A command in a forked process."""

    pid: int
    folder: tempfile.TemporaryDirectory

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def wait(self, seconds: float = LONGEST) -> Ended:
        """Until it ends; after ``seconds`` it is killed."""
        deadline = time.monotonic() + seconds
        while not (found := os.waitpid(self.pid, os.WNOHANG))[0]:
            if time.monotonic() > deadline:
                self.kill()
            time.sleep(0.01)
        with self.folder as folder:
            output, error = (
                Path(folder, name).read_text("utf-8", errors="replace") for name in ("out", "err")
            )
        return Ended(os.waitstatus_to_exitcode(found[1]), output, error)


def start(line: Sequence[object], before: Callable[[], object] = lambda: None) -> Child:
    """Start ``python -m fixup_mt ...``, ``vision ...`` or a command of fairseq's (``train ...``).

    Args:
        line: The command and its arguments.
        before: Called in the new process first.
    """
    words, folder = [str(word) for word in line], tempfile.TemporaryDirectory()
    main = _main(words)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    pid = os.fork()
    if pid:
        return Child(pid, folder)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(folder.name, name), os.O_WRONLY | os.O_CREAT), number)
    sys.stdin = io.TextIOWrapper(io.BytesIO(b"w1 w2\n"))
    status = 1
    try:
        before()
        status = _status(main)
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)


def _main(words: list[str]) -> Callable[[], int | None]:
    name, *rest = words
    if name in ("fixup_mt", "vision"):
        module: Any = importlib.import_module(f"{name}.__main__")
        return lambda: _with(words, lambda: module.main(rest))
    command: Any = importlib.import_module(f"fairseq_cli.{name}")
    return lambda: _with(words, command.cli_main)


def _with(words: list[str], main: Callable[[], int | None]) -> int | None:
    sys.argv = words
    return main()


def _status(main: Callable[[], int | None]) -> int:
    """As Python ends: an error that nobody catches goes to the hook."""
    try:
        return main() or 0
    except SystemExit as stop:
        return _code(stop)
    except BaseException as error:
        try:
            sys.excepthook(type(error), error, error.__traceback__)
        except SystemExit as stop:
            return _code(stop)
        except BaseException:
            traceback.print_exc()
        return 1


def _code(stop: SystemExit) -> int:
    return stop.code if isinstance(stop.code, int) else int(stop.code is not None)


def run(line: Sequence[object], before: Callable[[], object] = lambda: None) -> Ended:
    """``start``, and wait."""
    return start(line, before).wait()


@dataclass(frozen=True)
class Half:
    """A training that can be stopped and resumed.

    Attributes:
        name: Of the half.
        line: The command that trains into a folder, and goes on there.
        last: Its checkpoint, in that folder.
    """

    name: str
    line: Callable[[Path], list[object]]
    last: str

    def state(self, folder: Path) -> dict[str, Any]:
        """Weights and optimiser of a run's last checkpoint."""
        saved = torch.load(folder / self.last, map_location="cpu", weights_only=True)
        names = ("model", "last_optimizer_state", "state_dict", "optimizer_states")
        return dict(_leaves({name: saved[name] for name in names if name in saved}))


def halves(data: Path) -> tuple[Half, Half]:
    """Both halves; the binarised data of the translation go into ``data``."""
    more = ("--max-epoch", "8", "--save-interval-updates", "3", "--keep-interval-updates", "1")
    flags = (*more, "--no-epoch-checkpoints", "--user-dir", "")

    def train(folder: Path) -> list[object]:
        return ["train", *train_flags(data, folder, *flags)]

    def fit(folder: Path) -> list[object]:
        resumes = (folder / "checkpoints" / "last.ckpt").exists()
        more = ("--ckpt_path", "last") if resumes else ()
        return ["vision", *FIT, "--trainer.default_root_dir", folder, *more]

    if not data.exists():
        text = data.with_name("text")
        text.mkdir()
        write_parallel_text(text)
        prefixes = [f"--{split}pref={text / split}" for split in ("train", "valid", "test")]
        languages = ("-s", "de", "-t", "en", "--joined-dictionary", "--destdir", data)
        fairseq("preprocess", *prefixes, *languages)
    return (
        Half("translation", train, "checkpoint_last.pt"),
        Half("images", fit, "checkpoints/last.ckpt"),
    )


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(item, f"{path}/{key}")
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _leaves(item, f"{path}/{number}")
    else:
        yield path, value


def bit_equal(one: dict[str, Any], two: dict[str, Any]) -> bool:
    """Whether two states are the same, to the last bit."""

    def same(a: Any, b: Any) -> bool:
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else bool(a == b)

    return one.keys() == two.keys() and all(same(one[name], two[name]) for name in one)


def prepare() -> None:
    """Import what every command needs, so that the forked processes need not."""
    os.environ |= {"PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": ""}
    os.chdir(ROOT)
    torch.set_num_threads(1)
    logging.disable(logging.DEBUG)
    for name in ("fixup_mt", "vision.cli", "fairseq_cli.train", "fairseq_cli.generate"):
        importlib.import_module(name)


def campaign(
    attack: Callable[[int, int, Path], tuple[int, int]], *, count: int, closes: str
) -> None:
    """Run an attack from the command line and close with its figure.

    Args:
        attack: Takes how many trials, a seed and a folder; returns how many held, of how many.
        count: Trials where the command line gives none.
        closes: What the figure counts.
    """
    parser = argparse.ArgumentParser(description=sys.modules[attack.__module__].__doc__)
    add = parser.add_argument
    add("--count", type=int, default=count, metavar="N", help="trials; default: %(default)s")
    add("--seed", type=int, default=1, metavar="N", help="which trials; default: %(default)s")
    args = parser.parse_args()
    prepare()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        held, total = attack(args.count, args.seed, Path(folder))
    print(f"{held}/{total} {closes} ({time.monotonic() - began:.0f} s)", flush=True)
    sys.exit(held != total)
