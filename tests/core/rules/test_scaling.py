"""The numbers of rule 2."""

import pytest

from fixup_core.rules.scaling import branch_scale
from tests.core.nets import unit_scale

DEPTHS = [1, 2, 12, 30, 5000]


@pytest.mark.parametrize("num_branches", DEPTHS)
@pytest.mark.parametrize("m", [2, 3, 4, 7])
def test_scaled_layers_contribute_one_over_root_l(num_branches: int, m: int) -> None:
    scale = branch_scale(num_branches, m)
    assert scale ** (2 * m - 2) * num_branches == pytest.approx(1)


@pytest.mark.parametrize("m", [2, 4])
def test_the_ablation_breaks_the_property(m: int) -> None:
    assert unit_scale(30, m) ** (2 * m - 2) * 30 != pytest.approx(1)


def test_published_exponents() -> None:
    assert branch_scale(16, 2) == pytest.approx(16 ** (-1 / 2))
    assert branch_scale(16, 3) == pytest.approx(16 ** (-1 / 4))
    assert branch_scale(64, 4) == pytest.approx(64 ** (-1 / 6))


def test_deeper_means_smaller() -> None:
    scales = [branch_scale(depth, 3) for depth in DEPTHS]
    assert scales == sorted(scales, reverse=True)
    assert len(set(scales)) == len(scales)


@pytest.mark.parametrize(("num_branches", "m"), [(0, 2), (-1, 2), (3, 1), (3, 0)])
def test_impossible_counts_are_refused(num_branches: int, m: int) -> None:
    with pytest.raises(ValueError, match="branch"):
        branch_scale(num_branches, m)
