"""Gradient flow, its two parts in a residual block, its paths, and its graph."""

from __future__ import annotations

import itertools
import math
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fixup_core.errors import UserError
from fixup_core.measure import figures
from fixup_core.measure.backward_graph import backward_graph
from fixup_core.measure.chains import VARIANTS, build_chain
from fixup_core.measure.flow import gradient_flow, plot_flows
from fixup_core.measure.paths import path_gradient, path_lengths, residual_split
from tests.core.nets import Mlp
from vision.nets import build_net


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def _batch(count: int = 16, features: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(count, features).double(), torch.randint(10, (count,))


def _links(depth: int) -> list[str]:
    return [f"links.{i}" for i in range(depth)]


class InPlace(nn.Module):
    """A layer called twice, its output overwritten; then a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.pair, self.unused = (nn.Linear(6, 6) for _ in range(3))
        self.wrap = nn.Identity()

    def forward(self, x, scale=1.0):
        h = F.relu(self.twice(x), inplace=True)
        h = self.twice(h).mul_(2.0)
        return self.wrap((self.pair(h) * scale, None))[0]


def test_values_and_gradients_are_those_before_anything_was_done_in_place() -> None:
    net, x = InPlace().double(), torch.randn(4, 6).double()
    layers = ["twice", "wrap", net.pair]
    flow = gradient_flow(
        net, {"x": x, "scale": 3.0}, loss=lambda z: z.square().mean(), layers=layers
    )
    first = net.twice(x)
    second = net.twice(first.relu())
    third = net.pair(2 * second)
    loss = (3 * third).square().mean()
    expected = [first, second, third, 3 * third]
    assert [(row.path, row.call) for row in flow] == [
        *(("twice", 1), ("twice", 2), ("pair", 1), ("wrap", 1))
    ]
    gradients = torch.autograd.grad(loss, [first, second, third, *net.twice.parameters()])
    for row, value, gradient in zip(flow, expected, gradients[:3], strict=False):
        assert row.activation_rms == pytest.approx(value.square().mean().sqrt().item())
        assert row.gradient_norm == pytest.approx(gradient.norm().item())
        assert row.gradient_rms == pytest.approx(gradient.square().mean().sqrt().item())
    own = math.hypot(*(g.norm().item() for g in gradients[3:]))
    assert flow.rows[0].weight_gradient_norm == pytest.approx(own)
    assert flow.loss == pytest.approx(loss.item())


def test_looking_changes_nothing() -> None:
    net = build_net("cifar_resnet8", method="batchnorm", dropout=0.3)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x, y = torch.randn(4, 3, 8, 8), torch.randint(10, (4,))
    torch.manual_seed(1)
    flow = gradient_flow(net, x, y)
    assert torch.equal(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(1)))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters()) and not x.requires_grad
    assert not any(module._forward_hooks for module in net.modules())
    assert flow.rows[0].path == "stem.conv" and len(flow) == 8


def test_checkpointed_layers_are_met_once() -> None:
    x, y = torch.randn(4, 3, 8, 8), torch.randint(10, (4,))
    rows = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        net = build_net("cifar_resnet8", method="fixup_rule2", checkpointing=checkpointing)
        rows.append(gradient_flow(net, x, y).rows)
    assert rows[0] == rows[1]


def test_a_sigmoid_chain_shrinks_the_gradient_and_a_shortcut_keeps_it() -> None:
    flows = {}
    for name in VARIANTS:
        net = build_chain(name, depth=20, zero_head=False).double()
        flows[name] = gradient_flow(net, *_batch(), layers=["first", *_links(20)])
    decay = {name: flow.decay for name, flow in flows.items()}
    assert decay["sigmoid"] < 4.0**-19, "the sigmoid's derivative is at most 1/4"
    assert decay["residual"] > 1e3
    assert decay["fixup"] == 1.0
    for name in ("relu", "tanh", "batchnorm", "highway"):
        assert 1e-2 < decay[name] < 1e2, name
    assert all(math.isfinite(row.weight_gradient_norm) for row in flows["tanh"])
    silent = gradient_flow(build_chain("fixup", depth=2).double(), *_batch(), layers=_links(2))
    assert math.isnan(silent.decay), "no gradient comes through a classifier of zeros"


def test_frozen_and_unused_layers_have_no_gradient_of_weights() -> None:
    net, (x, y) = build_chain("relu", depth=3).double(), _batch()
    net.links[0].requires_grad_(False)
    rows = gradient_flow(net, x, y).rows
    assert math.isnan(rows[1].weight_gradient_norm) and rows[1].gradient_norm > 0
    assert gradient_flow(InPlace(), torch.randn(2, 6), loss=torch.sum).rows[-1].path == "pair"


@pytest.mark.parametrize("variant", ["residual", "fixup", "highway", "batchnorm"])
def test_the_two_parts_of_a_gradient_sum_to_it(variant: str) -> None:
    net, (x, y) = build_chain(variant, depth=5, zero_head=False).double(), _batch()
    rows = residual_split(net, x, y, blocks=_links(5))
    flow = gradient_flow(net, x, y, layers=["first", *_links(5)])
    for row, before, after in zip(rows, flow.rows, flow.rows[1:], strict=False):
        assert row.total == pytest.approx(before.gradient_norm)
        assert row.shortcut == pytest.approx(after.gradient_norm)
        parts = row.shortcut**2 + row.branch**2 + 2 * row.cosine * row.shortcut * row.branch
        assert row.total**2 == pytest.approx(parts)
        assert (row.branch == 0) == (variant == "fixup"), "a branch that ends with 0"


def test_all_paths_sum_to_the_gradient_and_their_lengths_are_exact() -> None:
    depth = 4
    net, (x, y) = build_chain("residual", depth=depth, width=8).double(), _batch(4)
    blocks = _links(depth)
    lengths = path_lengths(net, x, y, blocks=blocks, samples=6)
    hidden = net.first(x)
    (whole,) = torch.autograd.grad(F.cross_entropy(net.head(net.links(hidden)), y), hidden)
    total = torch.zeros_like(whole)
    for k in range(depth + 1):
        subsets = list(itertools.combinations(range(depth), k))
        paths = [path_gradient(net, x, y, blocks=blocks, through=path) for path in subsets]
        together = sum(paths)
        assert lengths[k].count == len(subsets) == math.comb(depth, k)
        assert lengths[k].norm == pytest.approx(together.norm().item(), rel=1e-10)
        share = ((together * whole).sum() / whole.square().sum()).item()
        assert lengths[k].share == pytest.approx(share, rel=1e-9)
        norms = [path.norm().item() for path in paths]
        assert min(norms) <= lengths[k].magnitude * (1 + 1e-9) <= max(norms) * (1 + 1e-8)
        assert lengths[k].norm <= sum(norms) * (1 + 1e-9)
        total += together
    torch.testing.assert_close(total, whole, rtol=1e-12, atol=1e-15)
    assert sum(length.share for length in lengths) == pytest.approx(1)
    through = set(range(depth - 1))
    missing = total - path_gradient(net, x, y, blocks=blocks, through=through)
    assert not torch.allclose(missing, whole), "one path less is not the gradient"


def test_fixup_starts_with_the_shortest_path_alone() -> None:
    net, (x, y) = build_chain("fixup", depth=6, zero_head=False).double(), _batch()
    lengths = path_lengths(net, x, y, blocks=_links(6))
    assert [length.share for length in lengths] == [1.0, *[0.0] * 6]
    assert math.isnan(lengths[0].contribution), "no path was sampled"


def test_a_wide_resnet_has_paths_too() -> None:
    net = build_net("cifar_wrn10_1", method="none").double()
    x, y = torch.randn(2, 3, 8, 8).double(), torch.randint(10, (2,))
    blocks = [net.blocks()[0]]
    short, long = path_lengths(net, x, y, blocks=blocks)
    assert short.share + long.share == pytest.approx(1)
    with pytest.raises(UserError, match="leave out the blocks that change the shape"):
        path_lengths(net, x, y, blocks=net.blocks())


class Around(nn.Module):
    """A shortcut past the last block, which no path through its branch or shortcut knows."""

    def __init__(self) -> None:
        super().__init__()
        self.net = build_chain("residual", depth=2)

    def forward(self, x):
        h = self.net.links[0](self.net.first(x))
        return self.net.head(self.net.links[1](h) + torch.sin(h))


@pytest.mark.parametrize(
    ("blocks", "says"),
    [
        (["links.0.fc1"], "does not return its input plus a branch"),
        (["first"], "makes .* of .*: leave out the blocks that change the shape"),
        (["links.7"], "no module 'links.7'"),
        (["spare"], "spare is not called"),
        ([], "at least one module"),
    ],
)
def test_blocks_that_are_none_are_told(blocks: list[str], says: str) -> None:
    net, (x, y) = build_chain("residual", depth=2, inputs=32).double(), _batch(features=32)
    net.spare = nn.Identity()
    with pytest.raises(UserError, match=says):
        residual_split(net, x, y, blocks=blocks)


def test_an_activation_behind_the_addition_is_told() -> None:
    """It would be counted as the branch's."""
    net = build_net("cifar_resnet8", method="none")
    x, y = torch.randn(2, 3, 8, 8), torch.randint(10, (2,))
    with pytest.raises(UserError, match="nothing may follow the addition"):
        residual_split(net, x, y, blocks=["stages.0.0"])
    pre = build_net("cifar_resnet8", method="none", order="pre")
    assert residual_split(pre, x, y, blocks=["stages.0.0"])[0].branch > 0


def test_gradient_that_goes_round_the_blocks_is_told() -> None:
    net, (x, y) = Around().double(), _batch()
    blocks = [f"net.links.{i}" for i in range(2)]
    assert path_lengths(net, x, y, blocks=["net.links.1"]), "nothing goes round this one"
    with pytest.raises(UserError, match="gradient goes round the blocks"):
        path_lengths(net, x, y, blocks=blocks)


def test_a_network_that_has_diverged_is_told() -> None:
    net, (x, y) = build_chain("residual", depth=2).double(), _batch()
    with torch.no_grad():
        net.head.weight[0, 0] = math.nan
    with pytest.raises(UserError, match="the gradient is not finite"):
        path_lengths(net, x, y, blocks=_links(2))


def _scalar_net(x: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, dict]:
    names = {}
    for i, (w, v) in enumerate(weights, 1):
        x = x + v * torch.tanh(w * x)
        names[f"x{i}"] = x
    return x * x, names


def test_the_products_along_all_paths_sum_to_the_gradient() -> None:
    x = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    output, names = _scalar_net(x, torch.randn(3, 2).double())
    graph = backward_graph(output, {"x0": x}, names=names)
    paths = list(graph.paths("x0"))
    (expected,) = torch.autograd.grad(output, x, retain_graph=True)
    assert len(paths) == 2 * 2**3, "two ways into a square, two through each block"
    products = [graph.along(path).item() for path in paths]
    assert sum(products) == pytest.approx(expected.item(), rel=1e-12)
    assert sum(products[1:]) != pytest.approx(expected.item(), rel=1e-6)
    assert graph.vertices[-1].gradient.item() == pytest.approx(expected.item(), rel=1e-12)
    assert sum(edge.factor == 1 for edge in graph.edges) == 2 * 3, "the shortcuts, and beside them"


def test_of_tensors_the_factors_are_jacobians() -> None:
    x = torch.randn(4, dtype=torch.float64, requires_grad=True)
    w = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    hidden = torch.tanh(w @ x)
    first, second = (x + hidden).split([1, 3])
    output = first.sum() * second.square().sum()
    graph = backward_graph(output, {"x": x, "w": w}, names={"hidden": hidden})
    gradients = torch.autograd.grad(output, (x, w))
    for name, gradient in zip(("x", "w"), gradients, strict=True):
        total = sum(graph.along(path) for path in graph.paths(name))
        torch.testing.assert_close(total, gradient.flatten(), rtol=1e-12, atol=1e-14)
    matmul = next(e for e in graph.edges if e.jacobian.shape == (4, 4) and e.factor != 1)
    assert matmul.factor == pytest.approx(torch.linalg.matrix_norm(matmul.jacobian, 2).item())


def test_the_picture_names_every_edge_by_its_factor(tmp_path: Path, monkeypatch) -> None:
    x = torch.tensor(0.5, requires_grad=True)
    output, names = _scalar_net(x, torch.tensor([[2.0, 0.5]]))
    graph = backward_graph(output, {"x0": x}, names=names)
    text = graph.to_dot()
    assert text.count("->") == len(graph.edges) == 7
    for edge in graph.edges:
        assert f'v{edge.start} -> v{edge.end} [label=" {edge.factor:.3g} "' in text
    assert "x0\\ngrad" in text and "tanh" in text
    monkeypatch.setattr(shutil, "which", lambda _: None)
    with pytest.raises(UserError, match="needs graphviz"):
        graph.save(tmp_path / "graph.svg")
    assert (tmp_path / "graph.dot").read_text() == text


@pytest.mark.skipif(shutil.which("dot") is None, reason="graphviz is not installed")
def test_graphviz_draws_it(tmp_path: Path) -> None:
    x = torch.tensor(0.5, requires_grad=True)
    graph = backward_graph(x.exp(), {"x": x})
    graph.save(tmp_path / "graph.svg")
    assert "<svg" in (tmp_path / "graph.svg").read_text()
    with pytest.raises(UserError, match=r"graphviz wrote no .*graph.nothing"):
        graph.save(tmp_path / "graph.nothing")


def test_graphs_that_cannot_be_drawn_are_told() -> None:
    x, other = torch.ones(100, requires_grad=True), torch.ones(1, requires_grad=True)
    with pytest.raises(UserError, match="a value of 100 numbers is too large"):
        backward_graph(x.exp().sum(), {"x": x})
    with pytest.raises(UserError, match="does not depend on other"):
        backward_graph(x.sum(), {"x": x, "other": other})
    with pytest.raises(UserError, match="one number"):
        backward_graph(x, {"x": x})
    with pytest.raises(UserError, match=r"no value 'y'; it has x"):
        list(backward_graph(x.sum(), {"x": x}).paths("y"))


def test_several_networks_are_drawn_into_one_figure(tmp_path: Path, monkeypatch) -> None:
    flows = {
        name: gradient_flow(build_chain(name, depth=3).double(), *_batch()) for name in VARIANTS
    }
    drawn = []
    monkeypatch.setattr(figures, "draw", lambda panels, file: drawn.append((panels, file)))
    plot_flows(flows, tmp_path / "flow.png", quantities=("gradient_rms", "activation_rms"))
    panels, _ = drawn.pop()
    assert [[curve.name for curve in panel.curves] for panel in panels] == [list(VARIANTS)] * 2
    assert [y for _, y in panels[0].curves[0].points] == [r.gradient_rms for r in flows["tanh"]]
    plot_flows(flows, tmp_path / "flow.png", relative=True)
    ((panel,), _) = drawn.pop()
    assert panel.log_y and all(
        curve.points[-1][1] == 1 for curve in panel.curves if curve.name != "fixup"
    )
    monkeypatch.undo()
    flows["relu"].plot(tmp_path / "one.png")
    assert (tmp_path / "one.png").stat().st_size > 5000
    with pytest.raises(UserError, match="choose one of gradient_rms"):
        plot_flows(flows, tmp_path / "flow.png", quantities=("loss",))


def test_without_matplotlib_the_numbers_are_there_and_the_figure_is_told(monkeypatch) -> None:
    def missing(name: str):
        raise ImportError(name)

    flow = gradient_flow(Mlp(2), torch.randn(4, 8), torch.randint(5, (4,)))
    monkeypatch.setattr(figures.importlib, "import_module", missing)
    with pytest.raises(UserError, match="pip install matplotlib"):
        flow.plot(Path("never.png"))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda net, x, y: gradient_flow(net, x, y, layers=["link"]), "no module 'link'"),
        (lambda net, x, y: gradient_flow(net, x, y, layers=[net.head.spare]), "none of the layers"),
        (lambda net, x, y: gradient_flow(net, x, loss=lambda z: z), "the loss must be one number"),
        (lambda net, x, y: gradient_flow(nn.ReLU(), x, loss=torch.sum), "no layer with a weight"),
        (lambda net, x, y: build_chain("gru"), "there is no chain 'gru'"),
        (lambda net, x, y: build_chain("relu", depth=0), "at least 1 link"),
    ],
)
def test_mistakes_are_told(call, says: str) -> None:
    net, (x, y) = build_chain("relu", depth=2).double(), _batch()
    net.head.spare = nn.Identity()
    with pytest.raises(UserError, match=says):
        call(net, x, y)
