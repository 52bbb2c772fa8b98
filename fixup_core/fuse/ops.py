"""Fused scalars: they ride in the weight layers' own weights and biases and cost no pass.

A scalar added before an activation joins the bias of the layer before it, one added behind the
activation joins it too and moves the activation's floor, a multiplier joins the weight::

    relu(scale * layer(x) + before) + after
        == max(layer(x, scale * weight) + (before + after), after)

A block that receives its input with its first bias already added, and returns its output with the
next block's, needs nothing else. Where it adds its input to the branch, it subtracts that bias
again, as a constant. On the way such a bias is a plain number: it gets its gradient where it is
used, by ``use_fused_bias`` or ``activation``.

The layer itself stays PyTorch's own, with a constant vector for its bias. What follows it is one
function that works in place and keeps its output alone, as a ReLU does; its backward pass takes the
gradients of the scalars, two sums, on the way.

Two routes give the same numbers up to rounding: the modules' own forward passes (*plain*), and the
ones made of these functions (*fused*), which a network takes while ``may_fuse(net)`` holds.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.fx import _symbolic_trace
from torch.nn import functional as F

from fixup_core.rules.placed import DepthMultiplier, PlacedConstant
from fixup_core.rules.scalars import Scalar, ScalarBias, ScalarMultiplier

Number = Tensor | float
"""A scalar's value, shape [], or a plain number."""

HALVES = (torch.float16, torch.bfloat16)
SCALARS = (ScalarBias, ScalarMultiplier, DepthMultiplier, PlacedConstant, nn.Identity)
ACTIVATIONS = (nn.ReLU, nn.Identity)
GLOBAL_HOOKS = (
    nn.modules.module._global_forward_hooks,
    nn.modules.module._global_forward_pre_hooks,
    nn.modules.module._global_backward_hooks,
    nn.modules.module._global_backward_pre_hooks,
)

# The older name warns where the newer one exists.
_is_recorded = getattr(_symbolic_trace, "is_fx_symbolic_tracing", _symbolic_trace.is_fx_tracing)
_plain = contextvars.ContextVar("fixup_plain_route", default=os.environ.get("FIXUP_PLAIN") == "1")


@contextlib.contextmanager
def plain_route() -> Iterator[None]:
    """Within this context every network computes its scalars one by one, as the method has them.

    For comparison, and for what the fused route cannot do: derivatives of second order, and in
    forward mode. The environment variable ``FIXUP_PLAIN=1`` does the same for a whole process.
    """
    token = _plain.set(True)
    try:
        yield
    finally:
        _plain.reset(token)


def may_fuse(net: nn.Module) -> bool:
    """Whether ``net`` may take the fused route now: nobody asks for the plain one, no hook hangs on
    a module that the fused route would not call, and no tracer records what is called.
    """
    recorded = torch.jit.is_tracing() or _is_recorded() or torch.compiler.is_exporting()
    hooked = any(GLOBAL_HOOKS) or any(map(_has_hooks, net.modules()))
    return not (_plain.get() or recorded or hooked)


def fusable(
    convolutions: Iterable[nn.Module],
    scalars: Iterable[nn.Module],
    activations: Iterable[nn.Module] = (),
) -> bool:
    """Whether a block is made of what can be fused: convolutions with zero padding, scalars or
    nothing in their places, ReLUs. Anything else that stands there has a forward pass of its own.
    """
    return (
        all(type(conv) is nn.Conv2d and conv.padding_mode == "zeros" for conv in convolutions)
        and all(type(scalar) in SCALARS for scalar in scalars)
        and all(type(activation) in ACTIVATIONS for activation in activations)
    )


def value_of(module: nn.Module, otherwise: float = 0.0) -> Number:
    """The value of a scalar; ``otherwise`` for a module that stands in a scalar's place."""
    return module.value() if isinstance(module, Scalar | PlacedConstant) else otherwise


class ActivationScalars(NamedTuple):
    """The scalars at an activation: ``relu(x + before + (shortcut - on_shortcut)) + after``.

    Attributes:
        before: Added before the activation.
        after: Added behind it; a constant where it is added for the next block.
        on_shortcut: The constant that the shortcut holds already.
        relu: Whether there is an activation.
    """

    before: Number = 0.0
    after: Number = 0.0
    on_shortcut: Number = 0.0
    relu: bool = True


def convolution(
    conv: nn.Conv2d,
    x: Tensor,
    scalars: ActivationScalars,
    *,
    scale: Number = 1.0,
    shortcut: Tensor | None = None,
) -> Tensor:
    """A convolution with all that follows it.

    Args:
        conv: With zero padding.
        x: [B, C, H, W].
        scalars: Those that follow.
        scale: The multiplier behind the convolution.
        shortcut: Of the output's shape.
    """
    weight, bias = conv.weight, conv.bias
    if not (isinstance(scale, float) and scale == 1.0):
        weight, bias = weight * scale, None if bias is None else bias * scale
    bias = constant_bias(weight, bias, scalars)
    out = F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    return finish(out, scalars, shortcut)


def constant_bias(weight: Tensor, bias: Tensor | None, scalars: ActivationScalars) -> Tensor | None:
    """The bias vector with which a layer of that weight is ready for ``finish``, which gives the
    scalars their gradient; a traced layer does so itself.
    """
    before, after, on_shortcut, _ = scalars
    added = before + after - on_shortcut if _is_traced() else constant(before, after, -on_shortcut)
    if isinstance(added, float):
        if bias is None:
            return weight.new_full(weight.shape[:1], added) if added else None
        return bias + added
    if bias is None:
        return added.to(weight.dtype).expand(weight.shape[:1]).contiguous()
    return bias + added


def finish(out: Tensor, scalars: ActivationScalars, shortcut: Tensor | None = None) -> Tensor:
    """What follows a layer: ``max(out + shortcut, after)``.

    Args:
        out: Of the layer with its ``constant_bias``; it is overwritten.
        scalars: Those that follow.
        shortcut: Of the same shape.
    """
    if not _is_traced():
        return _Finish.apply(out, shortcut, *scalars)
    out = out if shortcut is None else out + shortcut
    return _floored(out, scalars.after) if scalars.relu else out


def constant(*scalars: Number) -> Number:
    """The sum of scalars as a constant: a plain number where reading it waits for no device."""
    tensors = [scalar for scalar in scalars if isinstance(scalar, Tensor)]
    if tensors and (_is_traced() or tensors[0].device.type != "cpu"):
        return torch.as_tensor(sum(scalars)).detach()
    return sum(map(_number, scalars))


def use_fused_bias(h: Tensor, bias: Number) -> Tensor:
    """``h``, to which ``bias`` was added as a constant, where the bias is used: its gradient."""
    if not isinstance(bias, Tensor):
        return h
    return h + (bias - bias.detach()) if _is_traced() else _FusedBias.apply(h, bias)


def activation(h: Tensor, before: Number, after: Number) -> Tensor:
    """``relu(x + before) + after`` of an ``h`` that is ``x + before + after``."""
    if not _is_traced():
        return _Activation.apply(h, before, after)
    return _floored(use_fused_bias(h, before), after)


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        given: Tensor,
        shortcut: Tensor | None,
        before: Number,
        after: Number,
        on_shortcut: Number,
        relu: bool,
    ) -> Tensor:
        # In place, half precision takes longer on the CPU: its convolutions are so fast that they
        # wait for memory, unless they write into the same few tensors again and again.
        in_place = given.dtype not in HALVES
        out = given
        if shortcut is not None:
            same = in_place and shortcut.dtype == given.dtype
            out = given.add_(shortcut) if same else given + shortcut
        if relu:
            ctx.low = _rounded(after, out)
            out = out.clamp_min_(ctx.low) if in_place else out.clamp_min(ctx.low)
        if out is given:
            ctx.mark_dirty(out)
        ctx.save_for_backward(out if relu else None)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (out,) = ctx.saved_tensors
        for_out, for_shortcut, for_before, for_after, *_ = ctx.needs_input_grad
        passed = grad if out is None else _passed(grad, out, ctx.low)
        return (
            *(passed if for_out else None, passed if for_shortcut else None),
            *(_total(passed) if for_before else None, _total(grad) if for_after else None),
            *(None, None),
        )


class _FusedBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, bias: Tensor) -> Tensor:
        return h.view_as(h)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, _total(grad)


class _Activation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, before: Number, after: Number) -> Tensor:
        ctx.low = _rounded(after, h)
        out = h.clamp_min(ctx.low)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        _, for_before, for_after = ctx.needs_input_grad
        passed = _passed(grad, ctx.saved_tensors[0], ctx.low)
        before = _total(passed) if for_before else None
        return passed, before, _total(grad) if for_after else None


def _floored(x: Tensor, after: Number) -> Tensor:
    low = torch.as_tensor(after, dtype=x.dtype, device=x.device)
    return torch.where(x <= low, low, x)  # what is no number stays none


def _number(scalar: Number) -> float:
    return scalar.item() if isinstance(scalar, Tensor) else scalar


def _rounded(after: Number, out: Tensor) -> Number:
    """The floor as ``out`` can hold it, so that what lies on it can be recognised; a plain number
    where reading it does not wait for the device.
    """
    low = torch.as_tensor(after, dtype=out.dtype).detach()
    return low.item() if low.device.type == "cpu" else low


def _passed(grad: Tensor, out: Tensor, low: Number) -> Tensor:
    """The gradient where the output lies above the floor; where it lies on it, the gradient is the
    floor's alone, as ReLU has it at 0.
    """
    if isinstance(low, float):
        return torch.ops.aten.threshold_backward(grad, out, low)
    return torch.where(out <= low, 0.0, grad)


def _total(grad: Tensor) -> Tensor:
    """The sum, in float32 or wider. Half precision is rounded a row at a time: reducing it to
    another type at once is slow on the CPU.
    """
    if grad.dtype not in HALVES:
        return grad.sum()
    rows = grad.sum(dim=tuple(range(1, grad.dim()))) if grad.dim() > 1 else grad
    return rows.sum(dtype=torch.float32)


def _is_traced() -> bool:
    """By a compiler or a function transform, which want differentiable operations."""
    return torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is not None


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
