"""Steps timed side by side: in turn, in another order every round, so that a machine whose speed
drifts slows all of them, and none always inherits the memory that the same other one left behind.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


def add_arguments(parser: argparse.ArgumentParser, rounds: int) -> None:
    """The options of every benchmark."""
    parser.add_argument("--rounds", type=int, default=rounds, help=f"default: {rounds}")
    parser.add_argument("--threads", type=int, default=2, help="default: 2")
    parser.add_argument("--json", type=Path, help="write the result there")


def compare(steps: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of each step, and its ratio to the first, after one round to warm up.

    Returns:
        By name: ``median`` and ``minimum`` in seconds, ``median_ratio`` of the ratios round by
        round, ``minimum_ratio`` of the minima.
    """
    order, times = random.Random(0), []
    for step in steps.values():
        step()
    for number in range(rounds):
        names = order.sample(list(steps), len(steps))
        times.append({name: _seconds(steps[name]) for name in names})
        print(f"round {number + 1}/{rounds}", end="\r", file=sys.stderr, flush=True)
    first = next(iter(steps))
    fastest = {name: min(row[name] for row in times) for name in steps}
    return {
        name: {
            "median": statistics.median(row[name] for row in times),
            "minimum": fastest[name],
            "median_ratio": statistics.median(row[name] / row[first] for row in times),
            "minimum_ratio": fastest[name] / fastest[first],
        }
        for name in steps
    }


def show(title: str, summary: Mapping[str, Mapping[str, float]]) -> None:
    """One line for each step."""
    print(f"\n{title}")
    for name, row in summary.items():
        print(
            "  {:28} median {:8.4f} s  minimum {:8.4f} s  ratio {:.3f}  of minima {:.3f}".format(
                name, *row.values()
            )
        )


def write(args: argparse.Namespace, results: Mapping[str, Any]) -> None:
    """The results, with settings and machine, as ``--json`` asks for."""
    if args.json:
        settings = {name: str(value) for name, value in vars(args).items()}
        everything = {"settings": settings, "machine": machine(), **results}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(everything, indent=2) + "\n")


def in_own_process(script: str, *options: object) -> Any:
    """What ``script`` prints as JSON in a process of its own, where memory is given back at once,
    so that peaks are those of the step and not of the allocator.
    """
    env = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=65536"}
    line = [sys.executable, script, *map(str, options)]
    run = subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True, env=env)
    return json.loads(run.stdout)


def peak_bytes(step: Callable[[], object]) -> int:
    """Bytes that a step takes at its peak, above what is held before."""
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    step()
    return _status("VmHWM") - before


def cuda_peak_bytes(step: Callable[[], object]) -> int:
    """The same on a GPU."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}: peaks are measured on Linux alone")


def machine() -> dict[str, Any]:
    """What the times were taken on."""
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_initialized() else None,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(": ", 1)[1] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _seconds(step: Callable[[], object]) -> float:
    start = time.perf_counter()
    step()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()  # a GPU works on when the call has returned
    return time.perf_counter() - start
