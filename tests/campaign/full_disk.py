"""Trainings on a disk that fills up, in both halves: one line, and no checkpoint is harmed.

A tmpfs of some hundred kilobytes to a few megabytes stands for the disk; mounting one takes the
right to, and without it the attack is skipped.
"""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import torch

from tests.campaign.common import Ended, Half, campaign, halves, run


def attack(count: int, seed: int, folder: Path) -> tuple[int, int]:
    """Fill ``count`` disks with each half's training."""
    disk = folder / "disk"
    disk.mkdir()
    if not _mount(disk, 1 << 20):
        print("skipped: this user may not mount a tmpfs")
        return 0, 0
    _unmount(disk)
    rng = random.Random(seed)
    held = full = 0
    for half in halves(folder / "bin"):
        assert run(half.line(folder / half.name)).status == 0
        needed = sum(file.stat().st_size for file in (folder / half.name).rglob("*"))
        for _ in range(count):
            ended, harmed = _fill(half, disk, int(needed * rng.uniform(0.05, 1.1)))
            full += ended.status != 0
            if not harmed and (ended.status == 0 or ended.refused):
                held += 1
            else:
                print(f"{half.name}: harmed {harmed}, status {ended.status}, {ended.error[-600:]}")
    print(f"{full} of the disks filled up")
    return held, 2 * count


def _fill(half: Half, disk: Path, size: int) -> tuple[Ended, list[str]]:
    """How the training ends, and the checkpoints that cannot be loaded."""
    assert _mount(disk, size)
    try:
        ended = run(half.line(disk))
        saved = [file for file in disk.rglob("*") if file.suffix in (".pt", ".ckpt")]
        whole = [file for file in saved if not file.name.startswith(".tmp-")]
        return ended, [file.name for file in whole if not _loads(file)]
    finally:
        _unmount(disk)


def _loads(file: Path) -> bool:
    try:
        torch.load(file, map_location="cpu", weights_only=True)
    except Exception:
        return False
    return True


def _mount(disk: Path, size: int) -> bool:
    line = ["mount", "-t", "tmpfs", "-o", f"size={max(size, 1 << 16)}", "tmpfs", str(disk)]
    try:
        return not subprocess.run(line, capture_output=True).returncode
    except FileNotFoundError:
        return False


def _unmount(disk: Path) -> None:
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


if __name__ == "__main__":
    campaign(attack, count=10, closes="full disks answered by one line, no checkpoint harmed")
