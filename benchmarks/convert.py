"""Other people's networks, as they are and after ``fixup_``: speed, and what a small budget gives.

``python benchmarks/convert.py --images cifar10-jpeg.tar.xz --text train.en --output runs/convert``
trains each network for ``--steps`` steps, as it is and converted (``calibrate=True``), on CIFAR-10
(a tree or an archive of images); the language models on the bytes of a text, converted with an
output that starts at the bytes' frequencies. Each has four trainings from one seed: as it is and by
``fixup_adam`` with four learning rates; by ``fixup`` with the two in the middle, and with the
product of a branch's factors as it is and tripled. The best setting, by the loss on validation
data, is trained from the other ``--seeds`` too. Every finished training is a line of
``results.jsonl``; another start goes on behind it. ``--table`` prints all.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from networks import NETS, Data, Network
from side_by_side import compare, machine
from torch import Tensor, nn
from torch.nn import functional as F

import fixup_core as fc

AS_IT_IS, FIXUP = "as it is", "fixup_"
ADAM = "fixup_, fixup_adam"
"""Converted with ``method="fixup_adam"``, at all four learning rates."""
UNCALIBRATED = "fixup_, no batch"
"""Converted without ``calibrate=True``."""
NO_FREQUENCIES = "fixup_, no frequencies"
"""A language model whose output does not start at the bytes' frequencies."""
CONTESTANTS = (AS_IT_IS, FIXUP, ADAM, UNCALIBRATED, NO_FREQUENCIES)
BASE = 8.0
"""c of ``fixup_adam``."""
SCALES = (1.0, 3.0)
"""Of the product of a branch's factors: the rule has ``scale / sqrt(L)``."""


def main() -> None:
    args = _parse()
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / "results.jsonl"
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    if args.table:
        _print_table(done)
        return
    data = Data(args)
    for name in args.nets:
        for row in _measure(name, data, args, done):
            done.append(row)
            with file.open("a") as out:
                print(json.dumps(row | {"machine": machine()}), file=out)
            print(row, flush=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--images", type=Path, help="CIFAR-10 as a tree of images, or an archive of one")
    add("--text", type=Path, help="a text; its last tenth is for validation")
    add("--output", type=Path, default=Path("runs/convert"), help="default: runs/convert")
    add("--nets", nargs="+", default=list(NETS), choices=list(NETS))
    add("--steps", type=int, default=150, help="default: 150; 0: times alone")
    add("--seeds", type=int, default=3, help="of the best setting (default: 3)")
    add("--batch", type=int, default=64, help="default: 64")
    add("--rounds", type=int, default=5, help="of timing (default: 5; 0: no times)")
    add("--contestants", nargs="+", default=[AS_IT_IS, FIXUP], choices=CONTESTANTS)
    add("--rates", nargs="+", type=float, help="these alone, and the rules as they are")
    add("--threads", type=int, default=2, help="default: 2")
    add("--table", action="store_true", help="print the results so far")
    return parser.parse_args()


def _measure(
    name: str, data: Data, args: argparse.Namespace, done: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    entry = NETS[name]
    if args.rounds and not _rows(done, name, "seconds"):
        nets = {contestant: _net(entry, contestant, data) for contestant in (AS_IT_IS, FIXUP)}
        seconds = compare({c: _step(net, entry, data) for c, net in nets.items()}, args.rounds)
        yield {"net": name, "contestant": "seconds", "seconds": seconds}
    for contestant in args.contestants if args.steps else ():
        trained = [row for row in _rows(done, name, contestant) if row["steps"] == args.steps]

        def train(lr: float, scale: float, seed: int, contestant: str = contestant) -> Any:
            net = _net(entry, contestant, data, scale, seed)
            highest = _train(net, lr, data.batches(entry.side, args.steps, seed), args.steps)
            loss, score = math.inf, 0.0
            if math.isfinite(highest):
                loss, score = _score(net.eval(), data.validation(entry.side))
            return {
                **{"net": name, "contestant": contestant, "lr": lr, "scale": scale, "seed": seed},
                **{"steps": args.steps, "loss": loss, "score": score, "highest": highest},
            }

        known = {(row["lr"], row["scale"], row["seed"]) for row in trained}
        for lr, scale in _settings(entry, contestant, args.rates):
            if (lr, scale, 0) not in known:
                trained.append(train(lr, scale, 0))
                yield trained[-1]
        best = _best(trained)
        for seed in range(1, args.seeds):
            if (best["lr"], best["scale"], seed) not in known:
                yield train(best["lr"], best["scale"], seed)


def _settings(
    entry: Network, contestant: str, rates: list[float] | None
) -> list[tuple[float, float]]:
    """Learning rates and scales of the rule, the same number for each contestant."""
    if rates or contestant in (AS_IT_IS, ADAM):
        return [(lr, BASE if contestant == ADAM else 1.0) for lr in rates or entry.rates]
    return [(lr, scale) for lr in entry.rates[1:3] for scale in SCALES]


def _rows(rows: list[dict[str, Any]], name: str, contestant: str) -> list[dict[str, Any]]:
    return [row for row in rows if (row["net"], row["contestant"]) == (name, contestant)]


def _best(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The setting that is chosen, by the first seed."""
    return min((row for row in rows if row["seed"] == 0), key=_finite_loss)


def _net(
    entry: Network, contestant: str, data: Data, scale: float = 1.0, seed: int = 0
) -> nn.Module:
    torch.manual_seed(seed)
    net = entry.make().to(memory_format=torch.channels_last)
    if contestant != AS_IT_IS:
        example = next(data.batches(entry.side, 1))[0]
        fc.fixup_(
            net,
            example_inputs=example,
            calibrate=contestant != UNCALIBRATED,
            method=fc.METHODS["fixup_adam"].with_base(scale)
            if contestant == ADAM
            else _method(scale),
            verbose=False,
        )
        if not entry.side and contestant != NO_FREQUENCIES:
            fc.start_at_frequencies_(net, data.text)
    return net.train()


def _method(scale: float) -> fc.Method:
    """Fixup with ``scale / sqrt(L)`` for the product of a branch's factors."""

    def factor(place: fc.Place) -> float:
        m = place.branch.layers_per_branch
        return scale ** (1 / (m - 1)) * fc.branch_scale(place.num_branches, m)

    return replace(fc.METHODS["fixup"], factor=factor)


def _loss(net: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(inputs)
    return F.cross_entropy(logits.float().flatten(0, -2), labels.flatten())


def _step(net: nn.Module, entry: Network, data: Data) -> Callable[[], None]:
    net = copy.deepcopy(net)
    inputs, labels = next(data.batches(entry.side, 1))

    def step() -> None:
        net.zero_grad()
        _loss(net, inputs, labels).backward()

    return step


def _train(net: nn.Module, lr: float, batches: Any, steps: int) -> float:
    """AdamW with a linear warm-up and decay; the highest loss on the way, inf where it is none."""
    highest = 0.0
    optimizer = torch.optim.AdamW(fc.param_groups(net, lr=lr, weight_decay=0.05))
    warm = max(steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / (steps - warm))
    )
    for inputs, labels in batches:
        optimizer.zero_grad()
        loss = _loss(net, inputs, labels)
        if not loss.isfinite():
            return math.inf
        highest = max(highest, loss.item())
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return highest


@torch.no_grad()
def _score(net: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    losses, right = [], []
    for inputs, labels in batches:
        with torch.autocast("cpu", torch.bfloat16):
            logits = net(inputs).float().flatten(0, -2)
        losses.append(F.cross_entropy(logits, labels.flatten()).item())
        right.append((logits.argmax(-1) == labels.flatten()).float().mean().item())
    return sum(losses) / len(losses), sum(right) / len(right)


def _finite_loss(row: dict[str, Any]) -> float:
    return row["loss"] if math.isfinite(row["loss"]) else math.inf


def _print_table(rows: list[dict[str, Any]]) -> None:
    names = [name for name in CONTESTANTS if any(row["contestant"] == name for row in rows)]
    print(f"| network | step, ratio | loss: {' | '.join(names)} | accuracy: {' | '.join(names)} |")
    print("|" + "---|" * (2 + 2 * len(names)))
    for name in dict.fromkeys(row["net"] for row in rows):
        timed = _rows(rows, name, "seconds")
        ratio = f"{timed[-1]['seconds']['fixup_']['median_ratio']:.2f}" if timed else ""
        found = [_of_best_setting(_rows(rows, name, contestant)) for contestant in names]
        losses = [_spread([row["loss"] for row in own]) for own in found]
        scores = [f"{100 * _mean([r['score'] for r in own]):.1f} %" if own else "" for own in found]
        print(f"| {' | '.join([name, ratio, *losses, *scores])} |")


def _of_best_setting(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    best = _best(rows) if rows else {}
    return [row for row in rows if (row["lr"], row["scale"]) == (best["lr"], best["scale"])]


def _mean(numbers: list[float]) -> float:
    return sum(numbers) / len(numbers)


def _spread(numbers: list[float]) -> str:
    """The mean, and in brackets the smallest and the largest."""
    if len(numbers) < 2:
        return "".join(f"{number:.3f}" for number in numbers)
    return f"{_mean(numbers):.3f} ({min(numbers):.3f}-{max(numbers):.3f})"


if __name__ == "__main__":
    main()
