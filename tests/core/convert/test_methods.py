"""``fixup_`` by other methods than Fixup: those without norms that know no distribution of all."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fixup_core import METHODS, collect_branches, fixup_, param_groups
from fixup_core.rules.placed import DepthMultiplier, placed_constants
from fixup_core.rules.scalars import ScalarMultiplier
from tests.core.convert.nets import IMAGES, NETS, Net, Small, assert_refused
from tests.core.foreign import GatedMlp, PreActivation

TAKEN = ("fixup_adam", "fixup_complete", "skipinit", "rezero")
REFUSED = ("batchnorm", "prenorm", "dyt", "t_fixup", "t_fixup_adam", "none", "xavier", "lsuv", "nf")
SUBJECTS = ("encoder", "PreActivation", "Separable", "GatedMlp")


def _multipliers(net: nn.Module) -> list[ScalarMultiplier]:
    return [module for module in net.modules() if isinstance(module, ScalarMultiplier)]


@pytest.mark.parametrize("name", SUBJECTS)
@pytest.mark.parametrize("method", TAKEN)
def test_it_is_converted_and_backward_reaches_everything_by_the_third_step(
    method: str, name: str
) -> None:
    make, count, _ = NETS[name]
    torch.manual_seed(0)
    net, record = make(), METHODS[method]
    report = fixup_(net, example_inputs=IMAGES, method=method, verbose=False)
    assert report.init.method == method and report.num_branches == count
    assert [m.initial for m in _multipliers(net)] == [record.multiplier] * count
    assert bool(report.head) == record.zero_head == (net(IMAGES).abs().max().item() == 0)
    optimizer = torch.optim.SGD(param_groups(net, lr=0.01), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(net(IMAGES), torch.arange(4)).backward()
        optimizer.step()
    still = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()]
    assert still == []
    assert net(IMAGES).isfinite().all()
    if record.multiplier == 0:
        assert all(m.value() != 0 for m in _multipliers(net))


@pytest.mark.parametrize("method", REFUSED)
def test_methods_that_need_norms_or_draw_everything_are_refused(method: str) -> None:
    message = f"'{method}' is not defined for fixup_, .* fixup_adam"
    assert_refused(PreActivation(), message, example_inputs=IMAGES, method=method)


@pytest.mark.parametrize("base", [None, 2.0])
def test_the_constant_counts_the_converted_network(base: float | None) -> None:
    net = GatedMlp()
    method = METHODS["fixup_adam"].with_base(base)
    report = fixup_(net, example_inputs=IMAGES, method=method, verbose=False)
    expected = (base or 15.0) / len(collect_branches(net))
    numbers = [constant.value().item() for constant in placed_constants(net)]
    assert numbers == pytest.approx([expected] * 6)
    assert [m.value().item() for m in _multipliers(net)] == pytest.approx(numbers)
    assert f"multiplied by the fixed number {expected:.4g}" in str(report)
    twin = GatedMlp()
    fixup_(twin, example_inputs=IMAGES, verbose=False)
    assert not list(placed_constants(twin))


def test_a_constant_is_on_the_branch_and_survives_a_state_dict() -> None:
    net = PreActivation(depth=1)
    named: Any = {"branches": {"block": ["convs.0", "convs.1"]}, "head": "fc", "verbose": False}
    fixup_(net, method=METHODS["fixup_adam"].with_base(0.25), **named)
    nn.init.normal_(net.convs[1].weight)
    seen: dict[str, Tensor] = {}
    last = net.convs[1]
    last.register_forward_hook(lambda m, args, out: seen.update(into=args[0], out=out))
    net(IMAGES)
    plain = F.conv2d(seen["into"], last.weight, last.bias, last.stride, last.padding)
    torch.testing.assert_close(seen["out"], 0.25 * plain)
    other = PreActivation(depth=1)
    fixup_(other, method="fixup_adam", **named)
    nn.init.normal_(net.fc.weight)
    other.load_state_dict(copy.deepcopy(net.state_dict()))
    assert torch.equal(other(IMAGES), net(IMAGES))


def test_what_a_batch_sets_stands_behind_the_constant() -> None:
    nets = {}
    for method in ("fixup", "fixup_adam"):
        torch.manual_seed(0)
        nets[method] = Small()
        record = METHODS[method].with_base(0.5 if method == "fixup_adam" else None)
        fixup_(nets[method], example_inputs=IMAGES, method=record, calibrate=True, verbose=False)
    plain, fixed = (_multipliers(net) for net in nets.values())
    assert [type(m) for m in fixed] == [DepthMultiplier] * 2
    for one, other in zip(plain, fixed, strict=True):
        torch.testing.assert_close(other.value(), 0.25 * one.value())  # L = 2
    assert plain[0].value() < 0.1


def test_a_multiplier_at_0_has_no_size_that_a_batch_could_set() -> None:
    options: Any = {"example_inputs": IMAGES, "calibrate": True}
    for method in ("skipinit", "rezero"):
        assert_refused(PreActivation(), f"{method}' lacks one of them", method=method, **options)
    gated = replace(METHODS["fixup"], name="gated", multiplier=0.0)
    assert_refused(PreActivation(), "'gated' start at 0", method=gated, **options)


def test_multipliers_at_0_are_said_to_learn() -> None:
    report = fixup_(GatedMlp(), example_inputs=IMAGES, method="rezero", verbose=False)
    assert "starts at 0, and learns" in str(report) and "at 0: nothing" in str(report)
    assert "(the last is 0)" not in str(report)


@pytest.mark.parametrize("method", ["fixup_adam", "skipinit"])
def test_a_branch_without_a_place_for_a_multiplier_is_refused(method: str) -> None:
    def forward(n: Any, x: Tensor) -> Tensor:
        x = x + n.b(F.relu(n.a(x)))
        return n.e(x + F.linear(F.relu(n.c(x)), n.matrix))

    net = Net(forward)
    net.matrix = nn.Parameter(torch.randn(8, 8))
    x = torch.randn(2, 3, 8)
    assert_refused(net, "behind every branch, and matrix", example_inputs=x, method=method)
    assert fixup_(net, example_inputs=x, verbose=False).num_branches == 2
