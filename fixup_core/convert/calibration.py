"""What normalisation layers did to one batch, kept after they are gone.

A norm subtracts a mean and divides by a standard deviation. Behind the layers of a residual branch
Fixup's own rules set the sizes; elsewhere (the stem, projections, what enters a branch or the head)
nothing does once the norms are removed. There the batch's mean and standard deviation stay as
constants, and the scalar biases before weight layers start where the inputs have mean 0: behind a
ReLU all inputs are positive, and the mean they share would make up most of every product.

A branch whose input is divided by a number has it back behind its last layer: its multiplier starts
there. So what the branch learns is in proportion to the signal it is added to. With a multiplier of
1 a small signal (embeddings of size 0.1) would be outgrown at once by branches that magnify it.
A method's fixed number on its branches stands before that multiplier, and stays what it is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fixup_core.convert.attach import BEFORE, MULTIPLIER
from fixup_core.convert.plan import ConversionPlan
from fixup_core.errors import UserError
from fixup_core.probing import Inputs, in_training_mode, outputs_of
from fixup_core.rules.frozen import FrozenNorm, frozen_norms

EPS = 1e-5
"""Of the variance, as in batch normalisation."""
NOTHING = 1e-10
"""A smaller variance is that of a signal that is not there: it is not magnified."""


@torch.no_grad()
def calibrate_(net: nn.Module, inputs: Inputs, plan: ConversionPlan) -> None:
    """Set the frozen norms of ``net``, its biases before weight layers, and the multipliers of the
    branches that start with a frozen norm, by one forward pass.

    Args:
        net: Converted by ``plan``, with frozen norms.
        inputs: A batch of real data.
        plan: It says where the biases stand, and which branches a norm starts.

    Raises:
        UserError: The batch gives numbers that are not finite.
    """
    biases = [net.get_submodule(f"{path}.{BEFORE}") for path in plan.before]
    found = _set_in_one_pass_(net, inputs, biases)
    for frozen, (scale, shift) in found.items():
        _write_(frozen, scale, shift)
    for norm in plan.norms:
        for path in norm.multiplied:
            scale = net.get_buffer(f"{norm.path}.frozen.scale")
            multiplier = net.get_parameter(f"{path}.{MULTIPLIER}.weight")
            # A batch norm has a scale a channel and the branch one number: their harmonic mean.
            multiplier.mul_(scale.pow(-2).mean().sqrt())
    values = [number for m in (*found, *biases) for number in m.state_dict().values()]
    if not all(value.isfinite().all() for value in values):
        raise UserError("the example inputs give numbers that are not finite: scale them first")


def _set_in_one_pass_(
    net: nn.Module, inputs: Inputs, biases: list[nn.Module]
) -> dict[FrozenNorm, tuple[Tensor, Tensor]]:
    """Set the biases; return scale and shift of the frozen norms.

    Each is set just before it runs, so that all that follow see what it gives. One that runs twice
    is set by its first call.
    """
    found: dict[FrozenNorm, tuple[Tensor, Tensor]] = {}
    reached: set[nn.Module] = set()

    def keep_statistics(module: FrozenNorm, args: tuple[Tensor, ...]) -> None:
        if module not in found:
            found[module] = _statistics(module, args[0])
            # The pass works on copies of all buffers: this serves what follows, and is gone then.
            _write_(module, *found[module])

    def start_at_mean_zero(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if module not in reached:
            reached.add(module)
            module.get_parameter("weight").fill_(-args[0].float().mean())

    hooks = [m.register_forward_pre_hook(keep_statistics) for m in frozen_norms(net)]
    hooks += [m.register_forward_pre_hook(start_at_mean_zero) for m in biases]
    try:
        # As the norms were in training: their statistics were those of the batch.
        with in_training_mode(net):
            outputs_of(net, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _statistics(module: FrozenNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift that give ``x`` mean 0 and variance 1."""
    dims = [d for d in range(x.dim()) if d != 1] if module.scale.dim() else list(range(x.dim()))
    variance, mean = torch.var_mean(x.float(), dims, correction=0)
    scale = torch.where(variance > NOTHING, (variance + EPS).rsqrt(), 1.0)
    return scale, -mean * scale


def _write_(module: FrozenNorm, scale: Tensor, shift: Tensor) -> None:
    module.scale.copy_(scale)
    module.shift.copy_(shift)
