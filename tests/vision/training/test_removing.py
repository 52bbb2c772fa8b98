"""Norms taken out by ``--model.remove_norms``, and the moving average of the weights."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.vision.training.test_resume import _fit
from vision.export import export
from vision.training.lit_classifier import load_classifier

OPTIONS = (
    *("--model.method", "batchnorm", "--model.remove_norms", "taper"),
    *("--model.removal_steps", "10", "--trainer.callbacks+=EMAWeightAveraging"),
    "--trainer.callbacks.decay=0.9",
)


def test_norms_that_are_gone_are_gone_from_the_average_too(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["vision"])
    state = _fit(tmp_path, *OPTIONS)
    gates = [value for name, value in state.items() if name.endswith("statistics.gates")]
    assert gates and not torch.stack(gates).any()
    last = tmp_path / "checkpoints" / "last.ckpt"
    removal = load_classifier(last).removal
    assert removal is not None and removal.done and removal.steps_done == 15
    export(last, tmp_path / "net.onnx")
    assert (tmp_path / "net.onnx").exists()
