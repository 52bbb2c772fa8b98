"""Scaled weight standardisation (Brock et al. 2021, section 2): a weight without mean and size.

Every output unit's weights are centred and brought to a norm of 1, then multiplied by a learned
gain. It is a parametrisation of PyTorch's, so that
``torch.nn.utils.parametrize.remove_parametrizations`` leaves a plain layer.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

EPS = 1e-4
"""The least squared norm that is divided by, as in the authors' code."""


class Standardised(nn.Module):
    """``gain * (w - mean(w)) / norm(w - mean(w))``, mean and norm those of an output unit.

    Args:
        units: Outputs of the layer, the first dimension of its weight.
    """

    def __init__(self, units: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(units))

    def forward(self, weight: Tensor) -> Tensor:
        size = (-1, *[1] * (weight.dim() - 1))
        dims = tuple(range(1, weight.dim()))
        centred = weight - weight.mean(dims, keepdim=True)
        squared = centred.square().sum(dims, keepdim=True)
        return centred * (squared.clamp(min=EPS).rsqrt() * self.gain.view(size))


def standardise_(layer: nn.Module) -> None:
    """Standardise the weight of ``layer``."""
    weight: Tensor = layer.get_parameter("weight")
    parametrize.register_parametrization(layer, "weight", Standardised(len(weight)))


def is_standardised(module: nn.Module, weight: str = "weight") -> bool:
    """Whether a weight of ``module`` is standardised, and nothing else."""
    if not parametrize.is_parametrized(module, weight):
        return False
    (*parts,) = module.get_submodule(f"parametrizations.{weight}").children()
    return [type(part) for part in parts] == [Standardised]


def standardised(net: nn.Module) -> Iterator[Standardised]:
    """The standardisations within a network."""
    return (module for module in net.modules() if isinstance(module, Standardised))
