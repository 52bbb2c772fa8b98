"""A small sample of each attack of ``make campaign``, as it is run."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.conftest import ENVIRONMENT, ROOT

SAMPLES = {
    "kills": 1,
    "writes": 1,
    "full_disk": 1,
    "broken_files": 1,
    "archives": 2,
    "bad_lines": 12,
}


@pytest.mark.parametrize("name", SAMPLES)
def test_a_sample(name: str) -> None:
    line = [sys.executable, "-m", f"tests.campaign.{name}", "--count", str(SAMPLES[name])]
    done = subprocess.run(
        line, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    figure = re.fullmatch(r"(\d+)/(\d+) .* \(\d+ s\)", done.stdout.splitlines()[-1])
    assert figure is not None and figure[1] == figure[2]
    skipped = "skipped: " in done.stdout
    assert skipped or int(figure[2]) >= SAMPLES[name]


def test_the_table_holds_a_hundred_lines() -> None:
    lines = (ROOT / "tests" / "campaign" / "bad_lines.txt").read_text().splitlines()
    found = [line for line in lines if not line.startswith("#")]
    assert len(found) == len(set(found)) == 100
