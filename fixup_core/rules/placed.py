"""Numbers that depend on where a branch stands: written with the weights, not learned or learned.

A block is built before anybody knows the depth of its network. So a method's constants are modules
that hold the rule; ``initialise_`` counts the built network and writes them (``write_``), and the
state dict carries them from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from fixup_core.rules.branches import Place
from fixup_core.rules.scalars import KeepsFloat32, ScalarMultiplier

Rule = Callable[[Place], float]
"""A number for a place of a built network."""


class PlacedConstant(KeepsFloat32):
    """Multiplies by a fixed number that a rule gives; 1 until it is written.

    Args:
        rule: Of the number.
    """

    number: Tensor

    def __init__(self, rule: Rule) -> None:
        super().__init__()
        self.rule = rule
        self.register_buffer("number", torch.ones(1))

    def write_(self, place: Place) -> None:
        """Set the number for the branch's place."""
        self.number.fill_(self.rule(place))

    def value(self) -> Tensor:
        """The number, shape []."""
        return self.number.reshape(())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.value()


class DepthMultiplier(ScalarMultiplier):
    """A scalar multiplier behind a fixed number: ``constant * s``.

    A multiplier that merely *starts* at a small number would leap: a step of Adam is as large
    wherever a parameter stands.

    Args:
        initial: Where ``s`` starts.
        rule: Of the constant.
    """

    def __init__(self, initial: float, rule: Rule) -> None:
        super().__init__(initial)
        self.constant = PlacedConstant(rule)

    def value(self) -> Tensor:
        """``constant * s``, shape []."""
        return self.constant.value() * super().value()


class ChannelMultiplier(nn.Module):
    """Multiplies by a learnable vector, all of whose elements start at the number of a rule.

    Args:
        channels: Of the last dimension of what comes in.
        rule: Of the start.
    """

    def __init__(self, channels: int, rule: Rule) -> None:
        super().__init__()
        self.rule = rule
        self.weight = nn.Parameter(torch.ones(channels))

    def start(self, place: Place) -> float:
        """What every element starts at."""
        return self.rule(place)

    def value(self) -> Tensor:
        """The vector, shape [channels]."""
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def placed_constants(*parts: nn.Module) -> Iterator[PlacedConstant]:
    """The constants within a network, or within the parts of a branch."""
    for part in parts:
        yield from (m for m in part.modules() if isinstance(m, PlacedConstant))


def channel_multipliers(*parts: nn.Module) -> Iterator[ChannelMultiplier]:
    """The vectors within the parts of a branch."""
    for part in parts:
        yield from (m for m in part.modules() if isinstance(m, ChannelMultiplier))
