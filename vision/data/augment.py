"""Augmentation of a whole batch at a time, on the device where it is. Images are [B, C, H, W].

Random numbers are drawn for the batch of all processes together, so that each image meets the same
fate whoever works on it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fixup_core.errors import UserError
from vision.data.batches import Batch


@dataclass(frozen=True)
class Pixels:
    """From bytes to the network's input.

    Attributes:
        mean: Of each channel, in 0..1.
        std: Of each channel, in 0..1.
        crop: In training, pad by this many black pixels on each side and cut the old size out at
            random.
        flip: In training, mirror half of the images.
        cutout: In training, the side of the square that is set to the mean (DeVries and Taylor
            2017); 0: none. Its centre may lie anywhere in the image: it can hang over the edge.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: int = 0
    flip: bool = False
    cutout: int = 0

    def __post_init__(self) -> None:
        for name in ("crop", "cutout"):
            if getattr(self, name) < 0:
                raise UserError(
                    f"--data.{name} is {getattr(self, name)}: take a number from 0 upwards"
                )

    def train(self, batch: Batch) -> Tensor:
        """Augmented and normalised images [B, C, H, W] of a batch of bytes."""
        generator, part = batch.generator(), slice(batch.first, batch.first + len(batch.images))
        images = batch.images

        def draw(high: int) -> Tensor:
            whole = torch.randint(high, (batch.total,), generator=generator)
            return whole[part].to(images.device)

        if self.crop:
            images = _crop(images, self.crop, draw(2 * self.crop + 1), draw(2 * self.crop + 1))
        if self.flip:
            images = torch.where(draw(2)[:, None, None, None] == 1, images.flip(3), images)
        images = self.normalise(images)
        if self.cutout:
            images = _cutout(images, self.cutout, draw(images.size(2)), draw(images.size(3)))
        return images

    def normalise(self, images: Tensor) -> Tensor:
        """Uint8 [B, C, H, W] to float32 of mean 0 and standard deviation 1."""
        offset, scale = (
            255 * torch.tensor(values, device=images.device).view(1, -1, 1, 1)
            for values in (self.mean, self.std)
        )
        return (images.float() - offset) / scale


def _crop(images: Tensor, pad: int, top: Tensor, left: Tensor) -> Tensor:
    height, width = images.shape[2:]
    padded = F.pad(images, (pad, pad, pad, pad))
    rows = top[:, None] + torch.arange(height, device=images.device)
    columns = left[:, None] + torch.arange(width, device=images.device)
    number = torch.arange(len(images), device=images.device)[:, None, None]
    # Advanced indices first, channels last: [B, H, W, C].
    cut = padded.permute(0, 2, 3, 1)[number, rows[:, :, None], columns[:, None, :]]
    return cut.permute(0, 3, 1, 2)


def _cutout(images: Tensor, side: int, row: Tensor, column: Tensor) -> Tensor:
    height, width = images.shape[2:]

    def inside(centre: Tensor, size: int) -> Tensor:
        start = centre[:, None] - side // 2
        position = torch.arange(size, device=images.device)
        return (position >= start) & (position < start + side)

    hidden = inside(row, height)[:, None, :, None] & inside(column, width)[:, None, None, :]
    return images.masked_fill(hidden, 0.0)
