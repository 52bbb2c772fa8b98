"""What kind of norm a layer is, and the statistics of what enters it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fixup_core.errors import UserError
from fixup_core.removal.kinds import NormKind, kind_of

X = torch.randn(4, 8, 5, 8, generator=torch.Generator().manual_seed(0)) + 0.3
LAST, CHANNELS = (-1,), (1,)


class Gemma(nn.Module):
    """An RMSNorm that keeps its gain minus 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.rand(8)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


class Images(nn.LayerNorm):
    """A LayerNorm over the channels of images."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Llama(nn.Module):
    """An RMSNorm as Llama has it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = nn.Parameter(torch.rand(8)), 1e-3

    def forward(self, x: Tensor) -> Tensor:
        size = x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon
        return self.weight * (x * torch.rsqrt(size))


class Length(nn.Module):
    """Divides by a length, which is no size of any kind here."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.norm(dim=-1, keepdim=True)


LAYERS: dict[str, tuple[Callable[[], nn.Module], NormKind]] = {
    "LayerNorm": (lambda: nn.LayerNorm(8), NormKind(LAST)),
    "no parameters": (lambda: nn.LayerNorm(8, elementwise_affine=False), NormKind(LAST)),
    "many dims": (lambda: nn.LayerNorm([8, 5, 8]), NormKind((-3, -2, -1))),
    "RMSNorm": (lambda: nn.RMSNorm(8, eps=1e-3), NormKind(LAST, centred=False, eps=1e-3)),
    "Gemma": (Gemma, NormKind(LAST, centred=False, offset=1.0, eps=1e-6)),
    "Llama": (Llama, NormKind(LAST, centred=False, eps=1e-3)),
    "LayerNorm2d": (lambda: Images(8), NormKind(CHANNELS)),
    "BatchNorm": (lambda: nn.BatchNorm2d(8), NormKind(CHANNELS, True, 8, 8, batch=True)),
    "BatchNorm, none kept": (
        lambda: nn.BatchNorm2d(8, track_running_stats=False),
        NormKind(CHANNELS, True, 8, 8, over_batch=True),
    ),
    "GroupNorm": (lambda: nn.GroupNorm(2, 8), NormKind(CHANNELS, True, 2, 8)),
    "InstanceNorm": (lambda: nn.InstanceNorm2d(8), NormKind(CHANNELS, True, 8, 8)),
}


def _layer(name: str) -> Any:
    norm = LAYERS[name][0]()
    with torch.no_grad():
        for part in norm.parameters():
            part += 0.5 * torch.rand(part.shape, generator=torch.Generator().manual_seed(1))
    return norm


@pytest.mark.parametrize("name", LAYERS)
def test_the_kind_of_a_layer(name: str) -> None:
    norm = _layer(name)
    assert kind_of(norm, "norm", (X, norm(X))) == LAYERS[name][1]


@pytest.mark.parametrize("name", [n for n, (_, kind) in LAYERS.items() if kind.of_tokens])
def test_a_token_norm_is_what_its_kind_computes(name: str) -> None:
    norm = _layer(name)
    kind = kind_of(norm, "norm", (X, norm(X)))
    made = kind.applied(X, getattr(norm, "weight", None), getattr(norm, "bias", None))
    torch.testing.assert_close(made, norm(X))


@pytest.mark.parametrize("name", LAYERS)
def test_a_norm_divides_by_its_size(name: str) -> None:
    """``(x - mean) / size`` is what the layer makes of x, its gain and bias aside."""
    norm = _layer(name)
    kind = kind_of(norm, "norm", (X, norm(X)))
    if kind.batch:
        norm = nn.BatchNorm2d(8, affine=False, track_running_stats=False)
        kind = kind_of(norm, "norm", None)
    mean, size = kind.mean_and_size(X)
    if kind.groups:
        repeats = kind.channels // kind.groups
        mean, size = (part.repeat_interleave(repeats, 1)[:, :, None, None] for part in (mean, size))
    else:
        shape = [1 if d in [i % 4 for i in kind.dims] else n for d, n in enumerate(X.shape)]
        mean, size = (part.view(shape) for part in (mean, size))
    made = (X - (mean if kind.centred else 0)) / size
    gain, bias = (getattr(norm, n, None) for n in ("weight", "bias"))
    made = made if gain is None else made * kind.along(gain + kind.offset, X)
    made = made if bias is None else made + kind.along(bias, X)
    torch.testing.assert_close(made, norm(X), rtol=1e-4, atol=1e-4)


def test_the_size_beside_a_large_mean_is_right() -> None:
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)) + 1000
    exact = (x.double().var(-1, correction=0) + 1e-5).sqrt().float()
    torch.testing.assert_close(NormKind(LAST).mean_and_size(x)[1], exact, rtol=1e-5, atol=0)


def test_a_layer_of_no_kind_is_refused() -> None:
    with pytest.raises(UserError, match=r"a\.b is a Length, .* keep=\['a.b'\] leaves it"):
        kind_of(Length(), "a.b", (X, Length()(X)))
    with pytest.raises(UserError, match="known by what it computes: give NormRemoval a batch"):
        kind_of(Gemma(), "a.b", None)
