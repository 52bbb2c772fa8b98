"""Residual branches, declared by the blocks that own them and counted from the built network.

A block says which of its modules form a residual branch, in order::

    class Block(nn.Module):
        def residual_branches(self):
            yield ResidualBranch("convs", (WeightLayer(self.conv1), WeightLayer(self.conv2)))

Four more methods are looked for on any module of the network, all optional:
``classifier_layers()`` yields the layers that rule 1 sets to 0, ``standard_layers()`` the layers
outside all branches whose standard initialisation is not the default of their type,
``last_norms()`` the normalisation layers that end a branch, ``stack_embeddings()`` the embeddings
that a stack begins with, each with the stack's name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from fixup_core.errors import UserError
from fixup_core.rules.standardised import is_standardised
from fixup_core.rules.standards import Standard

INSIDE_SOFTMAX = frozenset({"query", "key"})
"""Roles of weights that a branch depends on through a softmax: they are no factor of its output."""


@dataclass(frozen=True)
class WeightLayer:
    """One matrix or filter bank: a parameter of a module, and the part it plays.

    Attributes:
        module: The module that holds it.
        weight: The parameter's name in the module.
        bias: The name of its bias vector; a module without one may keep the default.
        role: "conv", "fc1", "fc2", "query", "key", "value", "out", ...; "" where nothing asks.
        standard: How its weights are drawn before the factor of rule 2; ``None`` takes the
            default of the module's type (He for convolutions, Xavier for linear layers).
        copies: The number of weight layers that the matrix packs: 3 for one matrix of queries,
            keys and values.
    """

    module: nn.Module
    weight: str = "weight"
    bias: str = "bias"
    role: str = ""
    standard: Standard | None = None
    copies: int = 1

    @property
    def parameter(self) -> nn.Parameter:
        """The weight, which is drawn; of a standardised one that which is standardised, of another
        parametrised one what it computes.
        """
        if is_standardised(self.module, self.weight):
            return self.module.get_parameter(f"parametrizations.{self.weight}.original")
        return getattr(self.module, self.weight)

    @property
    def bias_vector(self) -> Tensor | None:
        """The bias vector, if there is one."""
        bias = getattr(self.module, self.bias, None)
        return bias if isinstance(bias, Tensor) else None

    @property
    def sources(self) -> list[nn.Parameter]:
        """The parameters that the weight is computed from; an ordinary one is its own source."""
        if is_parametrized(self.module, self.weight):
            parametrizations: Any = self.module.parametrizations
            return list(parametrizations[self.weight].parameters())
        return [self.parameter]


@dataclass(frozen=True)
class ResidualBranch:
    """The weight layers between a split of the residual stream and the addition that ends it.

    Attributes:
        name: The branch's name inside its block; ``collect_branches`` puts the block's path before.
        layers: In the order of the forward pass; rule 1 sets the last one to 0.
        kind: "self_attention", "cross_attention", "feed_forward"; "" where nothing asks.
        stack: "encoder" or "decoder" in a Transformer; else "".
        parts: Modules that belong to the branch beside its layers, such as its multiplier and the
            module that joins it to its shortcut: what in them depends on the place is written
            with the weights.
        m: The layers of its longest product, where some stand side by side; ``None``: all.
        ends: Positions of the layers that rule 1 sets to 0; ``None``: of the last one.
    """

    name: str
    layers: tuple[WeightLayer, ...]
    kind: str = ""
    stack: str = ""
    parts: tuple[nn.Module, ...] = ()
    m: int | None = None
    ends: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not self.layers:
            raise UserError(f"residual branch {self.name!r} has no weight layer")

    @property
    def layers_per_branch(self) -> int:
        """The m of the rules: all weight layers that stand one behind the other."""
        return self.m or sum(layer.copies for layer in self.layers)

    @property
    def factors(self) -> int:
        """The weight layers whose product the branch is: m without queries and keys."""
        outside = (layer for layer in self.layers if layer.role not in INSIDE_SOFTMAX)
        return self.m or sum(layer.copies for layer in outside)


@dataclass(frozen=True)
class Place:
    """Where a weight stands in a built network. Everything is counted, nothing is passed in; only
    what ``in_network_of`` returns is of a network that nobody built.

    Attributes:
        branch: Its residual branch.
        position: Of the layer in the branch, from 0.
        num_branches: L, the residual branches of the network.
        block: Of the blocks that make up its stack, the number of its own, from 1.
        blocks: Stack -> number of its blocks: N = ``blocks["encoder"]``.
        branches: Stack -> number of its residual branches.
    """

    branch: ResidualBranch
    position: int
    num_branches: float
    block: float
    blocks: Mapping[str, float]
    branches: Mapping[str, float]

    @property
    def stack_blocks(self) -> float:
        """The blocks of its own stack."""
        return self.blocks[self.branch.stack]

    @property
    def layer(self) -> WeightLayer:
        return self.branch.layers[self.position]

    def in_network_of(self, num_branches: float) -> Place:
        """The place at the same share of the depth in a network of the same shape.

        Args:
            num_branches: L of that network. Blocks need not be whole there.
        """
        share = num_branches / self.num_branches
        return replace(
            self,
            num_branches=num_branches,
            block=share * self.block,
            blocks={stack: share * number for stack, number in self.blocks.items()},
            branches={stack: share * number for stack, number in self.branches.items()},
        )

    @property
    def last(self) -> bool:
        """Whether it is the branch's last layer, or one of several."""
        branch = self.branch
        return self.position in ((len(branch.layers) - 1,) if branch.ends is None else branch.ends)


def collect_branches(net: nn.Module) -> list[ResidualBranch]:
    """All residual branches of ``net``, in module order; their number is L.

    Raises:
        UserError: A weight lies in two branches, or twice in one.
    """
    return [branch for branch, _ in _with_blocks(net)]


def collect_places(net: nn.Module) -> list[Place]:
    """Every weight layer of every branch, in order.

    Raises:
        UserError: As ``collect_branches``.
    """
    found = _with_blocks(net)
    paths: dict[str, dict[str, None]] = {}
    for branch, path in found:
        paths.setdefault(branch.stack, {}).setdefault(path)
    number = {
        (stack, path): n for stack, own in paths.items() for n, path in enumerate(own, start=1)
    }
    blocks = {stack: len(own) for stack, own in paths.items()}
    branches = dict(Counter(branch.stack for branch, _ in found))
    return [
        Place(branch, position, len(found), number[branch.stack, path], blocks, branches)
        for branch, path in found
        for position in range(len(branch.layers))
    ]


def collect_classifiers(net: nn.Module) -> list[WeightLayer]:
    """The layers that rule 1 sets to 0."""
    return [_as_layer(layer) for _, layer in _declarations(net, "classifier_layers")]


def collect_standard_layers(net: nn.Module) -> list[WeightLayer]:
    """The layers outside all branches that declare their own standard initialisation."""
    return [layer for _, layer in _declarations(net, "standard_layers")]


def collect_last_norms(net: nn.Module) -> list[nn.Module]:
    """The normalisation layers that end a branch."""
    return [norm for _, norm in _declarations(net, "last_norms")]


def collect_stack_embeddings(net: nn.Module) -> dict[int, set[str]]:
    """The stacks, "encoder" and "decoder", that begin with an embedding, by the weight's id."""
    found: dict[int, set[str]] = {}
    for _, (embedding, stack) in _declarations(net, "stack_embeddings"):
        found.setdefault(id(embedding.weight), set()).add(stack)
    return found


def _with_blocks(net: nn.Module) -> list[tuple[ResidualBranch, str]]:
    """The branches, each with the path of the block that declares it."""
    found = [
        (replace(branch, name=_join(path, branch.name)), path)
        for path, branch in _declarations(net, "residual_branches")
    ]
    owner: dict[int, str] = {}
    for branch, _ in found:
        for layer in branch.layers:
            key = id(layer.sources[0])
            if key in owner:
                raise UserError(
                    f"the branches {owner[key]!r} and {branch.name!r} share a weight: "
                    "rule 2 is defined for branches with weights of their own"
                )
            owner[key] = branch.name
    return found


def _declarations(net: nn.Module, method: str) -> Iterator[tuple[str, Any]]:
    for path, module in net.named_modules():
        # Not getattr alone: wrappers, as torch.compile's, hand what they lack on to what they wrap.
        own = method in vars(module) or hasattr(type(module), method)
        declare = getattr(module, method) if own else None
        if callable(declare):
            declared: Iterable[Any] = declare()
            for item in declared:
                yield path, item


def _as_layer(declared: nn.Module | WeightLayer) -> WeightLayer:
    return declared if isinstance(declared, WeightLayer) else WeightLayer(declared)


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
