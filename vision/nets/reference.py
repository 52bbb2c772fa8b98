"""State dicts of other people's code, loaded into our networks.

The authors' Fixup ResNets and torchvision's ResNets name the same weights like this (s the stage,
b the block, i the convolution, all counted as they count them):

=====================================  =============================  ==========================
ours                                   the authors' Fixup             torchvision
=====================================  =============================  ==========================
stem.conv.weight                       conv1.weight                   conv1.weight
stem.before_activation.*               bias1                          bn1.*
stages.S.B.convs.I.weight              layer{s}.{b}.conv{i}.weight    the same
stages.S.B.before_convs.I.weight       layer{s}.{b}.bias{i}a
stages.S.B.before_acts.I.*             layer{s}.{b}.bias{i}b          layer{s}.{b}.bn{i}.*
stages.S.B.residual.end.*              the same, of the last i        the same, of the last i
stages.S.B.residual.multiplier.weight  layer{s}.{b}.scale
stages.S.B.shortcut.conv.weight        layer{s}.{b}.downsample.weight ....downsample.0.weight
stages.S.B.shortcut.norm.*                                       ....downsample.1.*
head.before_fc.weight                  bias2
head.fc.*                              fc.*                           fc.*
=====================================  =============================  ==========================
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping

from torch import Tensor, nn

from fixup_core.errors import UserError

Names = tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]


def _numbered(text: str) -> Callable[[re.Match[str]], str]:
    """Stages and convolutions are counted from 1 there, from 0 here."""

    def rename(match: re.Match[str]) -> str:
        parts = match.groupdict()
        parts["s"] = str(int(parts["s"]) - 1)
        if "i" in parts:
            parts["i"] = str(int(parts["i"]) - 1)
        return text.format(**parts)

    return rename


BLOCK = r"layer(?P<s>\d+)\.(?P<b>\d+)\."
NAMES: Names = (
    (r"conv1\.(weight)", r"stem.conv.\1"),
    (r"bias1", "stem.before_activation.weight"),
    (r"bn1\.(.*)", r"stem.before_activation.\1"),
    (r"bias2", "head.before_fc.weight"),
    (r"fc\.(.*)", r"head.fc.\1"),
    (BLOCK + r"conv(?P<i>\d)\.weight", _numbered("stages.{s}.{b}.convs.{i}.weight")),
    (BLOCK + r"bias(?P<i>\d)a", _numbered("stages.{s}.{b}.before_convs.{i}.weight")),
    (BLOCK + r"bias(?P<i>\d)b", _numbered("stages.{s}.{b}.before_acts.{i}.weight")),
    (BLOCK + r"bn(?P<i>\d)\.(?P<what>.*)", _numbered("stages.{s}.{b}.before_acts.{i}.{what}")),
    (BLOCK + r"scale", _numbered("stages.{s}.{b}.residual.multiplier.weight")),
    (BLOCK + r"downsample\.(0\.)?weight", _numbered("stages.{s}.{b}.shortcut.conv.weight")),
    (BLOCK + r"downsample\.1\.(?P<what>.*)", _numbered("stages.{s}.{b}.shortcut.norm.{what}")),
)


def load_reference_state_dict(net: nn.Module, state_dict: Mapping[str, Tensor]) -> None:
    """Load a state dict of the authors' Fixup code, or of torchvision, into ``net``.

    A ``module.`` in front of the names, as data-parallel training leaves it, is taken off.

    Args:
        net: Of the same kind and depth, built with method ``fixup`` or ``batchnorm``.
        state_dict: The other code's.

    Raises:
        UserError: A name that has no counterpart, a parameter of ``net`` that is not there, or
            another shape.
    """
    net.load_state_dict(own_state_dict(net, state_dict))


def own_state_dict(
    net: nn.Module, state_dict: Mapping[str, Tensor], *, classifier: Collection[str] = ()
) -> dict[str, Tensor]:
    """The entries of a state dict, of ours or of other code, under the names of ``net``.

    Args:
        net: Of the same kind and depth.
        state_dict: Names and values.
        classifier: Names of ``net`` that are left out where the shapes differ.

    Raises:
        UserError: A name that has no counterpart, an entry of ``net`` that is not there, or
            another shape.
    """
    own = net.state_dict()
    ours = any(name in own for name in state_dict)
    renamed = {
        name if ours else _own_name(_rename(name), own): value for name, value in state_dict.items()
    }
    for name, value in renamed.items():
        if name in own and value.numel() == 1:
            renamed[name] = value.reshape(own[name].shape)  # a scalar, [] or [1]
    differing = [n for n in own if n in renamed and renamed[n].shape != own[n].shape]
    wrong = [f"{n} is missing" for n in own if n not in renamed]
    wrong += [f"{n} is of no use here" for n in renamed if n not in own]
    wrong += [
        f"{n} is {tuple(renamed[n].shape)} there, {tuple(own[n].shape)} here"
        for n in differing
        if n not in classifier
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"the state dict is of another network: {'; '.join(wrong[:3])}{more}")
    return {name: value for name, value in renamed.items() if name not in differing}


def _own_name(name: str, own: Mapping[str, Tensor]) -> str:
    """What stands before the last activation of a block ends its branch."""
    return name if name in own else re.sub(r"\.before_acts\.\d\.", ".residual.end.", name)


def _rename(name: str) -> str:
    name = name.removeprefix("module.")
    for pattern, ours in NAMES:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(ours) if isinstance(ours, str) else ours(match)
    raise UserError(f"the state dict has a name that no network here has: {name}")
