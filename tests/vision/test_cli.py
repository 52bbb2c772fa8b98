"""``python -m vision``: runs, kills, resumes, several processes, mistakes."""

from __future__ import annotations

import csv
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fixup_core.errors import UserError
from tests.conftest import ENVIRONMENT, ROOT
from vision.cli import VisionCLI
from vision.compare import read_run
from vision.training.checkpoints import AtomicCheckpointIO
from vision.training.lit_classifier import DivergedError, LitClassifier, load_classifier
from vision.training.metrics import mean as _mean

RECIPE = ROOT / "recipes" / "vision" / "digits_fixup_resnet20.yaml"
TINY = (
    *("--config", str(RECIPE), "--model.net", "cifar_resnet8", "--trainer.max_epochs", "3"),
    *("--trainer.log_every_n_steps", "1", "--data.train_size", "256", "--data.batch_size", "32"),
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
)


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch) -> None:
    """LightningCLI warns where it is given arguments and pytest has some too."""
    monkeypatch.setattr(sys, "argv", ["vision"])


def test_the_help_ends_with_where_more_of_it_is(capsys) -> None:
    with pytest.raises(SystemExit):
        VisionCLI(["fit", "--help"])
    assert "--data.help CIFAR10" in capsys.readouterr().out[-300:]
    with pytest.raises(SystemExit):
        VisionCLI(["fit", "--data.help", "CIFAR10"])
    assert "--data.balanced" in capsys.readouterr().out


def _start(folder: Path, *more: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-W", "ignore", "-m", "vision", "fit", *TINY]
    return subprocess.Popen(
        [*line, "--trainer.default_root_dir", str(folder), *more],
        env=ENVIRONMENT | {"OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _finish(run: subprocess.Popen[str]) -> None:
    output, _ = run.communicate(timeout=240)
    assert run.returncode == 0, output[-3000:]


def _state(folder: Path, name: str = "last.ckpt") -> dict:
    return torch.load(folder / "checkpoints" / name, weights_only=True)


def _fit(folder: Path, *more: str) -> VisionCLI:
    return VisionCLI(["fit", *TINY, "--trainer.default_root_dir", str(folder), *more])


def test_a_run_leaves_one_folder_and_can_be_tested_and_predicted(tmp_path: Path) -> None:
    _fit(tmp_path, "--trainer.max_epochs", "1", "--model.mixup", "0.2")
    names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert {"config.yaml", "metrics.csv", "best.ckpt", "last.ckpt", "augmented.png"} <= names
    place = ("--trainer.default_root_dir", str(tmp_path), "--ckpt_path", "best")
    scores = VisionCLI(["test", *TINY, *place]).trainer.callback_metrics
    assert {"test/accuracy", "test/accuracy_top5", "test/calibration_error", "test/loss"} <= set(
        scores
    )
    VisionCLI(["predict", *TINY, *place])
    with (tmp_path / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 449 and all(0.1 <= float(row["probability"]) <= 1 for row in rows)


def test_kill_in_an_epoch_and_resume_equals_an_uninterrupted_run(tmp_path: Path) -> None:
    whole = _start(tmp_path / "whole", "--checkpoint_every", "3")
    killed = _start(tmp_path / "killed", "--checkpoint_every", "3")
    last = tmp_path / "killed" / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 200
    while not (last.exists() and _readable_step(last) >= 12):
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    killed.kill()
    killed.communicate()
    step = _state(tmp_path / "killed")["global_step"]
    assert step < 24 and step % 8, "killed in the midst of an epoch"
    _finish(_start(tmp_path / "killed", "--checkpoint_every", "3", "--ckpt_path", "last"))
    _finish(whole)
    first, second = _state(tmp_path / "whole"), _state(tmp_path / "killed")
    assert first["global_step"] == second["global_step"] == 24
    for name, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][name]), name


def _readable_step(file: Path) -> int:
    try:
        return torch.load(file, weights_only=True)["global_step"]
    except (RuntimeError, EOFError):  # being replaced
        return 0


def test_two_processes_equal_one_with_the_same_batch(tmp_path: Path) -> None:
    mixed = ("--model.mixup", "0.5", "--model.cutmix", "0.5")
    runs = [
        _start(tmp_path / "one", *mixed),
        _start(tmp_path / "two", *mixed, "--trainer.devices", "2", "--trainer.strategy", "ddp"),
    ]
    for run in runs:
        _finish(run)
    first, second = _state(tmp_path / "one"), _state(tmp_path / "two")
    assert first["global_step"] == second["global_step"] == 24
    for name, value in first["state_dict"].items():
        torch.testing.assert_close(second["state_dict"][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_two_processes_go_on_with_the_metrics_of_both(tmp_path: Path) -> None:
    flags = ("--checkpoint_every", "3", "--trainer.max_epochs", "1")
    two = ("--trainer.devices", "2", "--trainer.strategy", "ddp")
    last = tmp_path / "two" / "checkpoints" / "last.ckpt"
    _finish(_start(tmp_path / "one", *flags))
    killed = _start(tmp_path / "two", *flags, *two, "--trainer.callbacks+=tests.vision.kill.Kill")
    killed.communicate(timeout=240)
    assert killed.returncode != 0 and _state(tmp_path / "two")["global_step"] == 6
    assert not load_classifier(last).train_metrics["loss"].update_called, "of no use in another run"
    _finish(_start(tmp_path / "two", *flags, *two, "--ckpt_path", "last"))
    one, both = read_run(tmp_path / "one"), read_run(tmp_path / "two")
    for name in ("train/loss", "train/accuracy"):
        assert both.last(name) == pytest.approx(one.last(name), rel=1e-4)


@pytest.mark.slow
def test_two_processes_go_on_from_a_validation_at_the_end_of_an_epoch(tmp_path: Path) -> None:
    """The metrics were saved before they were taken: both processes must take them."""
    two = (
        "--trainer.devices",
        "2",
        "--trainer.strategy",
        "ddp",
        "--trainer.val_check_interval",
        "4",
    )
    _finish(_start(tmp_path, *two, "--trainer.max_epochs", "1"))
    _finish(_start(tmp_path, *two, "--trainer.max_epochs", "2", "--ckpt_path", "best"))
    assert _state(tmp_path)["global_step"] == 16


def test_a_mean_weighs_its_values_and_keeps_what_is_no_number() -> None:
    mean = _mean()
    mean.update(torch.tensor(1.0), weight=30)
    mean.update(torch.tensor(3.0), weight=10)
    assert mean.compute().item() == pytest.approx(1.5)
    mean.update(torch.tensor(float("nan")), weight=1)
    assert mean.compute().isnan()


def test_a_kill_while_saving_leaves_the_checkpoint_of_before(tmp_path: Path, monkeypatch) -> None:
    file = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, file)

    def die(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", die)
    with pytest.raises(KeyboardInterrupt):
        AtomicCheckpointIO().save_checkpoint({"step": 2}, file)
    assert torch.load(file, weights_only=True) == {"step": 1}
    assert (
        type(_fit(tmp_path, "--trainer.max_steps", "0").trainer.strategy.checkpoint_io)
        is AtomicCheckpointIO
    )


def test_a_run_that_diverges_stops_at_once_and_its_checkpoints_are_good(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(LitClassifier, "rate", lambda self, step: 1e30 if step >= 10 else 0.1)
    with pytest.raises(DivergedError, match=r"diverged at step \d+: the loss is not finite"):
        _fit(tmp_path)
    for name in ("last.ckpt", "best.ckpt"):
        assert _state(tmp_path, name)["global_step"] == 8


@pytest.mark.parametrize("every", ["0", "1"])
def test_weights_that_have_diverged_are_never_saved(every: str, tmp_path: Path) -> None:
    """The last step of an epoch is the one that fails: the loss before it was finite."""
    one = ("--trainer.limit_train_batches", "1", "--model.warmup_epochs", "0")
    with pytest.raises(DivergedError):
        _fit(tmp_path, *one, "--model.lr", "1e38", "--checkpoint_every", every)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_run_goes_on_with_its_own_options_alone(tmp_path: Path) -> None:
    _fit(tmp_path, "--trainer.max_epochs", "1")
    with pytest.raises(UserError, match="holds a run: go on with it by --ckpt_path last"):
        _fit(tmp_path)
    with pytest.raises(UserError, match=r"with --model\.lr 0\.1, not 0\.2: go on with the same"):
        _fit(tmp_path, "--ckpt_path", "last", "--model.lr", "0.2")
    assert "lr: 0.1" in (tmp_path / "config.yaml").read_text()
    _fit(tmp_path, "--ckpt_path", "last", "--trainer.max_epochs", "2")
    assert _state(tmp_path)["global_step"] == 16


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--model.net", "cifar_resnet21"), "not 6n.2: take 20 or 26"),
        (("--model.num_classes", "7"), "the data have 10 classes, --model.num_classes is 7"),
        (("--data.val_size", "0"), "--data.val_size is 0; take a number from 1 to 1347"),
        (("--model.mixup", "-1"), "0 or above"),
        (("--model.lr", "-1"), "--model.lr is -1.0: take a number from 0 upwards"),
        (("--model.label_smoothing", "3"), "take a number from 0 to 1"),
        (("--model.options.dropout", "2"), "dropout is 2: take a number from 0 to below 1"),
        (("--trainer.limit_train_batches", "0"), "no batch to train on"),
    ],
)
def test_mistakes_are_told(flags: tuple[str, ...], says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        _fit(tmp_path, *flags)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (
            ("--model.lrr", "1"),
            "error: unrecognized arguments: --model.lrr 1; did you mean --model.lr?",
        ),
        (("--data.batchsize", "1"), "did you mean --data.batch_size?"),
        (("--model.schedule", "cosin"), "Got value: cosin"),
        (("--data", "CIFAR11"), "there is no data module CIFAR11; did you mean CIFAR10?"),
        (
            ("--data", "foo.Bar"),
            "--data foo.Bar cannot be imported: ModuleNotFoundError: No module named 'foo'",
        ),
    ],
)
def test_a_wrong_option_names_the_nearest(flags: tuple[str, ...], says: str, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        VisionCLI(["fit", *TINY, *flags])
    error = capsys.readouterr().err.strip()
    assert stop.value.code == 2 and says in error and "\n" not in error


def test_an_option_of_the_data_wants_the_data_before_it(capsys) -> None:
    with pytest.raises(SystemExit):
        VisionCLI(["fit", "--data.batch_size", "8", "--data", "Digits"])
    assert "give --data before --data.batch_size" in capsys.readouterr().err


def test_an_option_that_the_data_lack_names_those_that_have_it(capsys) -> None:
    with pytest.raises(SystemExit):
        VisionCLI(["fit", "--data", "Digits", "--data.root", "photos"])
    error = capsys.readouterr().err
    assert "'root' is not accepted by these data: it is an option of CIFAR10" in error
    assert "ImageFolderData" in error and "Digits" not in error


def test_the_command_ends_a_mistake_in_one_line_and_status_2(tmp_path: Path) -> None:
    run = _start(tmp_path, "--ckpt_path", str(tmp_path / "nothing.ckpt"))
    output, _ = run.communicate(timeout=120)
    assert run.returncode == 2 and "Traceback" not in output
    assert output.strip().splitlines()[-1].startswith("error: Checkpoint file not found")
