"""The depth check: the right rule passes it, every wrong one fails, whatever the network."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fixup_core import (
    DepthCheck,
    ResidualBranch,
    ScalarMultiplier,
    WeightLayer,
    assert_depth_stable,
    branch_scale,
    branch_weights,
    collect_branches,
    depth_check,
    initialise_,
    plot_depth_checks,
)
from fixup_core.errors import UserError
from fixup_core.measure import depth as module
from tests.core.nets import Mlp, method_of, unit_scale

GENERATOR = torch.Generator().manual_seed(0)
BATCH = torch.randn(16, 8, generator=GENERATOR), torch.arange(16) % 5
FAST = {"batch": BATCH, "depths": (4, 12, 36), "seeds": 8}
WIDE = FAST | {"depths": (4, 16, 64)}
"""For verdicts of flat, which want a narrow interval."""
WIDTH = 64


def test_the_check_says_on_stderr_how_far_it_is(capsys: pytest.CaptureFixture) -> None:
    depth_check(lambda depth: Mlp(depth, width=8), **FAST | {"seeds": 1})
    out, err = capsys.readouterr()
    assert not out and [line.split(":")[0] for line in err.splitlines()] == [
        f"depth {depth} of 4, 12, 36" for depth in (4, 12, 36)
    ]


class DeepBlock(nn.Module):
    """A branch of m layers, behind a multiplier that may start at 0."""

    def __init__(self, m: int, multiplier: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(m))
        self.multiplier = ScalarMultiplier(multiplier)

    def residual_branches(self):
        yield ResidualBranch("branch", tuple(WeightLayer(layer) for layer in self.layers))

    def forward(self, x: Tensor) -> Tensor:
        first, *others = self.layers
        out = first(x)
        for layer in others:
            out = layer(torch.relu(out))
        return x + self.multiplier(out)


class DeepNet(nn.Module):
    def __init__(self, depth: int, m: int = 3, multiplier: float = 1.0) -> None:
        super().__init__()
        self.stem = nn.Linear(8, WIDTH)
        self.blocks = nn.Sequential(*(DeepBlock(m, multiplier) for _ in range(depth)))
        self.head = nn.Linear(WIDTH, 5)

    def classifier_layers(self):
        yield self.head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


def undeclared(depth: int) -> nn.Module:
    """Nothing says what a branch is; the last linear layer is at 0."""
    net = nn.Sequential(nn.Linear(8, 16), *(Layer() for _ in range(depth)), nn.Linear(16, 5))
    nn.init.zeros_(net[-1].weight)
    return net


class Layer(nn.Linear):
    def __init__(self) -> None:
        super().__init__(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def mlp(depth: int) -> nn.Module:
    return Mlp(depth, width=WIDTH)


def maker(kind=mlp, rule=branch_scale, **options):
    def make_net(depth: int) -> nn.Module:
        net = kind(depth)
        initialise_(net, method_of(rule, **options))
        return net

    return make_net


def inverse(num_branches: int, m: int) -> float:
    return 1 / branch_scale(num_branches, m)


def one_layer_more(num_branches: int, m: int) -> float:
    """L^(-1/2m): the exponent that forgets that the last layer is 0."""
    return branch_scale(num_branches, m + 1)


def squared(num_branches: int, m: int) -> float:
    """L^(-1/(m-1))."""
    return branch_scale(num_branches, m) ** 2


@pytest.mark.parametrize("kind", [mlp, DeepNet], ids=["m = 2", "m = 3"])
def test_fixup_is_flat(kind) -> None:
    assert_depth_stable(maker(kind), **WIDE)


@pytest.mark.parametrize("kind", [mlp, DeepNet], ids=["m = 2", "m = 3"])
@pytest.mark.parametrize(
    ("rule", "slopes"),
    [(unit_scale, (1, 1)), (inverse, (2, 2)), (one_layer_more, (1 / 2, 1 / 3))],
    ids=["no factor", "sign", "exponent"],
)
def test_wrong_rules_grow_as_the_theory_says(kind, rule, slopes) -> None:
    check = depth_check(maker(kind, rule), **FAST)
    wanted = slopes[0 if kind is mlp else 1]
    assert check.verdict == "growing"
    assert check.slope.low - 0.05 < wanted < check.slope.high + 0.05


def test_the_assertion_shows_the_table() -> None:
    with pytest.raises(AssertionError, match=r"is growing\n +depth  branches(.*\n)+slope"):
        assert_depth_stable(maker(rule=unit_scale), batch=BATCH, depths=(2, 4, 8))


def test_a_factor_that_is_too_small_shrinks() -> None:
    check = depth_check(maker(rule=squared), **FAST)
    assert check.verdict == "shrinking" and check.slope.value == pytest.approx(-1, abs=0.15)


def test_plain_he_or_xavier_grows_beyond_all_bounds() -> None:
    check = depth_check(
        maker(rule=unit_scale, zero=False), **FAST | {"depths": (4, 64, 256), "seeds": 1}
    )
    assert check.verdict == "growing" and check.slope.value == math.inf


def test_with_the_factor_on_every_layer_the_last_need_not_be_zero() -> None:
    """The update's size does not ask for rule 1: each layer's share is still 1 / L."""
    assert_depth_stable(maker(zero=False), **WIDE)


def test_bias_vectors_at_the_end_of_branches_grow() -> None:
    def last_biases(net: nn.Module):
        return [block.fc2.bias for block in net.blocks]

    check = depth_check(maker(), **FAST, moved=last_biases)
    assert check.verdict == "growing" and check.slope.value == pytest.approx(1, abs=0.2)


def test_adam_steps_are_flat_under_another_exponent() -> None:
    """Its step is as long in every layer: each share is L^-1/2 with Fixup, and 1 / L with L^-1."""
    options = FAST | {"optimizer": torch.optim.Adam}
    fixup = depth_check(maker(), **options)
    assert fixup.verdict == "growing" and fixup.slope.value == pytest.approx(0.5, abs=0.1)
    assert_depth_stable(maker(rule=squared), **options)


def test_a_rival_rule_behind_the_same_interface() -> None:
    """ReZero (Bachlechner et al. 2020) moves nothing but its multipliers at first."""

    def rezero(depth: int) -> nn.Module:
        return DeepNet(depth, m=2, multiplier=0.0)

    with pytest.raises(UserError, match="multiplier or gain"):
        depth_check(rezero, **FAST)
    assert depth_check(rezero, **FAST, moved="scalars").verdict == "growing"


def test_what_moves() -> None:
    net = Mlp(3)
    own = [p for block in net.blocks for p in (block.fc1.weight, block.fc2.weight)]
    assert [id(p) for p in branch_weights(net)] == [id(p) for p in own]
    assert len(list(module.MOVED["scalars"](net))) == len(own) + 3 * 4
    assert len(list(module.MOVED["all"](net))) == len(list(net.parameters()))
    assert [id(p) for p in branch_weights(net, "1.mlp")] == [id(p) for p in own[2:4]]
    with pytest.raises(UserError, match="no branch whose name ends with 'attn'"):
        branch_weights(net, "attn")


def test_a_network_that_declares_nothing() -> None:
    def layers(net: nn.Module):
        return [m.weight for m in net if isinstance(m, Layer)]

    with pytest.raises(UserError, match=r"declares no residual branch: .*moved="):
        depth_check(undeclared, batch=BATCH)
    options = FAST | {"moved": layers}
    found = depth_check(undeclared, **options)
    assert found.num_branches == (4, 12, 36)
    with pytest.raises(UserError, match="the step changes nothing"):
        depth_check(undeclared, head="0", **options)
    with pytest.raises(UserError, match="no module 'fc'"):
        depth_check(undeclared, head="fc", **options)


def test_a_head_at_zero_would_make_the_test_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "draw_zero_heads_", lambda heads: None)
    with pytest.raises(UserError, match="the step changes nothing"):
        depth_check(maker(), **FAST)


def test_a_head_that_is_not_zero_stays() -> None:
    heads = {}

    def make_net(depth: int) -> nn.Module:
        net = maker(zero=False)(depth)
        heads[depth] = net, net.head.weight.detach().double()
        return net

    depth_check(make_net, batch=BATCH, depths=(2, 4, 8))
    assert all(torch.equal(net.head.weight, before) for net, before in heads.values())


def test_the_step_is_small_enough() -> None:
    options = FAST | {"seeds": 2}
    once = depth_check(maker(), **options, eta=1e-6).sizes
    half = depth_check(maker(), **options, eta=5e-7).sizes
    large = depth_check(maker(), **options, eta=30.0).sizes
    assert torch.allclose(torch.tensor(once), torch.tensor(half), rtol=1e-4)
    assert not torch.allclose(torch.tensor(once), torch.tensor(large), rtol=1e-1)


def test_seeds_repeat_and_leave_the_random_numbers_alone() -> None:
    torch.manual_seed(7)
    wanted = torch.rand(3)
    torch.manual_seed(7)
    first = depth_check(maker(), batch=BATCH, depths=(2, 4, 8), seeds=2)
    assert torch.equal(torch.rand(3), wanted)
    assert first == depth_check(maker(), batch=BATCH, depths=(2, 4, 8), seeds=2)
    assert first.sizes[0][0] != first.sizes[0][1]


class Wrapped(nn.Module):
    """Several inputs, two outputs, and dropout."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.net = maker()(depth)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, None]:
        return self.net(F.dropout(x + y, 0.5)), None


def test_arguments_tuples_and_dropout() -> None:
    x, targets = BATCH
    named = depth_check(Wrapped, **WIDE | {"batch": ({"x": x, "y": x}, targets)})
    assert named.flat
    few = FAST | {"depths": (2, 4, 8), "seeds": 2}
    first, second = (
        depth_check(Wrapped, **few | {"batch": (inputs, targets)})
        for inputs in ({"x": x, "y": x}, (x, x))
    )
    assert first == second


def test_another_loss_and_precision() -> None:
    x, _ = BATCH
    options = WIDE | {"batch": (x, x[:, :5]), "loss": F.mse_loss, "dtype": torch.float32}
    assert_depth_stable(maker(), **options)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"depths": (4, 8)}, "three different depths"),
        ({"depths": (4, 4, 4)}, "three different depths"),
        ({"depths": (0, 4, 8)}, "at least 1"),
        ({"seeds": 0}, "three different"),
        ({"moved": "everything"}, "take branches, scalars, all"),
        ({"moved": lambda net: []}, "names no parameter"),
    ],
)
def test_mistakes(options: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        depth_check(maker(), batch=BATCH, **options)


def test_networks_that_are_all_as_deep() -> None:
    with pytest.raises(UserError, match="takes no heed of the depth"):
        depth_check(lambda depth: maker()(3), batch=BATCH)


def _made_up(*means: float, spread: float = 0.01) -> DepthCheck:
    depths = tuple(4 * 2**i for i in range(len(means)))
    sizes = tuple((mean * (1 - spread), mean, mean * (1 + spread)) for mean in means)
    return DepthCheck(depths, depths, sizes)


@pytest.mark.parametrize(
    ("check", "verdict"),
    [
        (_made_up(1, 1, 1, 1), "flat"),
        (_made_up(1, 1.1, 1.2, 1.3), "flat"),
        (_made_up(1, 1.2, 1.44, 1.73), "growing"),
        (_made_up(2, 1.6, 1.3, 1), "shrinking"),
        (_made_up(1, 1, 1, 1, spread=0.8), "unclear"),
        (_made_up(1, 2, 1, 2, 1), "unclear"),
        (_made_up(1, 1, math.inf), "growing"),
        (_made_up(1, 1, math.nan), "growing"),
    ],
)
def test_verdicts(check: DepthCheck, verdict: str) -> None:
    assert check.verdict == verdict and check.flat == (verdict == "flat")
    assert str(check).splitlines()[-1].endswith(verdict)


def test_the_table_has_a_line_for_each_depth() -> None:
    check = depth_check(maker(DeepNet), batch=BATCH, depths=(2, 4, 8))
    lines = str(check).splitlines()
    assert [line.split()[:2] for line in lines[1:4]] == [["2", "2"], ["4", "4"], ["8", "8"]]
    assert len(collect_branches(DeepNet(8))) == 8


def test_a_figure_of_several_checks(tmp_path: Path) -> None:
    checks = {"flat": _made_up(1, 1, 1), "lost": _made_up(1, 1, math.inf)}
    plot_depth_checks(checks, tmp_path / "new" / "depth.png")
    checks["flat"].plot(tmp_path / "one.png")
    for file in (tmp_path / "new" / "depth.png", tmp_path / "one.png"):
        assert file.read_bytes().startswith(b"\x89PNG")


def test_steps_are_counted_from_the_start() -> None:
    one = depth_check(maker(), **FAST, eta=1e-3)
    three = depth_check(maker(), **FAST, eta=1e-3, steps=3)
    assert three.earlier[0] == one.sizes and len(three.earlier) == 2
    assert len(three.slopes) == 3 and three.slope in three.slopes
    # Three steps in about one direction change about three times as much.
    for first, last in zip(one.sizes, three.sizes, strict=True):
        assert 2 < sum(last) / sum(first) < 4
    assert "after each step" in str(three) and "after each step" not in str(one)


@pytest.mark.parametrize(("rule", "slope"), [(branch_scale, 1 / 4), (unit_scale, 0)])
def test_how_far_inner_layers_move_relative_to_their_size(rule, slope: float) -> None:
    """Adam moves all weights alike: relative to those that a factor has made small, farther."""
    adam = {"steps": 3, "optimizer": torch.optim.Adam, "seeds": 2}
    check = depth_check(maker(DeepNet, rule), **FAST | adam)
    assert check.movement is not None
    assert check.movement.value == pytest.approx(slope, abs=0.05)
    assert f"inner layers: slope {check.movement.value:.2f}" in str(check)


@pytest.mark.parametrize("steps", [0, -1])
def test_steps_that_make_no_sense(steps: int) -> None:
    with pytest.raises(UserError, match="at least 1 step"):
        depth_check(maker(), **FAST, steps=steps)
