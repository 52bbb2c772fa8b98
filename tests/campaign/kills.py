"""kill -9 at random moments of a training, in both halves; resumed, it must end as if never killed.

``python -m tests.campaign.kills --count 20``: 20 kills in each half.
"""

from __future__ import annotations

import random
import time
from pathlib import Path

from tests.campaign.common import Half, bit_equal, campaign, halves, run, start


def attack(count: int, seed: int, folder: Path) -> tuple[int, int]:
    """Kill ``count`` runs of each half."""
    rng = random.Random(seed)
    held = 0
    for half in halves(folder / "bin"):
        began = time.monotonic()
        whole = run(half.line(folder / half.name))
        assert whole.status == 0, whole.error[-2000:]
        seconds = time.monotonic() - began
        ends = [
            _resumes(half, folder, f"{half.name}{i}", rng.uniform(0, seconds)) for i in range(count)
        ]
        print(f"{half.name}: {sum(ends)}/{count} resumed bit-equal", flush=True)
        held += sum(ends)
    return held, 2 * count


def _resumes(half: Half, folder: Path, name: str, seconds: float) -> bool:
    child = start(half.line(folder / name))
    time.sleep(seconds)
    child.kill()
    child.wait()
    resumed = run(half.line(folder / name))
    if resumed.status:
        print(f"{name}, killed after {seconds:.2f} s: {resumed.error[-500:]}")
        return False
    return bit_equal(half.state(folder / half.name), half.state(folder / name))


if __name__ == "__main__":
    campaign(attack, count=20, closes="resumed bit-equal")
