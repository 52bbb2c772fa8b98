"""The figures and numbers of docs/gradient-flow.md: ``python benchmarks/gradient_flow.py``.

Chains of 50 links on random vectors (``measure.chains``); a graph of three scalar blocks, whose
picture needs graphviz. About five seconds on one core.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from fixup_core.errors import UserError
from fixup_core.measure.backward_graph import BackwardGraph, backward_graph
from fixup_core.measure.chains import VARIANTS, Chain, build_chain
from fixup_core.measure.figures import draw
from fixup_core.measure.flow import gradient_flow, panel_of
from fixup_core.measure.paths import path_lengths, residual_split

DEPTH, WIDTH, CLASSES, BATCH = 50, 64, 10, 128
LINKS = [f"links.{i}" for i in range(DEPTH)]
STEPS, RATE = 40, 0.05
"""Of SGD, before a chain is measured again."""
SCALAR_WEIGHTS = ((1.2, 0.9), (-0.7, 1.1), (0.6, -0.8))
"""w and v of ``x + v tanh(w x)``, for each block of the graph."""

Data = tuple[Tensor, Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("docs"), help="of the figures")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    data = torch.randn(BATCH, WIDTH), torch.randint(CLASSES, (BATCH,))
    chains = {name: build_chain(name, depth=DEPTH, zero_head=False) for name in VARIANTS}
    _flows(chains, data, args.folder / "gradient-flow.png")
    _splits(chains, data)
    _lengths(chains, data)
    try:
        _graph(args.folder / "backward-graph.svg")
    except UserError as error:  # all else is done
        print(error)


def _flows(chains: dict[str, Chain], data: Data, file: Path) -> None:
    flows = {n: gradient_flow(c, *data, layers=["first", *LINKS]) for n, c in chains.items()}
    print(f"{'chain':10} gradient, first layer / last   activation, last layer / first")
    for name, flow in flows.items():
        growth = flow.rows[-1].activation_rms / flow.rows[0].activation_rms
        print(f"{name:10} {flow.decay:29.3g} {growth:33.3g}")
    wide = panel_of(flows, "gradient_rms", relative=True)
    mild = {n: flow for n, flow in flows.items() if n not in ("sigmoid", "residual")}
    close = panel_of(mild, "gradient_rms", relative=True)
    close = replace(close, title="The same without sigmoid and residual")
    draw([wide, close], file)


def _splits(chains: dict[str, Chain], data: Data) -> None:
    print(f"\n{'chain':10} block   total/shortcut  branch/shortcut  cosine, at the start")
    for name in ("residual", "batchnorm", "fixup"):
        rows = residual_split(chains[name], *data, blocks=LINKS)
        for i in (0, DEPTH // 2, DEPTH - 1):
            row = rows[i]
            shares = f"{row.total / row.shortcut:14.3f} {row.branch / row.shortcut:16.3f}"
            print(f"{name:10} {i:5} {shares} {row.cosine:8.3f}")


def _lengths(chains: dict[str, Chain], data: Data) -> None:
    print(
        f"\n{'chain':10} steps  loss      mean length  share of lengths 0, 1, 2, 3, 4, 5, 6, above"
    )
    for name in ("residual", "batchnorm", "fixup"):
        _tell(name, 0, chains[name], data)
    for name in ("batchnorm", "fixup"):
        chain = build_chain(name, depth=DEPTH)
        _train_(chain, data, STEPS)
        _tell(name, STEPS, chain, data)
    _train_(chains["residual"], data, 1)
    loss = F.cross_entropy(chains["residual"](data[0]), data[1]).item()
    print(f"{'residual':10}     1  {loss}")


def _tell(name: str, steps: int, chain: Chain, data: Data) -> None:
    lengths = path_lengths(chain, *data, blocks=LINKS)
    loss = F.cross_entropy(chain(data[0]), data[1]).item()
    total = sum(length.norm for length in lengths) or 1.0
    mean = sum(length.length * length.norm for length in lengths) / total
    shares = [length.share for length in lengths]
    text = " ".join(f"{share:6.3f}" for share in (*shares[:7], sum(shares[7:])))
    print(f"{name:10} {steps:5}  {loss:<9.3g} {mean:11.2f}  {text}")


def _train_(chain: Chain, data: Data, steps: int) -> None:
    optimizer = torch.optim.SGD(chain.parameters(), lr=RATE, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(chain(data[0]), data[1]).backward()
        optimizer.step()


def _graph(file: Path) -> None:
    graph, expected = scalar_graph()
    print(f"\nthe graph of {file}: paths from x3 to x0 and the products of their factors")
    products = [(len(path), graph.along(path).item()) for path in graph.paths("x0")]
    for edges, product in products:
        print(f"  {edges:2} edges {product:10.6f}")
    print(f"  sum {sum(p for _, p in products):.12f}, autograd {expected:.12f}")
    graph.save(file)


def scalar_graph() -> tuple[BackwardGraph, float]:
    """Three residual blocks on one number, and autograd's gradient."""
    x0 = x = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    names = {}
    for i, (w, v) in enumerate(SCALAR_WEIGHTS, 1):
        x = x + v * torch.tanh(w * x)
        names[f"x{i}"] = x
    (expected,) = torch.autograd.grad(x, x0, retain_graph=True)
    return backward_graph(x, {"x0": x0}, names=names), expected.item()


if __name__ == "__main__":
    main()
