"""``fixup_``: the residual branches it finds, and those that are named."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fixup_core import ResidualBranch, WeightLayer, collect_branches, fixup_, param_groups, scalars
from fixup_core.errors import UserError
from fixup_core.rules.standards import NORMS, XAVIER_UNIFORM
from tests.core.convert.nets import BRANCHES, IMAGES, NETS, SLOW, Basic, Net, Untraceable, disturb_
from tests.core.nets import ConvNet


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in NETS]
)
def test_branches_are_found_and_logits_start_at_zero(name: str) -> None:
    make, num_branches, depths = NETS[name]
    net = make()
    before = dict(net.named_parameters())
    removed = {id(p) for m in net.modules() if isinstance(m, NORMS) for p in m.parameters()}
    report = fixup_(net, example_inputs=IMAGES, verbose=False)
    assert report.num_branches == len(collect_branches(net)) == num_branches
    assert {branch.m for branch in report.branches} == depths
    for branch in report.branches:
        assert branch.factor == pytest.approx(num_branches ** (-1 / (2 * branch.m - 2)))
    assert net(IMAGES).shape == (4, 10) and net(IMAGES).abs().max() == 0
    assert not [m for m in net.modules() if isinstance(m, NORMS)]
    after = dict(net.named_parameters())
    for path, parameter in before.items():
        assert (after.get(path) is parameter) is (id(parameter) not in removed), path
    added = after.keys() - before.keys()
    assert len(added) == report.scalars == sum(1 for _ in scalars(net))
    assert all(after[path].shape == (1,) for path in added)


@pytest.mark.parametrize("name", ["resnet18", "encoder", "PreActivation", "Separable", "GatedMlp"])
def test_training_reaches_every_parameter(name: str) -> None:
    torch.manual_seed(0)
    net = NETS[name][0]()
    fixup_(net, example_inputs=IMAGES, verbose=False)
    optimizer = torch.optim.SGD(param_groups(net, lr=0.1), momentum=0.9)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(IMAGES), torch.arange(4))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(10)) and losses[-1] < losses[0]
    # Under an InstanceNorm that is gone nothing is lost; a softmax ignores what all logits share.
    silent = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    assert not silent


def test_encoder_and_decoder_with_masks_and_keywords() -> None:
    net = nn.Transformer(16, 2, 1, 2, 32, dropout=0.0, batch_first=True)
    source, target = torch.randn(2, 5, 16), torch.randn(2, 4, 16)
    mask = nn.Transformer.generate_square_subsequent_mask(4)
    inputs = {"src": source, "tgt": target, "tgt_mask": mask}
    report = fixup_(net, example_inputs=inputs, verbose=False)
    assert [branch.m for branch in report.branches] == [2] * 8
    crossing = report.branches[3]
    assert crossing.layers == tuple(
        f"decoder.layers.0.multihead_attn.{n}" for n in ("in_proj_weight", "out_proj.weight")
    )
    assert not report.head and "no head" in str(report)
    torch.testing.assert_close(net(**inputs), target)  # every branch is 0


def _gelu(u: Tensor) -> Tensor:
    return 0.5 * u * (1 + torch.tanh(0.797 * (u + 0.0447 * u**3)))


def _attention(n: Any, x: Tensor, made: Callable[[Tensor], Tensor]) -> Tensor:
    return n.d(made(torch.softmax(n.a(x) @ n.b(x).transpose(-1, -2), dim=-1)) @ n.c(x))


FOUND: dict[str, tuple[Callable[[Any, Tensor], Any], list[tuple[str, ...]]]] = {
    "an activation written out": (lambda n, x: n.e(x + n.b(_gelu(n.a(x)))), [("a", "b")]),
    "a product of two layers": (
        lambda n, x: n.e(x + n.c(F.silu(n.a(x)) * n.b(x))),
        [("a", "b", "c")],
    ),
    "a squared activation": (lambda n, x: n.e(x + n.b(F.relu(n.a(x)) ** 2)), [("a", "a", "b")]),
    "a gate written out": (
        lambda n, x: n.e(x + n.b(n.a(x)) * F.relu6(n.c(x) + 3) / 6),
        [("a", "b")],
    ),
    "weights scaled behind the softmax": (
        lambda n, x: n.e(x + _attention(n, x, lambda w: (w * 0.9).masked_fill(w < 0.01, 0.0))),
        [("c", "d")],
    ),
    "two branches beside one another": (
        lambda n, x: n.e(x + n.b(F.gelu(n.a(n.norm(x)))) + n.d(F.gelu(n.c(x)))),
        [("a", "b"), ("c", "d")],
    ),
    "a branch taken off": (lambda n, x: n.e(x - n.b(F.relu(n.a(x)))), [("a", "b")]),
    "a mask drawn anew": (
        lambda n, x: n.e(x + n.b(F.relu(n.a(x))) * (torch.rand_like(x) < 0.9)),
        [("a", "b")],
    ),
    "a branch scaled": (lambda n, x: n.e(x + 0.5 * n.b(F.relu(n.a(x)))), [("a", "b")]),
    "a head in two places": (
        lambda n, x: (lambda y: (n.e(y), n.e(y.flip(1))))(x + n.b(F.relu(n.a(x)))),
        [("a", "b")],
    ),
    "a head in the middle": (
        lambda n, x: (lambda y: (n.f(y), n.e(y + n.d(F.relu(n.c(y))))))(x + n.b(F.relu(n.a(x)))),
        [("a", "b"), ("c", "d")],
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_a_branch_is_the_product_of_its_layers(name: str) -> None:
    forward, expected = FOUND[name]
    net, x = Net(forward), torch.randn(2, 3, 8)
    report = fixup_(net, example_inputs=x, verbose=False)
    branches = collect_branches(net)
    paths = {id(module): path for path, module in net.named_modules()}
    found = [
        tuple(paths[id(layer.module)] for layer in b.layers for _ in range(layer.copies))
        for b in branches
    ]
    assert found == expected and [b.m for b in report.branches] == [len(e) for e in expected]
    outputs = net(x)
    for output in outputs if isinstance(outputs, tuple) else (outputs,):
        assert not output.any()


def test_other_ways_to_join_are_noted() -> None:
    net = Net(lambda n, x: n.e(torch.lerp(y := x + n.b(n.a(x)), n.d(n.c(y)), 0.5)))
    report = fixup_(net, example_inputs=torch.randn(2, 3, 8), verbose=False)
    assert any("not taken for a residual branch" in n and "lerp" in n for n in report.notes)


def test_branches_that_are_named() -> None:
    net, x = Untraceable(), torch.randn(5, 8)
    with pytest.raises(UserError, match=r"cannot be traced.*branches="):
        fixup_(Untraceable().to("meta"), x.to("meta"), check=False, verbose=False)
    report = fixup_(net, branches=BRANCHES, head="fc", verbose=False)
    assert report.num_branches == 3 and net(x).abs().max() == 0
    assert not [m for m in net.modules() if isinstance(m, nn.LayerNorm)]
    assert net.blocks[0][1].weight.std() > 0 and not net.blocks[0][3].weight.any()


def test_branches_that_the_network_declares_need_no_inputs() -> None:

    report = fixup_(ConvNet(4), verbose=False)
    assert report.num_branches == 4 and report.head == ("fc.weight",)


class Attending(nn.Module):
    """``nn.MultiheadAttention`` as the only branch, with keys and values of a size of their own."""

    def __init__(self, size: int | None = None) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, kdim=size, vdim=size)
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        memory = x if memory is None else memory
        return self.out(x + self.attention(x, memory, memory, need_weights=False)[0])


class Declaring(Attending):
    """It says itself which of attention's weights its branch is a product of."""

    def residual_branches(self) -> Iterator[ResidualBranch]:
        own = ("in_proj_weight", "in_proj_bias", "value", XAVIER_UNIFORM)
        packed, out = WeightLayer(self.attention, *own), self.attention.out_proj
        yield ResidualBranch("", (packed, WeightLayer(out, role="out")))

    def classifier_layers(self) -> Iterator[nn.Module]:
        yield self.out


X, MEMORY = torch.randn(2, 3, 8), torch.randn(2, 5, 6)
ROLES: dict[str, tuple[Callable[[], nn.Module], Any, list[tuple[str, str]]]] = {
    "packed": (Attending, X, [("in_proj_weight", "value"), ("weight", "out")]),
    "separate": (
        lambda: Attending(6),
        (X, MEMORY),
        [("v_proj_weight", "value"), ("weight", "out")],
    ),
    "declared": (Declaring, None, [("in_proj_weight", "value"), ("weight", "out")]),
    "convolutions": (Basic, IMAGES, [("weight", "conv"), ("weight", "conv")]),
    "linear layers": (
        lambda: Net(lambda n, x: n.e(x + n.b(n.a(x)))),
        X,
        [("weight", "fc"), ("weight", "fc")],
    ),
}


@pytest.mark.parametrize("name", ROLES)
def test_layers_say_which_parameter_they_are_and_which_part_they_play(name: str) -> None:
    make, inputs, expected = ROLES[name]
    net = make()
    report = fixup_(net, example_inputs=inputs, verbose=False)
    (branch,) = collect_branches(net)
    assert [(layer.weight, layer.role) for layer in branch.layers] == expected
    assert branch.layers_per_branch == branch.factors == report.branches[0].m == 2


def test_a_declared_packed_matrix_is_converted_as_a_traced_one() -> None:
    nets = [Declaring(), Attending()]
    reports = [
        fixup_(net, example_inputs=X, generator=torch.manual_seed(0), verbose=False) for net in nets
    ]
    assert reports[0].branches[0].layers == reports[1].branches[0].layers
    states = [net.state_dict() for net in nets]
    assert list(states[0]) == list(states[1])
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name])
    for net in nets:
        disturb_(net)
    nets[1].load_state_dict(nets[0].state_dict())
    torch.testing.assert_close(nets[0](X), nets[1](X))
