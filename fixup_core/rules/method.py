"""What a method is: one record that says how weights start and what stands around them.

``rules.init`` reads how weights start; the blocks of both halves take the rest from the record and
know no method by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from torch import nn

from fixup_core.errors import UserError
from fixup_core.rules.branches import Place
from fixup_core.rules.factors import no_factor
from fixup_core.rules.norms import POINTWISE
from fixup_core.rules.placed import (
    ChannelMultiplier,
    DepthMultiplier,
    PlacedConstant,
    Rule,
)
from fixup_core.rules.residual import Residual
from fixup_core.rules.scalars import ScalarBias, ScalarMultiplier
from fixup_core.rules.scaling import depth_constant
from fixup_core.rules.standards import Standard

BASE_BRANCHES = 15.0
"""The residual branches of a Transformer of 3 + 3 layers, where learning rates were tuned here."""
Multiplier = ScalarMultiplier | PlacedConstant | ChannelMultiplier


@dataclass(frozen=True)
class Method:
    """What makes a network trainable.

    Attributes:
        name: As every command and function takes it.
        text: What it is, in a line.
        source: Where it comes from.
        differs: How it departs from its source; "" where it does not.
        factor: Of a weight's standard deviation at its place in a residual branch.
        embeddings: Of the standard deviation of the embeddings that stacks begin with: called with
            the stacks' names and the number of blocks of every stack.
        zero_last: Rule 1 in the branches: the last layer of each starts at 0.
        zero_head: Rule 1 at the end: the classifier starts at 0. Else it is drawn as PyTorch does.
        head_prior: The classifier has a bias vector that starts at the logarithm of the classes'
            frequencies, where these are known.
        standard: The distribution of all layers, wherever they stand; ``None``: every layer has
            its own, times the factor in a branch.
        biases: Rule 3's scalar biases, before weight layers and activations.
        multiplier: Where the scalar multiplier of every branch starts; ``None``: there is none.
        shared_multiplier: The branches of one Transformer layer share their multiplier.
        depth_power: Branches are multiplied by the fixed number ``(c / L) ** depth_power``, c the
            ``base_branches``; ``None``: by none.
        base_branches: c, the residual branches of the network at which the rate was tuned.
        starts_at_base: ``factor`` and ``embeddings`` are those of a network of c branches: of all
            that is written at the start only the fixed number depends on the depth.
        branch_scale: Branches are multiplied by this fixed number, at any depth, and what enters
            one is divided by the standard deviation that the sum of the branches before it has if
            each has a variance of 1; ``None``: neither.
        channel_multiplier: Start of a learnable vector on every branch; ``None``: there is none.
        shortcut: A number on the shortcut; ``None``: none.
        learned_shortcut: That number is the start of a learnable vector.
        bias_vectors: Weight layers have a bias for each channel.
        norm: In ResNets "batch" or "group", before every activation; in Transformers "layer"; in
            both "dyt" or "derf", which normalise nothing; ``None``: none at all.
        norm_on_sum: In Transformers the norm stands behind the addition, not on the branch's input.
        norm_scale: A fixed number on the norm's output; ``None``: none.
        zero_last_gains: The norm that ends a branch starts with a gain of 0.
        standardised: The weights of convolutions are standardised, behind a learned gain.
        unit_activations: Activations are multiplied by what keeps a variance of 1.
        preactivation: In ResNets it is defined for pre order and projections alone.
        decays_vectors: Weight decay is for gains, bias vectors and scalars too.
        unit_variance: Every layer is divided by the standard deviation of its output on a batch,
            so that the initialisation takes one.
        needs_branches: It is defined for networks with residual branches alone.
        only: The kind of network that it is defined for, "ResNets" or "Transformers"; "": both.
    """

    name: str
    text: str
    source: str
    differs: str = ""
    factor: Rule = no_factor
    embeddings: Callable[[set[str], Mapping[str, float]], float] | None = None
    zero_last: bool = False
    zero_head: bool = False
    head_prior: bool = False
    standard: Standard | None = None
    biases: bool = False
    multiplier: float | None = None
    shared_multiplier: bool = False
    depth_power: float | None = None
    base_branches: float = BASE_BRANCHES
    starts_at_base: bool = False
    branch_scale: float | None = None
    channel_multiplier: Rule | None = None
    shortcut: Rule | None = None
    learned_shortcut: bool = False
    bias_vectors: bool = False
    norm: str | None = None
    norm_on_sum: bool = False
    norm_scale: Rule | None = None
    zero_last_gains: bool = False
    standardised: bool = False
    unit_activations: bool = False
    preactivation: bool = False
    decays_vectors: bool = True
    unit_variance: bool = False
    needs_branches: bool = False
    only: str = ""

    @property
    def scalars(self) -> bool:
        """Whether it has any of rule 3's scalars."""
        return self.biases or self.multiplier is not None

    @property
    def normalises(self) -> bool:
        """Whether it computes a mean or variance of the data."""
        return self.norm is not None and self.norm not in POINTWISE

    @property
    def foldable(self) -> bool:
        """Whether all that it adds goes into the weights when training is over."""
        plain = self.norm is None and self.shortcut is None
        return plain and not (self.standardised or self.unit_activations)

    def with_base(self, branches: float | None) -> Method:
        """The same, its learning rate tuned at a network of this many residual branches.

        Args:
            branches: c; ``None`` leaves the record's own.

        Raises:
            UserError: It is below 0.001, or the method knows no such number.
        """
        if branches is None:
            return self
        depth_constant(1, branches)
        if self.depth_power is None:
            raise UserError(
                f"the method {self.name!r} has no factor of the depth, so no base branches"
            )
        return replace(self, base_branches=branches)

    def weight_factor(self, place: Place) -> float:
        """Of the standard deviation of the weight at a place."""
        return self.factor(self._start_of(place))

    def embedding_factor(self, stacks: set[str], place: Place) -> float | None:
        """Of the standard deviation of the embeddings that those stacks begin with.

        Args:
            stacks: Their names.
            place: Any of the network.
        """
        return self.embeddings and self.embeddings(stacks, self._start_of(place).blocks)

    def _start_of(self, place: Place) -> Place:
        return place.in_network_of(self.base_branches) if self.starts_at_base else place

    def depth_rule(self) -> Rule | None:
        """The fixed number on every branch."""
        if self.branch_scale is not None:
            return partial(_constant, number=self.branch_scale)
        if self.depth_power is None:
            return None
        return partial(_constant_at, base=self.base_branches, power=self.depth_power)

    def scalar_bias(self) -> ScalarBias | None:
        """The scalar bias before a weight layer or activation."""
        return ScalarBias() if self.biases else None

    def branch_multiplier(self, channels: int | None = None) -> Multiplier | None:
        """What a branch is multiplied by: a scalar, a vector, a fixed number, or nothing.

        Args:
            channels: Of the branch's output, for a vector.
        """
        rule = self.depth_rule()
        if self.channel_multiplier is not None and channels is not None:
            return ChannelMultiplier(channels, self.channel_multiplier)
        if self.multiplier is None:
            return None if rule is None else PlacedConstant(rule)
        if rule is None:
            return ScalarMultiplier(self.multiplier)
        return DepthMultiplier(self.multiplier, rule)

    def closing_multiplier(self) -> ScalarMultiplier | None:
        """What a stack without norms ends with: rule 3's multipliers start at 1, gates at 0."""
        return ScalarMultiplier() if self.multiplier else None

    def make_bias(self) -> nn.Module:
        """``scalar_bias`` as a module that can be called: the identity where there is none."""
        return self.scalar_bias() or nn.Identity()

    def make_residual(
        self,
        *,
        end: nn.Module | None = None,
        norm: nn.Module | None = None,
        multiplier: bool = True,
        channels: int | None = None,
    ) -> Residual:
        """Where a branch joins its shortcut.

        Args:
            end: What ends the branch, behind the multiplier.
            norm: On the sum.
            multiplier: False where the multiplier is part of the branch's last layer.
            channels: Of the stream, for a vector on the shortcut.
        """
        shortcut: nn.Module | None = None
        if self.shortcut is not None and self.learned_shortcut and channels is not None:
            shortcut = ChannelMultiplier(channels, self.shortcut)
        elif self.shortcut is not None:
            shortcut = PlacedConstant(self.shortcut)
        return Residual(
            multiplier=self.branch_multiplier() if multiplier else None,
            end=end,
            shortcut=shortcut,
            norm=norm,
        )


def _constant(place: Place, number: float) -> float:
    return number


def _constant_at(place: Place, base: float, power: float) -> float:
    return depth_constant(place.num_branches, base, power)
