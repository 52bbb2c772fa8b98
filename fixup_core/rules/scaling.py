"""The numbers of the method: pure functions that return floats.

Every depth exponent of the project stands in this file.
L is the number of residual branches of the whole network, m the number of weight layers
inside one branch.
"""

from __future__ import annotations

import math

from fixup_core.errors import UserError

SMALLEST_BASE = 1e-3
"""Below it no network is meant, and numbers run out: a base is a count, or a scale near it."""


def branch_scale(num_branches: float, layers_per_branch: int) -> float:
    """Factor of every weight layer of a residual branch but the last: ``L ** (-1 / (2m - 2))``.

    The m - 1 scaled layers together contribute ``L ** (-1/2)``, and so one step of SGD changes
    the network function by as much at any depth (Zhang et al. 2019, rule 2 and section 3).

    Args:
        num_branches: L, at least 1.
        layers_per_branch: m, at least 2.

    Raises:
        UserError: L < 1, or m < 2 (the only layer of such a branch is its last: it starts at 0).
    """
    if num_branches < 1:
        raise UserError(f"a network needs at least one residual branch, got L = {num_branches}")
    if layers_per_branch < 2:
        raise UserError(
            f"a branch of m = {layers_per_branch} weight layers has no layer to scale: "
            "its only layer is the last one, which starts at 0"
        )
    return num_branches ** (-1 / (2 * layers_per_branch - 2))


def complete_scale(num_branches: float, layers_per_branch: int) -> float:
    """Factor ``L ** (-1 / m)``: what a step changes, and how far each layer moves relative to its
    own size, are then both independent of depth, if SGD's rate grows as ``L ** (1 - 2 / m)``.

    At m = 2 this is the paper's factor and the rate stays (docs/methods.md derives it).

    Raises:
        UserError: As ``branch_scale``.
    """
    branch_scale(num_branches, layers_per_branch)  # refuses what is no branch
    return num_branches ** (-1 / layers_per_branch)


def depth_constant(num_branches: float, base: float, power: float = 1.0) -> float:
    """``(base / L) ** power``: 1 at the depth at which the learning rate was tuned.

    With power 1, whole branches times ``c / L``, one step of Adam changes the function by as much
    at any depth, and every layer moves as far relative to its size (Dey et al. 2025, CompleteP).

    Args:
        num_branches: L, at least 1.
        base: c, the residual branches of the network whose learning rate is known; at least 0.001.
        power: 1/2 keeps the size of the sum of all branches (depth-muP).

    Raises:
        UserError: ``base`` is smaller, or no number.
    """
    if not SMALLEST_BASE <= base < math.inf:
        raise UserError(
            f"the base branches are {base:g}: give the number of residual branches, above 0, of "
            "the network at which the learning rate was tuned"
        )
    return (base / num_branches) ** power


def t_fixup_scale(stack: str, layers: float) -> float:
    """Of T-Fixup's matrices but queries and keys, and of its embeddings (Huang et al. 2020).

    Args:
        stack: "encoder" or "decoder".
        layers: Of that stack.
    """
    return 0.67 * layers**-0.25 if stack == "encoder" else (9 * layers) ** -0.25


def t_fixup_embedding_scale(layers: float) -> float:
    """Of T-Fixup's embeddings, by the layers of their stack."""
    return (9 * layers) ** -0.25


def deepnorm_scales(stack: str, encoder: float, decoder: float) -> tuple[float, float]:
    """DeepNorm's alpha, on the shortcut, and beta, on the weights (Wang et al. 2022, figure 2).

    Args:
        stack: "encoder" or "decoder".
        encoder: N, its layers; 0 where there is none.
        decoder: M, its layers; 0 where there is none.
    """
    if not (encoder and decoder):
        layers = encoder or decoder
        return (2 * layers) ** 0.25, (8 * layers) ** -0.25
    if stack == "encoder":
        size = encoder**4 * decoder
        return 0.81 * size ** (1 / 16), 0.87 * size ** (-1 / 16)
    return (3 * decoder) ** 0.25, (12 * decoder) ** -0.25


def admin_omega(num_branches: float) -> float:
    """Of Admin's shortcuts, for a change of the outputs of O(log n) (Liu et al. 2020).

    Args:
        num_branches: n, the residual branches of the stack.
    """
    return math.sqrt((num_branches + 1) / math.log(num_branches + 1) - 1)


def layer_scale_start(layers: float) -> float:
    """Where LayerScale's vectors start, by the depth of the stack (Touvron et al. 2021)."""
    if layers <= 18:
        return 0.1
    return 1e-5 if layers <= 24 else 1e-6


NF_BRANCH_SCALE = 0.2
"""Alpha of norm-free ResNets (Brock et al. 2021)."""


def lecun_std(fan_in: int) -> float:
    """Standard deviation that keeps the variance of what a linear layer sees."""
    return fan_in**-0.5


def he_std(fan: int) -> float:
    """Standard deviation of He initialisation over a fan (He et al. 2015, equations 10 and 14).

    The fan-out of a convolution is ``out_channels * kernel_height * kernel_width``.
    """
    return math.sqrt(2 / fan)


def xavier_std(fan_in: int, fan_out: int) -> float:
    """Standard deviation of Xavier initialisation (Glorot and Bengio 2010, eq. 16)."""
    return math.sqrt(2 / (fan_in + fan_out))


def orthogonal_std(rows: int, columns: int) -> float:
    """Root mean square of the entries of a matrix whose rows, or columns, are orthonormal."""
    return max(rows, columns) ** -0.5


def embedding_std(embedding_dim: int) -> float:
    """Standard deviation of the embeddings of a Transformer: ``d ** (-1/2)``."""
    return embedding_dim**-0.5


def torch_default_std(fan_in: int) -> float:
    """Standard deviation of PyTorch's own ``Linear`` and ``Conv`` initialisation.

    It is uniform on ``(-fan_in ** -0.5, fan_in ** -0.5)``.
    """
    return math.sqrt(1 / (3 * fan_in))
