"""Standard initialisations: the distributions that rule 2 scales.

A ``Standard`` says how wide a module's weights are drawn; drawing is ``rules.init``'s alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from fixup_core.rules import scaling

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)
CHANNEL_NORMS = (*BATCH_NORMS, nn.modules.instancenorm._InstanceNorm, nn.GroupNorm)
NORMS = (*CHANNEL_NORMS, nn.LayerNorm, nn.RMSNorm)


@dataclass(frozen=True)
class Standard:
    """A zero-mean distribution for the weights of a module.

    Attributes:
        name: As printed in reports.
        std: The standard deviation of a weight, which lies in a module, before any factor.
        shape: "normal", "uniform" or "orthogonal".
    """

    name: str
    std: Callable[[Tensor, nn.Module], float]
    shape: str = "normal"


def fans(weight: Tensor, module: nn.Module) -> tuple[int, int]:
    """Fan-in and fan-out of a weight of a linear layer or convolution.

    The fan-out of a grouped convolution counts all output channels, as the authors' code does;
    its fan-in counts the channels of one group.
    """
    receptive = weight[0, 0].numel() if weight.dim() > 2 else 1
    outputs, inputs = weight.shape[:2]
    if isinstance(module, TRANSPOSED):
        outputs, inputs = inputs, outputs
    return inputs * receptive, outputs * receptive


def _xavier(weight: Tensor, module: nn.Module) -> float:
    return scaling.xavier_std(*fans(weight, module))


def _xavier_packed(weight: Tensor, module: nn.Module) -> float:
    fan_in, fan_out = fans(weight, module)
    return scaling.xavier_std(fan_in, 3 * fan_out)


def _xavier_per_expert(weight: Tensor, module: nn.Module) -> float:
    return scaling.xavier_std(*weight.shape[-2:])


def _he(weight: Tensor, module: nn.Module) -> float:
    fan_in, fan_out = fans(weight, module)
    return scaling.he_std(fan_in if isinstance(module, nn.Linear) else fan_out)


def _he_per_group(weight: Tensor, module: nn.Module) -> float:
    groups = 1 if isinstance(module, TRANSPOSED) else getattr(module, "groups", 1)
    return scaling.he_std(fans(weight, module)[1] // groups)


def _lecun(weight: Tensor, module: nn.Module) -> float:
    return scaling.lecun_std(fans(weight, module)[0])


def _he_forward(weight: Tensor, module: nn.Module) -> float:
    return scaling.he_std(fans(weight, module)[0])


def _torch_default(weight: Tensor, module: nn.Module) -> float:
    return scaling.torch_default_std(fans(weight, module)[0])


def _orthogonal(weight: Tensor, module: nn.Module) -> float:
    return scaling.orthogonal_std(*weight.flatten(1).shape)


def _embedding(weight: Tensor, module: nn.Module) -> float:
    return scaling.embedding_std(weight.shape[1])


HE_NORMAL = Standard("He normal", _he)
"""Over the fan-out of a convolution, as the authors' code has it, and the fan-in of a linear layer,
whose two fans may differ by much (He et al. 2015, equations 10 and 14)."""
HE_PER_GROUP = Standard("He normal, per group", _he_per_group)
"""The fan-out of one group: with that of all groups the output of a depthwise convolution would
shrink by the square root of its channels."""
XAVIER_UNIFORM = Standard("Xavier uniform", _xavier, "uniform")
XAVIER_PER_EXPERT = Standard("Xavier uniform, per expert", _xavier_per_expert, "uniform")
"""Of the matrices of a mixture of experts, [experts, in, out] or [experts, out, in]."""
PACKED_XAVIER_UNIFORM = Standard("Xavier uniform, packed q/k/v", _xavier_packed, "uniform")
"""The fan of one packed ``3d x d`` matrix of queries, keys and values, as in the authors' code:
the bound is ``sqrt(6 / (3d + d))`` where separate matrices have ``sqrt(6 / 2d)``."""
LECUN_NORMAL = Standard("LeCun normal", _lecun)
FORWARD = Standard("LeCun normal, of the fan-in", _lecun)
FORWARD_ACTIVATED = Standard("He normal, of the fan-in", _he_forward)
"""Keeps the size of what comes in: He et al. 2015, equation 10."""
TOKEN_NORMAL = Standard("normal, 0.02", lambda weight, module: 0.02)
"""Of class tokens, as vision Transformers draw them (Dosovitskiy et al. 2021, their code)."""
XAVIER_NORMAL = Standard("Xavier normal", _xavier)
TORCH_DEFAULT = Standard("PyTorch default", _torch_default, "uniform")
ORTHOGONAL = Standard("orthonormal", _orthogonal, "orthogonal")
EMBEDDING_NORMAL = Standard("normal, d^-1/2", _embedding)
OUTPUT_NORMAL = EMBEDDING_NORMAL
"""Of a Transformer's output layer [V, D], which fairseq draws as the embeddings."""


def standard_of(module: nn.Module) -> Standard | None:
    """The default for a module's type, or ``None`` where no rule covers the type."""
    if isinstance(module, CONVOLUTIONS):
        return HE_NORMAL
    if isinstance(module, nn.Linear):
        return XAVIER_UNIFORM
    if isinstance(module, nn.Embedding):
        return EMBEDDING_NORMAL
    return None
