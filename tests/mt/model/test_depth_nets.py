"""Transformers under the depth check: what is flat, what is not, and by how much.

An attention branch is ``out(softmax(q k) v)``: with ``out`` at 0 one step of SGD changes its output
by the square of v's factor. Counted as m = 4 that is L^(-1/3) a branch, and L^(2/3) in the sum.
"""

from __future__ import annotations

from functools import cache, partial

import pytest
import torch

from fixup_core import DepthCheck, branch_weights, depth_check
from fixup_core.errors import UserError
from fixup_mt.model.attention import FixupAttention
from fixup_mt.model.depth_nets import transformer

FEWER = {"depths": (1, 3, 9), "seeds": 8}


@cache
def _check(method: str, ending: str = "") -> DepthCheck:
    options = transformer(method) | FEWER
    return depth_check(**options | {"moved": partial(branch_weights, ending=ending)})


def test_feed_forward_branches_are_flat() -> None:
    assert _check("fixup", "ffn").verdict == "flat"
    assert _check("fixup_no_factor", "ffn").slope.value == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize("ending", ["self_attn", "encoder_attn"])
def test_attention_counted_as_four_layers_grows(ending: str) -> None:
    check = _check("fixup", ending)
    assert check.verdict == "growing"
    assert check.slope.low - 0.05 < 2 / 3 < check.slope.high + 0.1


def test_attention_counted_as_two_layers_is_flat() -> None:
    assert _check("fixup_attention_m2").verdict == "flat"
    assert _check("fixup_attention_m2", "encoder_attn").verdict == "flat"


def test_cross_attention_scaled_for_twelve_branches_grows_faster() -> None:
    """A factor that does not know the depth is no factor: the slope is 1."""
    theirs, ours = _check("fixup_authors", "encoder_attn"), _check("fixup", "encoder_attn")
    assert theirs.slope.value == pytest.approx(1, abs=0.1)
    assert theirs.slope.low > ours.slope.high


def test_the_slip_is_in_cross_attention_alone() -> None:
    def sizes(method: str, ending: str):
        moved = partial(branch_weights, ending=ending)
        few = {"depths": (1, 2, 3), "seeds": 1, "moved": moved}
        return depth_check(**transformer(method) | few)

    assert sizes("fixup_authors", "self_attn") == sizes("fixup", "self_attn")
    assert sizes("fixup_authors", "encoder_attn") != sizes("fixup", "encoder_attn")


def test_an_unknown_method() -> None:
    with pytest.raises(UserError, match="did you mean 'fixup'"):
        transformer("fixpu")


def test_attention_in_double_precision_is_computed_in_it() -> None:
    torch.manual_seed(0)
    attention = FixupAttention(8, 2, self_attention=True).double()
    x = torch.randn(5, 3, 8, dtype=torch.float64)
    fused, _ = attention(x, x, x, need_weights=False)
    by_weights, _ = attention(x, x, x, need_weights=True)
    torch.testing.assert_close(fused, by_weights, rtol=1e-12, atol=1e-12)
    assert not torch.equal(fused, fused.float().double())


@pytest.mark.parametrize("method", ["batchnorm", "groupnorm", "zeroinit", "lsuv"])
def test_a_method_that_is_not_defined_for_transformers(method: str) -> None:
    with pytest.raises(UserError, match=f"'{method}' is not defined for Transformers; choose one"):
        transformer(method)


@cache
def _adam(method: str) -> DepthCheck:
    few = {"depths": (1, 3, 9), "seeds": 2, "steps": 4, "optimizer": torch.optim.Adam}
    return depth_check(**transformer(method) | few)


def test_under_adam_a_fixed_number_is_flat_after_every_step() -> None:
    check = _adam("fixup_adam")
    assert check.flat and len(check.slopes) == 4
    assert max(abs(slope.value) for slope in check.slopes) < 0.1
    assert check.movement is not None and abs(check.movement.value) < 0.1


def test_under_adam_t_fixup_grows_and_carried_over_to_depth_does_not() -> None:
    check, own = _adam("t_fixup_adam"), _adam("t_fixup")
    assert all(-0.3 < slope.value < 0 for slope in check.slopes)
    assert own.verdict == "growing" and own.slopes[0].value > 0.4


@pytest.mark.parametrize(("method", "slope"), [("fixup", 0.75), ("fixup_attention_m2", 0.5)])
def test_under_adam_the_papers_factor_grows(method: str, slope: float) -> None:
    check = _adam(method)
    assert check.verdict == "growing"
    assert check.slopes[0].value == pytest.approx(slope, abs=0.12)


def test_a_factor_for_the_first_step_grows_from_the_second_on() -> None:
    """Squared, m = 2: the first infinitesimal step under Adam is flat, the fourth real one not."""
    from dataclasses import replace

    from fixup_core import METHODS, initialise_
    from fixup_core.rules.factors import product_factor

    squared = replace(
        METHODS["fixup_attention_m2"], name="squared", factor=lambda p: product_factor(p) ** 2
    )
    options = transformer("fixup_attention_m2")

    def make_net(depth: int):
        net = options["make_net"](depth)
        initialise_(net, squared)
        return net

    check = depth_check(
        make_net,
        batch=options["batch"],
        depths=(1, 3, 9),
        seeds=2,
        steps=4,
        optimizer=torch.optim.Adam,
    )
    assert abs(check.slopes[0].value) < 0.2 and check.slopes[3].value > 0.3
