"""A norm on its way out: itself at first, a fixed affine map in the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fixup_core.removal.kinds import NormKind
from fixup_core.rules.frozen import STAYING
from fixup_core.rules.scalars import KeepsFloat32

MOMENTUM = 0.9
"""Of the running statistics."""
WHOLE, GONE = (1.0, 1.0), (0.0, 0.0)


class Statistics(KeepsFloat32):
    """What enters a norm, averaged over the batches seen, and how much of the norm is left.

    Attributes:
        centre: [groups], or [1] for a token norm.
        size: The same: what the norm divides by.
        spread: [1], the standard deviation of the tokens' sizes divided by their mean.
        largest: [1], the largest size divided by the mean.
        batches: [1], how many were seen.
        gates: [2], the share of the norm in what it hands to queries and keys, or to everything,
            and in what it hands to values.
    """

    centre: Tensor
    size: Tensor
    spread: Tensor
    largest: Tensor
    batches: Tensor
    gates: Tensor

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(groups))
        self.register_buffer("size", torch.ones(groups))
        self.register_buffer("spread", torch.zeros(1))
        self.register_buffer("largest", torch.ones(1))
        self.register_buffer("batches", torch.zeros(1))
        self.register_buffer("gates", torch.tensor(WHOLE))

    def add_(self, mean: Tensor, size: Tensor) -> None:
        """Those of one batch, [B, groups] or of any shape for a token norm."""
        groups = self.size.numel()
        mean, size = (part.reshape(-1, groups) for part in (mean, size))
        average = size.mean(0)
        relative = size / average
        seen = (mean.mean(0), average, relative.std(correction=0), relative.max())
        running = (self.centre, self.size, self.spread, self.largest)
        # The first batch counts in full.
        weight = torch.where(self.batches > 0, 1 - MOMENTUM, 1.0)
        for old, new in zip(running, seen, strict=True):
            old += weight * (new - old)
        self.batches += 1

    def agree_(self) -> None:
        """Give all processes the mean of theirs."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            for part in (self.centre, self.size, self.spread, self.largest):
                dist.all_reduce(part)
                part /= dist.get_world_size()


class FixedAffine(nn.Module):
    """What is left of a norm: ``(x - mean) * weight + bias``, the mean of each token or none.

    Args:
        kind: Of the norm.
        weight: A number for each feature, or [1].
        bias: Likewise; ``None`` for 0.
        centring: Subtract each token's mean, a linear map.
        then: What was part of the norm and stays, as an activation.
    """

    eps = 0.0  # looked at by nn.TransformerEncoder

    def __init__(
        self,
        kind: NormKind,
        weight: Tensor,
        bias: Tensor | None,
        centring: bool,
        then: Mapping[str, nn.Module],
    ) -> None:
        super().__init__()
        self.kind, self.centring = kind, centring
        self.weight = nn.Parameter(weight)
        self.bias = None if bias is None else nn.Parameter(bias)
        for name, module in then.items():
            self.add_module(name, module)

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        x = _affine(self.kind, x, self.weight, self.bias, self.centring)
        for step in self.children():
            x = step(x)
        return x

    def extra_repr(self) -> str:
        return f"{list(self.weight.shape)}, centring={self.centring}"


class LeavingNorm(nn.Module):
    """A norm, mixed with the affine map that will take its place.

    ``gate * norm(x) + (1 - gate) * fixed(x)``, and ``fixed(x) = (x - mean) / size * gain + bias``
    with the running ``size``, frozen from the first step at which the gate is below 1. Gain and
    bias are the norm's own parameters and go on learning, so an optimiser keeps knowing them.

    Args:
        norm: What is there. Its attributes can be asked for here too.
        kind: Of it.
        centring: Of a token norm with a mean: subtract each token's mean in ``fixed`` too, which is
            a linear map and folds into a linear layer. Else the running mean is subtracted.

    Attributes:
        sides: What the last call has handed out, and what is meant for values, where these differ.
    """

    def __init__(self, norm: nn.Module, kind: NormKind, centring: bool = True) -> None:
        super().__init__()
        self.norm, self.kind = norm, kind
        self.centring = centring and kind.centred and kind.of_tokens
        self.statistics = Statistics(kind.groups or 1)
        tensors = [*norm.parameters(), *norm.buffers()]
        if tensors:
            self.statistics.to(tensors[0].device)
        self.gates = WHOLE
        self._shares: tuple[float | None, ...] = WHOLE
        self._split = False
        self.sides: tuple[Tensor, Tensor] | None = None
        self.train(norm.training)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "norm" or name.startswith("__"):
                raise
            return getattr(self.norm, name)

    def __getstate__(self) -> dict[str, Any]:
        # Activations of the last call are no part of a copy.
        return self.__dict__ | {"sides": None}

    @property
    def observed(self) -> bool:
        """Whether there are statistics to freeze."""
        return self.kind.batch or bool(self.statistics.batches > 0)

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        self.sides = None
        if self._shares == WHOLE:
            if self.training and not self.kind.batch:
                with torch.no_grad():
                    self.statistics.add_(*self.kind.mean_and_size(x))
            return self.norm(x, *args, **options)
        normed = self.norm(x, *args, **options) if self._shares != GONE else None
        fixed = self._fixed(x)
        shares = zip(self._shares, self.statistics.gates.clone(), strict=True)
        first, second = (_mixed(share, gate, normed, fixed) for share, gate in shares)
        if self._split:
            self.sides = (first, second)
        return first

    def set_gates_(self, first: float, second: float) -> None:
        """The shares of the norm that are left, in 0..1; the statistics freeze below 1."""
        if self.gates == WHOLE and (first, second) != WHOLE:
            self.freeze_()
        self.write_gates_((first, second))

    def freeze_(self) -> None:
        """Take a BatchNorm's running statistics; let all processes have the same ones."""
        own, norm = self.statistics, self.norm
        if self.kind.batch:
            own.centre.copy_(norm.get_buffer("running_mean"))
            own.size.copy_(self.size())
        own.agree_()

    def size(self) -> Tensor:
        """What the norm divides by, on average: [groups] or [1], float32."""
        if self.kind.batch and self.gates == WHOLE:
            return (self.norm.get_buffer("running_var").float() + self.kind.eps).sqrt()
        return self.statistics.size

    def constants(self) -> tuple[Tensor, Tensor | None]:
        """The affine map: scale and shift, one number for each feature or [1], float32."""
        kind, own = self.kind, self.statistics
        # Their own parameters, not those of a layer that the norm wraps.
        parts = (getattr(self.norm, name, None) for name in ("weight", "bias"))
        gain, bias = (None if part is None else part.float() for part in parts)
        # Copies: what a backward pass keeps may change before it, where processes share buffers.
        size, centre = own.size.clone(), own.centre.clone()
        if kind.groups:
            size, centre = (_repeated(part, kind.channels) for part in (size, centre))
        scale = 1 / size if gain is None else (gain + kind.offset) / size
        if kind.centred and not self.centring:
            moved = -centre * scale
            bias = moved if bias is None else bias + moved
        return scale, bias

    def plain(self) -> FixedAffine:
        """The affine map as a module of its own."""
        scale, shift = self.constants()
        like = next(self.norm.parameters(), scale)
        parts = (None if part is None else part.detach().to(like) for part in (scale, shift))
        weight, bias = parts
        assert weight is not None
        if self.kind.of_tokens and weight.numel() == 1:
            weight = weight.reshape(1)
        plain = FixedAffine(self.kind, weight.clone(), bias, self.centring, self._then())
        learnt = [part.requires_grad for part in self.norm.parameters()]
        if learnt and not any(learnt):
            plain.requires_grad_(False)
        return plain.train(self.training)

    def _fixed(self, x: Tensor) -> Tensor:
        scale, shift = self.constants()
        x = _affine(self.kind, x, scale, shift, self.centring)
        for step in self._then().values():
            x = step(x)
        return x

    def _then(self) -> dict[str, nn.Module]:
        parts = dict(self.norm.named_children())
        return {name: parts[name] for name in STAYING if name in parts}

    def write_gates_(self, gates: tuple[float, float]) -> None:
        """Have these shares of the norm, whatever they were; its statistics are left alone."""
        kept = torch.tensor(gates)
        first, second = kept.tolist()
        self.gates = gates = (first, second)  # as the buffer has them
        # What ``forward`` asks for changes seldom, or a compiled network would be compiled anew at
        # every step; the buffer says how much is left.
        self._shares = tuple(gate if gate in (0, 1) else None for gate in gates)
        self._split = gates[0] != gates[1]
        self.statistics.gates.copy_(kept)

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        state, prefix = args[:2]
        gates = state.get(f"{prefix}statistics.gates")
        if gates is not None:
            first, second = gates.tolist()
            self.write_gates_((first, second))


def _affine(
    kind: NormKind, x: Tensor, scale: Tensor, shift: Tensor | None, centring: bool
) -> Tensor:
    given = x
    if centring:
        x = x - x.mean(kind.dims, keepdim=True)
    scale = kind.along(scale, x)
    made = x * scale if shift is None else torch.addcmul(kind.along(shift, x), x, scale)
    return made.to(given.dtype)


def _mixed(share: float | None, gate: Tensor, normed: Tensor | None, fixed: Tensor) -> Tensor:
    if normed is None or share == 0:
        return fixed
    return normed if share == 1 else torch.lerp(fixed, normed.to(fixed), gate.to(fixed))


def _repeated(part: Tensor, channels: int) -> Tensor:
    return part.repeat_interleave(channels // part.numel())
