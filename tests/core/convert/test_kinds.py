"""Kinds of residual branches as other people write them, and what a reader takes them for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fixup_core import collect_branches, fixup_
from tests.core.convert.nets import Net

Kind = tuple[Callable[[Any, Tensor], Any], list[tuple[str, int, str]]]


def _conditioned(n: Any, x: Tensor) -> Tensor:
    """A time embedding added within a branch, as in diffusion."""
    return n.e(x + n.b(F.silu(n.a(x) + n.c(x.mean(1, keepdim=True).detach() * 0 + 1))))


def _talking_heads(n: Any, x: Tensor) -> Tensor:
    """Layers before and behind the softmax of attention."""
    return n.e(x + n.d(n.b(torch.softmax(n.a(x), dim=-1)) * n.c(x)))


def _nested(n: Any, x: Tensor) -> Tensor:
    h = n.a(x)
    h = h + n.c(F.relu(n.b(h)))
    return n.e(x + n.d(h))


def _multi_scale(n: Any, x: Tensor) -> Tensor:
    """Pieces of a signal, each with what the one before it gave (Res2Net)."""
    h = n.a(x)
    first, second = h.roll(1, -1), h
    y = n.b(first)
    z = n.c(second + y)
    return n.e(x + n.d(y + z))


KINDS: dict[str, Kind] = {
    "one layer": (lambda n, x: n.e(x + n.a(F.relu(x))), [("a", 1, "a")]),
    "parallel, (a + b) + x": (
        lambda n, x: n.e((n.b(F.gelu(n.a(h := n.norm(x)))) + n.d(F.gelu(n.c(h)))) + x),
        [("a b", 2, "b"), ("c d", 2, "d")],
    ),
    "three in parallel behind dropout": (
        lambda n, x: n.e(x + F.dropout(n.b(n.a(x)) + n.c(x) + n.d(x), 0.1)),
        [("a b", 2, "b"), ("c", 1, "c"), ("d", 1, "d")],
    ),
    "side by side within": (
        lambda n, x: n.e(x + n.d(n.b(h := F.relu(n.a(x))) + n.c(h))),
        [("a b c d", 3, "d")],
    ),
    "side by side from one layer": (
        lambda n, x: (
            n.e(x + n.b(h := F.relu(n.a(x))) + n.c(h))
            if False
            else n.e(x + (n.b(h := F.relu(n.a(x))) + n.c(h)))
        ),
        [("a b c", 2, "b c")],
    ),
    "concatenated": (
        lambda n, x: n.e(x + torch.cat([(h := n.a(x))[..., :4], n.b(h)[..., 4:]], dim=-1)),
        [("a b", 2, "a b")],
    ),
    "a time embedding": (_conditioned, [("a c b", 2, "b")]),
    "talking heads": (_talking_heads, [("c d", 2, "d")]),
    "a branch within": (_nested, [("b c", 2, "c")]),
    "sums of pieces within": (_multi_scale, [("a b c d", 4, "d")]),
    "a response norm": (
        lambda n, x: n.e(x + n.b((h := F.gelu(n.a(x))) + h * (h.norm(dim=1, keepdim=True) / 1.5))),
        [("a b", 3, "b")],
    ),
    "a response norm by its mean": (
        lambda n, x: n.e(x + n.b((h := F.gelu(n.a(x))) + h * ((s := h.abs()) / s.mean()))),
        [("a b", 2, "b")],
    ),
    "a temperature": (
        lambda n, x: n.e(x + n.b(F.relu(n.a(x)) * torch.exp(n.f.bias))),
        [("a b", 2, "b")],
    ),
    "a power written as a float": (
        lambda n, x: n.e(x + n.b(F.relu(n.a(x)).pow(2.0))),
        [("a b", 3, "b")],
    ),
    "the largest on the shortcut": (
        lambda n, x: n.e(x[:, :2].amax(1) + n.b(F.relu(n.a(x))).mean(1)),
        [("a b", 2, "b")],
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_layers_m_and_last_layers_are_those_that_a_reader_counts(name: str) -> None:
    forward, expected = KINDS[name]
    net, x = Net(forward), torch.randn(2, 3, 8)
    report = fixup_(net, x, verbose=False)
    paths = {id(module): path for path, module in net.named_modules()}
    found = [
        (
            " ".join(paths[id(layer.module)] for layer in branch.layers),
            branch.layers_per_branch,
            " ".join(paths[id(branch.layers[n].module)] for n in branch.ends or ()),
        )
        for branch in collect_branches(net)
    ]
    assert found == expected
    assert not net(x).any()
    assert not any("no gradient" in note for note in report.notes)


def test_a_branch_around_others_is_left_out_with_a_word() -> None:
    net = Net(_nested)
    report = fixup_(net, torch.randn(2, 3, 8), verbose=False)
    assert report.left_out == ("the network itself (add): other residual branches lie within it",)
    assert "left out: the network itself" in str(report)


def test_what_is_returned_from_within_a_branch_is_noted() -> None:
    net = Net(lambda n, x: (n.e(x + n.b(h := n.a(x))), h))
    report = fixup_(net, torch.randn(2, 3, 8), verbose=False)
    assert any("also returns" in note for note in report.notes)


class Modulated(nn.Module):
    """Scales, shifts and gates from a condition, one matrix for both branches of a block (DiT)."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.out = (nn.Linear(8, 8) for _ in range(5))
        self.norm, self.ada = nn.LayerNorm(8, elementwise_affine=False), nn.Linear(4, 40)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        s, b, g, t, h = self.ada(condition)[:, None].chunk(5, dim=-1)
        x = x + g * self.b(F.gelu(self.a(self.norm(x) * (1 + s) + b)))
        x = x + g * self.d(F.gelu(self.c(self.norm(x) * (1 + t) + h)))
        return self.out(x)


def test_a_condition_that_branches_share_is_a_gate() -> None:
    net = Modulated()
    report = fixup_(net, (torch.randn(2, 3, 8), torch.randn(2, 4)), verbose=False)
    assert [branch.layers for branch in report.branches] == [
        ("a.weight", "b.weight"),
        ("c.weight", "d.weight"),
    ]
    assert [branch.m for branch in report.branches] == [2, 2]
    assert all("ada.weight" in branch.gates for branch in report.branches)
    assert "ada.weight" in report.kept and report.removed == ("norm",)


class LearntQueries(nn.Module):
    """A decoder whose stream starts at parameters, as detection and summaries have it."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(2, 4, 16))
        layer = nn.TransformerDecoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.decoder, self.out = nn.TransformerDecoder(layer, 2), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.decoder(self.queries, x))


def test_a_stream_that_starts_at_parameters_has_branches_too() -> None:
    report = fixup_(LearntQueries(), torch.randn(2, 6, 16), verbose=False)
    assert [branch.m for branch in report.branches] == [2] * 6


class ClassToken(nn.Module):
    """Reads its classes from a token that starts at 0."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, 1, 16))
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.out = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1)
        return self.out(self.encoder(x)[:, 0])


def test_a_class_token_at_zero_is_drawn() -> None:
    net = ClassToken()
    report = fixup_(net, torch.randn(2, 6, 16), verbose=False)
    assert 0.005 < net.token.std().item() < 0.08
    assert not any("no gradient" in note for note in report.notes)


class RectifiedEnd(nn.Module):
    """A ReLU behind the last layer of each branch, before the addition."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.out = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        for first, last in zip(self.layers[::2], self.layers[1::2], strict=True):
            x = x + F.relu(last(F.relu(first(x))))
        return self.out(x)


def test_a_layer_before_a_relu_that_ends_a_branch_is_not_zero() -> None:
    net = RectifiedEnd()
    report = fixup_(net, torch.randn(4, 8), verbose=False)
    assert all(layer.weight.any() for layer in net.layers)
    assert any("are scaled like the others" in note for note in report.notes)
    assert not any("no gradient" in note for note in report.notes)


class Contrastive(nn.Module):
    """Its output has length 1."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.project = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.project(x + self.b(F.relu(self.a(x))))
        return x / x.norm(dim=-1, keepdim=True)


def test_what_is_divided_by_its_length_is_no_head_to_be_zero() -> None:
    net = Contrastive()
    report = fixup_(net, torch.randn(4, 8), verbose=False)
    assert report.head == () and net.project.weight.any()
    assert any("project.weight stays" in note for note in report.notes)


class DependsOnNumbers(nn.Module):
    """Branches behind a question about what has been computed, in place and by views."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.BatchNorm1d(8) for _ in range(3))
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(6))
        self.out = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        for n, norm in enumerate(self.norms):
            if x.abs().sum().item() > 1e-6:
                h = self.layers[2 * n + 1](F.relu(self.layers[2 * n](norm(x))))
                h += x
                x = torch.zeros_like(h)
                x[:2], x[2:] = h[:2], h[2:]
        return self.out(x)


def test_a_path_that_depends_on_numbers_is_recorded() -> None:
    net = DependsOnNumbers()
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    with torch.random.fork_rng():
        drawn = torch.get_rng_state()
        report = fixup_(
            net,
            torch.randn(4, 8, generator=torch.Generator()),
            verbose=False,
            check=False,
            generator=torch.Generator(),
        )
        assert torch.equal(torch.get_rng_state(), drawn)
    assert [(branch.m, branch.layers) for branch in report.branches] == [
        (2, (f"layers.{2 * n}.weight", f"layers.{2 * n + 1}.weight")) for n in range(3)
    ]
    assert report.removed == ("norms.0", "norms.1", "norms.2") and before
    assert report.head == ("out.weight",)


class LayerDrop(nn.Module):
    """Leaves whole layers out while it trains, by chance; here always the second one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
        self.out = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.layers[1](F.relu(self.layers[0](x)))
        if not self.training:
            x = x + self.layers[3](F.relu(self.layers[2](x)))
        return self.out(x)


def test_layers_that_are_left_out_by_chance_are_found() -> None:
    report = fixup_(LayerDrop(), torch.randn(4, 8), verbose=False)
    assert [branch.m for branch in report.branches] == [2, 2]
