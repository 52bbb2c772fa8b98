"""fairseq's commands on tiny data, run the way users run them: in processes of their own."""

from __future__ import annotations

import atexit
import functools
import json
import logging
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
# The recipes run what runs the tests.
os.environ["PYTHON"] = sys.executable
ENVIRONMENT = os.environ | {
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": "",
}
WORDS = [f"w{i}" for i in range(20)]


@pytest.fixture(autouse=True)
def _logging_stays_on() -> Iterator[None]:
    """Commands that are called in this process have switched it off, as they do in their own."""
    yield
    logging.disable(logging.NOTSET)


def fairseq(
    command: str, *arguments: object, check: bool = True, **options: Any
) -> subprocess.CompletedProcess[str]:
    """``fairseq-COMMAND ARGUMENTS`` with the plugin of this checkout.

    Args:
        command: ``train``, ``generate`` and so on.
        arguments: Of the command.
        check: Whether a status other than 0 is an error.
        options: ``env``, ``cwd`` and ``input``.
    """
    words = list(map(str, arguments))
    done = zygote().run(f"fairseq_cli.{command}", words, **options)
    if check and done.returncode:
        line = f"fairseq-{command} {' '.join(words)}"
        raise AssertionError(f"{line}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done


class Zygote:
    """Runs modules as ``python -m`` does, without the time that imports take (``zygote.py``)."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "zygote.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=ENVIRONMENT,
        )
        atexit.register(self.close)

    def close(self) -> None:
        """It ends with its standard input."""
        self.process.communicate()

    def run(
        self,
        module: str,
        arguments: list[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path = ROOT,
        input: str = "",
    ) -> subprocess.CompletedProcess[str]:
        """``python -m MODULE ARGUMENTS``: its status, and what it has printed.

        The module ``-c`` stands for the code that follows.
        """
        assert self.process.stdin and self.process.stdout
        with tempfile.TemporaryDirectory() as folder:
            files = {name: Path(folder, name) for name in ("stdin", "stdout", "stderr")}
            files["stdin"].write_text(input, encoding="utf-8")
            order: dict[str, Any] = {name: str(file) for name, file in files.items()}
            order |= {"module": module, "arguments": arguments, "cwd": str(cwd)}
            order["environment"] = ENVIRONMENT | (env or {})
            print(json.dumps(order), file=self.process.stdin, flush=True)
            status = int(self.process.stdout.readline())
            said = [files[name].read_text("utf-8", "replace") for name in ("stdout", "stderr")]
        return subprocess.CompletedProcess([module, *arguments], status, *said)


@functools.cache
def zygote() -> Zygote:
    """One for a worker."""
    return Zygote()


def write_parallel_text(folder: Path) -> None:
    """Reversal: the target is the source backwards. 41 test sentences: no multiple of 8."""
    rng = random.Random(1)
    for split, size in (("train", 200), ("valid", 20), ("test", 41)):
        lines = [rng.choices(WORDS, k=rng.randint(2, 9)) for _ in range(size)]
        (folder / f"{split}.de").write_text("".join(" ".join(s) + "\n" for s in lines))
        (folder / f"{split}.en").write_text("".join(" ".join(s[::-1]) + "\n" for s in lines))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plain text, German on one side and English on the other."""
    folder = tmp_path_factory.mktemp("text")
    write_parallel_text(folder)
    return folder


@pytest.fixture(scope="session")
def data_bin(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The corpus as fairseq-preprocess writes it, with one dictionary."""
    folder = tmp_path_factory.mktemp("data") / "bin"
    prefixes = [f"--{split}pref={corpus / split}" for split in ("train", "valid", "test")]
    languages = ("-s", "de", "-t", "en", "--joined-dictionary", "--destdir", folder)
    fairseq("preprocess", *prefixes, *languages)
    return folder


Train = Callable[..., subprocess.CompletedProcess[str]]


def train_flags(data_bin: Path, save_dir: Path, *more: object) -> list[object]:
    """A tiny Fixup training of two epochs; ``more`` goes before the defaults."""
    flags: dict[str, object] = {
        "--user-dir": "fixup_mt",
        "--arch": "transformer_fixup_tiny",
        "--task": "translation",
        "--criterion": "label_smoothed_cross_entropy",
        "--optimizer": "adam",
        "--lr": "0.002",
        "--max-tokens": "400",
        "--max-epoch": "2",
        "--seed": "1",
        "--num-workers": "0",
        "--log-format": "json",
        "--log-interval": "1",
        "--save-dir": save_dir,
    }
    given = {str(flag) for flag in more}
    rest = [part for flag, value in flags.items() if flag not in given for part in (flag, value)]
    return [data_bin, *rest, "--cpu", *more]


@pytest.fixture(scope="session")
def trained(data_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished training of four epochs."""
    folder = tmp_path_factory.mktemp("trained")
    more = ("--max-epoch", "4", "--tensorboard-logdir", folder / "tb", "--store-ema")
    fairseq("train", *train_flags(data_bin, folder, *more))
    return folder
