"""A network that ``fixup_`` has converted, without what was attached to it.

What stands around a layer goes into that layer's own parameters, or stays as a constant
(``fuse.layers``, ``fuse.constants``); what stands where a norm stood becomes the identity or a
constant. Everything else is a copy of what the network's author has written, and hooks of others
stay: those between a layer and its scalars see what they saw, as the scalars become constants then.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fixup_core.convert import attach
from fixup_core.convert.attach import ATTACHED, Declared
from fixup_core.errors import UserError, one_line
from fixup_core.fuse.constants import NONE, Affine, Numbers, Unnormalised, WithConstants
from fixup_core.fuse.layers import computes_as, fold_into_
from fixup_core.probing import in_evaluation_mode
from fixup_core.rules.frozen import FrozenNorm, RemovedNorm
from fixup_core.rules.parametrised import plain_copy
from fixup_core.rules.placed import ChannelMultiplier, PlacedConstant
from fixup_core.rules.scalars import Scalar

TORCHVISION_BLOCK = "torchvision.models.vision_transformer.EncoderBlock"
OURS = (Scalar, PlacedConstant, ChannelMultiplier, FrozenNorm, RemovedNorm)


def is_converted(net: nn.Module) -> bool:
    """Whether ``fixup_`` has changed ``net``."""
    return any(
        isinstance(module, RemovedNorm)
        or _has_scalars(module)
        or any(isinstance(value, Declared) for value in vars(module).values())
        for module in net.modules()
    )


@torch.no_grad()
def fold_converted(net: nn.Module) -> nn.Module:
    """A plain copy of a converted network, with its outputs in evaluation.

    Args:
        net: Left as it is.

    Raises:
        UserError: It cannot be copied, or has scalars that its own forward pass uses.
    """
    net = getattr(net, "_orig_mod", net)  # of torch.compile
    try:
        with in_evaluation_mode(net):  # spectral norm changes whenever it is computed in training
            plain = plain_copy(net)
    except (RuntimeError, TypeError) as error:
        raise UserError(
            f"{type(net).__name__} cannot be copied, so not folded: {one_line(str(error))}"
        ) from error
    modules, to_itself = list(plain.modules()), dict(_attention(plain))
    replaced: dict[nn.Module, nn.Module] = {}
    for module in modules:
        if isinstance(module, RemovedNorm):
            replaced[module] = _without_norm(module)
        elif _has_scalars(module):
            replaced[module] = _without_scalars(module, to_itself.get(module))
    replace_(modules, replaced)
    for module in modules:
        _forget_declarations_(module)
        if isinstance(module, nn.TransformerEncoderLayer):
            # PyTorch's fast path would compute norms that are gone, and skip constants.
            module.activation_relu_or_gelu = 0
    _check_nothing_left(plain)
    return replaced.get(plain, plain)


def _has_scalars(module: nn.Module) -> bool:
    return any(name in module._modules for name in ATTACHED)


def _attention(net: nn.Module) -> Iterator[tuple[nn.Module, bool]]:
    """The attention in layers whose forward pass is known, and whether keys and values are the
    queries there.
    """
    for layer in net.modules():
        if f"{type(layer).__module__}.{type(layer).__qualname__}" == TORCHVISION_BLOCK:
            yield layer.get_submodule("self_attention"), True
        elif computes_as(layer, nn.TransformerEncoderLayer):
            yield layer.get_submodule("self_attn"), True
        elif computes_as(layer, nn.TransformerDecoderLayer):
            yield layer.get_submodule("self_attn"), True
            yield layer.get_submodule("multihead_attn"), False


def _without_norm(norm: RemovedNorm) -> nn.Module:
    """Constants where they change anything; an activation that is part of it stays."""
    then = dict(norm.named_children())
    frozen, bias = then.pop("frozen", None), then.pop("scalar_bias", None)
    scale: Tensor | None = None
    shift: Tensor | None = None
    if isinstance(frozen, FrozenNorm):
        scale, shift = frozen.scale, frozen.shift
    if isinstance(bias, Scalar):
        shift = bias.value().clone() if shift is None else shift + bias.value()
    scale = None if scale is None or bool((scale == 1).all()) else scale
    shift = None if shift is None or not shift.any() else shift
    then = {name: module for name, module in then.items() if type(module) is not nn.Identity}
    given = scale is not None or shift is not None or then
    new = Affine(scale, shift, then) if given else Unnormalised()
    _move_hooks_(norm, new, [*norm._forward_pre_hooks, *norm._forward_hooks])
    return new


def _without_scalars(module: nn.Module, to_itself: bool | None) -> nn.Module:
    """The module, its scalars in its parameters, or within the constants that are left."""
    parts = {name: module._modules.pop(name, None) for name in ATTACHED}
    numbers = Numbers(
        *(
            _number(part, default)
            for part, default in zip(parts.values(), vars(NONE).values(), strict=True)
        )
    )
    inner, outer = _take_hooks_(module)
    left = numbers if inner else fold_into_(module, numbers, to_itself)
    if left == NONE:
        return module
    like = next(t for part in parts.values() if part for t in part.state_dict().values())
    new = WithConstants(module, left, like.new_zeros(()))
    _move_hooks_(module, new, outer)
    return new


def _number(part: Any, default: float) -> float:
    return default if part is None else part.value().item()


def _take_hooks_(module: nn.Module) -> tuple[list[int], list[int]]:
    """Remove Fixup's own hooks; return those of others by id, in two lists: nearer to the module
    than Fixup's, and further away.
    """
    inner: list[int] = []
    outer: list[int] = []
    # The last hook on what enters is the nearest, and the first on what leaves.
    for hooks, order in ((module._forward_pre_hooks, -1), (module._forward_hooks, 1)):
        keys = list(hooks)[::order]
        places = [
            i
            for i, key in enumerate(keys)
            if getattr(hooks[key], "__module__", "") == attach.__name__
        ]
        if places:
            inner += keys[: places[0]]
            outer += keys[places[-1] + 1 :]
            for place in places:
                for table in _hook_tables(module):
                    table.pop(keys[place], None)
    return inner, outer[::-1]


def _hook_tables(module: nn.Module) -> list[dict[int, Any]]:
    return [
        module._forward_pre_hooks,
        module._forward_pre_hooks_with_kwargs,
        module._forward_hooks,
        module._forward_hooks_with_kwargs,
        module._forward_hooks_always_called,
    ]


def _move_hooks_(source: nn.Module, target: nn.Module, keys: Iterable[int]) -> None:
    for key in keys:
        for old, new in zip(_hook_tables(source), _hook_tables(target), strict=True):
            if key in old:
                new[key] = old.pop(key)


def replace_(modules: Iterable[nn.Module], replaced: Mapping[nn.Module, nn.Module]) -> None:
    """Put others in the place of ``modules``' parts, wherever these stand."""
    for module in modules:
        for name, child in module._modules.items():
            if child is not None and child in replaced:
                module._modules[name] = replaced[child]


def _forget_declarations_(module: nn.Module) -> None:
    """The copy's branches are no residual branches by the rules any more."""
    for name, value in list(vars(module).items()):
        if isinstance(value, Declared):
            delattr(module, name)


def _check_nothing_left(net: nn.Module) -> None:
    left = [path for path, module in net.named_modules() if isinstance(module, OURS)]
    if left:
        raise UserError(
            f"{type(net).__name__} cannot be folded: its own forward pass uses the scalar "
            f"{left[0]}, give it a folded() method (fixup_core/fuse/fold.py)"
        )
