"""ResNets on small images for the depth check: ``python -m fixup_core check cifar``.

Each function returns what ``fixup_core.depth_check`` takes. A depth is a number of residual
branches, a multiple of three: the blocks are shared out over three stages.
"""

from __future__ import annotations

from typing import Any

import torch

from fixup_core.errors import UserError
from fixup_core.rules.methods import method_named
from vision.nets.design import make_design
from vision.nets.network import Network, write_weights_
from vision.nets.resnet import ResNet

DEPTHS = (3, 6, 12, 24, 48, 96)
WIDTHS = (16, 32, 64)
BATCH, SIZE, CLASSES = 16, 8, 10


def cifar(method: str = "fixup") -> dict[str, Any]:
    """CIFAR ResNets of basic blocks, m = 2.

    Args:
        method: Of the registry: fixup, fixup_no_factor, none, batchnorm, ...

    Raises:
        UserError: There is no such method.
    """
    return _check(method, shortcut="A")


def bottleneck(method: str = "fixup") -> dict[str, Any]:
    """ResNets of bottlenecks, m = 3; ``method`` as for ``cifar``."""
    return _check(method, shortcut="B", bottleneck=True)


def _check(name: str, **design: Any) -> dict[str, Any]:
    method, generator = method_named(name), torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 3, SIZE, SIZE, generator=generator)

    def make_net(depth: int) -> Network:
        if depth < 3 or depth % 3:
            raise UserError(f"a depth of {depth} is not a multiple of 3: take one, as 12")
        counts = (depth // 3,) * 3
        own = make_design(method, {}, **design)
        net = ResNet(own, counts=counts, widths=WIDTHS, num_classes=CLASSES)
        write_weights_(net, method, images)
        return net

    return {
        "make_net": make_net,
        "batch": (images, torch.arange(BATCH) % CLASSES),
        "depths": DEPTHS,
        # Behind a multiplier at 0 nothing but the multiplier can move.
        "moved": "scalars" if method.multiplier == 0 else "branches",
    }
