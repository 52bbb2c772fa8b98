"""The anchor: what enters the head keeps the size that the last norm gave it.

Without a last norm cross-entropy can lower the loss by growing everything before the head, and the
logits run away.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fixup_core.errors import UserError
from fixup_core.removal.leaving import MOMENTUM
from fixup_core.rules.standards import CONVOLUTIONS

ANCHOR = 0.1
"""Its weight in the loss."""


class Anchor:
    """``weight * (size / target - 1)^2``, the size being the root mean square of what enters the
    head.

    Args:
        net: The network.
        head: Path of its output layer; the last weight layer by default.
        weight: Of the loss.

    Attributes:
        calibrating: The target is still being taken: its running mean.
        target: The size at which to stay; 0 before the first batch.

    Raises:
        UserError: There is no such layer.
    """

    def __init__(self, net: nn.Module, head: str | None, weight: float) -> None:
        self.weight, self.calibrating, self.target = weight, True, 0.0
        self._size: Tensor | None = None
        self._handle = _head(net, head).register_forward_pre_hook(self._look, with_kwargs=True)

    def __getstate__(self) -> dict[str, Any]:
        # The hook goes into copies of the network, the last call's graph does not.
        return self.__dict__ | {"_size": None}

    def loss(self) -> Tensor:
        """Of the last call in training mode.

        Raises:
            UserError: There was none.
        """
        if self._size is None:
            raise UserError("removal.loss() comes after a call of the network in training mode")
        if not self.target:
            return self._size * 0
        return self.weight * (self._size / self.target - 1).square()

    def hold_(self, device: torch.device) -> None:
        """Stay at the target from now on: in all processes at the mean of theirs.

        Args:
            device: On which processes can speak to each other.
        """
        self.calibrating = False
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            target = torch.tensor(self.target, device=device, dtype=torch.float32)
            dist.all_reduce(target)
            self.target = target.item() / dist.get_world_size()

    def state(self) -> dict[str, Any]:
        """To go on with."""
        return {"target": self.target, "calibrating": self.calibrating}

    def load(self, state: dict[str, Any]) -> None:
        """Go on with it."""
        self.target, self.calibrating = float(state["target"]), bool(state["calibrating"])

    def remove(self) -> None:
        """Look no longer."""
        self._handle.remove()

    def _look(self, module: nn.Module, args: Any, options: Any) -> None:
        if not module.training or not torch.is_grad_enabled():
            return
        given = args[0] if args else next(iter(options.values()))
        self._size = given.float().square().mean().sqrt()
        if self.calibrating:
            seen = self._size.item()
            first = not self.target
            self.target = seen if first else MOMENTUM * self.target + (1 - MOMENTUM) * seen


def _head(net: nn.Module, path: str | None) -> nn.Module:
    if path is not None:
        try:
            return net.get_submodule(path)
        except AttributeError as error:
            raise UserError(f"head={path!r}: the network has no such module") from error
    kinds = (nn.Linear, *CONVOLUTIONS)
    layers = [module for module in net.modules() if isinstance(module, kinds)]
    if not layers:
        raise UserError("no output layer was found: name it, head=, or leave the anchor: anchor=0")
    return layers[-1]
