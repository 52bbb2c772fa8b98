"""The list of networks that ``fixup_`` is tried on, and the benchmark that tries them."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fixup_core.__main__ import COMMANDS
from fixup_core.command_line import build_parser
from fixup_core.convert.notation import parse_inputs, parse_options
from tests.conftest import ENVIRONMENT, ROOT

SCRIPT = ROOT / "benchmarks" / "coverage.py"


@pytest.fixture(scope="module")
def sweep() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sweep", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["sweep"] = module  # its dataclasses look for it
    spec.loader.exec_module(module)
    return module


def test_every_line_of_the_list_can_be_read(sweep: ModuleType) -> None:
    nets = list(sweep.listed(sweep.LIST.read_text("utf-8")))
    parser = build_parser("", "", COMMANDS, chosen="convert")
    for net in nets:
        args = parser.parse_args(["convert", *net.line.split()])
        parse_options(args.set), parse_inputs(args.inputs or ["1"], vocabulary=2)
        assert net.library and net.family and "$" not in net.line
    assert len({net.line for net in nets}) == len(nets) >= 100


def test_the_table_counts_outcomes(sweep: ModuleType) -> None:
    rows = [
        {"library": "a", "family": "f", "outcome": "converted", "normalising_after": 1},
        {"library": "a", "family": "f", "outcome": "refused"},
        {"library": "a", "family": "g", "outcome": "dead", "left_out": ["x"]},
        {"library": "b", "family": "f", "outcome": "crashed"},
    ]
    assert sweep.table(rows).splitlines()[2:] == [
        "| a | f | 2 | 1 | 0 | 1 | 0 | 0 | 1 |",
        "| a | g | 1 | 0 | 1 | 0 | 0 | 1 | 0 |",
        "| a | all | 3 | 1 | 1 | 1 | 0 | 1 | 1 |",
        "| b | f | 1 | 0 | 0 | 0 | 1 | 0 | 0 |",
        "| b | all | 1 | 0 | 0 | 0 | 1 | 0 | 0 |",
    ]


def test_what_no_longer_learns_is_seen(sweep: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "tests.core.convert.test_command:encoder_and_inputs"
    found = sweep.measure(line)
    assert found["outcome"] == "converted" and found["m"] == {"2": 4}
    assert found["normalising_before"] == found["norms_removed"] == 4
    assert found["normalising_after"] == 0
    learning = sweep.learning
    monkeypatch.setattr(sweep, "learning", lambda *given: learning(*given) - {"head.bias"})
    assert sweep.measure(line)["outcome"] == "converted"  # it never learnt
    answers = iter([{"head.bias"}, set()])
    monkeypatch.setattr(sweep, "learning", lambda *given: next(answers))
    assert "head.bias" in sweep.measure(line)["lost"]


@pytest.mark.slow
def test_a_network_is_tried_once(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    output = tmp_path / "coverage.jsonl"
    flags = ["--output", str(output), "--only", "torchvision:resnet18"]
    here = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    for expected in (1, 0):
        done = subprocess.run(
            [sys.executable, str(SCRIPT), *flags],
            env=here,
            check=True,
            capture_output=True,
            text=True,
        )
        assert done.stdout.count("converted  torchvision:resnet18: 8 of m = 2") == expected
    (row,) = map(json.loads, output.read_text().splitlines())
    assert row["branches"] == 8 and row["normalising_after"] == 0
