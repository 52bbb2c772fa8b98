"""What normalisation layers did to one batch, kept after they are gone.

A norm subtracts a mean and divides by a standard deviation. Behind the layers of a residual branch
Fixup's own rules set the sizes; elsewhere (the stem, projections, what enters a branch or the head)
nothing does once the norms are removed. There the batch's mean and standard deviation stay as
constants, and the scalar biases before weight layers start where the inputs have mean 0: behind a
ReLU all inputs are positive, and the mean they share would make up most of every product.

A branch whose input is divided by a number has it back behind its last layer: its multiplier starts
there. So what the branch learns is in proportion to the signal it is added to. With a multiplier of
1 a small signal (embeddings of size 0.1) would be outgrown at once by branches that magnify it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fixup_core.convert.attach import BEFORE, MULTIPLIER
from fixup_core.errors import UserError
from fixup_core.probing import Inputs, in_training_mode, outputs_of
from fixup_core.rules.frozen import FrozenNorm, frozen_norms

EPS = 1e-5
"""Of the variance, as in batch normalisation."""
NOTHING = 1e-10
"""A smaller variance is that of a signal that is not there: it is not magnified."""


@torch.no_grad()
def calibrate_(
    net: nn.Module, inputs: Inputs, before: Sequence[str], norms: Mapping[str, Sequence[str]]
) -> None:
    """Set, in one forward pass and in its order, the constants of ``net`` and its biases before
    weight layers; and the multipliers of the branches that start with a constant.

    Args:
        net: With scalars and constants as ``fixup_`` attaches them.
        inputs: A batch of real data.
        before: Paths of the modules with a scalar bias on what comes in.
        norms: Paths of what stands for a norm; for one that starts branches, of the modules with
            the branches' multipliers.

    Raises:
        UserError: The batch gives numbers that are not finite.
    """
    found: dict[FrozenNorm, tuple[Tensor, Tensor]] = {}
    reached: set[nn.Module] = set()

    def keep_statistics(module: FrozenNorm, args: tuple[Tensor, ...]) -> None:
        if module not in found:
            found[module] = _statistics(module, args[0])
            _write_(module, *found[module])  # to a copy of its buffers, for this pass

    def start_at_mean_zero(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if module not in reached:
            reached.add(module)
            module.get_parameter("weight").fill_(-args[0].float().mean())

    biases = [net.get_submodule(f"{path}.{BEFORE}") for path in dict.fromkeys(before)]
    hooks = [m.register_forward_pre_hook(keep_statistics) for m in frozen_norms(net)]
    hooks += [m.register_forward_pre_hook(start_at_mean_zero) for m in biases]
    try:
        with in_training_mode(net):
            outputs_of(net, inputs)
    finally:
        for hook in hooks:
            hook.remove()
    for frozen, (scale, shift) in found.items():
        _write_(frozen, scale, shift)
    for path, ends in norms.items():
        scale = net.get_buffer(f"{path}.frozen.scale")
        for end in ends:
            multiplier = net.get_parameter(f"{end}.{MULTIPLIER}.weight")
            multiplier.mul_(scale.pow(-2).mean().sqrt())
    values = [number for m in (*found, *biases) for number in m.state_dict().values()]
    if not all(value.isfinite().all() for value in values):
        raise UserError("the example inputs give numbers that are not finite: scale them first")


def _statistics(module: FrozenNorm, x: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift that give ``x`` mean 0 and variance 1."""
    dims = [d for d in range(x.dim()) if d != 1] if module.scale.dim() else list(range(x.dim()))
    variance, mean = torch.var_mean(x.float(), dims, correction=0)
    scale = torch.where(variance > NOTHING, (variance + EPS).rsqrt(), 1.0)
    return scale, -mean * scale


def _write_(module: FrozenNorm, scale: Tensor, shift: Tensor) -> None:
    module.scale.copy_(scale)
    module.shift.copy_(shift)
