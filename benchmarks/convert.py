"""Other people's networks, as they are and after ``fixup_``: speed, and what a small budget gives.

``python benchmarks/convert.py --images cifar10-jpeg.tar.xz --text train.en --output runs/convert``
trains each network for ``--steps`` steps on CIFAR-10 (a tree or an archive of images; the
Transformer on the bytes of a text), as it is and converted, from the same seed, with every learning
rate of a short list, and keeps what the best one reaches on validation data. Every finished
training is a line of ``results.jsonl``; another start goes on behind it. ``--table`` prints all.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from side_by_side import compare, machine
from torch import Tensor, nn
from torch.nn import functional as F

import fixup_core as fc
from vision.data.modules import CIFAR10

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.core import foreign

CONTESTANTS = ("as it is", "fixup_")
KINDS = ("seconds", *CONTESTANTS)
SGD, ADAM, VIT = (0.1, 0.2, 0.4), (0.001, 0.003, 0.008), (0.0001, 0.0003, 0.001)
BLOCK = 64
"""Bytes that the language model reads at a time."""


def _timm(name: str, **options: Any) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=10, **options)


class ByteModel(nn.Module):
    """``nn.TransformerEncoder`` on bytes, each predicted from those before it."""

    def __init__(self, depth: int = 4, width: int = 128) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, width), nn.Embedding(BLOCK, width)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth)
        self.head = nn.Linear(width, 256)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(BLOCK))

    def forward(self, text: Tensor) -> Tensor:
        x = self.bytes(text) + self.places.weight
        return self.head(self.encoder(x, mask=self.mask, is_causal=True))


@dataclass(frozen=True)
class Entry:
    """A network, how large its images are (0: text), its learning rates, AdamW's or SGD's."""

    make: Callable[[], nn.Module]
    side: int
    rates: tuple[float, ...]

    @property
    def adam(self) -> bool:
        return self.rates is not SGD


tv = torchvision.models
NETS = {
    "torchvision resnet18": Entry(lambda: tv.resnet18(num_classes=10), 32, SGD),
    "torchvision resnet50": Entry(lambda: tv.resnet50(num_classes=10), 32, SGD),
    "timm resnet50d": Entry(lambda: _timm("resnet50d"), 32, SGD),
    "torchvision convnext_tiny": Entry(lambda: tv.convnext_tiny(num_classes=10), 32, ADAM),
    "torchvision vit_b_16": Entry(lambda: tv.vit_b_16(num_classes=10, image_size=32), 32, VIT),
    "timm vit_tiny": Entry(
        lambda: _timm("vit_tiny_patch16_224", img_size=32, patch_size=8), 32, VIT
    ),
    "nn.TransformerEncoder": Entry(ByteModel, 0, ADAM),
    "PreActivation": Entry(foreign.PreActivation, 32, SGD),
    "Separable": Entry(foreign.Separable, 32, SGD),
    "GatedMlp": Entry(foreign.GatedMlp, 32, ADAM),
}


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
        for row in _measure(name, data, args, {_key(row) for row in done}):
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
    add("--batch", type=int, default=64, help="default: 64")
    add("--rounds", type=int, default=5, help="of timing (default: 5)")
    add("--threads", type=int, default=2, help="default: 2")
    add("--table", action="store_true", help="print the results so far")
    return parser.parse_args()


class Data:
    """Batches of training data, and one set of validation data."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.batch = args.batch
        if args.images:
            images = CIFAR10(root=args.images, crop=0, flip=False, download=False).load(train=True)
            mean = torch.tensor(CIFAR10.mean).view(3, 1, 1)
            std = torch.tensor(CIFAR10.std).view(3, 1, 1)
            order = torch.randperm(len(images.labels), generator=torch.Generator().manual_seed(0))
            self.images = (images.images[order].float() / 255 - mean) / std
            self.labels = images.labels[order].long()
        if args.text:
            self.text = torch.tensor(list(args.text.read_bytes()))

    def batches(self, side: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The same in every run."""
        generator = torch.Generator().manual_seed(1)
        for _ in range(steps):
            yield self._drawn(side, generator, valid=False)

    def validation(self, side: int) -> list[tuple[Tensor, Tensor]]:
        """2,000 images, or as many stretches of text."""
        generator = torch.Generator().manual_seed(2)
        return [self._drawn(side, generator, valid=True) for _ in range(2000 // self.batch)]

    def _drawn(self, side: int, generator: torch.Generator, valid: bool) -> tuple[Tensor, Tensor]:
        size = len(self.images) if side else len(self.text) - BLOCK - 1
        edge = size * 9 // 10
        low, high = (edge, size) if valid else (0, edge)
        chosen = torch.randint(low, high, (self.batch,), generator=generator)
        if side:
            images = F.interpolate(self.images[chosen], size=(side, side))
            return images.contiguous(memory_format=torch.channels_last), self.labels[chosen]
        text = self.text[chosen[:, None] + torch.arange(BLOCK + 1)]
        return text[:, :-1], text[:, 1:]


def _measure(
    name: str, data: Data, args: argparse.Namespace, done: set[tuple[Any, ...]]
) -> Iterator[dict[str, Any]]:
    entry = NETS[name]
    nets = {contestant: _net(entry, contestant, data) for contestant in CONTESTANTS}
    if (name, "seconds", 0.0) not in done:
        seconds = compare({c: _step(net, entry, data) for c, net in nets.items()}, args.rounds)
        yield {"net": name, "contestant": "seconds", "lr": 0.0, "seconds": seconds}
    for contestant in CONTESTANTS if args.steps else ():
        for lr in entry.rates:
            if (name, contestant, lr) not in done:
                loss, score = _train(_net(entry, contestant, data), entry, lr, data, args.steps)
                yield {
                    **{"net": name, "contestant": contestant, "lr": lr, "steps": args.steps},
                    **{"loss": loss, "score": score},
                }


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["net"], row["contestant"], row["lr"]


def _net(entry: Entry, contestant: str, data: Data) -> nn.Module:
    torch.manual_seed(0)
    net = entry.make().to(memory_format=torch.channels_last)
    if contestant == "fixup_":
        example = next(data.batches(entry.side, 1))[0][:4]
        fc.fixup_(net, example_inputs=example, verbose=False)
    return net.train()


def _loss(net: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = net(inputs)
    return F.cross_entropy(logits.float().flatten(0, -2), labels.flatten())


def _step(net: nn.Module, entry: Entry, data: Data) -> Callable[[], None]:
    net = copy.deepcopy(net)
    inputs, labels = next(data.batches(entry.side, 1))

    def step() -> None:
        net.zero_grad()
        _loss(net, inputs, labels).backward()

    return step


def _train(net: nn.Module, entry: Entry, lr: float, data: Data, steps: int) -> tuple[float, float]:
    """Validation loss and accuracy after the last step of a linear warm-up and decay."""
    groups = fc.param_groups(net, lr=lr, weight_decay=0.05 if entry.adam else 5e-4)
    optimizer: Any = (
        torch.optim.AdamW(groups) if entry.adam else torch.optim.SGD(groups, momentum=0.9)
    )
    warm = max(steps // 10, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, (steps - step) / (steps - warm))
    )
    for inputs, labels in data.batches(entry.side, steps):
        optimizer.zero_grad()
        _loss(net, inputs, labels).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return _score(net.eval(), data.validation(entry.side))


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
    print("| network | step, ratio | loss: as it is | `fixup_` | accuracy: as it is | `fixup_` |")
    print("|---|---|---|---|---|---|")
    for name in dict.fromkeys(row["net"] for row in rows):
        found = {c: [r for r in rows if (r["net"], r["contestant"]) == (name, c)] for c in KINDS}
        if all(found.values()):
            seconds = found["seconds"][0]["seconds"]["fixup_"]["median_ratio"]
            best = [min(found[c], key=_finite_loss) for c in CONTESTANTS]
            losses = " | ".join(f"{row['loss']:.3f}" for row in best)
            scores = " | ".join(f"{100 * row['score']:.1f} %" for row in best)
            print(f"| {name} | {seconds:.2f} | {losses} | {scores} |")


if __name__ == "__main__":
    main()
