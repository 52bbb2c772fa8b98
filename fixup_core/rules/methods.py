"""The registry: every method that makes a deep network trainable, as data, written once.

A method says how the weights of a network start, which scalars and norms stand around them, and
how a branch joins its shortcut. ``rules.init`` reads how weights start; the blocks of both halves
take the rest from the record and know no method by its name. To add a method, add a record.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from fixup_core.errors import UserError
from fixup_core.rules.branches import Place
from fixup_core.rules.residual import Residual
from fixup_core.rules.scalars import ScalarBias, ScalarMultiplier
from fixup_core.rules.scaling import branch_scale
from fixup_core.rules.standards import HE_NORMAL, ORTHOGONAL, XAVIER_NORMAL, Standard

Factor = Callable[[Place], float]
AUTHORS_CROSS_ATTENTION_BRANCHES = 12
"""The L that the authors' translation code takes for cross-attention, whatever the depth."""


def no_factor(place: Place) -> float:
    """1 at every place: the standard distribution itself."""
    return 1.0


def fixup_factor(place: Place) -> float:
    """Rule 2 with the paper's m, which counts queries and keys."""
    return branch_scale(place.num_branches, place.branch.layers_per_branch)


def product_factor(place: Place) -> float:
    """Rule 2 with the m of the product: queries and keys stand inside a softmax, m = 2."""
    return branch_scale(place.num_branches, place.branch.factors)


def authors_factor(place: Place) -> float:
    """Rule 2 as the authors' translation code has it: cross-attention as if L were 12."""
    cross = place.branch.kind == "cross_attention"
    branches = AUTHORS_CROSS_ATTENTION_BRANCHES if cross else place.num_branches
    return branch_scale(branches, place.branch.layers_per_branch)


@dataclass(frozen=True)
class Method:
    """What makes a network trainable.

    Attributes:
        name: As every command and function takes it.
        text: What it is, in a line.
        source: Where it comes from.
        differs: How it departs from its source; "" where it does not.
        factor: Of a weight's standard deviation at its place in a residual branch.
        zero_last: Rule 1 in the branches: the last layer of each starts at 0.
        zero_head: Rule 1 at the end: the classifier starts at 0. Else it is drawn as PyTorch does.
        standard: The distribution of all layers, wherever they stand; ``None``: every layer has
            its own, times the factor in a branch.
        biases: Rule 3's scalar biases, before weight layers and activations.
        multiplier: Where the scalar multiplier of every branch starts; ``None``: there is none.
        bias_vectors: Weight layers have a bias for each channel.
        norm: "batch" or "group": normalisation before every activation; ``None``: none at all.
        zero_last_gains: The norm that ends a branch starts with a gain of 0.
        unit_variance: Every layer is divided by the standard deviation of its output on a batch,
            so that the initialisation takes one.
        needs_branches: It is defined for networks with residual branches alone.
    """

    name: str
    text: str
    source: str
    differs: str = ""
    factor: Factor = no_factor
    zero_last: bool = False
    zero_head: bool = False
    standard: Standard | None = None
    biases: bool = False
    multiplier: float | None = None
    bias_vectors: bool = False
    norm: str | None = None
    zero_last_gains: bool = False
    unit_variance: bool = False
    needs_branches: bool = False

    @property
    def scalars(self) -> bool:
        """Whether it has any of rule 3's scalars."""
        return self.biases or self.multiplier is not None

    def scalar_bias(self) -> ScalarBias | None:
        """The scalar bias before a weight layer or activation."""
        return ScalarBias() if self.biases else None

    def scalar_multiplier(self) -> ScalarMultiplier | None:
        """The scalar multiplier behind a branch."""
        return None if self.multiplier is None else ScalarMultiplier(self.multiplier)

    def make_bias(self) -> nn.Module:
        """``scalar_bias`` as a module that can be called: the identity where there is none."""
        return self.scalar_bias() or nn.Identity()

    def make_residual(self, *, end: nn.Module | None = None, multiplier: bool = True) -> Residual:
        """Where a branch joins its shortcut.

        Args:
            end: What ends the branch, behind the multiplier.
            multiplier: False where the multiplier is part of the branch's last layer.
        """
        return Residual(multiplier=self.scalar_multiplier() if multiplier else None, end=end)


PAPER = "Zhang, Dauphin, Ma 2019"
_FIXUP = Method(
    "fixup",
    "no normalisation: branches scaled by L^(-1/(2m-2)), last layers and head at 0, scalars",
    f"{PAPER}, section 4",
    factor=fixup_factor,
    zero_last=True,
    zero_head=True,
    biases=True,
    multiplier=1.0,
    needs_branches=True,
)


def _ablation(name: str, text: str, **changed: object) -> Method:
    return replace(_FIXUP, name=name, text=text, source=f"{PAPER}, section 5.1", **changed)  # type: ignore[arg-type]


def _plain(name: str, text: str, source: str, **parts: object) -> Method:
    return Method(name, text, source, bias_vectors=True, **parts)  # type: ignore[arg-type]


_RECORDS = (
    _FIXUP,
    replace(
        _FIXUP,
        name="fixup_authors",
        text="Fixup as the authors' translation code has it",
        source="the authors' code",
        differs="cross-attention is scaled as if there were 12 branches, their code's default",
        factor=authors_factor,
    ),
    _ablation(
        "fixup_attention_m2",
        "Fixup that counts attention as m = 2: its values and output",
        differs="queries and keys go through a softmax and are no factor of the branch's size",
        factor=product_factor,
    ),
    _ablation("fixup_no_factor", "Fixup without the factor of rule 2", factor=no_factor),
    _ablation("fixup_no_bias", "Fixup without scalar biases", biases=False),
    _ablation("fixup_no_multiplier", "Fixup without multipliers", multiplier=None),
    _ablation(
        "fixup_rule2",
        "the factor of rule 2 alone, on every layer of a branch",
        zero_last=False,
        zero_head=False,
        biases=False,
        multiplier=None,
    ),
    Method(
        "batchnorm",
        "batch normalisation before every activation",
        "Ioffe and Szegedy 2015",
        standard=HE_NORMAL,
        norm="batch",
    ),
    Method(
        "groupnorm",
        "group normalisation before every activation",
        "Wu and He 2018",
        standard=HE_NORMAL,
        norm="group",
    ),
    Method(
        "zeroinit",
        "batch normalisation, the last gain of every branch at 0",
        "Goyal et al. 2017, section 5.1",
        standard=HE_NORMAL,
        norm="batch",
        zero_last_gains=True,
        needs_branches=True,
    ),
    _plain("none", "no normalisation, He's initialisation", "He et al. 2015", standard=HE_NORMAL),
    _plain(
        "xavier",
        "no normalisation, Xavier's initialisation",
        "Glorot and Bengio 2010",
        standard=XAVIER_NORMAL,
    ),
    _plain(
        "lsuv",
        "no normalisation, orthonormal weights of unit variance on a batch",
        "Mishkin and Matas 2016, algorithm 1",
        differs="one division makes the variance 1, as a layer is linear: one pass serves all",
        standard=ORTHOGONAL,
        unit_variance=True,
    ),
)

METHODS: dict[str, Method] = {method.name: method for method in _RECORDS}
"""By name, as ``--model.method``, ``--fixup-method``, ``check --method`` and ``fixup_`` take it."""


def method_named(name: str | Method) -> Method:
    """The record of that name; a record is returned as it is.

    Raises:
        UserError: There is no such method; the nearest is named.
    """
    if isinstance(name, Method):
        return name
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(METHODS)}"
        raise UserError(f"there is no method {name!r}; {hint}")
    return METHODS[name]


def check_defined(method: Method, nets: str, defined: Callable[[Method], bool]) -> Method:
    """The method, where it is defined for a kind of network.

    Args:
        method: Any.
        nets: The kind, as the message names it: "ResNets".
        defined: Whether a method is defined for that kind.

    Raises:
        UserError: It is not defined; those of the registry that are, are named.
    """
    if not defined(method):
        known = ", ".join(one.name for one in METHODS.values() if defined(one))
        raise UserError(
            f"the method {method.name!r} is not defined for {nets}; choose one of {known}"
        )
    return method
