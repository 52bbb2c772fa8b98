"""A trained language model of ``transformers``, its norms taken out, against it trained as long.

``python benchmarks/removal.py --text train.en --output runs/removal``
trains GPT-2 and Llama (4 layers, 128 wide) on the bytes of a text for ``--base`` steps; then goes
on for ``--steps`` from there in several ways: with the norms kept, and without, by each schedule.
Every finished training is a line of ``results.jsonl``; another start goes on behind it. ``--table``
prints those of this length: losses in nats on validation data, over bytes, and what the norms cost
in inference.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from networks import BLOCK, NETS, Data
from side_by_side import compare, machine
from torch import Tensor, nn
from torch.nn import functional as F

import fixup_core as fc

LANGUAGE_MODELS = ("transformers GPT-2", "transformers Llama")
WAYS: dict[str, dict[str, Any] | None] = {
    "norms kept": None,
    "taper": {"schedule": "taper"},
    "one by one": {"schedule": "one_by_one"},
    "at once": {"schedule": "at_once"},
    "taper, no anchor": {"schedule": "taper", "anchor": 0.0},
    "taper, distilled": {"schedule": "taper", "distil": 1.0},
}
"""How a training goes on: arguments of ``NormRemoval``."""
PERCENTILES = (0.5, 0.95, 0.99)


def main() -> None:
    args = _parse()
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / "results.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = [row for row in rows if (row["base"], row["steps"]) == (args.base, args.steps)]
    if args.table:
        _print_table(done)
        return
    args.images, args.batch = None, 64
    data = Data(args)
    for name in args.nets:
        for seed in range(args.seeds):
            for row in _measure(name, seed, data, args, done):
                with file.open("a") as out:
                    print(json.dumps(row | {"machine": machine()}), file=out)
                print(row, flush=True)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--text", type=Path, required=True, help="its last tenth is for validation")
    add("--output", type=Path, default=Path("runs/removal"), help="default: runs/removal")
    add("--nets", nargs="+", default=list(LANGUAGE_MODELS), choices=LANGUAGE_MODELS)
    add("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    add("--base", type=int, default=1500, help="steps with norms (default: 1500)")
    add("--steps", type=int, default=600, help="steps behind them (default: 600)")
    add("--seeds", type=int, default=2, help="default: 2")
    add("--rounds", type=int, default=15, help="of timing (default: 15)")
    add("--threads", type=int, default=2, help="default: 2")
    add("--table", action="store_true", help="print the results so far")
    return parser.parse_args()


def _measure(
    name: str, seed: int, data: Data, args: argparse.Namespace, done: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    known = {row["way"] for row in done if (row["net"], row["seed"]) == (name, seed)}
    missing = [way for way in args.ways if way not in known]
    if not missing:
        return
    row = {"net": name, "seed": seed, "base": args.base, "steps": args.steps}
    base = _base(name, seed, data, args)
    for way in missing:
        net = copy.deepcopy(base).train()
        removal = _removal(net, WAYS[way], data, args.steps)
        _train(net, 1e-3, data, args.steps, seed + 50, removal)
        net.eval()
        before = copy.deepcopy(net)
        net = removal.finish() if removal else net
        seconds = _seconds(base.eval(), net, data, args.rounds) if way == "taper" else None
        losses = _losses(net, data)
        yield {
            **row,
            "way": way,
            "loss": losses.mean().item(),
            "percentiles": torch.quantile(losses, torch.tensor(PERCENTILES)).tolist(),
            "unfolded": _losses(before, data).mean().item(),
            "logits": _logits_size(net, data),
            "seconds": seconds,
        }


def _base(name: str, seed: int, data: Data, args: argparse.Namespace) -> nn.Module:
    """Trained with its norms, or taken from what an earlier start has left."""
    file = args.output / f"{name.split()[-1]}_{args.base}_s{seed}.pt"
    torch.manual_seed(seed)
    net = NETS[name].make()
    if file.exists():
        net.load_state_dict(torch.load(file, weights_only=True))
    else:
        _train(net, 3e-3, data, args.base, seed, None)
        torch.save(net.state_dict(), file)
    return net.train()


def _removal(
    net: nn.Module, options: dict[str, Any] | None, data: Data, steps: int
) -> fc.NormRemoval | None:
    """In the first two thirds of the training; the rest is without norms."""
    if options is None:
        return None
    example = next(data.batches(0, 1))[0][:2]
    return fc.NormRemoval(net, example, steps=steps * 2 // 3, **options)


def _train(
    net: nn.Module, lr: float, data: Data, steps: int, seed: int, removal: fc.NormRemoval | None
) -> None:
    """AdamW, a linear warm-up and decay; the same batches for every way from a seed."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.05)
    warm = max(steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / (steps - warm))
    )
    for tokens, targets in data.batches(0, steps, seed):
        with torch.autocast("cpu", torch.bfloat16):
            logits = net(tokens)
        loss = F.cross_entropy(logits.float().flatten(0, -2), targets.flatten())
        if removal is not None:
            loss = loss + removal.loss(logits, tokens)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if removal is not None:
            removal.step()


@torch.no_grad()
def _losses(net: nn.Module, data: Data) -> Tensor:
    """Of every byte of the validation data, in nats."""
    found = []
    for tokens, targets in data.validation(0):
        logits = net(tokens).float().flatten(0, -2)
        found.append(F.cross_entropy(logits, targets.flatten(), reduction="none"))
    return torch.cat(found)


@torch.no_grad()
def _logits_size(net: nn.Module, data: Data) -> float:
    """Their root mean square."""
    return net(data.validation(0)[0][0]).float().square().mean().sqrt().item()


@torch.no_grad()
def _seconds(
    base: nn.Module, net: nn.Module, data: Data, rounds: int
) -> dict[str, dict[str, float]]:
    """Of inference, as it was and without norms."""
    tokens = data.validation(0)[0][0]
    assert tokens.size(1) == BLOCK
    return compare({"norms": lambda: base(tokens), "none": lambda: net(tokens)}, rounds)


def _print_table(rows: list[dict[str, Any]]) -> None:
    print("| network | way | loss | median | 95th | 99th | against norms kept | logits, RMS |")
    print("|" + "---|" * 8)
    for name in dict.fromkeys(row["net"] for row in rows):
        own = [row for row in rows if row["net"] == name]
        kept = {row["seed"]: row["loss"] for row in own if row["way"] == "norms kept"}
        for way in dict.fromkeys(row["way"] for row in own):
            these = [row for row in own if row["way"] == way]
            losses = [row["loss"] for row in these]
            more = [row["loss"] - kept[row["seed"]] for row in these if row["seed"] in kept]
            tails = [
                statistics.mean(p) for p in zip(*(r["percentiles"] for r in these), strict=True)
            ]
            cells = [f"{statistics.mean(losses):.3f}", *(f"{tail:.3f}" for tail in tails)]
            cells += [", ".join(f"{one:+.3f}" for one in more)]
            cells += [f"{statistics.mean(row['logits'] for row in these):.2f}"]
            print(f"| {name} | {way} | {' | '.join(cells)} |")
        times = [row["seconds"]["none"]["median_ratio"] for row in own if row["seconds"]]
        if times:
            print(
                f"inference of {name} without norms, ratio: {', '.join(f'{t:.3f}' for t in times)}"
            )


if __name__ == "__main__":
    main()
