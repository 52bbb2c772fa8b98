"""Residual branches, declared by the blocks that own them and counted from the built model.

A block says which of its modules form a residual branch, in order::

    class Block(nn.Module):
        def residual_branches(self):
            yield ResidualBranch("convs", (WeightLayer(self.conv1), WeightLayer(self.conv2)))

More methods are looked for on any module of the model, all optional: ``classifier_layers()``
yields the modules that rule 1 sets to 0, ``standard_layers()`` the ``WeightLayer`` outside all
branches whose standard initialisation is not the default of their type, ``last_norms()`` the
normalisation layers that end a branch (for the initialisations Fixup is compared with).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from fixup_core.errors import UserError
from fixup_core.rules.parametrised import parameters_of_weight
from fixup_core.rules.standards import Standard


@dataclass(frozen=True)
class WeightLayer:
    """One matrix or filter bank.

    Attributes:
        module: The module whose ``weight`` it is.
        standard: How its weights are drawn before the factor of rule 2; ``None`` means the
            default of the module's type (He for convolutions, Xavier for linear layers).
        copies: How many weight layers the matrix packs: 3 for one matrix of queries, keys and
            values.
    """

    module: nn.Module
    standard: Standard | None = None
    copies: int = 1


@dataclass(frozen=True)
class ResidualBranch:
    """The weight layers between a split of the residual stream and the addition that ends it.

    Attributes:
        name: The branch's name inside its block; ``collect_branches`` puts the block's path before.
        layers: In the order of the forward pass; the last one starts at 0.
        assumed_num_branches: Take this for L in place of the true count. Only for repeating other
            people's runs.
    """

    name: str
    layers: tuple[WeightLayer, ...]
    assumed_num_branches: int | None = None

    def __post_init__(self) -> None:
        if not self.layers:
            raise UserError(f"residual branch {self.name!r} has no weight layer")

    @property
    def layers_per_branch(self) -> int:
        """M of the rules."""
        return sum(layer.copies for layer in self.layers)


def collect_branches(model: nn.Module) -> list[ResidualBranch]:
    """All residual branches of ``model``, in module order; their number is L.

    Raises:
        UserError: A weight lies in two branches, or twice in one.
    """
    branches = [
        replace(branch, name=_join(path, branch.name))
        for path, branch in _declarations(model, "residual_branches")
    ]
    owner: dict[int, str] = {}
    for branch in branches:
        for layer in branch.layers:
            key = id(parameters_of_weight(layer.module)[0])
            if key in owner:
                raise UserError(
                    f"the branches {owner[key]!r} and {branch.name!r} share a weight: "
                    "rule 2 is defined for branches with weights of their own"
                )
            owner[key] = branch.name
    return branches


def collect_classifiers(model: nn.Module) -> list[nn.Module]:
    """The modules that rule 1 sets to 0."""
    return [layer for _, layer in _declarations(model, "classifier_layers")]


def collect_standard_layers(model: nn.Module) -> list[WeightLayer]:
    """The layers outside all branches that declare their own standard initialisation."""
    return [layer for _, layer in _declarations(model, "standard_layers")]


def collect_last_norms(model: nn.Module) -> list[nn.Module]:
    """The normalisation layers that end a branch."""
    return [norm for _, norm in _declarations(model, "last_norms")]


def _declarations(model: nn.Module, method: str) -> Iterator[tuple[str, Any]]:
    for path, module in model.named_modules():
        # Not getattr alone: wrappers, as torch.compile's, hand what they lack on to what they wrap.
        own = method in vars(module) or hasattr(type(module), method)
        declare = getattr(module, method) if own else None
        if callable(declare):
            declared: Iterable[Any] = declare()
            for item in declared:
                yield path, item


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
