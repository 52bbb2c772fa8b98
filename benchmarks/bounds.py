"""The figure and numbers of docs/theory.md: ``python benchmarks/bounds.py``.

ResNets without normalisation as He draws them (method ``none``) against Fixup, on scikit-learn's
handwritten digits: their gradients and the lower bounds of the theory, over depth at
initialisation, along the blocks of one network, and in training. Half a minute on one core.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

from fixup_core import param_groups
from fixup_core.measure.bounds import BoundTable, activation_bounds, euler_identity, gradient_bounds
from fixup_core.measure.figures import Curve, Panel, draw
from fixup_core.measure.homogeneous import homogeneous_sets, is_positively_homogeneous
from vision.nets import build_net

METHODS = {"none": "He, no normalisation", "fixup": "Fixup"}
SEEDS = 3
RATE = 0.05

SHORTCUT, *CONVS = (f"stages.1.0.{n}.weight" for n in ("shortcut.conv", "convs.0", "convs.1"))
ALONE: dict[str, Any] = {
    "stem alone": ["stem.conv.weight"],
    "shortcut alone": [SHORTCUT],
    "shortcut, conv 0": [SHORTCUT, CONVS[0]],
    "shortcut, conv 1": [SHORTCUT, CONVS[1]],
    "shortcut, both": [SHORTCUT, *CONVS],
}
"""Weights without the biases that follow: homogeneous, or not, where these are 0."""

Data = tuple[Tensor, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--file", type=Path, default=Path("docs/bounds.png"), help="the figure")
    parser.add_argument("--depths", type=int, nargs="+", default=(8, 14, 20, 32, 44, 56, 80, 110))
    parser.add_argument("--steps", type=int, default=60, help="of the training")
    args = parser.parse_args()
    torch.manual_seed(0)
    data = _digits(64)
    _sets(data)
    draw([_over_depth(args.depths, data), _over_blocks(data), _in_training(args.steps)], args.file)


def _digits(count: int) -> Data:
    images, labels = load_digits(return_X_y=True)
    chosen = torch.randperm(len(labels))[:count]
    pixels = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 8 - 1
    return pixels[chosen], torch.tensor(labels)[chosen]


def _net(depth: int, method: str, **options: Any) -> Any:
    return build_net(f"cifar_resnet{depth}", method=method, in_channels=1, **options)


def _sets(data: Data) -> None:
    """The paper's sets in one network, in float64; the identity on each."""
    images, labels = data[0].double(), data[1]
    for method in ("none", "fixup"):
        net = _net(20, method, shortcut="B").double()
        with torch.no_grad():
            for parameter in net.parameters() if method == "fixup" else ():
                parameter.add_(0.05 * torch.randn_like(parameter))  # as after some training
        print(f"\ncifar_resnet20, {method}, shortcut B: set, deviation, both sides of the identity")
        sets: dict[str, Any] = homogeneous_sets(net, images) | ALONE
        for name, parameters in sets.items():
            finding = is_positively_homogeneous(net, parameters, images)
            sides = euler_identity(net, parameters, images, labels)
            numbers = f"{finding.deviation:8.1e} {sides.product:20.15f} {sides.excess:20.15f}"
            print(f"  {name:20} {len(parameters):3} parameters {numbers}")


def _over_depth(depths: list[int], data: Data) -> Panel:
    curves = []
    print("\ndepth  method  set          gradient      bound   expected   loss   entropy")
    for method, title in METHODS.items():
        measured, bounds = [], []
        for depth in depths:
            tables = [gradient_bounds(_net(depth, method), *data) for _ in range(SEEDS)]
            _tell(depth, method, tables)
            measured.append((depth, _mean(tables, "classifier", "measured")))
            bounds.append((depth, _mean(tables, "classifier", "bound")))
        curves.append(Curve(f"{title}: gradient", measured))
        if any(bound > 0 for _, bound in bounds):
            curves.append(Curve(f"{title}: bound", bounds, dashed=True))
    title = "Classifier at initialisation (Fixup's bound: 0)"
    return Panel(curves, "layers", "norm", title, log_x=True, log_y=True, ticks=tuple(depths))


def _tell(depth: int, method: str, tables: list[BoundTable]) -> None:
    loss, entropy = (sum(getattr(t, n) for t in tables) / SEEDS for n in ("loss", "entropy"))
    for name in ("first layer", "classifier"):
        values = [_mean(tables, name, what) for what in ("measured", "bound", "expected")]
        numbers = " ".join(f"{value:10.3g}" for value in values)
        print(f"{depth:5}  {method:6}  {name:11} {numbers} {loss:8.3g} {entropy:8.3f}")


def _mean(tables: list[BoundTable], name: str, what: str) -> float:
    return sum(getattr(table[name], what) for table in tables) / len(tables)


def _over_blocks(data: Data) -> Panel:
    net = _net(56, "none")
    table = activation_bounds(net, *data, blocks=net.blocks())
    measured = [(i, row.measured) for i, row in enumerate(table.rows, 1)]
    bounds = [(i, row.bound) for i, row in enumerate(table.rows, 1)]
    worst = max(row.tightest for row in table.rows)
    print(
        f"\ntheorem 1, 56 layers, He: gradient of the blocks' inputs {measured[0][1]:.3g} (first)"
    )
    print(f"{measured[-1][1]:.3g} (last), largest bound / gradient of an example {worst:.3f}")
    curves = [Curve("gradient", measured), Curve("bound", bounds, dashed=True)]
    return Panel(
        curves,
        "block",
        "norm, mean of examples",
        "Blocks' inputs at initialisation, 56 layers, He",
        log_y=True,
    )


def _in_training(steps: int) -> Panel:
    """Of batches as they come; the first layer's set has all biases in it."""
    images, labels = _digits(1024)
    curves = []
    print("\nstep  method  first layer: gradient, bound; loss, entropy")
    for method, title in METHODS.items():
        net, found = _net(20, method), []
        optimizer = torch.optim.SGD(param_groups(net, lr=RATE), momentum=0.9)
        for step in range(steps + 1):
            batch = torch.arange(64 * step, 64 * (step + 1)) % len(labels)
            found.append(gradient_bounds(net, images[batch], labels[batch]))
            if step % 20 == 0:
                row, table = found[-1]["first layer"], found[-1]
                numbers = f"{row.measured:10.3g} {row.bound:10.3g} {table.loss:8.3g}"
                print(f"{step:4}  {method:6} {numbers} {table.entropy:8.3f}")
            optimizer.zero_grad()
            F.cross_entropy(net(images[batch]), labels[batch]).backward()
            optimizer.step()
        rows = [table["first layer"] for table in found]
        assert all(row.homogeneity and row.measured >= row.bound for row in rows)
        curves.append(Curve(f"{title}: gradient", [(i, r.measured) for i, r in enumerate(rows)]))
        curves.append(
            Curve(f"{title}: bound", [(i, r.bound) for i, r in enumerate(rows)], dashed=True)
        )
    title = "First layer in training, 20 layers"
    return Panel(curves, "step", "norm", title)


if __name__ == "__main__":
    main()
