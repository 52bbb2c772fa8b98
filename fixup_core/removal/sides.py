"""A norm that feeds attention hands queries and keys one tensor and values another.

One norm stands before all three, but the norm of the queries and keys is taken out before that of
the values. The layers that make values are found by looking at what they are given: it is the very
tensor that the norm has made.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fixup_core.probing import Inputs, in_evaluation_mode, outputs_of
from fixup_core.removal.leaving import LeavingNorm

VALUES = re.compile(r"(^|[._])(v|value|v_proj|v_lin|to_v|wv|values)$", re.IGNORECASE)
"""Paths of layers that make values."""
PACKED = re.compile(r"(^|\.)(c_attn|qkv|qkv_proj|in_proj)$")
"""Paths of layers that make queries, keys and values, one after the other in equal parts."""


@dataclass
class Seen:
    """What one call of a network has shown of its norms.

    Attributes:
        order: Paths of the norms, as they are called.
        made: By path, the input of a norm, and what it made of that.
        values: By path of a layer that makes values, the path of the norm that feeds it.
    """

    order: list[str] = field(default_factory=list)
    made: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    values: dict[str, str] = field(default_factory=dict)


def look_at(net: nn.Module, inputs: Inputs, norms: Mapping[str, nn.Module]) -> Seen:
    """Call ``net`` once, in evaluation mode; it is as it was after.

    Args:
        net: With its norms.
        inputs: A batch of it.
        norms: By path.
    """
    seen = Seen()
    made_by: dict[int, str] = {}
    entering: dict[str, Tensor] = {}
    alive: list[Tensor] = []  # or another tensor could get the same id

    def remember(path: str, module: nn.Module, args: Any, output: Any) -> None:
        if path in entering and isinstance(output, Tensor):
            seen.order.append(path)
            # An activation may write over it.
            seen.made[path] = (entering.pop(path), output.clone())
            made_by[id(output)] = path
            alive.append(output)

    def keep(path: str, module: nn.Module, args: Any) -> None:
        if path not in seen.made and args and isinstance(args[0], Tensor):
            entering[path] = args[0].clone()

    def ask(path: str, module: nn.Module, args: Any, options: Any) -> None:
        given = value_argument(module, args, options)
        norm = made_by.get(id(given))
        if norm is not None and makes_values(path, module):
            seen.values[path] = norm

    handles = [m.register_forward_pre_hook(partial(keep, path)) for path, m in norms.items()]
    handles += [m.register_forward_hook(partial(remember, path)) for path, m in norms.items()]
    handles += [
        module.register_forward_pre_hook(partial(ask, path), with_kwargs=True)
        for path, module in net.named_modules()
        if makes_values(path, module)
    ]
    try:
        with in_evaluation_mode(net), torch.no_grad():
            outputs_of(net, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def makes_values(path: str, module: nn.Module) -> bool:
    """Whether a module makes values, alone or beside queries and keys."""
    if isinstance(module, nn.MultiheadAttention):
        return True
    if not isinstance(getattr(module, "weight", None), Tensor):
        return False
    return bool(VALUES.search(path)) or _is_packed(path, module)


def value_argument(module: nn.Module, args: Any, options: Any) -> Any:
    """The tensor that a module makes values of."""
    if isinstance(module, nn.MultiheadAttention):
        return args[2] if len(args) > 2 else options.get("value")
    return args[0] if args else options.get("input", options.get("x"))


def split_(net: nn.Module, values: Mapping[str, str]) -> list[RemovableHandle]:
    """Let the layers that make values take the norm's other side.

    Args:
        net: Its norms are ``LeavingNorm``.
        values: Of ``Seen``.
    """
    handles = []
    for path, norm_path in values.items():
        module, norm = net.get_submodule(path), net.get_submodule(norm_path)
        assert isinstance(norm, LeavingNorm)
        if isinstance(module, nn.MultiheadAttention) or not _is_packed(path, module):
            hook: Callable[..., Any] = partial(_hand_over, norm)
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(partial(_pack, norm)))
    return handles


def _hand_over(norm: LeavingNorm, module: nn.Module, args: Any, options: Any) -> Any:
    """A hook before the layer: it is given the values' side."""
    first, second = norm.sides or (None, None)
    given = value_argument(module, args, options)
    if first is None or given is not first:
        return None
    if isinstance(module, nn.MultiheadAttention):
        if len(args) > 2:
            return (*args[:2], second, *args[3:]), options
        return args, options | {"value": second}
    return ((second, *args[1:]), options) if args else (args, {next(iter(options)): second})


def _pack(norm: LeavingNorm, module: nn.Module, args: Any, output: Tensor) -> Any:
    """A hook behind a packed layer: the values' third is made of the values' side."""
    first, second = norm.sides or (None, None)
    if first is None or args[0] is not first:
        return None
    other = module.forward(second)
    start = output.size(-1) // 3 * 2
    return torch.cat([output[..., :start], other[..., start:]], dim=-1)


def _is_packed(path: str, module: Any) -> bool:
    """Whether one layer makes queries, keys and values, as GPT-2's and timm's do."""
    shape = tuple(module.weight.shape)
    return bool(PACKED.search(path)) and len(shape) == 2 and max(shape) == 3 * min(shape)
