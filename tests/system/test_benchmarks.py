"""The benchmarks run; what they measure is for ``make bench``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.conftest import ENVIRONMENT, ROOT


def test_the_step_benchmark_times_every_contestant(tmp_path: Path) -> None:
    sizes = {"layers": 1, "width": 16, "ffn": 16, "heads": 2, "words": 50, "rounds": 2}
    more = {"sentences": 4, "length": 5, "threads": 1, "json": tmp_path / "result.json"}
    flags = [str(part) for name, value in (sizes | more).items() for part in (f"--{name}", value)]
    subprocess.run(
        [sys.executable, "benchmarks/mt_step.py", *flags], cwd=ROOT, env=ENVIRONMENT, check=True
    )
    rows = json.loads((tmp_path / "result.json").read_text())["seconds"]
    assert len(rows) == 4 and all(row["minimum"] > 0 for row in rows.values())
