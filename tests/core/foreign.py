"""Networks as other people write them: with normalisation, and without a word of Fixup."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PreActivation(nn.Module):
    """Convolutions behind GroupNorm and SiLU; squeeze-and-excite; additions written in a loop."""

    def __init__(self, depth: int = 4, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norms = nn.ModuleList(nn.GroupNorm(4, width) for _ in range(2 * depth))
        self.convs = nn.ModuleList(
            nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2 * depth)
        )
        self.squeeze = nn.ModuleList(nn.Linear(width, 4) for _ in range(depth))
        self.excite = nn.ModuleList(nn.Linear(4, width) for _ in range(depth))
        self.norm, self.fc = nn.BatchNorm2d(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for i, (squeeze, excite) in enumerate(zip(self.squeeze, self.excite, strict=True)):
            h = self.convs[2 * i](F.silu(self.norms[2 * i](x)))
            h = self.convs[2 * i + 1](F.silu(self.norms[2 * i + 1](h)))
            gate = torch.sigmoid(excite(F.relu(squeeze(h.mean((2, 3))))))
            x = x + h * gate[:, :, None, None]
        return self.fc(F.relu(self.norm(x)).mean((2, 3)))


class Separable(nn.Module):
    """Depthwise, grouped and transposed convolutions, a projection, an activation in place."""

    def __init__(self, depth: int = 3, width: int = 16, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 4, stride=4), nn.BatchNorm2d(width))
        self.blocks = nn.ModuleList(SeparableBlock(width) for _ in range(depth))
        self.head = nn.Sequential(nn.InstanceNorm2d(width, affine=True), nn.Flatten())
        self.out = nn.Linear(64 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        return self.out(self.head(x))


class SeparableBlock(nn.Module):
    """Down by a depthwise convolution and up again by a transposed one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(width, width, 2, stride=2, groups=width)
        self.mix = nn.Conv2d(width, 2 * width, 1, groups=4)
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.norm1, self.norm2 = nn.BatchNorm2d(2 * width), nn.BatchNorm2d(width)
        self.project = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(self.mix(self.down(x))), inplace=True)
        h = self.norm2(self.up(h))
        h += self.project(x)
        return F.relu(h, inplace=True)


class GatedMlp(nn.Module):
    """RMSNorm, a gated feed-forward and attention written by hand, on pieces of an image."""

    def __init__(self, depth: int = 3, width: int = 32, heads: int = 4, classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, stride=8)
        self.positions = nn.Parameter(0.02 * torch.randn(16, width))
        self.layers = nn.ModuleList(GatedLayer(width, heads) for _ in range(depth))
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x).mean(dim=1))


class GatedLayer(nn.Module):
    """Softmax attention by matrix products; a product of two linear layers."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.gate = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for project in (self.q, self.k, self.v)
        )
        weights = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1)
        return self.o((weights @ v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Tied(nn.Module):
    """A language model whose output shares the embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.fc1, self.fc2 = nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm, self.out = nn.LayerNorm(8), nn.Linear(8, 11, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, words: Tensor) -> Tensor:
        x = self.embed(words)
        return self.out(x + self.fc2(F.gelu(self.fc1(self.norm(x)))))
