"""The scalars of rule 3: one learnable number for a whole tensor.

A scalar stores its value ``s`` in one of two forms.

*Direct*: the parameter is the value. An optimiser with parameter groups gives it its own
learning rate (``fixup_core.rules.param_groups``).

*Anchored*: ``s = s0 + rate * p`` with ``p`` starting at 0, for hosts with a single learning rate.
A step of ``s`` is then ``rate`` (Adam) or ``rate ** 2`` (SGD) times the step of a weight, and
weight decay on ``p`` pulls ``s`` to ``s0``, not to 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fixup_core.errors import UserError


class KeepsFloat32(nn.Module):
    """A module whose tensors stay float32 or wider, even in a half-precision model."""

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        def at_least_float32(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            if changed.dtype in (torch.float16, torch.bfloat16):
                return tensor.to(changed.device)
            return changed

        return super()._apply(at_least_float32, recurse)


class Scalar(KeepsFloat32):
    """One learnable number, kept in float32 or wider even in a half-precision model.

    Args:
        initial: The value at initialisation, ``s0``.

    Attributes:
        weight: The parameter, shape [1].
        rate: Shape [1] in the anchored form, else ``None``. It is part of the state dict, so a
            checkpoint keeps its meaning wherever it is loaded: a state dict of the other form or
            of another rate is converted to the same value.
    """

    def __init__(self, initial: float) -> None:
        super().__init__()
        self.initial = float(initial)
        self.weight = nn.Parameter(torch.full((1,), self.initial))
        self.register_buffer("rate", None)

    def value(self) -> Tensor:
        """The scalar ``s``, shape []: without dimensions it leaves other tensors' dtype alone."""
        rate = self.rate
        if rate is None:
            return self.weight.reshape(())
        return (self.initial + rate * self.weight).reshape(())

    def initial_weight(self) -> float:
        """What the parameter holds when the scalar is at its initial value."""
        return self.initial if self.rate is None else 0.0

    def anchor_(self, rate: float) -> None:
        """Switch to the anchored form with this rate; the value stays.

        Raises:
            UserError: ``rate`` is not positive.
        """
        if not rate > 0:
            raise UserError(f"the rate of a scalar must be positive, got {rate}")
        value = self.value().detach()
        self.rate = torch.full_like(self.weight.detach(), rate)
        with torch.no_grad():
            self.weight.copy_((value - self.initial) / self.rate)

    def extra_repr(self) -> str:
        form = "direct" if self.rate is None else f"rate={self.rate.item():.4g}"
        return f"initial={self.initial:g}, {form}"

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        saved, rate = state_dict.get(prefix + "weight"), state_dict.get(prefix + "rate")
        if saved is not None and not _same_rate(rate, self.rate):
            value = saved if rate is None else self.initial + rate * saved
            own = value if self.rate is None else (value - self.initial) / self.rate.to(value)
            state_dict[prefix + "weight"] = own
            state_dict.pop(prefix + "rate", None)
            if self.rate is not None:
                state_dict[prefix + "rate"] = self.rate
        super()._load_from_state_dict(state_dict, prefix, *args)


class ScalarBias(Scalar):
    """Adds one learnable number, at first 0, to a tensor of any shape."""

    def __init__(self) -> None:
        super().__init__(0.0)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.value()


class ScalarMultiplier(Scalar):
    """Multiplies a tensor of any shape by one learnable number, at first 1."""

    def __init__(self, initial: float = 1.0) -> None:
        super().__init__(initial)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.value()


def scalars(net: nn.Module) -> Iterator[Scalar]:
    """The scalars of ``net``, found by type."""
    return (module for module in net.modules() if isinstance(module, Scalar))


def anchor_scalars_(net: nn.Module, rate: float) -> None:
    """Put every scalar of ``net`` into the anchored form, values unchanged."""
    for scalar in scalars(net):
        scalar.anchor_(rate)


def _same_rate(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return bool(torch.equal(a.cpu(), b.cpu()))
