"""``recipes/privacy/cifar10.py`` as a user starts it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ENVIRONMENT, ROOT


@pytest.mark.slow
def test_every_contestant_spends_the_same_privacy(tmp_path: Path) -> None:
    pytest.importorskip("opacus")
    rng = np.random.default_rng(0)
    for i in range(40):
        file = tmp_path / "images" / ("test" if i % 4 == 0 else "train") / f"c{i % 2}" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file)
    result = tmp_path / "result.jsonl"
    flags = {"images": tmp_path / "images", "output": result, "batch": 9, "width": 4, "lrs": 0.5}
    subprocess.run(
        [sys.executable, str(ROOT / "recipes" / "privacy" / "cifar10.py")]
        + [str(part) for name, value in flags.items() for part in (f"--{name}", value)],
        cwd=tmp_path,  # where the packed images go
        env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
        check=True,
    )
    rows = [json.loads(line) for line in result.read_text().splitlines()]
    assert [row["contestant"] for row in rows] == ["GroupNorm", "fixup_", "fixup_, noise"]
    assert len({(row["epsilon"], row["steps"]) for row in rows}) == 1
    assert 7 < rows[0]["epsilon"] <= 8 and rows[0]["steps"] == 3
