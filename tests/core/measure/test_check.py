"""The command ``python -m fixup_core check``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fixup_core import branch_scale
from fixup_core.__main__ import main
from tests.core.measure.test_depth import FAST, DeepNet, inverse, maker, one_layer_more, squared
from tests.core.nets import unit_scale

HERE = "tests.core.measure.test_check"
RULES = {
    "fixup": branch_scale,
    "no_factor": unit_scale,
    "inverse": inverse,
    "one_layer_more": one_layer_more,
    "squared": squared,
}


def net(method: str = "fixup") -> dict:
    """Branches of m = 2."""
    return {"make_net": maker(rule=RULES[method]), **FAST}


def deep_net(method: str = "fixup") -> dict:
    """Branches of m = 3."""
    return {"make_net": maker(DeepNet, RULES[method]), **FAST}


def without_rules() -> dict:
    return net()


def he() -> dict:
    return {
        "make_net": maker(rule=unit_scale, zero=False),
        **FAST,
        "depths": (4, 64, 256),
        "seeds": 1,
    }


def nothing() -> None:
    pass


def test_flat_ends_with_0_and_growing_with_1(capsys: pytest.CaptureFixture) -> None:
    assert main(["check", f"{HERE}:net"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[-1].endswith(": flat")
    assert [line.split(":")[0] for line in err.splitlines()] == [
        f"depth {depth} of {', '.join(map(str, FAST['depths']))}" for depth in FAST["depths"]
    ]
    assert main(["check", f"{HERE}:net", "--method", "no_factor"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].endswith(": growing")


def test_several_rules_in_one_figure(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    figure = tmp_path / "depth.png"
    flags = ("--method", "fixup", "no_factor", "--plot", str(figure), "--json")
    assert main(["check", f"{HERE}:net", *flags]) == 1
    found = json.loads(capsys.readouterr().out)
    assert {name: check["verdict"] for name, check in found.items()} == {
        "fixup": "flat",
        "no_factor": "growing",
    }
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_options_reach_the_check(capsys: pytest.CaptureFixture) -> None:
    flags = ("--depths", "2", "4", "8", "--seeds", "5", "--branches", "mlp", "--optimizer", "adam")
    assert main(["check", f"{HERE}:without_rules", *flags, "--json"]) == 1
    (check,) = json.loads(capsys.readouterr().out).values()
    assert check["depths"] == [2, 4, 8] and [len(sizes) for sizes in check["sizes"]] == [5] * 3
    assert check["slope"]["value"] == pytest.approx(0.5, abs=0.25)


def test_json_has_no_infinite_numbers(capsys: pytest.CaptureFixture) -> None:
    assert main(["check", f"{HERE}:he", "--json"]) == 1
    out = capsys.readouterr().out
    assert "Infinity" not in out and "NaN" not in out
    (check,) = json.loads(out).values()
    assert check["slope"]["value"] is None and check["verdict"] == "growing"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("cifra",), "there is no network 'cifra': take cifar, bottleneck, transformer"),
        (("no.where:net",), "No module named 'no'"),
        ((f"{HERE}:nowhere",), "has no attribute 'nowhere'"),
        ((f"{HERE}:nothing",), "must return a dictionary with make_net and batch"),
        ((f"{HERE}:without_rules", "--method", "fixup"), "takes no method"),
        ((f"{HERE}:net", "--depths", "4", "8"), "three different depths"),
        ((f"{HERE}:net", "--moved", "all", "--branches", "mlp"), "not both"),
        ((f"{HERE}:net", "--branches", "attn"), "no branch whose name ends with 'attn'"),
    ],
)
def test_mistakes_end_in_one_line(flags: tuple, says: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["check", *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and says in line


def test_as_a_command() -> None:
    flags = ("check", f"{HERE}:net", "--depths", "2", "4", "8", "--seeds", "1")
    done = subprocess.run(
        [sys.executable, "-m", "fixup_core", *flags], capture_output=True, text=True, timeout=120
    )
    assert done.returncode in (0, 1) and len(done.stderr.splitlines()) == 3
    assert "slope" in done.stdout
