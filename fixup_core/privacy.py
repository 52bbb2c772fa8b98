"""Per-sample gradients of Fixup networks, for training with differential privacy by Opacus.

Opacus computes every sample's own gradient module by module, from what goes into a module and the
gradient at what comes out. BatchNorm has no such gradient, so Opacus refuses it; a network
converted by ``fixup_`` has none left. Three things keep the converted network from being right by
itself, and ``grad_sample_module`` sees to them:

- A multiplier that ``fixup_`` attached to a layer acts by a hook *of that layer*, so that the
  gradient Opacus sees is the one behind the multiplier.
- A scalar's gradient for one sample is a sum over everything but the batch.
- Operations in place on what comes out of a module, as in torchvision's ResNets, are an error in
  PyTorch once the module has Opacus's hooks.

Imports Opacus when called, not before.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fixup_core.convert.attach import ATTACHED, MULTIPLIER
from fixup_core.errors import UserError
from fixup_core.rules.frozen import RemovedNorm
from fixup_core.rules.placed import DepthMultiplier, PlacedConstant
from fixup_core.rules.scalars import Scalar, ScalarBias, ScalarMultiplier

Sampler = Callable[[Any, list[Tensor], Tensor], dict[nn.Parameter, Tensor]]
"""Of a module, what went in and the gradient at what came out, both [B, ...]: the gradients of its
own parameters, [B, *parameter.shape]."""


def grad_sample_module(
    net: nn.Module, *, batch_first: bool = True, loss_reduction: str = "mean"
) -> Any:
    """Wrap a converted network for Opacus; ``PrivacyEngine.make_private`` takes what is returned.

    From then on ``net`` itself computes nothing in place. Its parameters stay the same tensors.

    Args:
        net: Converted by ``fixup_``, in training mode.
        batch_first: Whether the batch is the first dimension of what goes through the modules;
            else it is the second. It must be the same one in all modules.
        loss_reduction: "mean" or "sum", how the loss is reduced over the batch.

    Returns:
        A ``GradSampleModule`` in Opacus's mode "hooks".

    Raises:
        UserError: Opacus is not installed, cannot train one of the modules with privacy, or has no
            per-sample gradients for one that carries scalars.
    """
    try:
        opacus = importlib.import_module("opacus")
    except ImportError as error:
        raise UserError("training with privacy needs Opacus: pip install opacus") from error
    errors = opacus.validators.ModuleValidator.validate(net)
    if errors:
        raise UserError(f"Opacus cannot train {type(net).__name__} with privacy: {errors[0]}")
    samplers = opacus.GradSampleModule.GRAD_SAMPLERS
    _register_samplers(net, samplers)
    _check_buffers(net, samplers)
    _compute_out_of_place_(net)
    # Not strict: that would refuse the scalars' constants, which hold nothing of the data.
    return opacus.GradSampleModule(
        net, batch_first=batch_first, loss_reduction=loss_reduction, strict=False
    )


def _check_buffers(net: nn.Module, samplers: dict[type[nn.Module], Sampler]) -> None:
    """Raise where a module with parameters of its own has buffers.

    The scalars' constants are allowed, but not within a module that Opacus copies as a whole for
    ``torch.func``, because it knows no sampler for it.
    """
    constants = {
        id(buffer)
        for module in net.modules()
        if isinstance(module, (Scalar, PlacedConstant))
        for buffer in module.buffers()
    }
    for name, module in net.named_modules():
        if not any(p.requires_grad for p in module.parameters(recurse=False)):
            continue
        allowed = constants if type(module) in samplers else set()
        if any(id(buffer) not in allowed for buffer in module.buffers()):
            raise UserError(
                f"{name or type(net).__name__} has parameters of its own and buffers in it, for "
                "which Opacus has no per-sample gradients"
            )


def _register_samplers(net: nn.Module, samplers: dict[type[nn.Module], Sampler]) -> None:
    """Give Opacus the samplers of scalars, and of the layers that carry them."""
    samplers[ScalarBias] = _of_bias
    samplers[ScalarMultiplier] = samplers[DepthMultiplier] = _of_multiplier
    for name, module in net.named_modules():
        own = next(module.parameters(recurse=False), None)
        if own is None or not any(hasattr(module, part) for part in ATTACHED):
            continue
        sampler = samplers.get(type(module))
        if sampler is None:
            parts = [part for key, part in module.named_children() if key not in ATTACHED]
            if any(True for part in parts for _ in part.parameters()):
                raise UserError(
                    f"{name}: Opacus has no per-sample gradients for a {type(module).__name__} "
                    "with scalars"
                )
            sampler = _without_hooks
        if not isinstance(sampler, _BeforeMultiplier):
            samplers[type(module)] = _BeforeMultiplier(sampler)


class _BeforeMultiplier:
    """A layer's sampler, given the gradient in front of the layer's multiplier.

    Args:
        sampler: The layer's own.
    """

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler

    def __call__(
        self, module: nn.Module, activations: list[Tensor], backprops: Tensor
    ) -> dict[nn.Parameter, Tensor]:
        multiplier: Any = getattr(module, MULTIPLIER, None)
        if multiplier is not None:
            backprops = backprops * multiplier.value().detach()
        return self.sampler(module, activations, backprops)


def _of_bias(
    scalar: Scalar, activations: list[Tensor], backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    return {scalar.weight: _summed(backprops) * _slope(scalar)}


def _of_multiplier(
    scalar: Scalar, activations: list[Tensor], backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    return {scalar.weight: _summed(backprops * activations[0]) * _slope(scalar)}


def _summed(tensor: Tensor) -> Tensor:
    """Over all but the batch, shape [B, 1], in float32 or wider."""
    wide = torch.promote_types(tensor.dtype, torch.float32)
    return tensor.flatten(1).sum(1, keepdim=True, dtype=wide)


def _slope(scalar: Scalar) -> Tensor | float:
    """Of the scalar's value by its parameter."""
    slope = 1.0 if scalar.rate is None else scalar.rate
    return slope * scalar.constant.value() if isinstance(scalar, DepthMultiplier) else slope


class _Bare(nn.Module):
    """A layer without its hooks."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer.forward(x)


def _without_hooks(
    module: nn.Module, activations: list[Tensor], backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    """By ``torch.func``, for a layer that Opacus has no sampler for.

    Opacus's own fallback copies the layer with its hooks and would add the bias twice.
    """
    bare = _Bare(module)
    own = {f"layer.{name}": p for name, p in module.named_parameters(recurse=False)}

    def loss(params: dict[str, Tensor], entering: Tensor, gradient: Tensor) -> Tensor:
        output = functional_call(bare, params, (entering.unsqueeze(0),))
        return (output * gradient.unsqueeze(0)).sum()

    if not len(backprops):  # Poisson sampling may draw nobody, and vmap wants somebody
        return {p: p.new_zeros(0, *p.shape) for p in own.values()}
    detached = {name: p.detach() for name, p in own.items()}
    grads = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(
        detached, activations[0], backprops
    )
    return {own[name]: grad for name, grad in grads.items()}


def _compute_out_of_place_(net: nn.Module) -> None:
    for module in net.modules():
        if getattr(module, "inplace", None) is True:
            module.inplace = False  # type: ignore[assignment]
        if isinstance(module, RemovedNorm) and _own_tensor not in module._forward_hooks.values():
            module.register_forward_hook(_own_tensor)


def _own_tensor(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """A tensor that may be changed in place: what comes out of a hooked layer may not."""
    return output.clone()
