"""A training that starts from other weights, with some of the network frozen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fixup_core.errors import UserError
from fixup_core.probing import modules_named
from fixup_core.rules.branches import collect_classifiers
from vision.nets import own_state_dict


def load_weights_(net: nn.Module, file: Path) -> None:
    """Load the weights of a checkpoint of ours, or of a state dict of torchvision's or the
    authors'; a classifier of another number of classes stays as it is.

    Args:
        net: Built by ``build_net``.
        file: Saved by ``python -m vision fit`` or ``torch.save``.

    Raises:
        UserError: No such file, or weights of another network.
    """
    if not file.is_file():
        raise UserError(f"--model.weights {file} does not exist")
    saved = torch.load(file, map_location="cpu", weights_only=True)
    state = saved.get("state_dict", saved) if isinstance(saved, dict) else {}
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"--model.weights {file} holds no state dict of a network")
    if all(name.startswith("net.") for name in state):
        state = {name.removeprefix("net."): value for name, value in state.items()}
    own = net.state_dict()
    found = own_state_dict(net, state, classifier=_classifier_names(net))
    net.load_state_dict(own | found)
    left = sorted(own.keys() - found.keys())
    print(f"weights of {file}" + (f"; new: {', '.join(left)}" if left else ""))


def freeze_(net: nn.Module, names: Sequence[str]) -> list[nn.Module]:
    """Take the parameters of some modules out of the training, and put these in evaluation mode.

    Args:
        net: The network.
        names: Of modules in it, as ``stem`` or ``stages.0``.

    Returns:
        The modules, which are to stay in evaluation mode.

    Raises:
        UserError: There is no such module, or nothing is left to train.
    """
    modules = list(modules_named(net, names))
    for module in modules:
        module.requires_grad_(False).eval()
    if not any(parameter.requires_grad for parameter in net.parameters()):
        raise UserError("--model.freeze leaves nothing to train")
    return modules


def _classifier_names(net: nn.Module) -> set[str]:
    modules = {id(layer.module) for layer in collect_classifiers(net)}
    return {
        f"{path}.{name}"
        for path, module in net.named_modules()
        if id(module) in modules
        for name, _ in module.named_parameters()
    }
