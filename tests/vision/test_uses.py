"""What users do with a run: other folders, other classes, other options, other precision."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch import nn

from fixup_core.errors import UserError, explain
from tests.vision.conftest import Tree, on_digits, on_tree, rows, run
from vision.data import Digits
from vision.export import export
from vision.sweep.figures import lr
from vision.sweep.lesion import lesion
from vision.sweep.points import Recipe
from vision.training.lit_classifier import LitClassifier


def _saved(folder: Path, name: str = "last") -> dict:
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


def _accuracy(cli) -> float:
    return cli.trainer.callback_metrics["test/accuracy"].item()


LEARNS = ("--trainer.max_epochs", "30", "--model.schedule", "cosine", "--model.lr", "0.03")


def test_a_test_set_that_lacks_a_class_is_scored_by_name(tree: Tree, tmp_path: Path) -> None:
    data = tree(train="abc", test="abc")
    run("fit", tmp_path / "run", *on_tree(data), *LEARNS)
    line = (*on_tree(data), "--ckpt_path", "last")
    assert _accuracy(run("test", tmp_path / "run", *line)) == 1.0
    assert _saved(tmp_path / "run")["classes"] == ["a", "b", "c"]
    shutil.rmtree(data / "test" / "a")
    assert _accuracy(run("test", tmp_path / "run", *line)) == 1.0
    (data / "test" / "b").rename(data / "test" / "d")
    with pytest.raises(UserError, match=r"the training set does not have \(d\); it has 3: a, b, c"):
        run("test", tmp_path / "run", *line)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_folder_without_labels_is_predicted_into_a_new_folder(tree: Tree, tmp_path: Path) -> None:
    data, photos = tree(train="abc", test="abc"), tree("photos", x="ac")
    run("fit", tmp_path / "run", *on_tree(data), *LEARNS)
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    line = ("--data", "CIFAR10", "--data.root", str(photos), "--trainer.accelerator", "cpu")
    run("predict", tmp_path / "new", *line, "--ckpt_path", str(checkpoint))
    table = rows(tmp_path / "new" / "predictions.csv")
    assert [row["image"] for row in table[:2]] == ["x/a/0.png", "x/a/1.png"] and len(table) == 24
    assert all(row["class"] == row["image"].split("/")[1] for row in table)
    assert list(table[0])[:5] == ["image", "class", "probability", "class_2", "probability_2"]
    assert float(table[0]["probability"]) >= float(table[0]["probability_2"])


def test_images_of_another_size_are_noticed(tree: Tree, tmp_path: Path, capsys) -> None:
    data = on_tree(tree(train="abc", test="abc"))
    run("fit", tmp_path / "run", *data)
    run("predict", tmp_path / "run", *data)
    assert "warning" not in capsys.readouterr().err
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (20, 10)).save(tmp_path / "photos" / "a.png")
    run("predict", tmp_path / "run", *data, "--data.root", str(tmp_path / "photos"))
    told = "trained on images of 8 x 8 pixels; these have 10 x 20: resize them"
    assert told in capsys.readouterr().err


def test_a_saved_configuration_starts_a_training_of_its_own(tmp_path: Path, capsys) -> None:
    run("fit", tmp_path / "run", *on_digits())
    run("fit", tmp_path / "run", *on_digits("--trainer.max_epochs", "2"), "--ckpt_path", "last")
    capsys.readouterr()
    run("fit", tmp_path / "run", *on_digits("--trainer.max_epochs", "2"), "--ckpt_path", "last")
    assert "nothing was trained: the run had come to its end (2 epochs)" in capsys.readouterr().out
    config = tmp_path / "run" / "config.yaml"
    assert yaml.safe_load(config.read_text()).get("ckpt_path") is None
    run("fit", tmp_path / "new", "--config", str(config))
    out = capsys.readouterr().out
    assert f"next: python -m vision test --config {tmp_path / 'new' / 'config.yaml'}" in out
    assert _saved(tmp_path / "new")["global_step"] == _saved(tmp_path / "run")["global_step"] == 8
    test = run("test", tmp_path / "new", "--config", str(config))
    assert test.trainer.ckpt_path.endswith("best.ckpt")


def test_the_checkpoint_says_what_network_is_tested(tmp_path: Path) -> None:
    run(
        "fit",
        tmp_path,
        *on_digits("--model.options.activation", "tanh", "--model.net", "cifar_resnet14"),
    )
    right = run("test", tmp_path, *on_digits("--model.options.activation", "tanh"))
    other = run("test", tmp_path, *on_digits("--model.method", "batchnorm", "--model.lr", "3"))
    assert _accuracy(right) == _accuracy(other)
    assert other.model.args.options["activation"] == "tanh" and other.model.args.method == "fixup"


@pytest.mark.parametrize(
    "changed",
    [
        ("--data.batch_size", "16"),
        ("--data.seed", "3"),
        ("--trainer.accumulate_grad_batches", "2"),
        ("--trainer.precision", "bf16-mixed"),
        ("--trainer.gradient_clip_val", "1.0"),
        ("--seed_everything", "7"),
        ("--model.base_branches", "4.0"),
    ],
    ids=lambda changed: changed[0],
)
def test_a_run_goes_on_under_its_own_conditions(changed: tuple[str, str], tmp_path: Path) -> None:
    one = ("--trainer.limit_train_batches", "1", "--model.method", "fixup_adam")
    run("fit", tmp_path, *on_digits(*one))
    with pytest.raises(UserError, match=rf"started with {changed[0]} \S+, not {changed[1]}"):
        run("fit", tmp_path, *on_digits(*one, *changed), "--ckpt_path", "last")


def test_a_dry_run_leaves_nothing(tmp_path: Path) -> None:
    run("fit", tmp_path / "new", *on_digits("--trainer.fast_dev_run", "true"))
    assert not (tmp_path / "new").exists()


def test_loggers_and_checkpoints_can_be_switched_off(tmp_path: Path) -> None:
    off = ("--trainer.logger", "false", "--trainer.enable_checkpointing", "false")
    run("fit", tmp_path, *on_digits(*off))
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "augmented.png", ".lock"}


@pytest.mark.parametrize("precision", ["64", "bf16-true", "16-true"])
def test_true_precisions_train_test_and_predict(precision: str, tmp_path: Path) -> None:
    line = on_digits("--trainer.precision", precision, "--trainer.limit_val_batches", "1")
    run("fit", tmp_path, *line, "--trainer.limit_train_batches", "2")
    run("test", tmp_path, *line, "--trainer.limit_test_batches", "1")
    run("predict", tmp_path, *line, "--trainer.limit_predict_batches", "1")
    kind = {"64": torch.float64, "bf16-true": torch.bfloat16, "16-true": torch.float16}[precision]
    assert _saved(tmp_path)["state_dict"]["net.stem.conv.weight"].dtype == kind


def test_a_run_without_validation_names_the_checkpoint_there_is(tmp_path: Path) -> None:
    run("fit", tmp_path, *on_digits("--trainer.limit_val_batches", "0"))
    with pytest.raises(UserError, match="was not validated; --ckpt_path last is there"):
        run("test", tmp_path, *on_digits())


@pytest.mark.parametrize("name", ["LearningRateFinder", "BatchSizeFinder"])
def test_what_would_change_a_run_behind_its_back_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{name} cannot be used here"):
        run("fit", tmp_path, *on_digits(f"--trainer.callbacks+={name}"))


def test_other_optimisers_keep_the_group_of_the_scalars(tmp_path: Path) -> None:
    adam = ("--model.optimizer", "torch.optim.AdamW", "--model.optimizer_options", "{eps: 1e-6}")
    cli = run("fit", tmp_path, *on_digits(*adam, "--model.lr", "0.01"))
    (optimizer,) = cli.trainer.optimizers
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["eps"] == 1e-6
    weights, scalars = optimizer.param_groups
    assert scalars["initial_lr"] == pytest.approx(weights["initial_lr"] / 10)
    assert scalars["params"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Adan", "take a name in torch.optim"),
        ("Optimizer", "take a name in torch.optim"),
        ("nowhere.Lamb", "cannot be imported: ModuleNotFoundError"),
        ("LBFGS", "--model.optimizer LBFGS: "),
    ],
)
def test_a_wrong_optimiser_is_told(name: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        run("fit", tmp_path, *on_digits("--model.optimizer", name))


def test_one_class_alone_and_a_folder_as_checkpoint_are_told(tree: Tree, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one class alone: there is nothing to tell apart"):
        run("fit", tmp_path / "run", *on_tree(tree(train="a"), 3))
    with pytest.raises(UserError, match=r"is a folder: give a checkpoint in it"):
        run("test", tmp_path / "new", *on_digits("--ckpt_path", str(tmp_path)))


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
def test_fine_tuning_keeps_the_body_and_makes_a_new_classifier(tree: Tree, tmp_path: Path) -> None:
    data = tree(train="abc", test="abc")
    run("fit", tmp_path / "first", *on_tree(data), "--model.method", "batchnorm")
    for split in ("train", "test"):
        shutil.rmtree(data / split / "c")
    file = tmp_path / "first" / "checkpoints" / "last.ckpt"
    line = (*on_tree(data, 2), "--model.method", "batchnorm", "--model.weights", str(file))
    run("fit", tmp_path / "second", *line, "--model.freeze", "[stem, stages]")
    before, after = (
        _saved(tmp_path / "first")["state_dict"],
        _saved(tmp_path / "second")["state_dict"],
    )
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == {"net.head.fc.weight", "net.head.fc.bias"}
    run("fit", tmp_path / "third", *line)
    after = _saved(tmp_path / "third")["state_dict"]
    assert not torch.equal(before["net.stem.conv.weight"], after["net.stem.conv.weight"])
    file.unlink()
    run("test", tmp_path / "second", *line[:-2], "--data.root", str(tree("two", test="ab")))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--model.weights", "nowhere.pt"), "nowhere.pt does not exist"),
        (("--model.freeze", "[stemm]"), "has no module 'stemm'"),
        (("--model.freeze", "[stem, stages, head]"), "leaves nothing to train"),
        (("--model.momentum", "2"), "momentum is 2.0: take a number from 0 to 1"),
        (("--model.milestones", "[-5]"), "take epochs from 0 on"),
        (("--data.crop", "-1"), "--data.crop is -1"),
        (("--data.train_size", "-1"), "--data.train_size is -1"),
        (("--data.batch_size", "0"), "--data.batch_size is 0: take 1 or more"),
        (("--seed_everything", "-1"), "--seed_everything is -1"),
        (("--trainer.accumulate_grad_batches", "0"), "take 1 or more"),
    ],
)
def test_a_wrong_number_or_name_is_told(flags: tuple[str, str], says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as caught:  # the parser wraps what data modules raise
        run("fit", tmp_path, *on_digits(*flags))
    assert says in (explain(caught.value) or "")


def test_a_late_moving_average_starts_from_the_trained_weights(tmp_path: Path) -> None:
    late = (
        "--trainer.callbacks+=EMAWeightAveraging",
        "--trainer.callbacks.update_starting_at_step=99",
    )
    run("fit", tmp_path, *on_digits(*late))
    saved = _saved(tmp_path, "best")
    weights, current = saved["state_dict"], saved["current_model_state"]
    assert all(torch.equal(weights[name], current[name]) for name in weights)


def test_the_average_of_a_short_run_follows_the_weights(tmp_path: Path) -> None:
    run("fit", tmp_path, *on_digits("--trainer.callbacks+=EMAWeightAveraging"))
    saved = _saved(tmp_path)
    average, current = (
        saved[kind]["net.head.fc.weight"] for kind in ("state_dict", "current_model_state")
    )
    assert average.norm() > 0.3 * current.norm(), "a decay of 0.999 leaves 0.4 %"


class StopAt(Callback):
    """Time is up after the second step, as Lightning's Timer says it."""

    def on_train_batch_end(self, trainer, *rest) -> None:
        trainer.should_stop = trainer.global_step == 2


@pytest.mark.filterwarnings("ignore:.*could not find the monitored key")
@pytest.mark.parametrize(
    "stop",
    [("--trainer.max_steps", "2"), ("--trainer.callbacks+=tests.vision.test_uses.StopAt",)],
    ids=["steps", "time"],
)
def test_a_run_that_was_stopped_within_an_epoch_goes_on_there(
    stop: tuple[str, ...], tmp_path: Path
) -> None:
    two = ("--trainer.max_epochs", "2")
    run("fit", tmp_path / "whole", *on_digits(*two))
    run("fit", tmp_path / "run", *on_digits(*two, *stop))
    assert _saved(tmp_path / "run")["global_step"] == 2
    run("fit", tmp_path / "run", *on_digits(*two), "--ckpt_path", "last")
    whole, stopped = _saved(tmp_path / "whole"), _saved(tmp_path / "run")
    assert whole["global_step"] == stopped["global_step"] == 8
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, stopped["state_dict"][name]), name


@pytest.mark.parametrize(("schedule", "warns"), [("cosine", True), ("step", False)])
def test_a_longer_run_says_what_becomes_of_the_rate(
    schedule: str, warns: bool, tmp_path: Path, capsys
) -> None:
    line = on_digits("--model.schedule", schedule, "--model.lr", "0.1")
    run("fit", tmp_path, *line)
    run("fit", tmp_path, *line, "--ckpt_path", "last")
    assert "warning" not in capsys.readouterr().err
    run("fit", tmp_path, *line, "--trainer.max_epochs", "2", "--ckpt_path", "last")
    told = "was laid out over 4 steps, now over 8: the rate goes on at 0.05 in place of 0."
    assert (told in capsys.readouterr().err) == warns


class TimeIsUp(Callback):
    """From the first batch on, as Lightning's Timer says it."""

    def on_train_batch_end(self, trainer, *rest) -> None:
        trainer.should_stop = True


def test_a_run_whose_time_is_up_finishes_the_step_it_accumulates_for(tmp_path: Path) -> None:
    line = on_digits("--trainer.accumulate_grad_batches", "3")
    run("fit", tmp_path / "whole", *line)
    run("fit", tmp_path / "run", *line, "--trainer.callbacks+=tests.vision.test_uses.TimeIsUp")
    assert _saved(tmp_path / "run")["global_step"] == 1
    run("fit", tmp_path / "run", *line, "--ckpt_path", "last")
    whole, stopped = _saved(tmp_path / "whole"), _saved(tmp_path / "run")
    assert whole["global_step"] == stopped["global_step"] == 2
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, stopped["state_dict"][name]), name


class OwnNet(nn.Module):
    def __init__(self, num_classes: int, width: int = 4) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU())
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.fc(self.layers(x))


OWN = "tests.vision.test_uses.OwnNet"


def test_a_network_of_ones_own(tmp_path: Path) -> None:
    own = ("--model.net", OWN, "--model.options", "{width: 6}", "--model.method", "as_it_is")
    line = on_digits()
    line = (*line[2:], *own)  # without the first --model.net
    run("fit", tmp_path, *line)
    run("test", tmp_path, *line)
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    assert LitClassifier.load_from_checkpoint(checkpoint).net.fc.in_features == 6
    run("predict", tmp_path, *line)
    assert len(rows(tmp_path / "predictions.csv")) == 449
    refused = "OwnNet, a network of your own, .* load it in Python"
    with pytest.raises(UserError, match=refused):
        export(checkpoint, tmp_path / "model.onnx")
    with pytest.raises(UserError, match=refused):
        lesion(checkpoint, Digits(), tmp_path / "lesion", accelerator="cpu")
    with pytest.raises(UserError, match="a sweep has no network"):
        lr(Recipe(Digits()), tmp_path / "lr", net="package.resnet20.Net")
    with pytest.raises(UserError, match=r"give it as --model\.net"):
        run("test", tmp_path, *on_digits())
    with pytest.raises(UserError, match="cannot be imported"):
        run("fit", tmp_path / "x", *line, "--model.net", "tests.vision.nowhere.Net")


def test_a_plain_data_module_of_ones_own(tmp_path: Path) -> None:
    line = ("--data", "tests.vision.own_data.PlainData", "--model.options.in_channels", "1")
    tiny = on_digits()[: on_digits().index("--model.options.in_channels")]
    run("fit", tmp_path, *tiny, *line, "--model.mixup", "0.2")
    run("test", tmp_path, *tiny, *line)
    run("predict", tmp_path, *tiny, *line)
    assert [row["image"] for row in rows(tmp_path / "predictions.csv")] == [*map(str, range(20))]
