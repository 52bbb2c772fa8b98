"""Scalars: their two forms, precision, learning rate, and state dicts."""

from __future__ import annotations

import pytest
import torch

from fixup_core import (
    SCALAR_LR_RATIO,
    ScalarBias,
    ScalarMultiplier,
    anchor_scalars_,
    anchored_rate,
    fixup_init_,
    param_groups,
    scalars,
)
from tests.core.nets import ConvNet, Mlp


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_scalars_leave_the_dtype_alone(dtype: torch.dtype) -> None:
    x = torch.ones(3, 2, dtype=dtype)
    bias, multiplier = ScalarBias(), ScalarMultiplier()
    with torch.no_grad():
        bias.weight.fill_(0.5)
        multiplier.weight.fill_(3.0)
    assert bias(x).dtype == dtype and torch.equal(bias(x), x + 0.5)
    assert multiplier(x).dtype == dtype and torch.equal(multiplier(x), x * 3)


def test_scalars_stay_float32_in_a_half_precision_model() -> None:
    net = Mlp(2)
    anchor_scalars_(net, 0.1)
    with torch.no_grad():
        net.blocks[0].multiplier.weight.fill_(1e-4)
    before = net.blocks[0].multiplier.value().item()
    net.half()
    assert net.stem.weight.dtype == torch.float16
    assert {s.weight.dtype for s in scalars(net)} == {torch.float32}
    assert net.blocks[0].multiplier.value().item() == before
    assert {s.weight.dtype for s in scalars(net.double())} == {torch.float64}


def test_every_scalar_is_a_parameter_of_its_own() -> None:
    net = Mlp(6)
    found = list(scalars(net))
    assert len(found) == 6 * 4
    assert len({s.weight.data_ptr() for s in found}) == len(found)
    assert all(s.weight.shape == (1,) for s in found)


@pytest.mark.parametrize(("initial", "make"), [(0.0, ScalarBias), (1.0, ScalarMultiplier)])
def test_anchoring_keeps_the_value(initial: float, make) -> None:
    scalar = make()
    with torch.no_grad():
        scalar.weight.add_(0.25)
    scalar.anchor_(0.1)
    assert scalar.value().item() == pytest.approx(initial + 0.25)
    assert scalar.weight.item() == pytest.approx(2.5)


def _first_step(optimizer: str, ratio: float | None) -> float:
    scalar = ScalarMultiplier()
    if ratio is not None:
        scalar.anchor_(anchored_rate(ratio, optimizer))
    kinds = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
    step = kinds[optimizer](scalar.parameters(), lr=0.01)
    (scalar(torch.ones(10)).sum() * 0.3).backward()
    step.step()
    return abs(scalar.value().item() - 1)


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("ratio", [0.1, 0.5])
def test_anchored_scalars_learn_at_the_ratio(optimizer: str, ratio: float) -> None:
    assert _first_step(optimizer, ratio) == pytest.approx(
        ratio * _first_step(optimizer, None), rel=1e-3
    )


def test_a_gradient_multiplier_would_not_do_it_under_adam() -> None:
    scalar = ScalarMultiplier()
    step = torch.optim.Adam(scalar.parameters(), lr=0.01)
    (scalar(torch.ones(10)).sum() * 0.3).backward()
    scalar.weight.grad.mul_(0.1)
    step.step()
    assert abs(scalar.value().item() - 1) == pytest.approx(_first_step("adam", None), rel=1e-3)


def test_weight_decay_pulls_anchored_scalars_to_their_anchor() -> None:
    scalar = ScalarMultiplier()
    with torch.no_grad():
        scalar.weight.fill_(3.0)
    scalar.anchor_(0.5)
    optimizer = torch.optim.SGD(scalar.parameters(), lr=0.1, weight_decay=1.0)
    for _ in range(200):
        scalar.weight.grad = torch.zeros(1)
        optimizer.step()
    assert scalar.value().item() == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("saved", [None, 0.1, 0.3])
@pytest.mark.parametrize("own", [None, 0.1, 1.0])
def test_a_state_dict_keeps_its_meaning_in_any_form(saved, own) -> None:
    source, target = ScalarMultiplier(), ScalarMultiplier()
    with torch.no_grad():
        source.weight.fill_(1.7)
    if saved:
        source.anchor_(saved)
    if own:
        target.anchor_(own)
    target.load_state_dict(source.state_dict())
    assert target.value().item() == pytest.approx(1.7, abs=1e-6)
    if saved == own:
        assert torch.equal(target.weight, source.weight)


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("nan")])
def test_impossible_ratios_are_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        anchored_rate(ratio, "adam")


@pytest.mark.parametrize("net", [Mlp(3), ConvNet(2)], ids=["mlp", "conv"])
def test_groups_partition_the_parameters(net) -> None:
    fixup_init_(net)
    net.stem.weight.requires_grad_(False)
    weights, scalar_group = param_groups(net, lr=0.1, weight_decay=1e-4)
    grouped = [id(p) for group in (weights, scalar_group) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in net.parameters() if p.requires_grad)
    assert {id(s.weight) for s in scalars(net)} == {id(p) for p in scalar_group["params"]}
    assert scalar_group["lr"] == pytest.approx(0.1 * SCALAR_LR_RATIO) and weights["lr"] == 0.1
    assert scalar_group["weight_decay"] == 1e-4


def test_torchscript_runs_both_forms() -> None:
    for rate in (None, 0.1):
        multiplier = ScalarMultiplier()
        if rate:
            multiplier.anchor_(rate)
        scripted = torch.jit.script(multiplier)
        assert torch.equal(scripted(torch.ones(3)), multiplier(torch.ones(3)))
