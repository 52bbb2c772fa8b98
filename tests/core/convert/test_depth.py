"""``fixup_``: converted networks are stable in depth, and without the factor they are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from fixup_core import assert_depth_stable, branch_scale, fixup_
from tests.core.convert.nets import BATCH, IMAGES, Encoder
from tests.core.foreign import GatedMlp, PreActivation
from tests.core.nets import method_of, unit_scale


def _converted(
    make: Callable[[int], nn.Module], rule: Any, calibrate: bool = False
) -> Callable[[int], nn.Module]:
    def make_net(depth: int) -> nn.Module:
        net = make(depth)
        fixup_(
            net, example_inputs=IMAGES, method=method_of(rule), calibrate=calibrate, verbose=False
        )
        return net

    return make_net


STACKS: dict[str, Callable[[int], nn.Module]] = {
    "PreActivation": PreActivation,
    "GatedMlp": GatedMlp,
    "encoder": Encoder,
    "encoder, norm first": lambda depth: Encoder(depth, norm_first=True),
}


def test_a_converted_network_is_depth_stable_by_its_factor() -> None:
    options: Any = {"batch": BATCH, "depths": [1, 3, 6], "seeds": 2, "tolerance": 0.4}
    assert_depth_stable(_converted(GatedMlp, branch_scale), **options)
    with pytest.raises(AssertionError, match="growing"):
        assert_depth_stable(_converted(GatedMlp, unit_scale), **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", STACKS)
def test_calibrated_networks_are_depth_stable(name: str) -> None:
    options: Any = {"batch": BATCH, "depths": [2, 4, 8, 16, 32], "seeds": 4, "tolerance": 0.3}
    assert_depth_stable(_converted(STACKS[name], branch_scale, calibrate=True), **options)


@pytest.mark.slow
@pytest.mark.parametrize("name", STACKS)
def test_converted_networks_are_depth_stable(name: str) -> None:
    options: Any = {"batch": BATCH, "depths": [2, 4, 8, 16, 32], "seeds": 10, "tolerance": 0.3}
    assert_depth_stable(_converted(STACKS[name], branch_scale), **options)
    with pytest.raises(AssertionError, match="growing"):
        assert_depth_stable(_converted(STACKS[name], unit_scale), **(options | {"seeds": 3}))
