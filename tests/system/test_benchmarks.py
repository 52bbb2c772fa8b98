"""The benchmarks run; what they measure is for ``make bench``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ENVIRONMENT, ROOT


def test_the_step_benchmark_times_every_contestant(tmp_path: Path) -> None:
    sizes = {"layers": 1, "width": 16, "ffn": 16, "heads": 2, "words": 50, "rounds": 2}
    more = {"sentences": 4, "length": 5, "threads": 1, "json": tmp_path / "result.json"}
    _run("benchmarks/mt_step.py", sizes | more)
    rows = json.loads((tmp_path / "result.json").read_text())["seconds"]
    assert len(rows) == 4 and all(row["minimum"] > 0 for row in rows.values())


def test_the_search_benchmark_times_every_contestant(tmp_path: Path) -> None:
    pytest.importorskip("ctranslate2")
    sizes = {"layers": 1, "width": 16, "ffn": 16, "heads": 2, "words": 50, "rounds": 1}
    more = {"sentences": 2, "length": 4, "threads": 1, "json": tmp_path / "result.json"}
    _run("benchmarks/mt_generate.py", sizes | more)
    assert len(json.loads((tmp_path / "result.json").read_text())["seconds"]) == 6


@pytest.mark.slow
def test_the_vision_benchmark_times_every_contestant(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    flags = {"nets": "cifar_resnet8", "rounds": 1, "threads": 1, "json": result}
    _run("benchmarks/vision_step.py", flags)
    found = json.loads(result.read_text())
    rows = [row for name, row in found.items() if name.startswith("cifar_resnet8")]
    assert len(rows) == 2
    for row in rows:
        assert len(row["train"]) == 4 and len(row["inference"]) == 5
        assert row["kept"]["Fixup, plain"] > 1.5 * row["kept"]["Fixup"]
        assert all(value > 0 for value in row["peak"].values())


@pytest.mark.slow
def test_the_growth_benchmark_sees_what_checkpointing_saves(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    flags = ["--depths", "20", "56", "--images", "4", "--rounds", "1", "--threads", "1"]
    _start("benchmarks/growth.py", [*flags, "--json", str(result)])
    found = json.loads(result.read_text())
    assert found["growth"]["checkpointing"]["peak"] < found["growth"]["all kept"]["peak"]
    assert found["build_seconds"] > 0


def _run(script: str, options: dict[str, object]) -> None:
    _start(script, [str(part) for name, value in options.items() for part in (f"--{name}", value)])


def _start(script: str, flags: list[str]) -> None:
    here = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, script, *flags], cwd=ROOT, env=here, check=True)
