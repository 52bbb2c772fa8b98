"""How a normalisation layer computes, so that a fixed affine map can take its place.

Two families. A *token norm* divides every token, or every pixel, by a size of its own: LayerNorm,
RMSNorm. A *channel norm* has statistics of channels over an image or a batch: BatchNorm, GroupNorm,
InstanceNorm.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from fixup_core.errors import UserError
from fixup_core.rules.frozen import STAYING
from fixup_core.rules.standards import BATCH_NORMS, CHANNEL_NORMS

EPSILONS = ("eps", "variance_epsilon", "epsilon")
"""What the number that keeps a division from 0 is called."""
TOLERANCE = 1e-3
"""Of the largest output: how far a layer may be from a kind that it is taken for."""


@dataclass(frozen=True)
class NormKind:
    """What a norm computes: ``(x - centre) / size * gain + bias``.

    Attributes:
        dims: Of a token norm, those over which it takes a token's mean and size; they hold the
            gain's shape too. ``(1,)``, the channels, for a channel norm.
        centred: Whether a mean is subtracted.
        groups: Of a channel norm: how many parts the channels fall into, each with a statistic of
            its own; 0 for a token norm.
        channels: Of a channel norm.
        over_batch: A channel norm takes its statistics over the whole batch, and keeps none.
        offset: Added to the gain, 1 where a layer keeps the gain minus 1 (Gemma).
        eps: The number that keeps a division from 0.
        batch: The statistics are those of a batch, of which the layer keeps a running mean.
    """

    dims: tuple[int, ...]
    centred: bool = True
    groups: int = 0
    channels: int = 0
    over_batch: bool = False
    offset: float = 0.0
    eps: float = 1e-5
    batch: bool = False

    @property
    def of_tokens(self) -> bool:
        """Whether every token has a size of its own."""
        return not self.groups

    def along(self, part: Tensor, x: Tensor) -> Tensor:
        """A gain, or one number for each channel, in the shape that broadcasts to ``x``."""
        return part.view(-1, *[1] * (x.dim() - 2)) if self.dims == (1,) and part.dim() else part

    def mean_and_size(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of every token, or of every group of channels of every sample [B, groups]; float32."""
        x, dims = x.float(), self.dims
        if self.groups:
            x = x.transpose(0, 1).unsqueeze(0) if self.over_batch else x
            x, dims = x.reshape(x.size(0), self.groups, -1), (2,)
        if self.centred:
            # A mean of squares less the mean's square would lose it beside a large mean.
            square, mean = torch.var_mean(x, dims, correction=0)
        else:
            square, mean = x.square().mean(dims), x.mean(dims)
        return mean, (square + self.eps).sqrt()

    def applied(self, x: Tensor, gain: Tensor | None, bias: Tensor | None) -> Tensor:
        """What a token norm of this kind makes of ``x``."""
        centre = x.mean(self.dims, keepdim=True) if self.centred else 0.0
        centred = x - centre
        size = (centred.square().mean(self.dims, keepdim=True) + self.eps).sqrt()
        gained = centred / size
        gained = gained if gain is None else gained * self.along(gain + self.offset, x)
        return gained if bias is None else gained + self.along(bias, x)


def kind_of(norm: nn.Module, path: str, seen: tuple[Tensor, Tensor] | None) -> NormKind:
    """The kind of a layer.

    Args:
        norm: PyTorch's own, or any that computes as one of them does along its last dimension or
            along the channels.
        path: Of the layer.
        seen: An input of it and what it made of that; what is not PyTorch's own is known by them.

    Raises:
        UserError: The layer is of no known kind, or there is nothing to know it by.
    """
    known = _kind_by_type(norm)
    if known is not None:
        return known
    if seen is None:
        raise UserError(
            f"{path} is a {type(norm).__name__}, which is known by what it computes: give "
            "NormRemoval a batch, example_inputs="
        )
    given, made = (tensor.detach().float() for tensor in seen)
    for kind in _candidates(norm):
        if _computes(norm, kind, given, made):
            return kind
    raise UserError(
        f"{path} is a {type(norm).__name__}, which computes neither what a LayerNorm nor what an "
        f"RMSNorm does: keep=[{path!r}] leaves it"
    )


def _kind_by_type(norm: Any) -> NormKind | None:
    """Of PyTorch's own layers, and of those that put an activation behind them."""
    if isinstance(norm, CHANNEL_NORMS) and (_plain(norm) or _with_parts(norm)):
        channels: Any = getattr(norm, "num_features", 0) or norm.num_channels
        groups = norm.num_groups if isinstance(norm, nn.GroupNorm) else channels
        # An InstanceNorm too may keep running statistics, and has them in evaluation.
        kept = getattr(norm, "running_mean", None) is not None
        over_batch = isinstance(norm, BATCH_NORMS) and not kept
        return NormKind((1,), True, groups, channels, over_batch, eps=norm.eps, batch=kept)
    if type(norm).forward is nn.LayerNorm.forward:
        return NormKind(_last(norm), eps=norm.eps)
    if type(norm).forward is nn.RMSNorm.forward:
        return NormKind(_last(norm), centred=False, eps=_eps_of(norm))
    return None


def _plain(norm: nn.Module) -> bool:
    own = (*BATCH_NORMS, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm, nn.SyncBatchNorm)
    return any(type(norm).forward is kind.forward for kind in own)


def _with_parts(norm: nn.Module) -> bool:
    return any(isinstance(getattr(norm, name, None), nn.Module) for name in STAYING)


def _last(norm: Any) -> tuple[int, ...]:
    return tuple(range(-len(norm.normalized_shape), 0))


def _candidates(norm: nn.Module) -> Iterator[NormKind]:
    base = NormKind((-1,), eps=_eps_of(norm))
    for dims in ((-1,), (1,)):
        for centred in (True, False):
            for offset in (0.0, 1.0):
                yield replace(base, dims=dims, centred=centred, offset=offset)


def _computes(norm: Any, kind: NormKind, given: Tensor, made: Tensor) -> bool:
    gain, bias = (getattr(norm, name, None) for name in ("weight", "bias"))
    width = given.size(kind.dims[0])
    if given.shape != made.shape or (kind.dims == (1,) and given.dim() < 3):
        return False
    if any(part is not None and part.numel() != width for part in (gain, bias)):
        return False
    if gain is None and kind.offset:
        return False
    parts = (None if part is None else part.detach().float() for part in (gain, bias))
    off = (kind.applied(given, *parts) - made).abs().max()
    return bool(off <= TOLERANCE * made.abs().max())


def _eps_of(norm: nn.Module) -> float:
    given = next((e for name in EPSILONS if (e := getattr(norm, name, None)) is not None), None)
    # As nn.RMSNorm has it where none is given.
    return float(torch.finfo(torch.float32).eps if given is None else given)
