"""The numbers of the method: pure functions that return floats.

Every depth exponent of the project stands in this file.
L is the number of residual branches of the whole network, m the number of weight layers
inside one branch.
"""

from __future__ import annotations

import math

from fixup_core.errors import UserError


def branch_scale(num_branches: int, layers_per_branch: int) -> float:
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
