"""``fixup_``: what it refuses, and that the network is then as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fixup_core import fixup_, scalars
from fixup_core.errors import UserError
from tests.core.convert.nets import BRANCHES, IMAGES, Net, Untraceable, assert_refused
from tests.core.foreign import PreActivation
from tests.core.nets import ConvNet


def _plain(n: Any, x: Tensor) -> Tensor:
    return n.b(n.norm(n.a(x)))


def _by_product(n: Any, x: Tensor) -> Tensor:
    return n.e(x * n.b(F.relu(n.a(x))))


def _by_concatenation(n: Any, x: Tensor) -> Tensor:
    return torch.cat([x, n.b(F.relu(n.a(x)))], dim=-1)


def _tied(n: Any, x: Tensor) -> Tensor:
    x = x + n.b(F.relu(n.a(x)))
    return n.e(x + n.c(F.relu(n.a(x))))


def _recurrent(n: Any, x: Tensor) -> Tensor:
    for _ in range(3):
        x = x + n.b(F.relu(n.a(x)))
    return n.e(x)


def _twice_in_one(n: Any, x: Tensor) -> Tensor:
    return n.e(x + n.b(n.a(F.relu(n.a(x)))))


def _used_elsewhere(n: Any, x: Tensor) -> Any:
    h = F.relu(n.a(x))
    return n.e(x + n.b(h)), n.c(h)


def _rectified(n: Any, x: Tensor) -> Any:
    return n.e(x + F.relu(n.a(x)))


def _uncovered(n: Any, x: Tensor) -> Tensor:
    return n.e(x + n.b(n.lstm(n.a(x))[0]))


def _norm_by_function(n: Any, x: Tensor) -> Tensor:
    return n.e(x + n.b(F.relu(F.layer_norm(n.a(x), (8,)))))


REFUSED = {
    _plain: "Net has no residual branch",
    _by_product: r"no residual branch.*otherwise than by addition in the network itself \(mul\)",
    _by_concatenation: r"no residual branch.*in the network itself \(cat\)",
    _tied: r"no rule covers most .*: a.weight is used in a too.*\(and 1 more\).*branches=",
    _recurrent: "a.weight is used in",
    _twice_in_one: "a.weight is used twice in it",
    _used_elsewhere: "used outside of it too.*reaches the output twice",
    _rectified: "its only layer cannot be 0",
    _uncovered: r"no rule covers lstm.*allow=\[",
    _norm_by_function: "normalises by a function.*norm_types=",
}


@pytest.mark.parametrize("forward", REFUSED, ids=lambda f: f.__name__)
def test_what_no_rule_covers_is_refused_and_the_network_left_alone(forward: Any) -> None:
    net = Net(forward)
    assert_refused(net, REFUSED[forward], example_inputs=torch.randn(2, 3, 8))


@pytest.mark.parametrize("name", ["a.weight", "a.bias", "e.bias", "gain"])
def test_frozen_parameters_are_refused(name: str) -> None:
    net = Net(lambda n, x: n.e(x + n.gain * n.b(n.a(x))))
    net.gain = nn.Parameter(torch.full((8,), 0.1))
    net.get_parameter(name).requires_grad_(False)
    assert_refused(net, f"{name} is frozen", example_inputs=torch.randn(2, 3, 8))


def test_a_frozen_layer_outside_the_branches_stays() -> None:
    net = Net(lambda n, x: n.e((y := n.c(x)) + n.b(n.a(y))))
    net.c.requires_grad_(False)
    report = fixup_(net, example_inputs=torch.randn(2, 3, 8), verbose=False)
    assert {"c.weight", "c.bias"} <= set(report.kept)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "example_inputs="),
        ({"branches": BRANCHES}, "head="),
        ({"branches": BRANCHES, "head": "fd"}, "no module 'fd'"),
        ({"branches": BRANCHES, "head": "blocks"}, "'blocks' .ModuleList. has no weight"),
        ({"branches": {"x": []}, "head": "fc"}, "'x' has no weight layer"),
        ({"branches": {"x": ["blocks.0.1", "no"]}, "head": "fc"}, "no module 'no'"),
        (
            {"branches": BRANCHES | {"x": ["blocks.0.1", "blocks.0.3"]}, "head": "fc"},
            "blocks.0.1.weight lies in the branch 'blocks.0' and in the branch 'x'",
        ),
    ],
)
def test_wrong_declarations_are_refused(options: dict[str, Any], message: str) -> None:
    assert_refused(Untraceable(), message, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"branches": {"a": ["blocks.0.conv1", "blocks.0.conv2"]}}, "leave branches= out"),
        ({"head": "stem"}, "leave head= out"),
        ({"head": False}, "leave head= out"),
    ],
)
def test_what_the_network_declares_cannot_be_named_otherwise(
    options: dict[str, Any], message: str
) -> None:
    net = ConvNet(2)
    with pytest.raises(UserError, match=message):
        fixup_(net, verbose=False, **options)
    assert not any(scalars(net))
    assert fixup_(net, head="fc", verbose=False).head == ("fc.weight",)


def test_a_second_time_is_refused() -> None:
    net = PreActivation()
    fixup_(net, example_inputs=IMAGES, verbose=False)
    with pytest.raises(UserError, match="has Fixup's scalars already"):
        fixup_(net, example_inputs=IMAGES, verbose=False)


def test_what_is_allowed_stays() -> None:
    net = Net(_uncovered)
    before = net.lstm.weight_ih_l0.clone()
    report = fixup_(net, example_inputs=torch.randn(2, 3, 8), allow=["lstm"], verbose=False)
    assert torch.equal(net.lstm.weight_ih_l0, before) and "lstm.weight_ih_l0" in report.kept


def _divided(n: Any, x: Tensor) -> Tensor:
    """A parameter in each of two branches that no rule covers."""
    x = x + n.b(n.a(x) / n.bs[1])
    return n.e(x + n.d(n.c(x) / n.bs[10]))


def _net_with_list() -> Net:
    net = Net(_divided)
    net.bs = nn.ParameterList(torch.ones(8) for _ in range(11))
    return net


def test_what_is_not_covered_is_named_in_one_go() -> None:
    message = r"no rule covers bs.1, .* nor 1 more parameters: allow=\['bs.1', 'bs.10'\]"
    assert_refused(_net_with_list(), message, example_inputs=torch.randn(2, 3, 8))


def test_what_is_allowed_is_a_path_and_no_prefix() -> None:
    x = torch.randn(2, 3, 8)
    message = r"no rule covers bs.10, .*allow=\['bs.10'\]"
    assert_refused(_net_with_list(), message, example_inputs=x, allow=["bs.1"])
    for allow in (["bs"], ["bs.1", "bs.10"]):
        report = fixup_(_net_with_list(), example_inputs=x, allow=allow, verbose=False)
        assert {"bs.1", "bs.10"} <= set(report.kept)


STEPS = ["apply.attach_scalars_", "convert.initialise_", "convert.calibrate_", "convert._report"]


@pytest.mark.parametrize("step", STEPS)
def test_a_failure_half_way_is_undone(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise UserError("halfway")

    monkeypatch.setattr(f"fixup_core.convert.{step}", fail)
    drawn = torch.Generator()
    options: Any = {"example_inputs": IMAGES, "calibrate": True, "generator": drawn}
    assert_refused(PreActivation(), "halfway", **options)


@pytest.mark.parametrize("step", ["initialise_", "_report"])
def test_a_users_hook_can_be_removed_after_a_refusal(
    step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, called = PreActivation(), []
    shown = repr(net)
    handle = net.stem.register_forward_hook(lambda *_: called.append(1))
    monkeypatch.setattr(f"fixup_core.convert.convert.{step}", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fixup_(net, example_inputs=IMAGES, verbose=False)
    assert repr(net) == shown
    net(IMAGES)
    assert called
    handle.remove()
    called.clear()
    net(IMAGES)
    assert not called
