"""Mixup and cutmix: a batch blended with a shuffled copy of itself. Images are [B, C, H, W]."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fixup_core.errors import UserError
from vision.data.batches import Batch, mix


class Mixed(NamedTuple):
    """A blended batch.

    Attributes:
        images: [B, C, H, W].
        labels: [B], of the first images.
        others: [B], of the images blended in.
        share: Of the first images, in 0..1.
    """

    images: Tensor
    labels: Tensor
    others: Tensor
    share: float

    def loss(self, logits: Tensor, label_smoothing: float) -> Tensor:
        """The mean cross-entropy, each label's by its share."""
        first = F.cross_entropy(logits, self.labels, label_smoothing=label_smoothing)
        if self.share == 1.0:
            return first
        other = F.cross_entropy(logits, self.others, label_smoothing=label_smoothing)
        return self.share * first + (1 - self.share) * other


def blend(batch: Batch, *, mixup: float, cutmix: float) -> Mixed:
    """Blend a batch by mixup (Zhang et al. 2018) or cutmix (Yun et al. 2019).

    The share is drawn from Beta(alpha, alpha) once for the batch. With both, each has every second
    batch, by chance. All draws follow the batch's seed.

    Differs: the partners are not drawn; neighbours in the batch, which is in random order, are each
    other's. So several processes blend what one would, as long as each has an even number.

    Args:
        batch: Prepared images.
        mixup: Alpha of mixup; 0: none.
        cutmix: Alpha of cutmix; 0: none.

    Raises:
        UserError: A negative alpha.
    """
    if mixup < 0 or cutmix < 0:
        raise UserError("mixup and cutmix are the alpha of a Beta distribution: 0 or above")
    images, labels = batch.images, batch.labels
    if mixup == 0 and cutmix == 0:
        return Mixed(images, labels, labels, 1.0)
    rng = np.random.default_rng(mix(batch.seed, 1))
    cuts = cutmix > 0 and (mixup == 0 or rng.random() < 0.5)
    alpha = cutmix if cuts else mixup
    share = float(rng.beta(alpha, alpha))
    partners = _neighbours(batch).to(images.device)
    if cuts:
        rows, columns = _box(images.shape[2:], share, rng)
        images = images.clone()
        images[:, :, rows, columns] = batch.images[partners][:, :, rows, columns]
        area = (rows.stop - rows.start) * (columns.stop - columns.start)
        share = 1 - area / math.prod(images.shape[2:])
    else:
        images = share * images + (1 - share) * images[partners]
    return Mixed(images, labels, labels[partners], share)


def _neighbours(batch: Batch) -> Tensor:
    """For each image the place of its partner; one whose partner is not there is its own."""
    places = torch.arange(len(batch.labels)) + batch.first
    partners = (places ^ 1) - batch.first
    there = (partners >= 0) & (partners < len(places))
    return torch.where(there, partners, places - batch.first)


def _box(size: torch.Size, share: float, rng: np.random.Generator) -> tuple[slice, slice]:
    """A box of ``1 - share`` of the image around a random centre, cut off at the edges."""
    sides = []
    for length in size:
        half = length * math.sqrt(1 - share) / 2
        centre = rng.integers(length)
        sides.append(slice(max(0, round(centre - half)), min(length, round(centre + half))))
    return sides[0], sides[1]
