"""The gallery's scripts run, and what their prose says is what they compute."""

from __future__ import annotations

import math
import runpy
from collections.abc import Iterator
from typing import Any

import matplotlib
import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _no_window() -> Iterator[None]:
    matplotlib.use("Agg")
    yield
    from matplotlib import pyplot

    pyplot.close("all")


def _run(name: str) -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "docs" / "gallery" / f"{name}.py"))


def test_why_networks_explode() -> None:
    found = _run("plot_why_networks_explode")
    decays = found["decays"]
    assert decays["sigmoid"][0] > 1e-3 and decays["sigmoid"][-1] < 1e-29
    assert all(0.1 < value < 10 for name in ("tanh", "relu") for value in decays[name])
    assert decays["residual"][-1] > 1e10 and decays["batchnorm"][-1] < 20
    assert decays["fixup"] == pytest.approx([1.0] * 4)
    factors = {name: sum(each) / len(each) for name, each in found["growth"].items()}
    assert factors["residual"] == pytest.approx(math.sqrt(3), rel=0.1)
    assert found["growth"]["batchnorm"][-1] < 1.05 < found["growth"]["batchnorm"][0]
    mean = {name: found["mean_length"](paths) for name, paths in found["lengths"].items()}
    assert mean["batchnorm"] < 6 and mean["residual"] > 30
    bounds = [table["classifier"] for table in found["bounds"]["residual"]]
    assert all(row.measured >= row.bound > 0 for row in bounds)
    assert bounds[-1].bound > 1e3 * bounds[0].bound
    fixup = [table["classifier"] for table in found["bounds"]["fixup"]]
    assert all(abs(row.bound) < 1e-12 for row in fixup)
    assert max(row.measured for row in fixup) < 1.2 * min(row.measured for row in fixup)
    losses = found["losses"]
    assert losses["residual"][0] > 1e11 and math.isnan(losses["residual"][1])
    assert losses["fixup"][0] == pytest.approx(math.log(10)) and losses["fixup"][-1] < 0.1


def test_from_layernorm_to_none() -> None:
    found = _run("plot_from_layernorm_to_none")
    report = found["report"]
    assert [branch.m for branch in report.branches] == [2] * 4 and len(report.removed) == 5
    with_norms, without = found["losses"].values()
    for losses in (with_norms, without):
        assert all(curve[-1] < 0.05 for curve in losses.values())
    assert all(curve[0] == pytest.approx(math.log(10), abs=1e-5) for curve in without.values())
    assert all(sum(without[n][50:75]) < sum(with_norms[n][50:75]) for n in without)
    slopes = [check.slopes[-1].value for check in found["checks"].values()]
    assert slopes[0] > 0.5 and slopes[1] > 0.25 and abs(slopes[2]) < 0.2
    curves = {name: curve for name, (curve, _) in found["removals"].items()}
    for gentle in (curves["taper"], curves["one_by_one"]):
        assert max(gentle) < 0.5 * max(curves["at_once"])
        assert sum(gentle[-10:]) < 0.9 * sum(curves["at_once"][-10:])
    means = [sum(sizes) / len(sizes) for sizes in found["checks"]["none, fixup_adam"].sizes]
    assert max(means) < 1.25 * min(means)
