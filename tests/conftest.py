"""fairseq's commands on tiny data, run the way users run them: in processes of their own."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

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


def fairseq(
    command: str, *arguments: object, check: bool = True, **options
) -> subprocess.CompletedProcess[str]:
    """``fairseq-COMMAND ARGUMENTS`` with the plugin of this checkout."""
    options.setdefault("cwd", ROOT)
    environment = ENVIRONMENT | options.pop("env", {})
    line = [sys.executable, "-m", f"fairseq_cli.{command}", *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, **options)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(line)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done


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
