"""What every network here shares: its type, and what a method puts before an activation.

The methods themselves are the registry's (``fixup_core.rules.methods``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from fixup_core import InitReport, Method, initialise_
from fixup_core.errors import UserError
from fixup_core.rules.norms import POINTWISE

GROUPS = 32
"""Of group normalisation (Wu and He 2018), or fewer where a layer has fewer channels."""


def group_norm(channels: int) -> nn.GroupNorm:
    """Group normalisation with 32 groups, or as many below as divide the channels."""
    return nn.GroupNorm(math.gcd(GROUPS, channels), channels)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "batch": nn.BatchNorm2d,
    "group": group_norm,
    **{name: partial(kind, dims=2) for name, kind in POINTWISE.items()},
}
"""The norms of the registry that are defined on images [B, C, H, W]."""

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
}


UNIT_GAINS = {
    "relu": 1.7139588594436646,
    "tanh": 1.5939117670059204,
    "sigmoid": 4.803835391998291,
}
"""What each activation is multiplied by so that an input of N(0, 1) leaves it with a variance of 1
(Brock et al. 2021, as in the authors' code)."""


class Scaled(nn.Module):
    """Multiplies by a plain number, behind an activation or alone.

    Args:
        number: Fixed.
        activation: ``None``: there is none.
    """

    def __init__(self, number: float, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.number = number
        self.activation = activation or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.number * self.activation(x)

    def extra_repr(self) -> str:
        return f"{self.number:.4g}"


class Network(nn.Module):
    """What ``build_net`` returns: maps images [B, C, H, W] to logits [B, classes].

    Attributes:
        report: How every weight was drawn.
    """

    report: InitReport


def before_activation(method: Method, channels: int) -> nn.Module:
    """What stands before an activation: the method's norm, a scalar bias or nothing."""
    return NORMS[method.norm](channels) if method.norm else method.make_bias()


def after_projection(method: Method, channels: int) -> nn.Module:
    """What stands behind the convolution of a shortcut: the method's norm or nothing."""
    return NORMS[method.norm](channels) if method.norm else nn.Identity()


def make_activation(name: str, *, unit: bool = False) -> nn.Module:
    """A module of ``ACTIVATIONS``.

    Args:
        name: Its name.
        unit: Keep a variance of 1.

    Raises:
        UserError: There is none of that name.
    """
    choose("activation", name, ACTIVATIONS)
    activation = ACTIVATIONS[name]()
    return Scaled(UNIT_GAINS[name], activation) if unit else activation


def choose(option: str, value: str, choices: Collection[str]) -> None:
    """Let ``value`` pass if it is one of ``choices``.

    Raises:
        UserError: It is not.
    """
    if value not in choices:
        raise UserError(f"{option} is {value!r}; choose one of {', '.join(choices)}")


def write_weights_(net: Network, method: Method, batch: Tensor | None = None) -> None:
    """Write all weights of ``net`` as ``method`` has it, and its report.

    Args:
        net: Built with ``method``.
        method: Of the registry.
        batch: Images [B, C, H, W], for a method that looks at data.

    Raises:
        UserError: The method looks at data and there is no batch.
    """
    net.report = initialise_(net, method, batch=batch)


def rename_keys_(state_dict: dict[str, Any], prefix: str, names: Mapping[str, str]) -> None:
    """Give entries of a state dict their present names, in place.

    Args:
        state_dict: As a module's ``_load_from_state_dict`` gets it.
        prefix: Of the module.
        names: What an entry's name behind the prefix began with, and begins with now.
    """
    for key in [key for key in state_dict if key.startswith(prefix)]:
        for before, now in names.items():
            if key.startswith(prefix + before):
                state_dict[prefix + now + key[len(prefix + before) :]] = state_dict.pop(key)
                break
