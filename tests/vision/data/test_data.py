"""Data modules: splits, image trees in folders and archives, and what is wrong with them."""

from __future__ import annotations

import pickle
import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fixup_core.errors import UserError
from vision.data import CIFAR10, Digits, ImageFolderData, TensorData, sources

CIFAR_ARCHIVE = Path(__file__).parents[4] / "shared" / "data" / "cifar10-jpeg.tar.xz"


def _write_tree(root: Path, size: int = 8) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 3)):
        for label in ("cat", "dog"):
            folder = root / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.png")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    _write_tree(tmp_path / "tree")
    return tmp_path / "tree"


@pytest.fixture
def archive(tree: Path) -> Path:
    file = tree.parent / "tree.tar.xz"
    with tarfile.open(file, "w:xz") as tar:
        for split in ("train", "test"):
            tar.add(tree / split, split)
    return file


def test_the_digits_are_split_into_three_that_share_no_image() -> None:
    data = Digits()
    data.setup("fit"), data.setup("test")
    train, val, test = (data.parts[part] for part in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (1148, 200, 449) and data.num_classes == 10
    keys = [{image.numpy().tobytes() for image in part.images} for part in (train, val, test)]
    assert not keys[0] & keys[1] and not keys[0] & keys[2] and not keys[1] & keys[2]
    again = Digits()
    again.setup("fit")
    assert again.parts["val"].images.equal(val.images)
    other = Digits(seed=1)
    other.setup("fit")
    assert not other.parts["val"].images.equal(val.images)


def test_the_test_set_is_not_read_for_training(monkeypatch) -> None:
    read = []
    monkeypatch.setattr(sources, "digits", lambda train: read.append(train) or _few())
    Digits(val_size=2).setup("fit")
    assert read == [True]


def _few() -> sources.Images:
    return sources.Images(torch.zeros(8, 1, 8, 8).byte(), torch.arange(8) % 2, ("a", "b"))


def test_a_folder_and_an_archive_of_it_are_packed_into_the_same_tensor(
    tree: Path, archive: Path, tmp_path: Path
) -> None:
    for split, count in (("train", 12), ("test", 6)):
        folder = sources.packed(tree, split, tmp_path / "cache")
        packed = sources.packed(archive, split, tmp_path / "cache")
        assert folder.images.shape == (count, 3, 8, 8) and folder.classes == ("cat", "dog")
        assert folder.labels.tolist() == [0] * (count // 2) + [1] * (count // 2)
        assert folder.images.equal(packed.images) and folder.labels.equal(packed.labels)
    first = np.asarray(Image.open(tree / "train" / "cat" / "0.png"))
    assert np.array_equal(packed.images.new_tensor(first).permute(2, 0, 1), _first(tree, tmp_path))


def _first(tree: Path, tmp_path: Path) -> torch.Tensor:
    return sources.packed(tree, "train", tmp_path / "cache").images[0]


def test_packing_is_done_once_and_anew_when_the_archive_changes(
    archive: Path, tmp_path: Path, monkeypatch
) -> None:
    cache = tmp_path / "cache"
    before = sources.packed(archive, "train", cache)
    with monkeypatch.context() as patch:
        patch.setattr(sources, "_decode", lambda *_: pytest.fail("decoded twice"))
        assert sources.packed(archive, "train", cache).images.equal(before.images)
    with tarfile.open(archive, "w:xz") as tar:
        other = tmp_path / "other"
        _write_tree(other, size=4)
        tar.add(other / "train", "train")
    assert sources.packed(archive, "train", cache).images.shape == (12, 3, 4, 4)


def test_cifar10_reads_a_tree(archive: Path, tmp_path: Path) -> None:
    data = CIFAR10(root=archive, val_size=4, batch_size=4, cache=tmp_path / "cache")
    data.prepare_data(), data.setup("fit")
    assert len(data.parts["train"]) == 8 and len(data.train_dataloader()) == 2
    batch = next(iter(data.val_dataloader()))
    images = data.on_after_batch_transfer(batch, 0).images
    assert images.dtype == torch.float32 and images.shape == (4, 3, 8, 8)


def test_the_same_tree_through_worker_processes(archive: Path, tmp_path: Path) -> None:
    data = ImageFolderData(
        archive, batch_size=4, val_size=2, image_size=8, workers=2, cache=tmp_path / "cache"
    )
    data.prepare_data(), data.setup("fit"), data.setup("test")
    assert data.num_classes == 2
    first, again = ([b.images for b in data.train_dataloader()] for _ in range(2))
    assert len(first) == 2 and first[0].shape == (4, 3, 8, 8)
    for a, b in zip(first, again, strict=True):  # random crops, but of seed and epoch
        torch.testing.assert_close(a, b)
    assert sum(len(b.labels) for b in data.test_dataloader()) == 6


def test_workers_crop_otherwise_in_another_epoch(tree: Path) -> None:
    data = ImageFolderData(tree, batch_size=10, val_size=2, image_size=8, workers=0)
    data.setup("fit")
    loader = data.train_dataloader()
    batches = []
    loader.sampler.shuffle = False
    for _ in range(2):
        batches.append(next(iter(loader)))
    assert batches[0].labels.equal(batches[1].labels)
    assert not batches[0].images.equal(batches[1].images)


def _corrupt(tree: Path) -> None:
    (tree / "train" / "dog" / "3.png").write_bytes(b"no image")


@pytest.mark.parametrize("kind", ["packed", "folder"])
def test_a_corrupt_image_is_named_and_left_out_on_request(
    kind: str, tree: Path, tmp_path: Path
) -> None:
    _corrupt(tree)

    def count(skip: bool) -> int:
        if kind == "packed":
            return len(sources.packed(tree, "train", tmp_path / "c", skip_corrupt=skip))
        data = ImageFolderData(
            tree, batch_size=4, val_size=1, image_size=8, workers=0, skip_corrupt=skip
        )
        data.setup("fit")
        loaders = (data.train_dataloader(), data.val_dataloader())
        loaders[0].sampler.drop_last = False
        return sum(len(batch.labels) for loader in loaders for batch in loader)

    with pytest.raises(UserError, match=r"dog/3\.png is not an image"):
        count(skip=False)
    assert count(skip=True) == 11


def test_what_is_wrong_with_a_folder_is_told(tree: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(UserError, match="has no images in val/"):
        sources.packed(tree, "val", cache)
    Image.new("RGB", (5, 5)).save(tree / "test" / "cat" / "9.png")
    with pytest.raises(UserError, match="differ in size"):
        sources.packed(tree, "test", cache)
    for file in (tree / "train" / "dog").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="no images of the class dog"):
        sources.packed(tree, "train", cache)
    folder = ImageFolderData(tree, val_size=1)
    with pytest.raises(UserError, match="dog"):
        folder.setup("fit")
    with pytest.raises(UserError, match="does not exist"):
        ImageFolderData(tmp_path / "nowhere").setup("fit")
    shutil.rmtree(tree / "train")
    with pytest.raises(UserError, match="is no tree"):
        ImageFolderData(tree).setup("fit")


def test_a_missing_or_damaged_source_is_told(tmp_path: Path) -> None:
    data = CIFAR10(root=tmp_path / "nowhere", download=False)
    with pytest.raises(UserError, match="holds neither torchvision's files nor"):
        data.setup("fit")
    broken = tmp_path / "broken.tar.xz"
    broken.write_bytes(b"nothing")
    with pytest.raises(UserError, match="is not a tar archive, or is damaged"):
        sources.packed(broken, "train", tmp_path)
    with pytest.raises(UserError, match="take a number from 1 to 1347"):
        Digits(val_size=5000).setup("fit")


def test_a_changed_file_packs_the_folder_anew(tree: Path, tmp_path: Path) -> None:
    before = sources.packed(tree, "train", tmp_path / "cache")
    file = tree / "train" / "cat" / "0.png"
    size = (before.images.size(3), before.images.size(2))
    Image.new("RGB", size, (1, 2, 3)).save(file)
    after = sources.packed(tree, "train", tmp_path / "cache")
    assert not torch.equal(before.images, after.images)


def test_workers_may_be_spawned(tree: Path) -> None:
    data = ImageFolderData(tree, batch_size=4, val_size=1, image_size=8, workers=0)
    data.setup("fit")
    source = data.train_dataloader().source
    assert len(pickle.loads(pickle.dumps(source.dataset))) == len(source.dataset)
    assert data.parts["val"].dataset.transform is data.test_transform
    assert data.parts["train"].dataset.transform is data.train_transform


def test_several_processes_want_a_whole_batch() -> None:
    data = Digits(batch_size=64, train_size=32)
    data.setup("fit")
    assert len(data.train_dataloader()) == 1
    data.trainer = SimpleNamespace(world_size=2, global_rank=0, limit_train_batches=1.0)
    with pytest.raises(UserError, match="32 images do not fill one batch of 64"):
        data.train_dataloader()


def test_load_is_what_a_data_set_brings() -> None:
    with pytest.raises(NotImplementedError):
        TensorData(4, 1, 0, Digits().pixels).load(train=True)


@pytest.mark.slow
@pytest.mark.skipif(not CIFAR_ARCHIVE.exists(), reason=f"{CIFAR_ARCHIVE} is not here")
def test_all_of_cifar10_is_read(tmp_path: Path) -> None:
    data = CIFAR10(root=CIFAR_ARCHIVE, cache=tmp_path)
    data.prepare_data(), data.setup("fit"), data.setup("test")
    assert [len(data.parts[part]) for part in ("train", "val", "test")] == [45000, 5000, 10000]
    mean = data.pixels.normalise(data.parts["train"].images[:5000]).mean().item()
    assert abs(mean) < 0.05
