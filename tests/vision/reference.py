"""Fixup ResNets written plainly, with the parameter names of the authors' code."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def _scalar(value: float) -> nn.Parameter:
    return nn.Parameter(torch.full((1,), value))


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)


class _Basic(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int, project: bool) -> None:
        super().__init__()
        self.bias1a, self.bias1b, self.bias2a, self.bias2b = (_scalar(0.0) for _ in range(4))
        self.scale = _scalar(1.0)
        self.conv1, self.conv2 = _conv(inputs, width, 3, stride), _conv(width, width, 3)
        self.stride, self.grows = stride, width - inputs
        if project and (stride != 1 or self.grows):
            self.downsample = _conv(inputs, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        biased = x + self.bias1a
        out = F.relu(self.conv1(biased) + self.bias1b)
        out = self.conv2(out + self.bias2a) * self.scale + self.bias2b
        if hasattr(self, "downsample"):
            x = self.downsample(biased)
        elif self.stride != 1:
            small = F.avg_pool2d(biased, 1, self.stride)
            x = torch.cat((small, torch.zeros_like(small)), 1)
        return F.relu(out + x)


class _Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int, project: bool) -> None:
        super().__init__()
        for name in ("bias1a", "bias1b", "bias2a", "bias2b", "bias3a", "bias3b"):
            setattr(self, name, _scalar(0.0))
        self.scale = _scalar(1.0)
        self.conv1, self.conv2 = _conv(inputs, width, 1), _conv(width, width, 3, stride)
        self.conv3 = _conv(width, 4 * width, 1)
        if stride != 1 or inputs != 4 * width:
            self.downsample = _conv(inputs, 4 * width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        biased = x + self.bias1a
        out = F.relu(self.conv1(biased) + self.bias1b)
        out = F.relu(self.conv2(out + self.bias2a) + self.bias2b)
        out = self.conv3(out + self.bias3a) * self.scale + self.bias3b
        return F.relu(out + (self.downsample(biased) if hasattr(self, "downsample") else x))


class _Net(nn.Module):
    def __init__(self, block, counts, widths, num_classes: int, imagenet: bool) -> None:
        super().__init__()
        self.imagenet, channels = imagenet, widths[0]
        self.conv1 = (
            nn.Conv2d(3, channels, 7, 2, 3, bias=False) if imagenet else _conv(3, channels, 3)
        )
        self.bias1, self.bias2 = _scalar(0.0), _scalar(0.0)
        for stage, (count, width) in enumerate(zip(counts, widths, strict=True)):
            blocks = []
            for i in range(count):
                blocks.append(block(channels, width, 2 if stage and not i else 1, imagenet))
                channels = width * (4 if block is _Bottleneck else 1)
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.stages = len(counts)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x) + self.bias1)
        x = F.max_pool2d(x, 3, 2, 1) if self.imagenet else x
        for stage in range(self.stages):
            x = getattr(self, f"layer{stage + 1}")(x)
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1) + self.bias2)


def authors_cifar_resnet(count: int, num_classes: int) -> nn.Module:
    """ResNet-(6 count + 2)."""
    return _Net(_Basic, (count,) * 3, (16, 32, 64), num_classes, imagenet=False)


def authors_imagenet_resnet(depth: int, num_classes: int) -> nn.Module:
    """ResNet-18 or 50."""
    block, counts = {18: (_Basic, (2, 2, 2, 2)), 50: (_Bottleneck, (3, 4, 6, 3))}[depth]
    return _Net(block, counts, (64, 128, 256, 512), num_classes, imagenet=True)
