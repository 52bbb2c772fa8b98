"""The registry: every method that makes a deep network trainable, as data, written once.

To add a method, add a record; ``rules.method`` says what its fields are.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace

from fixup_core.errors import UserError
from fixup_core.rules.factors import (
    admin_shortcut,
    authors_factor,
    complete_factor,
    deepnorm_factor,
    deepnorm_shortcut,
    ds_init_factor,
    fixup_factor,
    layer_norm_scale,
    layer_scale,
    no_factor,
    product_factor,
    t_fixup_embeddings,
    t_fixup_factor,
)
from fixup_core.rules.method import Method
from fixup_core.rules.scaling import NF_BRANCH_SCALE
from fixup_core.rules.standards import HE_NORMAL, LECUN_NORMAL, ORTHOGONAL, XAVIER_NORMAL

RESNETS, TRANSFORMERS = "ResNets", "Transformers"
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
        only=TRANSFORMERS,
    ),
    _ablation(
        "fixup_attention_m2",
        "Fixup that counts attention as m = 2: its values and output",
        differs="queries and keys go through a softmax and are no factor of the branch's size",
        factor=product_factor,
    ),
    replace(
        _FIXUP,
        name="fixup_adam",
        text="Fixup's goal under Adam: branches times the fixed number c / L, weights unscaled",
        source=f"{PAPER}, section 3, carried over to Adam; exponent as Dey et al. 2025",
        differs="no factor of rule 2; c is the number of branches at which the rate was tuned; a "
        "language's output starts at the frequencies of its words",
        factor=no_factor,
        head_prior=True,
        depth_power=1.0,
    ),
    replace(
        _FIXUP,
        name="fixup_complete",
        text="Fixup's goal under SGD for any m: L^(-1/m), the rate times L^(1 - 2/m)",
        differs="the paper's L^(-1/(2m-2)) where m is 2; the rate is the user's to multiply",
        factor=complete_factor,
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
        only=RESNETS,
    ),
    Method(
        "groupnorm",
        "group normalisation before every activation",
        "Wu and He 2018",
        standard=HE_NORMAL,
        norm="group",
        only=RESNETS,
    ),
    Method(
        "zeroinit",
        "batch normalisation, the last gain of every branch at 0",
        "Goyal et al. 2017, section 5.1",
        standard=HE_NORMAL,
        norm="batch",
        only=RESNETS,
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

_RIVALS = (
    _plain(
        "skipinit",
        "no normalisation, every branch behind a scalar that starts at 0, head at 0",
        "De and Smith 2020",
        differs="the scalar learns at the rate of all scalars, in vision a tenth of the weights'",
        multiplier=0.0,
        zero_head=True,
        needs_branches=True,
    ),
    _plain(
        "rezero",
        "no normalisation, the branches of a layer behind one scalar that starts at 0",
        "Bachlechner et al. 2020",
        differs="the scalar learns at the rate of all scalars, in vision a tenth of the weights'",
        multiplier=0.0,
        shared_multiplier=True,
        needs_branches=True,
    ),
    _plain(
        "nf",
        "no normalisation: standardised weights, branches of a known variance, gains at 0",
        "Brock et al. 2021 (NF-ResNets)",
        differs="the classifier as PyTorch draws it; a gain at 0 learns at the scalars' rate; no "
        "stochastic depth",
        standard=LECUN_NORMAL,
        multiplier=0.0,
        branch_scale=NF_BRANCH_SCALE,
        standardised=True,
        unit_activations=True,
        preactivation=True,
        decays_vectors=False,
        needs_branches=True,
        only=RESNETS,
    ),
    _plain(
        "t_fixup",
        "no normalisation, no scalars: matrices and embeddings scaled by the depth of their stack",
        "Huang et al. 2020",
        differs="a tied output layer is scaled with its embedding, as in the authors' code",
        factor=t_fixup_factor,
        embeddings=t_fixup_embeddings,
        only=TRANSFORMERS,
    ),
    _plain(
        "t_fixup_adam",
        "T-Fixup as it starts at c branches, at any depth: branches times the fixed number c / L",
        "Huang et al. 2020, carried over to depth; exponent as Dey et al. 2025",
        differs="the scales of a network of c branches, 15 by default as 3 + 3 layers have, at any "
        "depth; a tied output layer is scaled with its embedding; the output starts at the "
        "frequencies of the words",
        factor=t_fixup_factor,
        embeddings=t_fixup_embeddings,
        head_prior=True,
        depth_power=1.0,
        starts_at_base=True,
        only=TRANSFORMERS,
    ),
    _plain(
        "prenorm",
        "layer normalisation on the input of every branch",
        "Vaswani et al. 2018 (tensor2tensor)",
        norm="layer",
        only=TRANSFORMERS,
    ),
    _plain(
        "postnorm",
        "layer normalisation behind every addition",
        "Vaswani et al. 2017",
        norm="layer",
        norm_on_sum=True,
        only=TRANSFORMERS,
    ),
    _plain(
        "deepnorm",
        "post-norm, shortcuts times alpha, matrices times beta",
        "Wang et al. 2022",
        factor=deepnorm_factor,
        norm="layer",
        norm_on_sum=True,
        shortcut=deepnorm_shortcut,
        only=TRANSFORMERS,
    ),
    _plain(
        "admin",
        "post-norm, shortcuts times a learnable vector that starts at omega",
        "Liu et al. 2020",
        differs="omega by the number of branches, as admin-torch has it, without a profiling batch",
        norm="layer",
        norm_on_sum=True,
        shortcut=admin_shortcut,
        learned_shortcut=True,
        only=TRANSFORMERS,
    ),
    _plain(
        "ds_init",
        "post-norm, the matrices of layer l times l^(-1/2)",
        "Zhang, Titov, Sennrich 2019",
        differs="the bound as in the paper; the authors' code takes it for a variance",
        factor=ds_init_factor,
        norm="layer",
        norm_on_sum=True,
        only=TRANSFORMERS,
    ),
    _plain(
        "layerscale",
        "pre-norm, every branch times a learnable vector that starts small",
        "Touvron et al. 2021",
        norm="layer",
        channel_multiplier=layer_scale,
        only=TRANSFORMERS,
    ),
    _plain(
        "layernorm_scaling",
        "pre-norm, the norm's output in layer l times l^(-1/2)",
        "Sun et al. 2025",
        norm="layer",
        norm_scale=layer_norm_scale,
        only=TRANSFORMERS,
    ),
    _plain(
        "completep",
        "pre-norm, branches times the fixed number c / L",
        "Dey et al. 2025",
        differs="of its rules that for depth alone: width and weight decay are the user's",
        norm="layer",
        depth_power=1.0,
        only=TRANSFORMERS,
    ),
    _plain(
        "depth_mup",
        "pre-norm, branches times the fixed number (c / L)^(1/2)",
        "Yang et al. 2023",
        differs="Adam's rate times (c / L)^(1/2) is the user's to set",
        norm="layer",
        depth_power=0.5,
        only=TRANSFORMERS,
    ),
    _plain(
        "dyt",
        "tanh(a x) in the place of every norm, with a gain and a bias",
        "Zhu et al. 2025",
        differs="one start of a for all places; embeddings times the fixed number sqrt(d)",
        norm="dyt",
    ),
    _plain(
        "derf",
        "erf(a x + s) in the place of every norm, with a gain and a bias",
        "Chen et al. 2025",
        norm="derf",
    ),
)

METHODS: dict[str, Method] = {method.name: method for method in (*_RECORDS, *_RIVALS)}
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
