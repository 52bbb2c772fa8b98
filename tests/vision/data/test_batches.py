"""Batches: every image once, the same for any number of processes and after any interruption."""

from __future__ import annotations

from itertools import chain

import pytest
import torch

from fixup_core.errors import UserError
from vision.data.augment import Pixels
from vision.data.batches import Batch, BatchOrder, Loader, TensorSource, balanced, mix
from vision.training.mixing import blend

IMAGES = torch.arange(20, dtype=torch.uint8).view(20, 1, 1, 1).expand(20, 1, 4, 4).contiguous()
LABELS = torch.arange(20)
UNEVEN = torch.tensor([0] * 2 + [1] * 13 + [4] * 5)


def _loader(batch_size: int = 6, **options) -> Loader:
    order = BatchOrder(20, batch_size, seed=3, **options)
    return Loader(order, TensorSource(IMAGES, LABELS, order))


def _labels(loader: Loader) -> list[list[int]]:
    """Of the next epoch."""
    return [batch.labels.tolist() for batch in loader]


def _epochs(count: int, **options) -> list[list[list[int]]]:
    loader = _loader(**options)
    return [_labels(loader) for _ in range(count)]


def test_an_epoch_has_every_image_once_and_another_epoch_another_order() -> None:
    first, second = _epochs(2)
    assert [len(batch) for batch in first] == [6, 6, 6, 2] and len(_loader()) == 4
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(20))
    assert first != second and first == _labels(_loader())
    assert _labels(_loader(shuffle=False))[0] == [0, 1, 2, 3, 4, 5]
    assert [len(batch) for batch in _labels(_loader(drop_last=True))] == [6, 6, 6]


@pytest.mark.parametrize("more", [{}, {"labels": UNEVEN}], ids=["plain", "balanced"])
@pytest.mark.parametrize("world_size", [2, 3, 6])
def test_processes_share_the_batches_of_one(world_size: int, more) -> None:
    whole = list(_loader(**more))
    ranks = [list(_loader(rank=r, world_size=world_size, **more)) for r in range(world_size)]
    for number, batch in enumerate(whole):
        parts = [rank[number] for rank in ranks]
        assert torch.cat([part.labels for part in parts]).equal(batch.labels)
        assert {(part.seed, part.total) for part in parts} == {(batch.seed, batch.total)}
        firsts = torch.tensor([0, *(len(part.labels) for part in parts[:-1])]).cumsum(0)
        assert [part.first for part in parts] == firsts.tolist()


def test_a_balanced_order_repeats_rare_images_evenly() -> None:
    numbers = balanced(UNEVEN, torch.Generator().manual_seed(0))
    assert len(numbers.unique()) == len(numbers) == 20, "each visit has a number of its own"
    images = numbers % 20
    counts = UNEVEN[images].bincount(minlength=5)
    assert counts[[0, 1, 4]].min() >= 6 and counts.sum() == 20
    visits = images.bincount(minlength=20)
    assert visits[:2].tolist() in ([3, 3], [3, 4], [4, 3]) and visits[2:15].max() == 1
    assert not numbers.equal(balanced(UNEVEN, torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("labels", [None, UNEVEN], ids=["plain", "balanced"])
@pytest.mark.parametrize("done", [1, 3])
def test_a_loader_goes_on_in_the_middle_of_an_epoch(done: int, labels) -> None:
    loader = _loader(labels=labels)
    _labels(loader), _labels(loader)
    batches = iter(loader)
    seen = [next(batches) for _ in range(done)]
    resumed = _loader(labels=labels)
    resumed.load_state_dict(loader.state_dict())
    iter(resumed)  # nothing is taken: it counts for nothing
    *_, whole, following = _epochs(4, labels=labels)
    assert [batch.labels.tolist() for batch in seen] + _labels(resumed) == whole
    assert _labels(resumed) == following


def test_the_state_at_the_end_of_an_epoch_starts_the_next() -> None:
    loader = _loader()
    _labels(loader)
    resumed = _loader()
    resumed.load_state_dict(loader.state_dict())
    assert _labels(resumed) == _epochs(2)[1]


def test_a_run_that_goes_on_with_an_epoch_is_told_its_number() -> None:
    loader = _loader()
    loader.sampler.set_epoch(2)
    *_, third, fourth = _epochs(4)
    assert _labels(loader) == third
    loader.sampler.set_epoch(7)
    assert _labels(loader) == fourth


def test_an_epoch_ends_at_the_limit() -> None:
    loader, resumed = _loader(), _loader()
    loader.limit = resumed.limit = 2
    batches = iter(loader)
    next(batches), next(batches)
    resumed.load_state_dict(loader.state_dict())
    assert _labels(resumed) == _epochs(2)[1]


def test_what_cannot_be_shared_out_is_told() -> None:
    with pytest.raises(UserError, match="no images"):
        BatchOrder(0, 4)
    with pytest.raises(UserError, match="a batch of 2 cannot be shared by 3 processes"):
        BatchOrder(10, 2, world_size=3)
    with pytest.raises(UserError, match="3 images do not fill"):
        BatchOrder(3, 4, drop_last=True)


def test_seeds_differ_in_every_number() -> None:
    seeds = {mix(a, b, c) for a in range(10) for b in range(10) for c in range(10)}
    assert len(seeds) == 1000 and min(seeds) >= 0 and max(seeds) < 2**63


def _batch(images: torch.Tensor, seed: int = 5, first: int = 0, total: int | None = None) -> Batch:
    labels = torch.arange(len(images))
    return Batch(images, labels, seed, first, total or len(images))


PHOTO = torch.randint(1, 256, (12, 3, 8, 8), generator=torch.Generator().manual_seed(0)).byte()
PLAIN = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}


def test_normalise_is_the_formula() -> None:
    out = Pixels(**PLAIN).normalise(PHOTO)
    torch.testing.assert_close(out[:, 1], (PHOTO[:, 1] / 255 - 0.4) / 0.3)


def test_an_image_meets_the_same_fate_on_any_process() -> None:
    pixels = Pixels(**PLAIN, crop=2, flip=True, cutout=4)
    whole = pixels.train(_batch(PHOTO))
    halves = [pixels.train(_batch(PHOTO[a : a + 6], 5, a, 12)) for a in (0, 6)]
    torch.testing.assert_close(torch.cat(halves), whole)
    assert not torch.equal(pixels.train(_batch(PHOTO, seed=6)), whole)


def test_a_crop_is_a_shifted_image_with_black_edges() -> None:
    pixels = Pixels((0.0,) * 3, (1 / 255,) * 3, crop=1)
    out = pixels.train(_batch(PHOTO))
    padded = torch.nn.functional.pad(PHOTO, (1, 1, 1, 1)).float()
    shifts = []
    for image, frame in zip(out, padded, strict=True):
        fits = [
            (y, x)
            for y in range(3)
            for x in range(3)
            if torch.equal(image, frame[:, y : y + 8, x : x + 8])
        ]
        assert len(fits) == 1
        shifts += fits
    assert len(set(shifts)) > 3


def test_flips_and_cutout() -> None:
    flipped = Pixels((0.0,) * 3, (1 / 255,) * 3, flip=True).train(_batch(PHOTO))
    turned = [torch.equal(o, p.flip(2).float()) for o, p in zip(flipped, PHOTO, strict=True)]
    same = [torch.equal(o, p.float()) for o, p in zip(flipped, PHOTO, strict=True)]
    assert all(a != b for a, b in zip(turned, same, strict=True)) and 0 < sum(turned) < 12
    cut = Pixels((0.0,) * 3, (1 / 255,) * 3, cutout=4).train(_batch(PHOTO))
    holes = (cut == 0).all(dim=1).flatten(1).sum(dim=1)
    assert holes.max() == 16 and holes.min() >= 4  # it may hang over the edge


def test_mixup_blends_images_and_losses_by_the_same_share() -> None:
    batch = _batch(PHOTO.float())
    mixed = blend(batch, mixup=0.7, cutmix=0.0)
    partners = mixed.others
    expected = mixed.share * batch.images + (1 - mixed.share) * batch.images[partners]
    torch.testing.assert_close(mixed.images, expected)
    logits = torch.randn(12, 12)
    log = logits.log_softmax(1)
    first, other = (-log[torch.arange(12), y].mean() for y in (mixed.labels, partners))
    torch.testing.assert_close(
        mixed.loss(logits, 0.0), mixed.share * first + (1 - mixed.share) * other
    )


def test_cutmix_pastes_a_box_of_the_share() -> None:
    shares = []
    for seed in range(20):
        batch = _batch(PHOTO.float(), seed)
        mixed = blend(batch, mixup=0.0, cutmix=1.0)
        pasted = (mixed.images != batch.images).any(dim=1)
        assert set(mixed.images.unique().tolist()) <= set(batch.images.unique().tolist())
        different = mixed.others != mixed.labels
        assert pasted[different].float().mean().item() == pytest.approx(1 - mixed.share, abs=0.02)
        shares.append(mixed.share)
    assert min(shares) < 0.4 and max(shares) > 0.6


def test_without_an_alpha_nothing_is_blended() -> None:
    batch = _batch(PHOTO.float())
    assert blend(batch, mixup=0.0, cutmix=0.0).images is batch.images
    with pytest.raises(UserError, match="0 or above"):
        blend(batch, mixup=-1.0, cutmix=0.0)
