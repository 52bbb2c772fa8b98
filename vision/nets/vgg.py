"""VGG networks (Simonyan and Zisserman 2015, table 1, columns A, B, D and E): [B, C, H, W].

Differs: what enters the linear layers is averaged to 7x7 as in torchvision, so that images may have
any size from 32 on; with a method that has norms these stand behind the convolutions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from torch import Tensor, nn

from vision.nets.design import Design, check_design
from vision.nets.network import Network, before_activation

WIDTHS = (64, 128, 256, 512, 512)
GRID = 7
HIDDEN = 4096


class VGG(Network):
    """Stages of 3x3 convolutions, each with a pooling behind it, then three linear layers.

    Args:
        design: Its method, activation and dropout, which lies on the linear layers.
        counts: Convolutions of each stage.
        num_classes: Of the classifier.
        in_channels: Of the images.
    """

    def __init__(
        self, design: Design, *, counts: Sequence[int], num_classes: int, in_channels: int = 3
    ) -> None:
        super().__init__()
        check_design(design)
        self.stages = nn.Sequential()
        channels = in_channels
        for count, width in zip(counts, WIDTHS, strict=True):
            self.stages.append(_stage(design, count, channels, width))
            channels = width
        self.pool = nn.AdaptiveAvgPool2d(GRID)
        self.hidden = nn.Sequential()
        for inputs, outputs in pairwise((channels * GRID**2, HIDDEN, HIDDEN)):
            dropout = nn.Dropout(design.dropout)
            self.hidden.extend([nn.Linear(inputs, outputs), design.make_activation(), dropout])
        self.fc = nn.Linear(HIDDEN, num_classes)

    def classifier_layers(self) -> Iterator[nn.Module]:
        yield self.fc

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.hidden(self.pool(self.stages(x)).flatten(1)))


def _stage(design: Design, count: int, inputs: int, width: int) -> nn.Sequential:
    stage = nn.Sequential()
    for channels in (inputs, *[width] * (count - 1)):
        # Biases whatever the method: the authors' networks and torchvision's have them.
        conv = nn.Conv2d(channels, width, 3, padding=1)
        stage.extend([conv, before_activation(design.method, width), design.make_activation()])
    stage.append(nn.MaxPool2d(2))
    return stage
