"""Bad input to fairseq's commands, as processes: one line, status 2, and no harm to what was saved.

``test_door`` has the mistakes that need no process of their own.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ENVIRONMENT, ROOT, fairseq, train_flags


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _refused(done, says: str) -> None:
    assert done.returncode == 2, done.stdout[-2000:]
    lines = done.stderr.strip().splitlines()
    assert lines[-1].startswith("error: ") and says in lines[-1], done.stderr[-2000:]
    assert "Traceback" not in done.stderr


def test_an_option_of_normalisation_is_refused(data_bin: Path, tmp_path: Path) -> None:
    flags = train_flags(data_bin, tmp_path, "--encoder-normalize-before")
    done = fairseq("train", *flags, check=False)
    _refused(done, "unrecognized arguments: --encoder-normalize-before")
    assert "usage" not in done.stderr


def _generate(data: Path, checkpoint: Path):
    flags = ("--path", checkpoint, "--user-dir", "fixup_mt", "--cpu")
    return fairseq("generate", data, *flags, check=False)


@pytest.fixture
def checkpoint(trained: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "checkpoint.pt"
    copy.write_bytes((trained / "checkpoint_best.pt").read_bytes())
    return copy


def test_a_truncated_checkpoint(data_bin: Path, checkpoint: Path) -> None:
    checkpoint.write_bytes(checkpoint.read_bytes()[:2000])
    _refused(_generate(data_bin, checkpoint), "truncated or not a checkpoint")


def test_a_foreign_checkpoint(data_bin: Path, checkpoint: Path) -> None:
    torch.save({"state_dict": {"w": torch.zeros(1)}}, checkpoint)
    _refused(_generate(data_bin, checkpoint), "not a fairseq checkpoint")
    torch.save({"cfg": Path("x")}, checkpoint)
    _refused(_generate(data_bin, checkpoint), "objects of other classes")


def test_a_dictionary_of_other_words(data_bin: Path, checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "bin"
    other.mkdir()
    for path in data_bin.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    for language in ("de", "en"):
        lines = (data_bin / f"dict.{language}.txt").read_text().splitlines()
        lines[0], lines[1] = lines[1], lines[0]
        (other / f"dict.{language}.txt").write_text("\n".join(lines) + "\n")
    _refused(_generate(other, checkpoint), "dictionary is not the one")


def test_resuming_with_another_size(data_bin: Path, trained: Path, tmp_path: Path) -> None:
    last = tmp_path / "checkpoint_last.pt"
    last.write_bytes((trained / "checkpoint_last.pt").read_bytes())
    before = _digest(last)
    flags = train_flags(data_bin, tmp_path, "--encoder-ffn-embed-dim", "64")
    _refused(fairseq("train", *flags, check=False), "does not fit the model")
    assert _digest(last) == before


def test_divergence_keeps_the_checkpoints(data_bin: Path, trained: Path, tmp_path: Path) -> None:
    last = tmp_path / "checkpoint_last.pt"
    last.write_bytes((trained / "checkpoint_last.pt").read_bytes())
    before = _digest(last)
    flags = train_flags(data_bin, tmp_path, "--lr", "1e30", "--max-epoch", "9", "--reset-optimizer")
    _refused(fairseq("train", *flags, check=False), "training diverged")
    assert _digest(last) == before


def _errors(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


def test_a_fork_of_the_tests_does_what_a_process_does(data_bin: Path, tmp_path: Path) -> None:
    flags = [str(flag) for flag in train_flags(data_bin, tmp_path, "--arch", "transformer_fixpu")]
    line = [sys.executable, "-m", "fairseq_cli.train", *flags]
    process = subprocess.run(line, capture_output=True, text=True, env=ENVIRONMENT, cwd=ROOT)
    fork = fairseq("train", *flags, check=False)
    assert process.returncode == fork.returncode == 2
    assert _errors(process) == _errors(fork) != []
