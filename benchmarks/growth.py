"""Seconds and memory of a training step against depth, and what it takes to build 10,000 layers.

``python benchmarks/growth.py [--depths 20 56 110 218 434]`` trains CIFAR ResNets of Fixup, with all
activations kept and with checkpointing (``checkpointing: true``), on one batch of random images.
The exponents are slopes of logarithms: 1 is linear growth, 0.5 that of a square root. The memory is
a step's peak above what was held before it, which includes the weights' gradients.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from side_by_side import add_arguments, compare, in_own_process, peak_bytes, show, write
from torch.nn import functional as F

from vision.nets import build_net

CONTESTANTS = {"all kept": False, "checkpointing": True}
TEN_THOUSAND = "cifar_resnet10004"


def main() -> None:
    args = _parse()
    torch.set_num_threads(args.threads)
    if args.one:
        print(json.dumps(_one(args.one, args)))
        return
    rows = {depth: _measure(depth, args) for depth in args.depths}
    growth = {name: _growth(rows, name) for name in CONTESTANTS}
    for name, found in growth.items():
        print(f"{name}: seconds grow as depth^{found['seconds']:.2f}, ", end="")
        print(f"memory as depth^{found['peak']:.2f}")
    seconds = _elsewhere("build", args)
    print(f"{TEN_THOUSAND} is built and initialised in {seconds:.1f} s")
    write(args, {"depths": rows, "growth": growth, "build_seconds": seconds})


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--depths", nargs="+", type=int, default=[20, 56, 110, 218, 434], help="6n + 2")
    add("--images", type=int, default=32, help="in a batch (default: 32)")
    add("--one", nargs="+", help=argparse.SUPPRESS)
    add_arguments(parser, rounds=5)
    return parser.parse_args()


def _measure(depth: int, args: argparse.Namespace) -> dict[str, Any]:
    steps = {name: _step(depth, args.images, keeps) for name, keeps in CONTESTANTS.items()}
    seconds = compare(steps, args.rounds)
    peak = {name: _elsewhere(f"{depth} {name}", args) for name in CONTESTANTS}
    show(f"{depth} layers, {args.images} images", seconds)
    print("  peak: " + ", ".join(f"{name} {value / 1e6:.1f} MB" for name, value in peak.items()))
    return {"seconds": seconds, "peak": peak}


def _step(depth: int, images: int, checkpointing: bool) -> Callable[[], None]:
    torch.manual_seed(0)
    net = build_net(f"cifar_resnet{depth}", method="fixup", checkpointing=checkpointing)
    net = net.to(memory_format=torch.channels_last).train()
    batch = torch.randn(images, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(images) % 10

    def step() -> None:
        net.zero_grad()
        F.cross_entropy(net(batch), labels).backward()

    return step


def _elsewhere(what: str, args: argparse.Namespace) -> Any:
    options = ["--threads", args.threads, "--images", args.images, "--one", *what.split(" ", 1)]
    return in_own_process(__file__, *options)


def _one(what: Sequence[str], args: argparse.Namespace) -> float:
    if what[0] == "build":
        start = time.perf_counter()
        build_net(TEN_THOUSAND, method="fixup")
        return time.perf_counter() - start
    depth, name = what
    _step(int(depth), 2, CONTESTANTS[name])()
    return peak_bytes(_step(int(depth), args.images, CONTESTANTS[name]))


def _growth(rows: Mapping[int, Any], name: str) -> dict[str, float]:
    depths = [math.log(depth) for depth in rows]
    return {
        "seconds": _slope(depths, [math.log(r["seconds"][name]["median"]) for r in rows.values()]),
        "peak": _slope(depths, [math.log(row["peak"][name]) for row in rows.values()]),
    }


def _slope(x: Sequence[float], y: Sequence[float]) -> float:
    middle, level = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - middle) * (b - level) for a, b in zip(x, y, strict=True))
    return above / sum((a - middle) ** 2 for a in x)


if __name__ == "__main__":
    main()
