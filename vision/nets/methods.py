"""What makes a deep network trainable, as data: norms, scalars and an initialisation.

A method says what stands around the weight layers of any network here and how the weights start.
The ablations of Fixup are flags of the same record.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from fixup_core import (
    FixupReport,
    ScalarBias,
    ScalarMultiplier,
    fixup_init_,
    lsuv_init_,
    standard_init_,
)
from fixup_core.errors import UserError
from fixup_core.rules.scaling import unit_scale
from fixup_core.rules.standards import XAVIER_NORMAL

GROUPS = 32
"""Of group normalisation (Wu and He 2018), or fewer where a layer has fewer channels."""


def group_norm(channels: int) -> nn.GroupNorm:
    """Group normalisation with 32 groups, or as many below as divide the channels."""
    return nn.GroupNorm(math.gcd(GROUPS, channels), channels)


class Network(nn.Module):
    """What ``build_net`` returns: maps images [B, C, H, W] to logits [B, classes].

    Attributes:
        report: How every weight was drawn.
    """

    report: FixupReport


@dataclass(frozen=True)
class Method:
    """How the layers of a network are kept in hand.

    Attributes:
        initialise: Writes all weights of a built network.
        norm: Makes the normalisation of so many channels; ``None``: there is none.
        biases: Rule 3's scalar biases before weight layers and activations.
        multipliers: Rule 3's multiplier at the end of every branch.
        vectors: Convolutions have a bias for each channel.
        residual: It is defined for networks with residual branches alone.
        batch: ``initialise`` takes a batch of images besides the network.
    """

    initialise: Callable[..., FixupReport]
    norm: Callable[[int], nn.Module] | None = None
    biases: bool = False
    multipliers: bool = False
    vectors: bool = False
    residual: bool = False
    batch: bool = False

    @property
    def scalars(self) -> bool:
        """Whether it has any."""
        return self.biases or self.multipliers

    def before_weights(self) -> nn.Module:
        """What stands before a convolution or linear layer."""
        return ScalarBias() if self.biases else nn.Identity()

    def before_activation(self, channels: int) -> nn.Module:
        """What stands before an activation of so many channels."""
        return self.norm(channels) if self.norm else self.before_weights()

    def end_of_branch(self) -> nn.Module:
        """What stands behind the last convolution of a branch."""
        return ScalarMultiplier() if self.multipliers else nn.Identity()

    def after_projection(self, channels: int) -> nn.Module:
        """What stands behind the convolution of a shortcut; Fixup has nothing there."""
        return self.norm(channels) if self.norm else nn.Identity()


_fixup = partial(Method, residual=True)

METHODS: dict[str, Method] = {
    "batchnorm": Method(standard_init_, norm=nn.BatchNorm2d),
    "groupnorm": Method(standard_init_, norm=group_norm),
    "zeroinit": Method(
        partial(standard_init_, zero_last_gains=True), norm=nn.BatchNorm2d, residual=True
    ),
    "none": Method(standard_init_, vectors=True),
    "xavier": Method(partial(standard_init_, convolution=XAVIER_NORMAL), vectors=True),
    "lsuv": Method(lsuv_init_, vectors=True, batch=True),
    "fixup": _fixup(fixup_init_, biases=True, multipliers=True),
    "fixup_rule2": _fixup(partial(fixup_init_, zero=False)),
    "fixup_no_bias": _fixup(fixup_init_, multipliers=True),
    "fixup_no_multiplier": _fixup(fixup_init_, biases=True),
    "fixup_no_factor": _fixup(partial(fixup_init_, rule=unit_scale), biases=True, multipliers=True),
}
"""By name, as ``build_net(..., method=...)`` takes them: batch and group normalisation, and the
former with the last gain of every branch at 0; no normalisation, drawn as He, Xavier or LSUV have
it; Fixup, and its ablations, each without one part of the rules."""

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}


def make_activation(name: str) -> nn.Module:
    """A module of ``ACTIVATIONS``.

    Raises:
        UserError: There is none of that name.
    """
    choose("activation", name, ACTIVATIONS)
    return ACTIVATIONS[name]()


def choose(option: str, value: str, choices: Collection[str]) -> None:
    """Let ``value`` pass if it is one of ``choices``.

    Raises:
        UserError: It is none.
    """
    if value not in choices:
        raise UserError(f"{option} is {value!r}; choose one of {', '.join(choices)}")


def initialise_(net: Network, method: Method, batch: torch.Tensor | None = None) -> None:
    """Write all weights of ``net`` as ``method`` has it, and its report.

    Args:
        net: Built with ``method``.
        method: One of ``METHODS``.
        batch: Images [B, C, H, W], for a method that looks at data.

    Raises:
        UserError: The method looks at data and there is no batch.
    """
    if not method.batch:
        net.report = method.initialise(net)
    elif batch is None:
        raise UserError("this initialisation looks at data: give it a batch of images")
    else:
        net.report = method.initialise(net, batch)
