"""kill -9 at the n-th file that a training opens to write, renames or removes, in both halves.

``python -m tests.campaign.writes --count 20``: 20 of its writes in each half, drawn at random.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from tests.campaign.common import Half, bit_equal, campaign, halves, run

WRITING = os.O_WRONLY | os.O_RDWR


def attack(count: int, seed: int, folder: Path) -> tuple[int, int]:
    """Kill ``count`` runs of each half."""
    rng = random.Random(seed)
    held = total = 0
    for half in halves(folder / "bin"):
        counted = folder / "counted"
        counted.unlink(missing_ok=True)
        whole = run(half.line(folder / half.name), _at_writes(folder, counted))
        assert whole.status == 0, whole.error[-2000:]
        writes = counted.stat().st_size
        chosen = sorted(rng.sample(range(1, writes + 1), min(count, writes)))
        ends = [_resumes(half, folder, number) for number in chosen]
        print(f"{half.name}: {sum(ends)}/{len(ends)} of {writes} writes resumed bit-equal")
        held, total = held + sum(ends), total + len(ends)
    return held, total


def _at_writes(folder: Path, counted: Path, last: int = 0) -> Callable[[], None]:
    """Count the writes below ``folder``, a byte each, and kill the process at number ``last``."""

    def watch() -> None:
        own, file = os.getpid(), os.open(counted, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        done = 0

        def hook(event: str, given: tuple) -> None:
            nonlocal done
            writes = event in ("os.rename", "os.remove", "os.mkdir") or (
                event == "open" and isinstance(given[2], int) and given[2] & WRITING
            )
            if writes and str(given[0]).startswith(str(folder)) and os.getpid() == own:
                done += 1
                os.write(file, b".")
                if done == last:
                    os.kill(own, signal.SIGKILL)

        sys.addaudithook(hook)

    return watch


def _resumes(half: Half, folder: Path, number: int) -> bool:
    place = folder / f"{half.name}{number}"
    killed = run(half.line(place), _at_writes(folder, folder / "counted", number))
    resumed = run(half.line(place))
    if killed.status != -signal.SIGKILL or resumed.status:
        print(f"{half.name}, write {number}: {killed.status}, then {resumed.error[-500:]}")
        return False
    return bit_equal(half.state(folder / half.name), half.state(place))


if __name__ == "__main__":
    campaign(attack, count=20, closes="killed at a write and resumed bit-equal")
