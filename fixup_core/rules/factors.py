"""What a method's weights and constants are at their place: functions of the place alone.

The numbers stand in ``rules.scaling``; here is which place takes which number.
"""

from __future__ import annotations

from collections.abc import Mapping

from fixup_core.rules.branches import INSIDE_SOFTMAX, Place
from fixup_core.rules.scaling import (
    admin_omega,
    branch_scale,
    complete_scale,
    deepnorm_scales,
    layer_scale_start,
    t_fixup_embedding_scale,
    t_fixup_scale,
)

AUTHORS_CROSS_ATTENTION_BRANCHES = 12
"""The L that the authors' translation code takes for cross-attention, whatever the depth."""
PER_MATRIX = 2**0.5
"""From Xavier's bound for one packed matrix of queries, keys and values to that of its own."""


def no_factor(place: Place) -> float:
    """1 at every place: the standard distribution itself."""
    return 1.0


def fixup_factor(place: Place) -> float:
    """Rule 2 with the paper's m, which counts queries and keys."""
    return branch_scale(place.num_branches, place.branch.layers_per_branch)


def product_factor(place: Place) -> float:
    """Rule 2 with the m of the product: queries and keys stand inside a softmax, m = 2."""
    return branch_scale(place.num_branches, place.branch.factors)


def complete_factor(place: Place) -> float:
    """``complete_scale``, with the m of the product."""
    return complete_scale(place.num_branches, place.branch.factors)


def authors_factor(place: Place) -> float:
    """Rule 2 as the authors' translation code has it: cross-attention as if L were 12."""
    cross = place.branch.kind == "cross_attention"
    branches = AUTHORS_CROSS_ATTENTION_BRANCHES if cross else place.num_branches
    return branch_scale(branches, place.branch.layers_per_branch)


def t_fixup_factor(place: Place) -> float:
    """All but queries and keys by the depth of their stack."""
    role = place.layer.role
    if role in INSIDE_SOFTMAX:
        return 1.0
    scale = t_fixup_scale(place.branch.stack, place.stack_blocks)
    return scale * PER_MATRIX if role == "value" else scale


def t_fixup_embeddings(stacks: set[str], blocks: Mapping[str, float]) -> float:
    """Shared embeddings are the encoder's."""
    stack = "encoder" if "encoder" in stacks else "decoder"
    return t_fixup_embedding_scale(blocks[stack])


def deepnorm_factor(place: Place) -> float:
    """Beta, of all but queries and keys; true Xavier for the values."""
    role = place.layer.role
    if role in INSIDE_SOFTMAX:
        return PER_MATRIX
    _, beta = _deepnorm(place)
    return beta * PER_MATRIX if role == "value" else beta


def deepnorm_shortcut(place: Place) -> float:
    """Alpha."""
    return _deepnorm(place)[0]


def admin_shortcut(place: Place) -> float:
    """Omega, by the branches of the stack."""
    return admin_omega(place.branches[place.branch.stack])


def ds_init_factor(place: Place) -> float:
    """By the number of the block: the bound of block l is Xavier's times ``l ** -0.5``."""
    return place.block**-0.5


def layer_norm_scale(place: Place) -> float:
    """Of the norm's output, by the number of the block."""
    return place.block**-0.5


def layer_scale(place: Place) -> float:
    """By the depth of the stack."""
    return layer_scale_start(place.stack_blocks)


def _deepnorm(place: Place) -> tuple[float, float]:
    blocks = place.blocks
    return deepnorm_scales(place.branch.stack, blocks.get("encoder", 0), blocks.get("decoder", 0))
