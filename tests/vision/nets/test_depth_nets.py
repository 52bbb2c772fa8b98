"""ResNets under the depth check: Fixup is flat, its ablation and plain He are not."""

from __future__ import annotations

import pytest

from fixup_core import assert_depth_stable, depth_check
from fixup_core.errors import UserError
from vision.nets.depth_nets import bottleneck, cifar

FEWER = {"depths": (3, 12, 48), "seeds": 4}
ROUGH = FEWER | {"seeds": 8, "tolerance": 0.35}
"""Fewer points, a wider interval; the ablation's slope of 1 stays far outside it."""


@pytest.mark.parametrize(("net", "m"), [(cifar, 2), (bottleneck, 3)])
def test_fixup_is_flat(net, m: int) -> None:
    options = net()
    assert {row.m for row in options["make_net"](6).report.rows} == {None, m}
    assert_depth_stable(**options | ROUGH)


@pytest.mark.slow
@pytest.mark.parametrize("net", [cifar, bottleneck])
def test_fixup_is_flat_by_the_check_as_users_run_it(net) -> None:
    assert_depth_stable(**net())


@pytest.mark.parametrize("net", [cifar, bottleneck])
def test_without_the_factor_it_grows_as_the_depth(net) -> None:
    check = depth_check(**net("fixup_no_factor") | FEWER)
    assert check.verdict == "growing" and check.slope.value == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize("method", ["none", "batchnorm"])
def test_other_methods_grow(method: str) -> None:
    with pytest.raises(AssertionError, match="growing"):
        assert_depth_stable(**cifar(method) | FEWER)


def test_a_last_gain_at_0_is_told() -> None:
    with pytest.raises(UserError, match="multiplier or gain"):
        depth_check(**cifar("zeroinit"))


def test_depths_that_do_not_fill_three_stages() -> None:
    with pytest.raises(UserError, match="multiple of 3"):
        cifar()["make_net"](8)
    with pytest.raises(UserError, match="did you mean 'fixup'"):
        cifar("fixpu")
