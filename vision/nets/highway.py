"""Highway networks (Srivastava, Greff and Schmidhuber 2015): y = H(x) T(x) + x (1 - T(x)).

The gate T is a sigmoid whose bias starts below 0, so that a layer starts by carrying its input.
Tensors are [B, D] in the fully connected network, [B, C, H, W] in the convolutional one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vision.nets.design import Subsample
from vision.nets.network import Network, make_activation


class HighwayLayer(nn.Module):
    """One gated layer.

    Args:
        transform: H without its activation: a linear layer or convolution.
        gate: T without its sigmoid, of the same shape.
        carry: What makes x the shape of H(x).
        activation: Of H.
        gate_bias: Where the gate's bias starts.
    """

    def __init__(
        self,
        transform: nn.Module,
        gate: Any,
        carry: nn.Module,
        *,
        activation: str,
        gate_bias: float,
    ) -> None:
        super().__init__()
        self.transform, self.gate, self.carry = transform, gate, carry
        self.activation = make_activation(activation)
        gate.initial_bias = gate_bias  # read by the initialisation, which writes all weights

    def forward(self, x: Tensor) -> Tensor:
        opened = torch.sigmoid(self.gate(x))
        carried = self.carry(x)
        return carried + opened * (self.activation(self.transform(x)) - carried)


class HighwayMLP(Network):
    """Fully connected: a plain layer, ``depth - 1`` highway layers, a classifier.

    As the paper's figure 1 counts depth, with its width of 50.
    """

    def __init__(
        self,
        *,
        depth: int,
        num_classes: int,
        in_channels: int = 3,
        image_size: int = 32,
        width: int = 50,
        gate_bias: float = -1.0,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.first = nn.Linear(in_channels * image_size**2, width)
        self.activation = make_activation(activation)
        self.layers = nn.Sequential(
            *(
                HighwayLayer(
                    nn.Linear(width, width),
                    nn.Linear(width, width),
                    nn.Identity(),
                    activation=activation,
                    gate_bias=gate_bias,
                )
                for _ in range(depth - 1)
            )
        )
        self.fc = nn.Linear(width, num_classes)

    def classifier_layers(self) -> Iterator[nn.Module]:
        yield self.fc

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layers(self.activation(self.first(x.flatten(1)))))


class HighwayConvNet(Network):
    """Convolutional: a 3x3 stem, ``depth - 1`` highway layers in stages, a classifier.

    Where a stage begins, the carried input is subsampled and gets zero channels.
    """

    def __init__(
        self,
        *,
        depth: int,
        num_classes: int,
        in_channels: int = 3,
        widths: Sequence[int] = (16, 32, 64),
        gate_bias: float = -2.0,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, widths[0], 3, padding=1)
        self.activation = make_activation(activation)
        self.layers = nn.Sequential()
        channels, per_stage = widths[0], -(-(depth - 1) // len(widths))
        for i in range(depth - 1):
            width, begins = widths[i // per_stage], i > 0 and i % per_stage == 0
            stride = 2 if begins else 1
            self.layers.append(
                HighwayLayer(
                    nn.Conv2d(channels, width, 3, stride, 1),
                    nn.Conv2d(channels, width, 3, stride, 1),
                    Subsample(channels, width, stride) if begins else nn.Identity(),
                    activation=activation,
                    gate_bias=gate_bias,
                )
            )
            channels = width
        self.fc = nn.Linear(channels, num_classes)

    def classifier_layers(self) -> Iterator[nn.Module]:
        yield self.fc

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(self.activation(self.stem(x)))
        return self.fc(x.mean(dim=(2, 3)))
