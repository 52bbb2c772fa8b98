"""Batches whose order and randomness depend on seed, epoch and position alone.

So a run that goes on from the middle of an epoch sees what an uninterrupted one sees, and several
processes see the batches that one process would, each its own part.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from fixup_core.errors import UserError

logger = logging.getLogger(__name__)


class Batch(NamedTuple):
    """What a loader yields.

    Attributes:
        images: [B, C, H, W], uint8 or float.
        labels: [B], int64.
        seed: Of everything random that is done with the batch.
        first: Position of the first image in the batch of all processes together.
        total: Images in the batch of all processes together.
    """

    images: Tensor
    labels: Tensor
    seed: int
    first: int
    total: int

    def generator(self) -> Generator:
        """A source of random numbers, on the CPU, that is the same in all processes."""
        return torch.Generator().manual_seed(self.seed)


def as_batch(given: Any, seed: int = 0) -> Batch:
    """A batch as it is, or the (images, labels) of a data module of the user's own.

    Args:
        given: From a loader; images alone have no labels.
        seed: Of everything random, where ``given`` has none.

    Raises:
        UserError: It is something else.
    """
    if isinstance(given, Batch):
        return given
    images, labels = (given, None) if isinstance(given, Tensor) else (*given, None)[:2]
    if not isinstance(images, Tensor):
        raise UserError("the loaders of your data module must yield (images, labels)")
    if labels is None:
        labels = torch.zeros(len(images), dtype=torch.long, device=images.device)
    return Batch(images, labels, seed, 0, len(images))


def mix(*numbers: int) -> int:
    """One seed below 2^63 from several numbers (splitmix64's finaliser, number by number)."""
    state, mask = 0, 2**64 - 1
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state >> 1


def balanced(labels: Tensor, generator: Generator) -> Tensor:
    """An order in which every class has the same share: rare images come several times.

    Each image of a class comes once before any of them comes again, in a random order.

    Args:
        labels: int64 [N].
        generator: Of the randomness.

    Returns:
        int64 [N], numbers of images; the second visit to image i is i + N, the third i + 2 N.
    """
    size, order = len(labels), torch.randperm(len(labels), generator=generator)
    classes, counts = labels.unique(return_counts=True)
    each = torch.arange(-(-size // len(classes)))
    by_class = order[labels[order].argsort(stable=True)].split(counts.tolist())
    visits = [images[each % len(images)] + each // len(images) * size for images in by_class]
    mixed = torch.randperm(len(classes) * len(each), generator=generator)[:size]
    return torch.cat(visits)[mixed]


class BatchOrder(Sampler[list[int]]):
    """Which images make up which batch, on this process.

    A number it yields stands for the image of that number modulo ``size``: see ``balanced``.

    Args:
        size: Number of images.
        batch_size: Of all processes together.
        seed: Of the order.
        shuffle: Another order every epoch; else the order of the data.
        labels: Of the images, if a shuffled epoch is to have as many of each class.
        drop_last: Leave an incomplete last batch out.
        rank: Of this process.
        world_size: Number of processes. Of an incomplete last batch the first processes may get
            one image more, and the last ones none.

    Raises:
        UserError: A batch size that the processes cannot share, or no image.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        labels: Tensor | None = None,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if size < 1:
            raise UserError("there are no images")
        if batch_size < 1:
            raise UserError(f"--data.batch_size is {batch_size}: take 1 or more")
        if batch_size % world_size:
            raise UserError(
                f"a batch of {batch_size} cannot be shared by {world_size} processes: make "
                "--data.batch_size a multiple of their number"
            )
        if drop_last and size < batch_size:
            raise UserError(f"{size} images do not fill one batch of {batch_size}")
        self.size, self.batch_size, self.seed, self.shuffle = size, batch_size, seed, shuffle
        self.drop_last, self.rank, self.world_size = drop_last, rank, world_size
        self.labels = labels
        self.epoch = 0
        self.start = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before every epoch; ``Loader`` heeds the first call alone."""
        self.epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(self.size, self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def seed_of(self, number: int) -> int:
        """The seed of batch ``number`` of this epoch."""
        return mix(self.seed, self.epoch, number)

    def part(self, number: int) -> tuple[int, int, int]:
        """First and end position of this process's images in batch ``number``, and its size."""
        total = min(self.batch_size, self.size - number * self.batch_size)
        each, more = divmod(total, self.world_size)
        first = self.rank * each + min(self.rank, more)
        return first, first + each + (self.rank < more), total

    def __iter__(self) -> Iterator[list[int]]:
        start, self.start = self.start, 0
        order = self._epoch_order()
        for number in range(start, len(self)):
            first, end, _ = self.part(number)
            base = number * self.batch_size
            yield order[base + first : base + end].tolist()

    def _epoch_order(self) -> Tensor:
        if not self.shuffle:
            return torch.arange(self.size)
        generator = torch.Generator().manual_seed(mix(self.seed, self.epoch))
        if self.labels is not None:
            return balanced(self.labels, generator)
        return torch.randperm(self.size, generator=generator)


class Loader:
    """Yields ``Batch`` after ``Batch``; its state is the epoch and the number of the next batch.

    It counts the epochs itself, those that yield something. Lightning says where to begin: by a
    saved state, or, at the beginning of an epoch, by its number alone. (Going on with a run that is
    limited in steps, Lightning counts the epoch that was finished twice.)

    Args:
        order: Which images make up which batch.
        source: Anything that iterates over (images, labels) in that order.
        limit: So many batches of an epoch are asked for; all by default.
    """

    def __init__(self, order: BatchOrder, source: Any, limit: int | None = None) -> None:
        self.sampler, self.batch_sampler = order, None  # Lightning looks for them
        self.source = source
        self.limit = len(order) if limit is None else limit
        self.epoch, self.next, self.resumed = -1, 0, False

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[Batch]:
        order = self.sampler
        if not self.resumed:
            self.epoch, self.next = order.epoch if self.epoch < 0 else self.epoch + 1, 0
        self.resumed, number = False, self.next
        order.epoch, order.start = self.epoch, number
        for images, labels in self.source:
            self.next = number + 1
            first, _, total = order.part(number)
            yield Batch(images, labels, order.seed_of(number), first, total)
            number += 1

    def state_dict(self) -> dict[str, int]:
        """Where the run is: saved with a checkpoint."""
        return {"epoch": self.epoch, "next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Let the next iteration begin at the saved batch, or with the epoch after it."""
        self.epoch, self.next = state["epoch"], state["next"]
        self.resumed = 0 < self.next < self.limit


class TensorSource:
    """Cuts batches out of tensors that lie in memory.

    Args:
        images: uint8 [N, C, H, W].
        labels: int64 [N].
        order: Which images make up which batch.
    """

    def __init__(self, images: Tensor, labels: Tensor, order: BatchOrder) -> None:
        self.images, self.labels, self.order = images, labels, order

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for indices in self.order:
            chosen = torch.as_tensor(indices, dtype=torch.long) % len(self.labels)
            yield self.images[chosen], self.labels[chosen]


class Seeded(Dataset[Any]):
    """Makes the random transforms of a data set depend on seed, epoch and index alone.

    Another visit to an image has an index of its own, and transforms it otherwise.

    Args:
        dataset: Of (image, label) pairs.
        order: It knows seed and epoch.
        skip: An item that raises this error is left out of its batch.
    """

    def __init__(self, dataset: Any, order: BatchOrder, skip: type[Exception] | None) -> None:
        self.dataset, self.order = dataset, order
        self.skip = skip or ()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(mix(self.order.seed, self.order.epoch, index))
            try:
                return self.dataset[index % len(self.dataset)]
            except self.skip as error:
                logger.warning("left out: %s", error)
                return None


def _collate(items: list[Any]) -> Any:
    left = [item for item in items if item is not None]
    return default_collate(left) if left else (torch.empty(0), torch.empty(0, dtype=torch.long))


def workers_source(
    dataset: Any, order: BatchOrder, *, skip: type[Exception] | None = None, **options: Any
) -> DataLoader[Any]:
    """Worker processes that read and transform images, as a source for ``Loader``.

    Args:
        dataset: Of (image, label) pairs.
        order: Which images make up which batch.
        skip: An item that raises this error is left out of its batch, and the log says so.
        options: Of torch's ``DataLoader``. Workers start anew every epoch, which tells them its
            number.
    """
    seeded = Seeded(dataset, order, skip)
    return DataLoader(seeded, batch_sampler=order, collate_fn=_collate, **options)
