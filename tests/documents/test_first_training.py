"""A fresh reader's way, from the README and the start page to a trained and exported model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ENVIRONMENT, ROOT
from tests.documents.blocks import labelled
from tests.system.test_recipes import write_slice

SHELL = labelled("sh")
SMALL = "--encoder-layers 1 --decoder-layers 1 --encoder-embed-dim 16 --decoder-embed-dim 16"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The files that the commands name, and nothing that they write."""
    for name in ("fixup_core", "fixup_mt", "vision", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def block_with(page: str, snippet: str) -> str:
    (found,) = [block.text for block in SHELL[page] if snippet in block.text]
    return found


def run(folder: Path, text: str, shorter: dict[str, str]) -> str:
    """The output of a block's commands, each of ``shorter`` found in it and replaced."""
    for long, short in shorter.items():
        assert text.count(long) == 1, long
        text = text.replace(long, short)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = ENVIRONMENT | {"PATH": path, "PYTHONPATH": str(folder), "PIECES": "45"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/start.md"])
def test_images(page: str, checkout: Path) -> None:
    text = block_with(page, "runs/digits.onnx").replace(". .venv/bin/activate\n", "")
    shorter = {
        "default_root_dir runs/digits\n": "default_root_dir runs/digits --trainer.max_epochs 2\n"
    }
    said = run(checkout, text, shorter)
    assert "test/accuracy" in said
    assert (checkout / "runs" / "digits.onnx").stat().st_size > 100_000


@pytest.mark.slow
def test_translation(checkout: Path) -> None:
    """The README's lines on a corpus of 120 pairs, with a smaller network."""
    write_slice(checkout / "slice")
    (checkout / "sums").touch()
    said = run(
        checkout,
        block_with("README.md", "fairseq-train"),
        {
            "--prepare-only": "--prepare-only --data slice --checksums sums --output runs/multi30k",
            "--max-update 5000": f"--max-epoch 6 --cpu {SMALL}",
            "--max-tokens 4000": "--max-tokens 400",
        },
    )
    assert (checkout / "runs" / "model" / "model.bin").exists()
    assert said.splitlines()


@pytest.mark.slow
def test_text(checkout: Path) -> None:
    """The start page's lines; every fairseq command on the CPU, as the page says."""
    shorter = {
        "--train 4000 --valid 200 --test 200": "--train 400 --valid 20 --test 20",
        "--max-epoch 3 --save-dir runs/text/run": "--max-epoch 2 --cpu --save-dir runs/text/run",
        "checkpoint_best.pt --beam 5": "checkpoint_best.pt --beam 5 --cpu",
    }
    said = run(checkout, block_with("docs/start.md", "fairseq-preprocess"), shorter)
    assert said.count("\nH-") == 20
    assert (checkout / "runs" / "text" / "model" / "model.bin").exists()
