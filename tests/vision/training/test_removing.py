"""Norms taken out of a trained classifier: ``--model.remove_norms``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fixup_core.errors import UserError
from fixup_core.removal.leaving import LeavingNorm
from tests.vision.conftest import on_digits, run
from tests.vision.training.test_resume import _fit
from vision.export import export
from vision.training import lit_classifier
from vision.training.lit_classifier import load_classifier

STEPS = 8
"""Of a run: two epochs of four batches."""
TWO_EPOCHS = ("--trainer.max_epochs", "2", "--model.method", "batchnorm")
pytest.importorskip("onnxruntime")


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    run("fit", tmp_path / "bn", *on_digits(*TWO_EPOCHS))
    return tmp_path / "bn" / "checkpoints" / "last.ckpt"


def removing(weights: Path, schedule: str, *more: str) -> tuple[str, ...]:
    """Options of a run that starts from ``weights``."""
    own = ("--model.weights", str(weights), "--model.remove_norms", schedule)
    return on_digits(*TWO_EPOCHS, *own, "--model.lr", "0.01", *more)


def test_norms_are_gone_scored_and_exported_without(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "out"
    run("fit", folder, *removing(trained, "taper", "--model.removal_steps", "6"))
    last = load_classifier(folder / "checkpoints" / "last.ckpt")
    assert last.removal is not None and last.removal.done
    best = load_classifier(folder / "checkpoints" / "best.ckpt")
    assert best.removal is not None and best.removal.done  # the first epoch ends with norms
    run("test", folder, *removing(trained, "taper", "--model.removal_steps", "6"))
    export(folder / "checkpoints" / "last.ckpt", tmp_path / "model.onnx")
    import onnx

    operations = {node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node}
    assert "Conv" in operations and not {"BatchNormalization", "Mul", "Sub"} & operations


@pytest.mark.filterwarnings("ignore:.*could not find the monitored key")  # ends in an epoch
def test_at_once_batchnorm_starts_as_it_is_in_evaluation(trained: Path, tmp_path: Path) -> None:
    before = load_classifier(trained).eval()
    options = removing(trained, "at_once", "--trainer.max_steps", "1", "--model.lr", "0")
    run("fit", tmp_path / "out", *options)
    after = load_classifier(tmp_path / "out" / "checkpoints" / "last.ckpt")
    assert after.removal is not None and after.removal.done
    images = torch.rand(4, 1, 8, 8)
    # In training mode too: no batch is looked at any more. Its one step has moved the statistics.
    with torch.no_grad():
        assert torch.equal(after.train()(images), after.eval()(images))
        norms = [m for m in after.modules() if isinstance(m, LeavingNorm)]
        plain = dict(before.net.named_modules())
        for path, norm in after.net.named_modules():
            if isinstance(norm, LeavingNorm):
                old = plain[path]
                assert not torch.equal(norm.statistics.centre, old.running_mean)
                assert torch.equal(norm.norm.weight, old.weight)
    assert len(norms) == 7


@pytest.mark.filterwarnings("ignore:.*could not find the monitored key")  # ends in an epoch
@pytest.mark.parametrize("schedule", ["taper", "one_by_one"])
def test_a_run_goes_on_bit_for_bit(
    schedule: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = removing(trained, schedule, "--model.removal_steps", "7")
    options += ("--model.removal_distil", "0.5", "--checkpoint_every", "3")
    run("fit", tmp_path / "whole", *options)
    with monkeypatch.context() as patches:
        # A kill behind the third step: a run that is asked to stop there would be refused.
        patches.setattr(lit_classifier, "check_length", lambda removal, length: None)
        run("fit", tmp_path / "cut", *options, "--trainer.max_steps", "3")
    run("fit", tmp_path / "cut", *options, "--ckpt_path", "last")
    whole, cut = (
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)
        for name in ("whole", "cut")
    )
    assert whole["state_dict"].keys() == cut["state_dict"].keys()
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, cut["state_dict"][name]), name


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--model.removal_steps", "9"), "the run of 8 steps ends before the last norm is gone"),
        (("--model.method", "fixup"), "--model.remove_norms taper: .* has no norms"),
        (("--model.removal_steps", "1"), "1 steps are too few"),
        (("--model.removal_anchor", "-1"), "anchor is -1.0: it cannot be negative"),
    ],
)
def test_mistakes_are_one_line(
    more: tuple[str, ...], message: str, tmp_path: Path, trained: Path
) -> None:
    with pytest.raises(UserError, match=message):
        run("fit", tmp_path / "out", *removing(trained, "taper", *more))
    assert load_classifier(trained).removal is None


def test_an_export_before_the_end_is_refused(trained: Path, tmp_path: Path) -> None:
    run("fit", tmp_path / "early", *removing(trained, "taper", "--model.removal_steps", "8"))
    half = torch.load(tmp_path / "early" / "checkpoints" / "last.ckpt", weights_only=True)
    for name in half["state_dict"]:
        if name.endswith("statistics.gates"):
            half["state_dict"][name].fill_(0.5)
    torch.save(half, tmp_path / "half.ckpt")
    with pytest.raises(UserError, match="7 of 7 norms are not gone yet"):
        export(tmp_path / "half.ckpt", tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()


AVERAGED = (
    *("--model.method", "batchnorm", "--model.remove_norms", "taper"),
    *("--model.removal_steps", "10", "--trainer.callbacks+=EMAWeightAveraging"),
    "--trainer.callbacks.decay=0.9",
)


def test_norms_that_are_gone_are_gone_from_the_average_too(tmp_path: Path) -> None:
    state = _fit(tmp_path, *AVERAGED)
    gates = [value for name, value in state.items() if name.endswith("statistics.gates")]
    assert gates and not torch.stack(gates).any()
    last = tmp_path / "checkpoints" / "last.ckpt"
    removal = load_classifier(last).removal
    assert removal is not None and removal.done and removal.steps_done == 15
    export(last, tmp_path / "net.onnx")
    assert (tmp_path / "net.onnx").exists()
