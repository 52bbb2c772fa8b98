"""Positively homogeneous (p.h.) parameter sets: ``f(x; a theta) = a f(x; theta)`` for all a > 0.

Convolutions and linear layers without bias, ReLU, pooling, concatenation, dropout and addition are
p.h. in their input, and a composition of such is. A layer of a chain of them is therefore a p.h.
set. In a residual network it is one only where nothing goes past it unscaled (Zhang et al. 2019,
section 2):

- the first layer, and the classifier;
- the layer of a shortcut together with *one* layer of the branch beside it. With both layers of
  the branch, the branch would grow with ``a ** 2`` and the shortcut with ``a``.

Biases break all of them, unless they join: a network is p.h. in its input and all its biases
together, and so a set is p.h. with all biases that follow it. This makes sets of networks with
Fixup's scalars, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fixup_core.probing import Inputs, logits_of, outputs_of, parameters_named
from fixup_core.rules.branches import collect_branches, collect_classifiers
from fixup_core.rules.scalars import ScalarBias

FACTORS = (0.5, 2.0, 3.0)
"""The ``a`` that are tried."""


@dataclass(frozen=True)
class Homogeneity:
    """How far a function is from positively homogeneous; true if it is one.

    Attributes:
        deviation: The largest ``|f(a theta) - a f(theta)| / |a f(theta)|`` over a.
        tolerance: What rounding may do.
        vacuous: f is 0, as a network of Fixup is at first: any set passes that changes nothing.
    """

    deviation: float
    tolerance: float
    vacuous: bool = False

    def __bool__(self) -> bool:
        return self.deviation <= self.tolerance


def is_positively_homogeneous(
    net: nn.Module,
    parameters: Iterable[str | nn.Parameter],
    inputs: Inputs,
    *,
    factors: Iterable[float] = FACTORS,
    tolerance: float | None = None,
) -> Homogeneity:
    """Whether these parameters are a p.h. set of the classifier, tried out on a batch.

    The network is called with scaled copies: its own parameters are not touched.

    Args:
        net: Maps the inputs to logits [B, classes].
        parameters: Names, or parameters.
        inputs: A batch.
        factors: The ``a`` to try, each positive.
        tolerance: For the relative deviation; by default the root of the type's rounding error,
            3.5e-4 in float32 and 1.5e-8 in float64.

    Raises:
        UserError: An unknown parameter, or an output that is no batch of logits.
    """
    chosen = parameters_named(net, parameters)
    with torch.no_grad():
        whole = logits_of(net, inputs)
        scaled = {
            a: logits_of(net, inputs, {name: a * p for name, p in chosen.items()}) for a in factors
        }
    return homogeneity(whole, scaled, tolerance)


def homogeneity(
    whole: Tensor, scaled: dict[float, Tensor], tolerance: float | None = None
) -> Homogeneity:
    """The finding from ``f(theta)`` and, for each a, ``f(a theta)``."""
    if tolerance is None:
        tolerance = torch.finfo(whole.dtype).eps ** 0.5
    deviations = torch.stack([_relative(value, a * whole) for a, value in scaled.items()])
    return Homogeneity(deviations.max().item(), tolerance, vacuous=not whole.any())


def homogeneous_sets(net: nn.Module, inputs: Inputs) -> dict[str, tuple[str, ...]]:
    """The paper's examples of p.h. sets in ``net``, by what they are.

    The first layer that is called, the classifier, and for each block with a layer in its shortcut
    that layer and the last of the branch; each with the biases that are called after it. The
    blocks and the classifier are those that the network declares (``fixup_core.rules.branches``).

    Returns:
        Names of parameters. Whether they are p.h. depends on the rest of the network (a
        normalisation makes none of them so): ``is_positively_homogeneous`` tries it.
    """
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    calls = _calls(net, inputs)
    weighted = [module for module in calls if _is_weight_layer(module)]
    found = {"first layer": [weighted[0].weight, *_biases(calls[calls.index(weighted[0]) :])]}
    heads = [layer.module for layer in collect_classifiers(net)] or weighted[-1:]
    for layer in heads:
        found["classifier"] = [*found.get("classifier", ()), *layer.parameters(recurse=False)]
    for path, shortcut, last in _shortcuts(net, weighted):
        after = _biases(calls[calls.index(last) :])
        own = [layer.weight for layer in (*shortcut, last)]
        found[f"shortcut {path}"] = [*own, *_biases(shortcut), *after]
    return {
        what: tuple(dict.fromkeys(names[id(p)] for p in parameters))
        for what, parameters in found.items()
    }


def _relative(value: Tensor, expected: Tensor) -> Tensor:
    difference = (value - expected).norm()
    return torch.where(difference == 0, 0.0, difference / expected.norm())


def _calls(net: nn.Module, inputs: Inputs) -> list[Any]:
    """The modules without children, in the order in which they are first called."""
    called: dict[nn.Module, None] = {}
    leaves = [module for module in net.modules() if not any(module.children())]
    hooks = [
        leaf.register_forward_hook(lambda module, *_: called.setdefault(module)) for leaf in leaves
    ]
    try:
        with torch.no_grad():
            outputs_of(net, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return list(called)


def _is_weight_layer(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() > 1


def _biases(modules: Iterable[Any]) -> list[nn.Parameter]:
    """Scalar biases and bias vectors."""
    owned = [m.weight if isinstance(m, ScalarBias) else getattr(m, "bias", None) for m in modules]
    return [bias for bias in owned if isinstance(bias, nn.Parameter)]


def _shortcuts(net: nn.Module, weighted: list[Any]) -> Iterator[tuple[str, list[Any], Any]]:
    """Blocks of one branch with weight layers beside it: path, these, the branch's last layer."""
    branches = collect_branches(net)
    inside = {layer.module for branch in branches for layer in branch.layers}
    for path, block in net.named_modules():
        declares = getattr(block, "residual_branches", None)
        own = list(declares()) if path and callable(declares) else []
        beside = [m for m in block.modules() if m in weighted and m not in inside]
        if len(own) == 1 and beside:
            yield path, beside, own[0].layers[-1].module
