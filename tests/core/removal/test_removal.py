"""``NormRemoval``: the network at its start, on the way, and without norms."""

from __future__ import annotations

import copy
import io
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fixup_core import NormRemoval, scalars
from fixup_core.errors import UserError
from fixup_core.removal.distilling import divergence
from fixup_core.removal.folding import maps_left
from fixup_core.removal.leaving import FixedAffine, LeavingNorm
from tests.core.convert.nets import Encoder, timm_net, torchvision_net
from tests.core.removal.nets import (
    IMAGES,
    PATHS,
    TOKENS,
    Model,
    Texts,
    conv_net,
    go_through_,
    gpt2,
    llama,
    mlp,
    norms_in,
    outputs,
    scatter_,
    text_loss,
    train_,
)

LARGE = F.interpolate(IMAGES, size=32)
WORDS = Texts(0, size=4, length=8).batch()
Made = tuple[nn.Module, Any]
NETS: dict[str, Callable[[], Made]] = {
    "BatchNorm": lambda: (conv_net(nn.BatchNorm2d(8)), IMAGES),
    "BatchNorm, none kept": lambda: (
        conv_net(nn.BatchNorm2d(8, track_running_stats=False)),
        IMAGES,
    ),
    "BatchNorm of vectors": lambda: (mlp(nn.BatchNorm1d(8)), TOKENS[:, 0]),
    "GroupNorm": lambda: (conv_net(nn.GroupNorm(2, 8)), IMAGES),
    "GroupNorm, no gain": lambda: (conv_net(nn.GroupNorm(2, 8, affine=False)), IMAGES),
    "InstanceNorm": lambda: (conv_net(nn.InstanceNorm2d(8, affine=True)), IMAGES),
    "LayerNorm": lambda: (mlp(nn.LayerNorm(8)), TOKENS),
    "LayerNorm, no gain": lambda: (mlp(nn.LayerNorm(8, elementwise_affine=False)), TOKENS),
    "LayerNorm, dims": lambda: (conv_net(nn.LayerNorm([8, 6, 6])), IMAGES),
    "RMSNorm": lambda: (mlp(nn.RMSNorm(8)), TOKENS),
    "model": lambda: (Model(), WORDS),
    "encoder": lambda: (Encoder(), LARGE),
    "encoder, norm first": lambda: (Encoder(norm_first=True), LARGE),
    "Llama": llama,
    "Gemma": lambda: llama("Gemma"),
    "GPT-2": gpt2,
    "resnet18": lambda: (torchvision_net("resnet18")(), LARGE),
    "convnext, LayerNorm2d": lambda: (
        timm_net("convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), use_grn=False)(),
        LARGE,
    ),
    "BatchNormAct2d": lambda: (timm_net("resnetv2_18", norm_layer=_act_norm)(), LARGE),
}
SCALARS = [
    *("encoder, norm first", "model"),
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("encoder", "Llama", "GPT-2", "resnet18")
    ),
]
LEFT = {
    "LayerNorm, dims": 1,
    "encoder": 4,  # on the stream
    "GPT-2": 1,  # before a tied head
    "Gemma": 1,
    "convnext, LayerNorm2d": 1,  # before pooling that flattens
    "BatchNormAct2d": 9,  # before an activation, on the stream
}
"""Maps that no layer can take in."""


def _act_norm(*args: Any, **options: Any) -> nn.Module:
    return pytest.importorskip("timm").layers.BatchNormAct2d(*args, **options)


def _made(name: str) -> Made:
    torch.manual_seed(0)
    net, inputs = NETS[name]()
    return scatter_(net), inputs


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("mode", [True, False])
def test_at_the_start_the_outputs_are_the_networks(name: str, mode: bool) -> None:
    net, inputs = _made(name)
    net.train(mode)
    norms, expected = norms_in(net), outputs(net, inputs)
    removal = NormRemoval(net, inputs, schedule="taper")
    assert torch.equal(outputs(net, inputs), expected)
    assert net.training == mode and set(norms) <= set(removal.left)
    assert all(isinstance(net.get_submodule(path), LeavingNorm) for path in removal.left)


@pytest.mark.parametrize("name", SCALARS)
def test_scalars_change_nothing_at_the_start(name: str) -> None:
    net, inputs = _made(name)
    expected = outputs(net, inputs)
    removal = NormRemoval(net, inputs, scalars=True)
    assert len(list(scalars(net))) > 3
    torch.testing.assert_close(outputs(net, inputs), expected, rtol=0, atol=1e-5)
    net.train()
    go_through_(net, inputs, removal)
    before = outputs(net, inputs)
    torch.testing.assert_close(
        outputs(removal.finish(), inputs), before, rtol=1e-4, atol=1e-4 * before.abs().max()
    )


@pytest.mark.parametrize("name", NETS)
def test_without_norms_the_outputs_are_those_of_the_maps(name: str) -> None:
    net, inputs = _made(name)
    net = net.double()
    inputs = (
        inputs if isinstance(inputs, dict) or not inputs.is_floating_point() else inputs.double()
    )
    removal = NormRemoval(net, inputs, steps=4)
    go_through_(net, inputs, removal)
    before = outputs(net, inputs)
    finished = removal.finish()
    assert finished is net and not norms_in(net)
    off = (outputs(net, inputs) - before).abs().max() / before.abs().max()
    assert off < 1e-9 and len(list(maps_left(net))) == LEFT.get(name, 0)


@pytest.mark.parametrize("name", ["BatchNorm", "resnet18", "BatchNormAct2d"])
def test_batch_norms_at_once_leave_the_network_of_evaluation(name: str) -> None:
    net, inputs = _made(name)
    net.train()
    expected = outputs(net, inputs)
    removal = NormRemoval(net, inputs, schedule="at_once")
    removal.step()
    near = 1e-5 * expected.abs().max().item()
    assert removal.done
    torch.testing.assert_close(outputs(net, inputs), expected, rtol=0, atol=near)
    args = (net.train()(inputs) - expected).abs().max()  # in training mode too
    assert args < near
    torch.testing.assert_close(outputs(removal.finish(), inputs), expected, rtol=0, atol=10 * near)


@pytest.mark.parametrize("schedule", ["taper", "one_by_one", "at_once"])
def test_the_norms_go_as_the_schedule_says(schedule: str) -> None:
    net = Model()
    removal = NormRemoval(net, WORDS, schedule=schedule, steps=21)
    for step in range(25):
        gates = removal.schedule.gates(step)
        for path, norm in removal.norms.items():
            assert norm.gates == pytest.approx(gates[path])  # as a float32 buffer has them
            assert norm.statistics.gates.tolist() == pytest.approx(list(gates[path]))
        net(WORDS)
        removal.step()
    assert removal.done and removal.steps_done == 25


def test_the_past_is_not_taken_back() -> None:
    net = Model()
    removal = NormRemoval(net, WORDS, steps=10)
    net(WORDS)
    removal.at(8)
    gates = {path: norm.gates for path, norm in removal.norms.items()}
    removal.at(2)
    assert {path: norm.gates for path, norm in removal.norms.items()} == gates


def test_going_norms_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    net = Model()
    removal = NormRemoval(net, WORDS, schedule="one_by_one", steps=7)
    with caplog.at_level(logging.INFO, logger="fixup_core"):
        go_through_(net, WORDS, removal)
        removal.finish()
    said = [record.message for record in caplog.records]
    order = [PATHS[1], PATHS[3], PATHS[0], PATHS[2], PATHS[4]]  # by their values' turns
    for path, line in zip(order, said, strict=False):
        assert f"{path}: 0.000 left, size " in line and "spread" in line
    assert said[5:] == ["5 norms are gone, 5 of them into layers"]
    assert "step 7 of 7: 5 of 5 norms are gone" in str(removal)


def _resumed(schedule: str, stop: int, steps: int) -> tuple[Any, Any]:
    """The state after ``steps`` steps, uninterrupted and stopped after ``stop``."""
    start = Model().state_dict()

    def begin() -> tuple[nn.Module, NormRemoval, Any, Texts]:
        net = Model()
        net.load_state_dict(start)
        removal = NormRemoval(net, WORDS, schedule=schedule, steps=14)
        return net, removal, torch.optim.Adam(net.parameters(), lr=1e-2), Texts(3)

    net, removal, optimizer, texts = begin()
    train_(net, steps, removal, optimizer=optimizer, texts=texts)
    first, second = begin(), begin()
    train_(first[0], stop, first[1], optimizer=first[2], texts=first[3])
    file = io.BytesIO()
    torch.save([part.state_dict() for part in first[:3]], file)
    file.seek(0)
    for part, state in zip(second[:3], torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    train_(second[0], steps - stop, second[1], optimizer=second[2], texts=first[3])
    return (net, removal), second[:2]


@pytest.mark.parametrize(
    ("schedule", "stop"),
    [("taper", 1), ("taper", 6), ("one_by_one", 9), ("taper", 15)],
)
def test_a_run_that_goes_on_is_the_same_bit_for_bit(schedule: str, stop: int) -> None:
    whole, parts = _resumed(schedule, stop, 17)
    for one, other in zip(whole, parts, strict=True):
        _assert_equal(one.state_dict(), other.state_dict())


def _assert_equal(one: Any, other: Any) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, Tensor):
            assert torch.equal(value, other[name]), name
        else:
            assert value == other[name], name


def test_another_run_is_not_gone_on_with() -> None:
    state = NormRemoval(Model(), WORDS, steps=30).state_dict()
    same = {"schedule": "taper", "steps": 30}
    for options, word in (
        ({"schedule": "one_by_one"}, "schedule=taper"),
        ({"steps": 20}, "steps=30, this one 20"),
        ({"keep": ["norm"]}, "norms="),
    ):
        other = NormRemoval(Model(), WORDS, **(same | options))
        with pytest.raises(UserError, match=f"the saved removal has {word}.*same network"):
            other.load_state_dict(state)


def test_a_copy_in_the_middle_goes_its_own_way() -> None:
    net = Model()
    removal = NormRemoval(net, WORDS, schedule="one_by_one", steps=7)
    train_(net, 4, removal)
    net(WORDS)
    twin = copy.deepcopy(net)
    expected = outputs(net, WORDS)
    assert torch.equal(outputs(twin, WORDS), expected)
    train_(net, 3, removal)
    assert torch.equal(outputs(twin, WORDS), expected)
    text_loss(twin.train(), WORDS).backward()
    assert all(p.grad is not None for p in twin.parameters() if p.numel() != 64 * 32)


def test_finishing_early_is_refused_and_can_be_forced() -> None:
    net = Model()
    removal = NormRemoval(net, WORDS, schedule="one_by_one", steps=14)
    train_(net, 4, removal)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(UserError, match="3 of 5 norms are not gone yet, 10 steps are left: go on"):
        removal.finish()
    _assert_equal(net.state_dict(), before)
    assert removal.finish(force=True) is net and not norms_in(net)


def test_forcing_before_a_batch_changes_nothing() -> None:
    net = Model()
    removal = NormRemoval(net, WORDS)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(UserError, match=r"cannot go: no batch has gone through it .*keep=\['bl"):
        removal.finish(force=True)
    _assert_equal(net.state_dict(), before)
    assert removal.left == PATHS


def test_folding_that_changes_the_outputs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from fixup_core.removal import removal as module

    def wrong(net: Any, inputs: Any) -> list[str]:
        net.head.weight.data = 1.1 * net.head.weight.data
        return []

    net = Model()
    removal = NormRemoval(net, WORDS, steps=4)
    train_(net, 2, removal)
    gates = [norm.gates for norm in removal.norms.values()]
    monkeypatch.setattr(module, "fold_maps_", wrong)
    with pytest.raises(UserError, match=r"folding would change the outputs .*finish\(fold=False\)"):
        removal.finish(force=True)
    assert norms_in(net) and [norm.gates for norm in removal.norms.values()] == gates
    assert [norm.statistics.gates.tolist() for norm in removal.norms.values()] == [
        pytest.approx(list(gate)) for gate in gates
    ]
    assert removal.steps_done == 2
    removal.finish(force=True, fold=False)
    assert len(list(maps_left(net))) == 5


def test_finishing_twice_changes_nothing() -> None:
    net = Model()
    removal = NormRemoval(net, WORDS, steps=3)
    train_(net, 3, removal)
    removal.finish()
    expected = outputs(net, WORDS)
    assert removal.finish() is net and torch.equal(outputs(net, WORDS), expected)
    assert removal.loss() == 0


def test_a_finished_network_trains_on() -> None:
    net = Model()
    removal = NormRemoval(net, WORDS, steps=3)
    train_(net, 3, removal)
    net = removal.finish()
    before = text_loss(net, WORDS).item()
    train_(net, 10, texts=_Same(WORDS))
    assert text_loss(net, WORDS).item() < before
    with pytest.raises(UserError, match="Model has no norms to take out"):
        NormRemoval(net, WORDS)


class _Same:
    def __init__(self, words: Tensor) -> None:
        self.words = words

    def batch(self) -> Tensor:
        return self.words


def test_without_a_batch_the_maps_stay() -> None:
    net = Model()
    removal = NormRemoval(net, steps=4)
    assert list(removal.norms) == PATHS  # in module order
    go_through_(net, WORDS, removal)
    expected = outputs(net, WORDS)
    removal.finish()
    assert not norms_in(net) and len(list(maps_left(net))) == 5
    torch.testing.assert_close(outputs(net, WORDS), expected)


def test_norms_can_be_kept() -> None:
    net = Model()
    removal = NormRemoval(net, WORDS, steps=3, keep=["norm", "blocks.0.norm1"])
    train_(net, 3, removal)
    removal.finish()
    assert norms_in(net) == ["blocks.0.norm1", "norm"] and isinstance(net.norm, nn.LayerNorm)


class Shared(nn.Module):
    """One norm at two paths, one that is called twice, one in the head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = self.again = nn.LayerNorm(8)
        self.twice = nn.LayerNorm(8)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.a(self.first(x)).relu())
        return self.head(self.twice(self.b(self.twice(x)).relu()))


def test_shared_norms_and_norms_called_twice() -> None:
    net = scatter_(Shared())
    expected = outputs(net, TOKENS)
    removal = NormRemoval(net, TOKENS, schedule="one_by_one", steps=6)
    assert list(removal.norms) == ["first", "twice", "head.0"] and net.first is net.again
    assert torch.equal(outputs(net, TOKENS), expected)
    go_through_(net, TOKENS, removal)
    before = outputs(net, TOKENS)
    removal.finish()
    torch.testing.assert_close(outputs(net, TOKENS), before)
    assert net.first is net.again and list(maps_left(net)) == ["first", "twice"]
    kept = Shared()
    assert "first" not in NormRemoval(kept, TOKENS, keep=["again"]).norms


class Conditional(nn.Module):
    """Its path depends on what it computes."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(x) if x.mean() > 0 else x)


class Idle(Conditional):
    """It never calls a norm that it has."""

    def __init__(self, norm: type[nn.Module] = nn.LayerNorm) -> None:
        super().__init__()
        self.idle = norm(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(x))


def _assert_refused(net: nn.Module, message: str, inputs: Any = TOKENS, **options: Any) -> None:
    before, shown = copy.deepcopy(net.state_dict()), repr(net)
    modes = [module.training for module in net.modules()]
    own = [{k: id(v) for k, v in vars(m).items()} for m in net.modules()]
    with pytest.raises(UserError, match=message) as caught:
        NormRemoval(net, inputs, **options)
    assert "\n" not in str(caught.value) and repr(net) == shown
    _assert_equal(net.state_dict(), before)
    assert [module.training for module in net.modules()] == modes
    assert [{k: id(v) for k, v in vars(m).items()} for m in net.modules()] == own
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


@pytest.mark.parametrize(
    ("make", "message", "options"),
    [
        (lambda: nn.Sequential(nn.Linear(8, 3)), "Sequential has no norms to take out$", {}),
        (lambda: nn.Linear(8, 3), "no norms .*; other libraries' are found", {"inputs": None}),
        (lambda: nn.LayerNorm(8), "the network is a norm itself, a LayerNorm", {}),
        (Shared, "2 steps are too few for the schedule 'one_by_one' of 3 norms: take 3",
         {"schedule": "one_by_one", "steps": 2}),
        (Shared, "there is no schedule 'never'", {"schedule": "never"}),
        (Shared, "keep names 'a', which is no norm", {"keep": ["a"]}),
        (Shared, "Shared has no norms to take out", {"keep": ["first", "twice", "head.0"]}),
        (Shared, "head='nowhere': the network has no such module", {"head": "nowhere"}),
        (Shared, "anchor is -1: it cannot be negative", {"anchor": -1}),
        (Shared, "distil is -0.5: it cannot be negative", {"distil": -0.5}),
        (Shared, "scalars=True needs a batch", {"scalars": True, "inputs": None}),
        (lambda: nn.DataParallel(Shared()), "before DataParallel wraps the network", {}),
        (lambda: nn.Sequential(nn.Linear(8, 8), nn.LocalResponseNorm(2)), "no norms", {}),
        (Idle, r"has not called idle with a tensor.*keep=\['idle'\] leaves it", {}),
        (lambda: nn.Sequential(nn.LayerNorm(8)), "no output layer was found", {}),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused(make: Any, message: str, options: Any) -> None:
    _assert_refused(make(), message, **options)


def test_a_norm_of_no_known_kind_is_refused() -> None:
    class Length(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x / x.norm(dim=-1, keepdim=True)

    _assert_refused(mlp(Length()), r"1 is a Length, which computes neither .*keep=\['1'\] leaves")


def test_a_second_removal_is_refused() -> None:
    net = Shared()
    removal = NormRemoval(net, TOKENS, steps=10)
    with pytest.raises(UserError, match="on their way out already: one NormRemoval a net"):
        NormRemoval(net, TOKENS, steps=10)
    net(TOKENS)
    removal.step()


def test_norms_that_are_not_called_can_be_kept_and_batch_norms_need_not_be() -> None:
    net = Idle()
    go_through_(net, TOKENS, NormRemoval(net, TOKENS, steps=3, keep=["idle"]))
    net = Idle(nn.BatchNorm1d)
    removal = NormRemoval(net, TOKENS, steps=3)
    go_through_(net, TOKENS, removal)
    removal.finish()
    assert not norms_in(net)


def test_a_path_that_depends_on_the_data() -> None:
    net = Conditional()
    removal = NormRemoval(net, steps=3)
    net(-TOKENS.abs())  # the norm is passed by
    removal.step()
    with pytest.raises(UserError, match="norm cannot go: no batch has gone through it"):
        removal.at(2)
    go_through_(net, TOKENS.abs(), removal)


def test_a_network_in_half_precision() -> None:
    net, inputs = scatter_(mlp(nn.LayerNorm(8))).bfloat16(), TOKENS.bfloat16()
    removal = NormRemoval(net, inputs, steps=4)
    go_through_(net, inputs, removal)
    assert {p.dtype for p in removal.finish().parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("frozen", ["1", "3", ""])
def test_frozen_parameters_stay_frozen(frozen: str) -> None:
    net = mlp(nn.LayerNorm(8))
    net.get_submodule(frozen).requires_grad_(False)
    wanted = {n for n, p in net.named_parameters() if p.requires_grad and not n.startswith("1")}
    removal = NormRemoval(net, TOKENS, steps=4)
    go_through_(net, TOKENS, removal)
    after = {n for n, p in removal.finish().named_parameters() if p.requires_grad}
    assert after == wanted


def test_a_map_that_stays_is_a_module_of_its_own() -> None:
    net = conv_net(nn.LayerNorm([8, 6, 6]))
    removal = NormRemoval(net, IMAGES, steps=4)
    go_through_(net, IMAGES, removal)
    fixed = removal.finish().get_submodule("1")
    assert isinstance(fixed, FixedAffine) and fixed.weight.shape == (8, 6, 6)
    assert "centring=True" in repr(fixed)


def test_the_loss_before_a_forward_pass() -> None:
    removal = NormRemoval(Shared(), TOKENS)
    with pytest.raises(UserError, match=r"removal.loss\(\) comes after a call of the network"):
        removal.loss()
    assert NormRemoval(Shared(), TOKENS, anchor=0.0).loss() == 0


def test_distillation_draws_to_the_network_as_it_was() -> None:
    net = scatter_(Model())
    original = copy.deepcopy(net).eval()
    removal = NormRemoval(net, WORDS, steps=3, anchor=0.0, distil=2.0)
    with pytest.raises(UserError, match=r"give the step's: removal.loss\(outputs, inputs\)"):
        removal.loss()
    net.train()
    assert removal.loss(net(WORDS), WORDS).abs() < 1e-6
    go_through_(net, WORDS, removal)
    logits = net(WORDS)
    own, other = logits.log_softmax(-1), original(WORDS).log_softmax(-1)
    expected = 2 * (other.exp() * (other - own)).sum(-1).mean()
    torch.testing.assert_close(removal.loss(logits, WORDS), expected)
    assert expected > 1e-4
    assert torch.equal(divergence(other, other), torch.zeros(()))


def test_a_fixed_network_sees_no_batch() -> None:
    """The negative twin of BatchNorm's exact start: in training it sees the batch."""
    net, images = _made("BatchNorm")
    net.train()
    alone, together = net(images[:1]), net(images)[:1]
    assert not torch.allclose(alone, together)
    removal = NormRemoval(net, images, schedule="at_once")
    removal.step()
    torch.testing.assert_close(net(images[:1]), net(images)[:1])
