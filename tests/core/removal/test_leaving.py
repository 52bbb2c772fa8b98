"""A norm on its way out: its statistics, its shares, its copies."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fixup_core.removal.kinds import kind_of
from fixup_core.removal.leaving import FixedAffine, LeavingNorm
from tests.core.removal.nets import scatter_

G = torch.Generator().manual_seed(0)
BATCHES = [torch.randn(6, 8, generator=G) * (1 + i) + 0.2 * i for i in range(4)]
IMAGES = torch.randn(4, 8, 5, 5, generator=G) + 0.5
CHANNEL = {
    "BatchNorm": lambda: nn.BatchNorm2d(8),
    "BatchNorm, no gain": lambda: nn.BatchNorm2d(8, affine=False),
    "GroupNorm": lambda: nn.GroupNorm(2, 8),
    "GroupNorm, no gain": lambda: nn.GroupNorm(2, 8, affine=False),
    "InstanceNorm": lambda: nn.InstanceNorm2d(8),
    "InstanceNorm, all": lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
}
TOKEN = {
    "LayerNorm": lambda: nn.LayerNorm(8),
    "LayerNorm, no bias": lambda: nn.LayerNorm(8, bias=False),
    "LayerNorm, no gain": lambda: nn.LayerNorm(8, elementwise_affine=False),
    "RMSNorm": lambda: nn.RMSNorm(8),
}


def _leaving(norm: nn.Module, centring: bool = True) -> LeavingNorm:
    scatter_(norm)
    return LeavingNorm(norm, kind_of(norm, "norm", None), centring)


def _gone(norm: LeavingNorm, x: Tensor) -> LeavingNorm:
    norm(x)
    norm.set_gates_(0.0, 0.0)
    return norm


def test_running_statistics_are_means_with_momentum() -> None:
    norm = _leaving(nn.LayerNorm(8))
    for batch in BATCHES:
        norm(batch)
    centre = size = spread = largest = 0.0
    for number, batch in enumerate(BATCHES):
        sizes = [(row.var(correction=0) + 1e-5).sqrt().item() for row in batch]
        average = sum(sizes) / len(sizes)
        squares = [(s / average - 1) ** 2 for s in sizes]
        seen = (batch.mean().item(), average, (sum(squares) / len(sizes)) ** 0.5)
        old = (centre, size, spread)
        kept = 0.9 if number else 0.0
        centre, size, spread = (kept * a + (1 - kept) * b for a, b in zip(old, seen, strict=True))
        largest = kept * largest + (1 - kept) * max(sizes) / average
    own = norm.statistics
    found = [t.item() for t in (own.centre, own.size, own.spread, own.largest, own.batches)]
    assert found == pytest.approx([centre, size, spread, largest, 4], rel=1e-5)


def test_groups_have_statistics_of_their_own() -> None:
    norm = _leaving(nn.GroupNorm(2, 8))
    norm(IMAGES)
    parts = IMAGES.view(4, 2, -1)
    sizes = (parts.var(2, correction=0) + 1e-5).sqrt()
    torch.testing.assert_close(norm.statistics.size, sizes.mean(0))
    torch.testing.assert_close(norm.statistics.centre, parts.mean(2).mean(0))


def test_statistics_are_taken_in_training_while_the_norm_is_whole() -> None:
    norm = _leaving(nn.LayerNorm(8))
    norm.eval()(BATCHES[0])
    assert not norm.observed
    norm.train()(BATCHES[0])
    before = {name: part.clone() for name, part in norm.statistics.named_buffers()}
    norm.set_gates_(0.999, 0.999)
    for batch in BATCHES:
        norm(batch)
    own = dict(norm.statistics.named_buffers())
    assert all(torch.equal(own[name], before[name]) for name in own if name != "gates")


def test_batch_norm_is_frozen_at_its_running_statistics() -> None:
    norm = _leaving(nn.BatchNorm2d(8))
    norm(IMAGES)
    mean, variance = (getattr(norm.norm, f"running_{n}").clone() for n in ("mean", "var"))
    norm.set_gates_(0.5, 0.5)
    norm(3 * IMAGES)  # the norm's own go on
    assert not torch.equal(norm.norm.running_mean, mean)
    torch.testing.assert_close(norm.statistics.centre, mean)
    torch.testing.assert_close(norm.size(), (variance + 1e-5).sqrt())


@pytest.mark.parametrize("name", TOKEN)
@pytest.mark.parametrize("centring", [True, False])
def test_what_is_left_of_a_token_norm(name: str, centring: bool) -> None:
    norm, x = TOKEN[name](), BATCHES[3]
    leaving = _gone(_leaving(norm, centring), BATCHES[0])
    own = leaving.statistics
    centre = (x.mean(-1, keepdim=True) if centring else own.centre) * (name != "RMSNorm")
    gain, bias = (getattr(norm, n, None) for n in ("weight", "bias"))
    expected = (x - centre) / own.size * (1 if gain is None else gain)
    expected = expected if bias is None else expected + bias
    torch.testing.assert_close(leaving(x), expected)
    torch.testing.assert_close(leaving.plain()(x), expected)


@pytest.mark.parametrize("name", CHANNEL)
def test_what_is_left_of_a_channel_norm(name: str) -> None:
    norm, x = CHANNEL[name](), 2 * IMAGES
    leaving = _gone(_leaving(norm), IMAGES)
    own = leaving.statistics
    repeats = 8 // own.size.numel()
    shape = (1, 8, 1, 1)
    size, centre = (p.repeat_interleave(repeats).view(shape) for p in (own.size, own.centre))
    expected = (x - centre) / size
    if getattr(norm, "weight", None) is not None:
        expected = expected * norm.weight.view(shape) + norm.bias.view(shape)
    torch.testing.assert_close(leaving(x), expected)
    torch.testing.assert_close(leaving.plain()(x), expected)


def test_in_between_it_is_a_mixture() -> None:
    norm = _leaving(nn.LayerNorm(8))
    norm(BATCHES[0])
    norm.set_gates_(0.3, 0.3)
    x = BATCHES[1]
    expected = 0.3 * norm.norm(x) + 0.7 * norm.plain()(x)
    torch.testing.assert_close(norm(x), expected)
    assert norm.sides is None


def test_the_sides_differ_while_one_is_gone() -> None:
    norm = _leaving(nn.LayerNorm(8))
    norm(BATCHES[0])
    norm.set_gates_(0.0, 1.0)
    first = norm(BATCHES[1])
    assert norm.sides is not None and norm.sides[0] is first
    torch.testing.assert_close(first, norm.plain()(BATCHES[1]))
    assert torch.equal(norm.sides[1], norm.norm(BATCHES[1]))
    norm.set_gates_(0.0, 0.0)
    norm(BATCHES[1])
    assert norm.sides is None


def test_gain_and_bias_go_on_learning() -> None:
    norm = _gone(_leaving(nn.LayerNorm(8)), BATCHES[0])
    norm(BATCHES[1]).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().min() > 0 for p in norm.parameters())
    assert {id(p) for p in norm.parameters()} == {id(norm.norm.weight), id(norm.norm.bias)}


@pytest.mark.parametrize("wants", [True, False])
def test_frozen_parameters_stay_frozen(wants: bool) -> None:
    norm = _leaving(nn.LayerNorm(8))
    norm.requires_grad_(wants)
    plain = _gone(norm, BATCHES[0]).plain()
    assert [p.requires_grad for p in plain.parameters()] == [wants, wants]


def test_a_state_dict_holds_the_shares() -> None:
    norm, other = _leaving(nn.LayerNorm(8)), _leaving(nn.LayerNorm(8))
    norm(BATCHES[0])
    norm.set_gates_(0.3, 0.7)
    other.load_state_dict(norm.state_dict())
    assert other.gates == pytest.approx((0.3, 0.7))
    assert torch.equal(other(BATCHES[1]), norm(BATCHES[1]))


def test_a_copy_has_no_activations() -> None:
    norm = _leaving(nn.LayerNorm(8))
    norm(BATCHES[0].requires_grad_())
    norm.set_gates_(0.0, 1.0)
    norm(BATCHES[1])
    twin = copy.deepcopy(norm)  # tensors with a graph cannot be copied
    assert twin.sides is None and norm.sides is not None
    assert torch.equal(twin(BATCHES[1]), norm(BATCHES[1]))


def test_the_norms_attributes_can_be_asked_for() -> None:
    norm = _leaving(nn.LayerNorm(8, eps=1e-3))
    assert norm.eps == 1e-3 and norm.weight is norm.norm.weight
    with pytest.raises(AttributeError):
        norm.nothing  # noqa: B018


def test_statistics_stay_in_float32() -> None:
    norm = _leaving(nn.LayerNorm(8)).bfloat16()
    x = BATCHES[0].bfloat16()
    assert norm(x).dtype == torch.bfloat16
    assert all(part.dtype == torch.float32 for part in norm.statistics.buffers())
    norm.set_gates_(0.5, 0.5)
    assert norm(x).dtype == torch.bfloat16
    assert {p.dtype for p in norm.plain().parameters()} == {torch.bfloat16}


def test_an_activation_that_is_part_of_the_norm_stays() -> None:
    norm = nn.BatchNorm2d(8)
    norm.act = nn.ReLU()
    norm.forward = lambda x: norm.act(nn.BatchNorm2d.forward(norm, x))  # type: ignore[method-assign]
    leaving = _gone(_leaving(norm.eval()), IMAGES)
    torch.testing.assert_close(leaving(IMAGES), norm(IMAGES))
    plain = leaving.plain()
    assert isinstance(plain, FixedAffine) and isinstance(plain.act, nn.ReLU)
    torch.testing.assert_close(plain(IMAGES), norm(IMAGES))
