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
from vision.data import CIFAR10, Digits, ImageFolderData, TensorData, VisionData, sources, trees

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
    data.trainer = SimpleNamespace(
        world_size=2, global_rank=0, limit_train_batches=1.0, overfit_batches=0
    )
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


def _tree_of(root: Path, **classes: tuple[str, ...]) -> Path:
    """Four 8x8 images in every class of every split."""
    for split, labels in classes.items():
        for label in labels:
            (root / split / label).mkdir(parents=True)
            for i in range(4):
                colour = (60 * i, 40 * (ord(label[0]) - 97), 0)
                Image.new("RGB", (8, 8), colour).save(root / split / label / f"{i}.png")
    return root


def _modules(root: Path, cache: Path) -> list[VisionData]:
    return [
        CIFAR10(root=root, val_size=2, batch_size=4, cache=cache),
        ImageFolderData(root, val_size=2, batch_size=4, image_size=8, workers=0),
    ]


def _labels(data: VisionData, part: str) -> list[int]:
    return [label for batch in data.loader(part) for label in batch.labels.tolist()]


def test_a_test_set_is_numbered_by_the_training_classes(tmp_path: Path) -> None:
    tree = _tree_of(tmp_path / "t", train=("a", "b", "c"), test=("b", "c"))
    for data in _modules(tree, tmp_path / "cache"):
        data.setup("fit"), data.setup("test")
        assert data.classes == ("a", "b", "c")
        assert _labels(data, "test") == [1] * 4 + [2] * 4
    for data in _modules(tree, tmp_path / "cache"):  # as a checkpoint says it
        data.classes = ("c", "b", "a")
        data.setup("test")
        assert sorted(_labels(data, "test")) == [0] * 4 + [1] * 4 and data.num_classes == 3


@pytest.mark.parametrize("stage", ["fit", "test"])
@pytest.mark.parametrize("packed", [False, True], ids=["folder", "archive"])
def test_a_test_set_of_other_classes_is_refused(stage: str, packed: bool, tmp_path: Path) -> None:
    tree = _tree_of(tmp_path / "t", train=("a", "b", "c"), test=("b", "c", "d"))
    if packed:
        tree = Path(shutil.make_archive(str(tmp_path / "t"), "gztar", tree))
    for data in _modules(tree, tmp_path / "cache"):
        data.cache = tmp_path / "cache"
        with pytest.raises(UserError, match=r"images have .* \(d\); it has 3: a, b, c"):
            data.setup(stage)


def test_a_balanced_epoch_has_as_many_images_of_each_class(tmp_path: Path) -> None:
    tree = _tree_of(tmp_path / "t", train=("a", "b", "c"))
    for name in ("1.png", "2.png", "3.png"):
        (tree / "train" / "b" / name).unlink()
    options = {"batch_size": 3, "val_size": 1, "seed": 0, "balanced": True}
    for data in (
        CIFAR10(tree, cache=tmp_path / "cache", **options),
        ImageFolderData(tree, image_size=8, workers=0, **options),
    ):
        data.setup("fit")
        labels = data.labels(data.parts["train"])
        assert sorted(labels.bincount().tolist()) == [1, 3, 4], (
            "the seed leaves the one b to train on"
        )
        assert len(data.loader("train")) == 2
        seen = _labels(data, "train")
        assert max(np.bincount(seen, minlength=3)) <= 3 and 1 in seen
        assert len(_labels(data, "val")) == 1
        assert data.description()["balanced"]


def test_an_image_that_comes_twice_is_cropped_twice(tmp_path: Path) -> None:
    rng, folder = np.random.default_rng(0), tmp_path / "train"
    for label, count in (("a", 1), ("b", 9)):
        (folder / label).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / label / f"{i}.png")
    data = ImageFolderData(
        tmp_path, batch_size=9, val_size=1, image_size=8, workers=0, balanced=True
    )
    data.setup("fit")
    (batch,) = data.loader("train")
    rare = batch.images[batch.labels == 0]
    assert 4 <= len(rare) <= 5 and not torch.equal(rare[0], rare[1])


def test_val_is_the_validation_set_where_there_is_a_test_set_too(tmp_path: Path) -> None:
    tree = _tree_of(tmp_path / "t", train=("a", "b"), val=("b",), test=("a",))
    for data in _modules(tree, tmp_path / "cache"):
        data.setup("fit"), data.setup("test")
        assert _labels(data, "val") == [1] * 4 and len(data.parts["train"]) == 8
        assert _labels(data, "test") == [0] * 4
    shutil.rmtree(tree / "test")
    data = _modules(tree, tmp_path / "cache")[1]
    data.setup("fit"), data.setup("test")
    assert len(data.parts["val"]) == 2 and _labels(data, "test") == [1] * 4


def test_hidden_folders_and_files_are_no_part_of_a_tree(tmp_path: Path) -> None:
    tree = _tree_of(tmp_path / "t", train=("a", "b"))
    for folder in (tree / "train", tree / "train" / "a"):
        (folder / ".ipynb_checkpoints").mkdir()
        shutil.copy(tree / "train/a/0.png", folder / ".ipynb_checkpoints" / "0-checkpoint.png")
    for data in _modules(tree, tmp_path / "cache"):
        data.setup("fit")
        assert data.classes == ("a", "b") and len(data.parts["train"]) == 6


def test_a_folder_without_labels_can_be_predicted(tmp_path: Path) -> None:
    _tree_of(tmp_path, photos=("a", "b"))
    for data in _modules(tmp_path / "photos", tmp_path / "cache"):
        data.prepare_data() if isinstance(data, ImageFolderData) else None
        data.setup("predict")
        assert data.names[:2] == ("a/0.png", "a/1.png") and _labels(data, "predict") == [*range(8)]
        with pytest.raises(UserError):
            data.setup("fit")


def test_images_that_are_left_out_keep_the_numbers_of_the_others(tmp_path: Path) -> None:
    _tree_of(tmp_path, photos=("a",))
    (tmp_path / "photos/a/1.png").write_bytes(b"no image")
    for data in _modules(tmp_path / "photos", tmp_path / "cache"):
        data.skip_corrupt = True
        data.setup("predict")
        chosen = [data.names[number] for number in _labels(data, "predict")]
        assert chosen == ["a/0.png", "a/2.png", "a/3.png"]


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_an_archive_may_have_one_folder_at_its_top(kind: str, tree: Path, tmp_path: Path) -> None:
    file = shutil.make_archive(str(tmp_path / "packed"), kind, tree.parent, tree.name)
    for data in _modules(Path(file), tmp_path / "cache"):
        data.cache = tmp_path / "cache"
        data.prepare_data() if isinstance(data, ImageFolderData) else None
        data.setup("fit")
        assert data.classes == ("cat", "dog") and len(data.parts["train"]) == 10


def test_a_refused_archive_leaves_nothing_behind(tmp_path: Path) -> None:
    file = tmp_path / "evil.tar"
    with tarfile.open(file, "w") as tar:
        (tmp_path / "x").write_text("x")
        tar.add(tmp_path / "x", "train/a/x.png"), tar.add(tmp_path / "x", "../../out")
    with pytest.raises(UserError, match="is not a tar archive, or is damaged"):
        trees.unpacked(file, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_flat_images_are_explained(tmp_path: Path) -> None:
    tree = _tree_of(tmp_path / "t", train=("a",))
    (tree / "val").mkdir()
    shutil.copy(tree / "train/a/0.png", tree / "val" / "0.JPEG")
    with pytest.raises(UserError, match="sort the images into a folder for each class"):
        ImageFolderData(tree).setup("test")


def test_linked_folders_are_packed_anew_and_dangling_links_are_no_images(tmp_path: Path) -> None:
    tree = _tree_of(tmp_path / "t", train=("a",))
    other = _tree_of(tmp_path / "o", train=("b",))
    (tree / "train" / "b").symlink_to(other / "train" / "b")
    before = sources.packed(tree, "train", tmp_path / "c").images
    Image.new("RGB", (8, 8), (1, 2, 3)).save(other / "train/b/0.png")
    assert not torch.equal(before, sources.packed(tree, "train", tmp_path / "c").images)
    (tree / "train/a/9.png").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"a/9\.png is not an image"):
        sources.packed(tree, "train", tmp_path / "c")
    assert len(sources.packed(tree, "train", tmp_path / "c", skip_corrupt=True)) == 8


def test_a_damaged_cache_is_made_anew(tree: Path, tmp_path: Path) -> None:
    before = sources.packed(tree, "train", tmp_path / "c")
    (file,) = (tmp_path / "c").iterdir()
    file.write_bytes(file.read_bytes()[:500])
    assert sources.packed(tree, "train", tmp_path / "c").images.equal(before.images)


def test_overfitting_sees_the_same_plain_images_every_epoch(tmp_path: Path) -> None:
    tree = _tree_of(tmp_path / "t", train=("a", "b"))

    def epochs(data: VisionData, overfit: int) -> list[torch.Tensor]:
        data.trainer = SimpleNamespace(
            world_size=1,
            global_rank=0,
            limit_train_batches=1,
            overfit_batches=overfit,
            training=True,
        )
        data.setup("fit")
        loader = data.train_dataloader()
        batches = [next(iter(loader)) for _ in range(2)]
        return [data.on_after_batch_transfer(batch, 0).images for batch in batches]

    for data in _modules(tree, tmp_path / "cache"):
        assert torch.equal(*epochs(data, 1))
    for data in _modules(tree, tmp_path / "cache"):
        assert not torch.equal(*epochs(data, 0))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"image_size": 0}, "--data.image_size is 0: take a number from 1 upwards"),
        ({"image_size": 8, "resize": 4}, "--data.resize is 4: take a number from 8 upwards"),
        ({"workers": -1}, "--data.workers is -1: take a number from 0 upwards"),
        ({"std": (0.0, 1.0, 1.0)}, "--data.std is .*: take numbers above 0"),
    ],
)
def test_impossible_sizes_are_told_at_once(options: dict, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        ImageFolderData(tmp_path, **options)


def test_one_image_can_be_predicted(tmp_path: Path) -> None:
    _tree_of(tmp_path, photos=("a",))
    data = ImageFolderData(tmp_path / "photos/a/2.png", image_size=8, workers=0)
    data.prepare_data(), data.setup("predict")
    assert data.names == ("2.png",) and _labels(data, "predict") == [0]


def test_a_test_set_is_numbered_by_the_training_folders_though_they_were_not_read(
    tmp_path: Path,
) -> None:
    tree = _tree_of(tmp_path / "t", train=("a", "b", "c"), test=("b", "c"))
    for data in _modules(tree, tmp_path / "cache"):
        data.setup("test")
        assert data.num_classes == 3 and _labels(data, "test") == [1] * 4 + [2] * 4
