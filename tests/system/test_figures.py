"""The scripts behind the figures of ``docs/`` run, and the documents show what they draw."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ENVIRONMENT, ROOT

DOCS = ("theory.md", "gradient-flow.md")


def _run(script: str, *flags: object) -> str:
    line = [sys.executable, ROOT / "benchmarks" / script, *map(str, flags)]
    env = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(line, capture_output=True, text=True, env=env, check=True).stdout


@pytest.mark.slow
def test_the_bounds_are_measured_and_drawn(tmp_path: Path) -> None:
    file = tmp_path / "bounds.png"
    out = _run("bounds.py", "--file", file, "--depths", 8, "--steps", 1)
    assert file.stat().st_size > 5000
    assert "stem alone" in out and "theorem 1" in out


def test_the_flow_is_measured_and_drawn(tmp_path: Path) -> None:
    out = _run("gradient_flow.py", "--folder", tmp_path)
    assert (tmp_path / "gradient-flow.png").stat().st_size > 5000
    assert (tmp_path / "backward-graph.dot").exists()
    (products,) = re.findall(r"sum ([-\d.]+), autograd ([-\d.]+)", out)
    assert products[0] == products[1]


@pytest.mark.parametrize("name", DOCS)
def test_what_a_document_shows_is_there_and_small(name: str) -> None:
    text = (ROOT / "docs" / name).read_text(encoding="utf-8")
    shown = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert shown
    for file in shown:
        assert (ROOT / "docs" / file).stat().st_size < 150_000
    for script in re.findall(r"python (benchmarks/\w+\.py)", text):
        assert (ROOT / script).exists()
