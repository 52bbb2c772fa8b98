"""``fixup_init_``: every weight once, by the rules, and the property the rules are made for."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fixup_core import (
    ResidualBranch,
    WeightLayer,
    branch_scale,
    collect_branches,
    fixup_init_,
    initialise_,
    lsuv_init_,
    scalars,
)
from fixup_core.errors import UserError
from tests.core.nets import Bottleneck, ConvNet, Mlp, method_of, unit_scale


def _weights(report, role):
    return [row for row in report.rows if row.role == role]


def test_branches_and_logits_are_exactly_zero() -> None:
    net, x = Mlp(7), torch.randn(4, 8)
    fixup_init_(net)
    assert all(block.branch(torch.randn(4, 16)).abs().max() == 0 for block in net.blocks)
    assert net(x).abs().max() == 0
    loss = F.cross_entropy(net(x), torch.tensor([0, 1, 2, 3]))
    assert loss.item() == pytest.approx(math.log(5), abs=1e-6)


def test_without_the_rules_they_are_not() -> None:
    net = Mlp(7)
    assert net(torch.randn(4, 8)).abs().max() > 0


@pytest.mark.parametrize("depth", [1, 6, 40])
def test_l_and_m_are_counted(depth: int) -> None:
    report = fixup_init_(Mlp(depth))
    assert report.num_branches == depth
    assert {row.m for row in _weights(report, "branch")} == {2}
    assert {row.m for row in _weights(fixup_init_(ConvNet(depth)), "branch")} == {3}


@pytest.mark.parametrize("net", [Mlp(9, width=64), ConvNet(4, width=48)], ids=["mlp", "conv"])
def test_standard_deviations(net: nn.Module) -> None:
    report = fixup_init_(net)
    parameters = dict(net.named_parameters())
    for row in report.rows:
        if row.value is not None:
            continue
        weight = parameters[row.name]
        if row.std == 0:
            assert weight.abs().max() == 0
        else:
            tolerance = 6 / math.sqrt(2 * weight.numel())
            assert weight.std(unbiased=False).item() == pytest.approx(row.std, rel=tolerance)
            assert abs(weight.mean().item()) < 6 * row.std / math.sqrt(weight.numel())


def test_convolutions_are_he_normal_over_the_fan_out_times_the_factor() -> None:
    report = fixup_init_(ConvNet(5, width=12))
    row = next(row for row in report.rows if row.name == "blocks.0.conv2.weight")
    assert row.std == pytest.approx(math.sqrt(2 / (12 * 9)) * 5 ** (-1 / 4))
    stem = next(row for row in report.rows if row.name == "stem.weight")
    assert stem.std == pytest.approx(1 / math.sqrt(3 * 27))
    projection = next(row for row in report.rows if row.name == "blocks.0.projection.weight")
    assert projection.std == pytest.approx(math.sqrt(2 / 12))


def test_every_parameter_has_one_row_and_twice_is_harmless() -> None:
    net = Mlp(5)
    first = fixup_init_(net, generator=torch.Generator().manual_seed(3))
    before = copy.deepcopy(net.state_dict())
    second = fixup_init_(net, generator=torch.Generator().manual_seed(3))
    assert [row.name for row in first.rows] == [name for name, _ in net.named_parameters()]
    assert first == second
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_a_second_call_does_not_scale_again() -> None:
    net = Mlp(30, width=64)
    fixup_init_(net)
    std = net.blocks[0].fc1.weight.std().item()
    for _ in range(3):
        fixup_init_(net)
    assert net.blocks[0].fc1.weight.std().item() == pytest.approx(std, rel=0.1)


def test_trained_scalars_go_back_to_their_start() -> None:
    net = Mlp(3)
    with torch.no_grad():
        for scalar in scalars(net):
            scalar.weight.add_(0.7)
    fixup_init_(net)
    assert all(scalar.value().item() == scalar.initial for scalar in scalars(net))


def test_a_parameter_without_a_rule_is_named_and_nothing_is_written() -> None:
    net = Mlp(3)
    net.mystery = nn.LayerNorm(16)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=r"mystery\.weight, mystery\.bias"):
        fixup_init_(net)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_kept_parameters_are_not_touched() -> None:
    net = Mlp(3)
    stem = net.stem.weight.clone()
    report = fixup_init_(net, keep=[net.stem.weight])
    assert torch.equal(net.stem.weight, stem)
    assert [row.name for row in _weights(report, "kept")] == ["stem.weight"]


def test_a_network_without_branches_is_refused() -> None:
    with pytest.raises(ValueError, match="declares no residual branch"):
        fixup_init_(nn.Linear(3, 3))


def test_a_weight_in_two_branches_is_refused() -> None:
    net = Mlp(3)
    net.blocks[2].fc1 = net.blocks[0].fc1
    with pytest.raises(ValueError, match="share a weight"):
        collect_branches(net)


def test_one_parameter_declared_twice_is_refused() -> None:
    net = Mlp(2)
    net.classifier_layers = lambda: iter((net.head, net.blocks[0].fc1))
    with pytest.raises(ValueError, match="written twice"):
        fixup_init_(net)


def test_a_branch_with_one_layer_is_zero_and_an_empty_one_is_refused() -> None:
    class OneLayer(nn.Linear):
        def residual_branches(self):
            yield ResidualBranch("only", (WeightLayer(self),))

    net = nn.Sequential(nn.Linear(3, 3), OneLayer(3, 3))
    report = fixup_init_(net)
    assert net[1].weight.abs().max() == 0 and report.num_branches == 1
    with pytest.raises(ValueError, match="no weight layer"):
        ResidualBranch("none", ())


def test_packed_layers_count_as_several() -> None:
    packed, out = nn.Linear(8, 24), nn.Linear(8, 8)
    branch = ResidualBranch("attention", (WeightLayer(packed, copies=3), WeightLayer(out)))
    assert branch.layers_per_branch == 4


def test_grouped_and_transposed_convolutions_have_their_own_fans() -> None:
    block = Bottleneck(8, 8, groups=4)
    report = fixup_init_(nn.Sequential(block))
    row = next(row for row in report.rows if row.name == "0.conv2.weight")
    assert row.std == pytest.approx(math.sqrt(2 / (8 * 9)))
    net = Mlp(1)
    net.up = nn.ConvTranspose2d(4, 6, 2)
    row = next(row for row in fixup_init_(net).rows if row.name == "up.weight")
    assert row.std == pytest.approx(math.sqrt(2 / (6 * 4)))


def test_lsuv_takes_a_network_with_norms_but_the_method_without_norms_does_not() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    x = torch.randn(64, 8)
    with pytest.raises(UserError, match=r"no rule covers .*1\.weight"):
        initialise_(net, "lsuv", batch=x)
    lsuv_init_(net, x)
    for out in (net[0](x), net(x)):
        assert out.std().item() == pytest.approx(1, abs=1e-3)


def test_the_summary_counts_branches_that_do_not_end_at_zero() -> None:
    assert "L = 3 residual branches (3 of m = 2);" in initialise_(Mlp(3), "fixup_rule2").summary()
    assert "L = 3 residual branches;" in initialise_(Mlp(3), "none").summary()


def test_the_report_prints_as_a_table() -> None:
    text = str(fixup_init_(Mlp(4)))
    assert text.splitlines()[0].split() == [
        *("parameter", "role", "branch", "m", "L", "factor", "std")
    ]
    assert "blocks.3.mlp" in text and "0.5000" in text
    assert text.splitlines()[-1].startswith("L = 4 residual branches (4 of m = 2)")


def _update_size(depth: int, rule, seed: int) -> float:
    """Change of the function after one small step on the blocks' weights, with a random head."""
    torch.manual_seed(seed)
    net = Mlp(depth, width=32).double()
    initialise_(net, method_of(rule))
    with torch.no_grad():
        net.head.weight.normal_(0, 32**-0.5)
        if rule is unit_scale:
            for block in net.blocks:
                block.fc2.weight.normal_(0, 32**-0.5)
    x, y = torch.randn(16, 8).double(), torch.arange(16) % 5
    before = net(x)
    F.cross_entropy(before, y).backward()
    blocks = [p for block in net.blocks for p in (block.fc1.weight, block.fc2.weight)]
    with torch.no_grad():
        for p in blocks:
            p -= 1e-3 * p.grad
        return (net(x) - before).norm().item()


def _slope(rule) -> float:
    """Of the logarithm of the update size over the logarithm of the depth."""
    depths = [4, 8, 16, 32]
    sizes = [sum(_update_size(d, rule, seed) for seed in range(3)) / 3 for d in depths]
    x = torch.tensor([math.log(d) for d in depths])
    y = torch.tensor([math.log(size) for size in sizes])
    return (((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum()).item()


def test_one_step_changes_the_function_as_much_at_any_depth() -> None:
    assert abs(_slope(branch_scale)) < 0.15


def test_a_standard_initialisation_grows_with_depth() -> None:
    assert _slope(unit_scale) > 0.5


def test_backward_reaches_every_parameter_by_the_third_step() -> None:
    torch.manual_seed(0)
    net = Mlp(4)
    fixup_init_(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(net(torch.randn(32, 8)), torch.arange(32) % 5).backward()
        optimizer.step()
    assert [n for n, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []
