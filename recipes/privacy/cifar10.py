"""CIFAR-10 with differential privacy: ``fixup_`` beside Opacus's answer to BatchNorm, GroupNorm.

``python recipes/privacy/cifar10.py --images cifar10-jpeg.tar.xz --output runs/privacy.jsonl``
trains a small ResNet of torchvision's blocks by DP-SGD (Poisson sampling, every sample's gradient
clipped at 1, noise for ``--epsilon`` at delta 1e-5) once for each contestant, learning rate and
seed, and adds a line to ``--output`` for each. Choose the learning rate by the accuracy on
validation images, a tenth of the training set. Needs ``pip install opacus``.

- ``GroupNorm``: ``ModuleValidator.fix`` puts GroupNorm in the place of BatchNorm.
- ``fixup_``: converted, without a batch.
- ``fixup_, noise``: with ``calibrate=True`` on Gaussian noise. A batch of the training images
  would tell of them, and epsilon does not count that.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from opacus import PrivacyEngine
from opacus.validators import ModuleValidator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.resnet import BasicBlock

import fixup_core as fc
from fixup_core.privacy import grad_sample_module
from vision.data import CIFAR10

CONTESTANTS = ("GroupNorm", "fixup_", "fixup_, noise")
DELTA = 1e-5


class Block(BasicBlock):
    """torchvision's, but nothing in place: Opacus's hooks on a GroupNorm forbid that."""

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        branch = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(branch + shortcut)


def small_resnet(width: int, blocks: int) -> nn.Sequential:
    """A 3x3 stem of stride 2, three stages of ``blocks`` blocks, at 16x16, 8x8 and 4x4."""
    stem = nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False)
    layers: list[nn.Module] = [stem, nn.BatchNorm2d(width), nn.ReLU()]
    entering = width
    for leaving in (width, 2 * width, 4 * width):
        for _ in range(blocks):
            shortcut = None
            if entering != leaving:
                project = nn.Conv2d(entering, leaving, 1, stride=2, bias=False)
                shortcut = nn.Sequential(project, nn.BatchNorm2d(leaving))
            layers.append(Block(entering, leaving, leaving // entering, shortcut))
            entering = leaving
    head = nn.Linear(entering, 10)
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


def main() -> None:
    args = _parse()
    warnings.filterwarnings("ignore", module="opacus|torch")
    torch.set_num_threads(args.threads)
    train, *scored = _data(args.images)
    for seed in args.seeds:
        for lr in args.lrs:
            for contestant in args.contestants:
                row = _trained(contestant, lr, seed, train, scored, args)
                print(row, flush=True)
                with args.output.open("a") as out:
                    print(json.dumps(row), file=out)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--images", type=Path, help="CIFAR-10 as a tree of images, or an archive of one")
    add("--output", type=Path, required=True, help="a file; results are added as lines of JSON")
    add("--contestants", nargs="+", default=list(CONTESTANTS), choices=CONTESTANTS)
    add("--lrs", nargs="+", type=float, default=[1.0, 2.0, 4.0], help="default: 1 2 4")
    add("--seeds", nargs="+", type=int, default=[0], help="default: 0")
    add("--epsilon", type=float, default=8.0, help="default: 8")
    add("--epochs", type=int, default=1, help="default: 1")
    add("--batch", type=int, default=450, help="expected size (default: 450)")
    add("--width", type=int, default=16, help="channels of the first stage (default: 16)")
    add("--blocks", type=int, default=1, help="in each of the three stages (default: 1)")
    add("--threads", type=int, default=1, help="default: 1")
    return parser.parse_args()


def _data(root: Path) -> tuple[TensorDataset, TensorDataset, TensorDataset]:
    """45,000 images to train on, 5,000 to choose by, 10,000 to test on."""
    mean, std = (torch.tensor(c).view(3, 1, 1) for c in (CIFAR10.mean, CIFAR10.std))
    sets = []
    for train in (True, False):
        read = CIFAR10(root=root, crop=0, flip=False, download=False).load(train=train)
        sets.append(((read.images.float() / 255 - mean) / std, read.labels.long()))
    (images, labels), test = sets
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    edge = len(order) * 9 // 10
    first, last = order[:edge], order[edge:]
    return (
        TensorDataset(images[first], labels[first]),
        TensorDataset(images[last], labels[last]),
        TensorDataset(*test),
    )


def _network(contestant: str, args: argparse.Namespace) -> nn.Module:
    net = small_resnet(args.width, args.blocks)
    if contestant == "GroupNorm":
        return ModuleValidator.fix(net)
    noise = torch.randn(64, 3, 32, 32)
    fc.fixup_(net, example_inputs=noise, calibrate=contestant != "fixup_", verbose=False)
    return net


def _trained(
    contestant: str,
    lr: float,
    seed: int,
    train: TensorDataset,
    scored: list[TensorDataset],
    args: argparse.Namespace,
) -> dict[str, Any]:
    """One training; its weights, samples and noise come from the seed."""
    torch.manual_seed(seed)
    net = _network(contestant, args)
    torch.manual_seed(1000 + seed)
    groups = fc.param_groups(net, lr=lr, weight_decay=0.0)
    engine = PrivacyEngine()
    private, optimizer, loader = engine.make_private_with_epsilon(
        module=grad_sample_module(net),
        optimizer=torch.optim.SGD(groups, lr=lr),
        data_loader=DataLoader(train, batch_size=args.batch),
        epochs=args.epochs,
        target_epsilon=args.epsilon,
        target_delta=DELTA,
        max_grad_norm=1.0,
    )
    began, steps = time.perf_counter(), 0
    for _ in range(args.epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            F.cross_entropy(private(images), labels).backward()
            optimizer.step()
            steps += 1
    seconds = time.perf_counter() - began
    valid, test = (_accuracy(net.eval(), data) for data in scored)
    return {
        **{"contestant": contestant, "lr": lr, "seed": seed, "steps": steps},
        **{"validation": valid, "test": test},
        **{"epsilon": float(engine.get_epsilon(DELTA)), "noise": optimizer.noise_multiplier},
        **{"parameters": sum(p.numel() for p in net.parameters()), "seconds": seconds},
    }


@torch.no_grad()
def _accuracy(net: nn.Module, data: TensorDataset) -> float:
    right = sum(
        (net(images).argmax(1) == labels).sum().item()
        for images, labels in DataLoader(data, batch_size=500)
    )
    return right / len(data)


if __name__ == "__main__":
    main()
