"""What Fixup's scalars cost a ResNet: seconds, memory and bytes kept, side by side.

``python benchmarks/vision_step.py [--nets cifar_resnet32 --rounds 20 ...]`` compares, for a
training step (forward, loss, backward), for inference, and in float32 and bfloat16 (autocast), all
in channels_last:

- ``bare``: the same network without normalisation and without scalars;
- ``Fixup``: scalars fused (``fixup_core.fuse.ops``); ``folded``: by ``fixup_core.fuse.fold``;
- ``Fixup, plain``: every scalar a pass over its tensor, as the authors' code has it;
- ``BatchNorm``; ``nf``, whose weights are standardised in every step.

``--device cuda`` measures on a GPU, where peaks are those of PyTorch's allocator.

Bytes are those of distinct tensors kept for the backward pass; peaks are of a training step in a
process of its own, above what the process held before, each large tensor mapped by itself: else the
holes that the allocator leaves would be measured (up to a third more, for all contestants).
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from side_by_side import (
    add_arguments,
    compare,
    cuda_peak_bytes,
    in_own_process,
    peak_bytes,
    show,
    write,
)
from torch import Tensor, nn
from torch.nn import functional as F

from fixup_core.fuse import ops
from fixup_core.fuse.fold import fold
from vision.nets import build_net

SHAPES = {
    "cifar_resnet8": (16, 32),
    "cifar_resnet32": (128, 32),
    "cifar_resnet110": (128, 32),
    "imagenet_resnet50": (16, 224),
}
"""Name of the network, images in a batch, side of an image; the first is for trying things out."""

METHODS = {
    "bare": "fixup_rule2",
    "Fixup": "fixup",
    "Fixup, plain": "fixup",
    "BatchNorm": "batchnorm",
    "nf": "nf",
}
PRECISIONS = ("float32", "bfloat16")


class Setting(NamedTuple):
    """What a contestant runs in, and on what."""

    precision: str
    device: str


def main() -> None:
    args = _parse()
    torch.set_num_threads(args.threads)
    if args.peak:
        net, contestant, precision = args.peak
        print(json.dumps(_peak(net, contestant, Setting(precision, args.device))))
        return
    results: dict[str, Any] = {}
    for net in args.nets:
        for precision in PRECISIONS:
            title = f"{net}, {SHAPES[net][0]} images of {SHAPES[net][1]}, {precision}"
            results[title] = found = _measure(net, Setting(precision, args.device), args)
            show(f"{title}: training step", found["train"])
            show(f"{title}: inference", found["inference"])
            for kind in ("kept", "peak"):
                first = found[kind]["bare"]
                row = {name: f"{value / first:.3f}" for name, value in found[kind].items()}
                print(f"\n{title}: bytes {kind}, ratio to bare ({first / 1e6:.1f} MB)\n  {row}")
    write(args, results)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nets", nargs="+", default=list(SHAPES)[1:], choices=list(SHAPES))
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: cpu")
    parser.add_argument("--peak", nargs=3, metavar=("NET", "CONTESTANT", "PRECISION"))
    add_arguments(parser, rounds=20)
    return parser.parse_args()


def _measure(name: str, setting: Setting, args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    nets = {c: _net(name, method).to(setting.device) for c, method in METHODS.items()}
    images, labels = (part.to(setting.device) for part in _batch(name))
    train = {c: _training(net, images, labels, c, setting) for c, net in nets.items()}
    folded = {c: net.eval() for c, net in nets.items()}
    summary = {"train": compare(train, args.rounds)}
    infer = {c: _inference(net, images, c, setting) for c, net in folded.items()}
    infer["Fixup, folded"] = _inference(fold(nets["Fixup"]), images, "folded", setting)
    summary["inference"] = compare(infer, args.rounds)
    kept = {c: _kept(net.train(), images, c, setting) for c, net in nets.items()}
    peak = {c: _peak_elsewhere(name, c, setting, args.threads) for c in METHODS}
    return {**summary, "kept": kept, "peak": peak}


def _net(name: str, method: str) -> nn.Module:
    torch.manual_seed(0)
    net = build_net(name, method=method)
    with torch.no_grad():  # a network that has learnt something, not one of zeros
        for parameter in net.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return net.to(memory_format=torch.channels_last)


def _batch(name: str, count: int = 0) -> tuple[Tensor, Tensor]:
    images, side = SHAPES[name]
    count = count or images
    batch = torch.randn(count, 3, side, side).contiguous(memory_format=torch.channels_last)
    return batch, torch.arange(count) % 10


@contextlib.contextmanager
def _route(contestant: str, setting: Setting) -> Iterator[None]:
    plain = ops.plain_route() if contestant.endswith("plain") else contextlib.nullcontext()
    half = setting.precision == "bfloat16"
    with plain, torch.autocast(setting.device, torch.bfloat16, enabled=half):
        yield


def _training(
    net: nn.Module, images: Tensor, labels: Tensor, contestant: str, setting: Setting
) -> Callable[[], None]:
    def step() -> None:
        net.train().zero_grad()
        with _route(contestant, setting):
            logits = net(images)
        F.cross_entropy(logits.float(), labels).backward()

    return step


def _inference(
    net: nn.Module, images: Tensor, contestant: str, setting: Setting
) -> Callable[[], Tensor]:
    def step() -> Tensor:
        with torch.no_grad(), _route(contestant, setting):
            return net.eval()(images)

    return step


def _kept(net: nn.Module, images: Tensor, contestant: str, setting: Setting) -> int:
    """Bytes of the distinct storages that the backward pass keeps."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    keep = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with keep, _route(contestant, setting):
        held = net(images)  # or memory would be given back, and its address used again
    del held
    return sum(storages.values())


def _peak_elsewhere(name: str, contestant: str, setting: Setting, threads: int) -> int:
    options = ("--threads", threads, "--device", setting.device)
    peak = ("--peak", name, contestant, setting.precision)
    return in_own_process(__file__, *options, *peak)


def _peak(name: str, contestant: str, setting: Setting) -> int:
    """Bytes that a training step takes at its peak, above what was held before."""
    net = _net(name, METHODS[contestant]).to(setting.device)
    images, labels = (part.to(setting.device) for part in _batch(name))
    _training(net, images[:2], labels[:2], contestant, setting)()
    step = _training(net, images, labels, contestant, setting)
    return peak_bytes(step) if setting.device == "cpu" else cuda_peak_bytes(step)


if __name__ == "__main__":
    main()
