"""``--fixup-log-gradients``: norms of the layers' gradients in fairseq's logs."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fixup_core.measure.flow import gradient_flow
from fixup_mt.errors import UserError
from fixup_mt.host.flow_log import layer_gradient_norms, log_gradients
from tests.conftest import fairseq, train_flags
from tests.mt.helpers import batch, build, build_lm, trained

TINY = ("--max-epoch", "1", "--max-update", "3", "--no-save", "--clip-norm", "0.01")


def _logs(run: Any) -> list[dict[str, str]]:
    """What a training logged, update by update."""
    lines = (run.stdout + run.stderr).splitlines()
    return [json.loads(line[line.index("{") :]) for line in lines if "| train_inner | {" in line]


def test_norms_are_those_of_the_gradients_and_cover_the_model() -> None:
    model = build(share_decoder_input_output_embed=False)
    assert layer_gradient_norms(model) == {}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    norms = layer_gradient_norms(model)
    layers = [f"{side}_{i}" for side in ("encoder", "decoder") for i in range(2)]
    assert set(norms) == {*layers, "encoder_embeddings", "decoder_embeddings", "output"}
    flat = torch.cat([p.grad.flatten() for p in model.decoder.layers[1].parameters()])
    assert norms["decoder_1"] == pytest.approx(flat.norm().item(), rel=1e-5)


def test_a_language_model_has_a_decoder_alone() -> None:
    model = build_lm()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert not any(name.startswith("encoder") for name in layer_gradient_norms(model))


def test_the_flow_through_a_transformer_is_measured_layer_by_layer() -> None:
    """Named inputs, layers that return tuples."""
    model = trained(build())
    layers = [*model.encoder.layers, *model.decoder.layers]
    flow = gradient_flow(model, batch(), loss=lambda out: out[0].square().mean(), layers=layers)
    paths = [f"{side}.layers.{i}" for side in ("encoder", "decoder") for i in range(2)]
    assert [row.path for row in flow] == paths
    model(**batch())[0].square().mean().backward()
    own = torch.cat([p.grad.flatten() for p in model.encoder.layers[0].parameters()])
    assert flow.rows[0].weight_gradient_norm == pytest.approx(own.norm().item(), rel=1e-4)
    assert all(row.gradient_norm > 0 for row in flow)


def test_a_training_logs_them_to_tensorboard_and_is_the_same(
    data_bin: Path, tmp_path: Path
) -> None:
    flags = train_flags(data_bin, tmp_path / "save", *TINY)
    board = ("--tensorboard-logdir", tmp_path / "tb")
    logged = _logs(fairseq("train", *flags, *board, "--fixup-log-gradients"))
    plain = _logs(fairseq("train", *flags))
    names = {name for name in logged[0] if name.startswith("grad_")}
    assert {"grad_encoder_0", "grad_decoder_1", "grad_output"} <= names
    assert not any(name.startswith("grad_") for name in plain[0])
    for first, second in zip(logged, plain, strict=True):
        assert first["loss"] == second["loss"] and first["gnorm"] == second["gnorm"]
    # Not yet clipped, and at first the output layer at 0 lets no gradient through to the others.
    assert float(logged[0]["grad_output"]) == pytest.approx(float(logged[0]["gnorm"]), rel=0.02)
    assert float(logged[0]["grad_encoder_0"]) == 0 < float(logged[2]["grad_encoder_0"])
    events = EventAccumulator(str(tmp_path / "tb" / "train_inner"))
    assert "grad_decoder_0" in events.Reload().Tags()["scalars"]


def test_half_precision_is_told_without_its_scale(data_bin: Path, tmp_path: Path) -> None:
    flags = train_flags(data_bin, tmp_path / "save", *TINY)
    half = ("--fixup-log-gradients", "--fp16", "--fp16-no-flatten-grads")
    (first, *_) = _logs(fairseq("train", *flags, *half))
    assert float(first["grad_output"]) == pytest.approx(float(first["gnorm"]), rel=0.02)


def test_amp_is_refused(data_bin: Path, tmp_path: Path) -> None:
    flags = train_flags(data_bin, tmp_path / "save", *TINY)
    run = fairseq("train", *flags, "--fixup-log-gradients", "--amp", check=False)
    assert run.returncode == 2 and "--amp wants a GPU" in run.stderr
    amp = SimpleNamespace(cfg=SimpleNamespace(common=SimpleNamespace(amp=True)))
    with pytest.raises(UserError, match="cannot see the gradients under --amp"):
        log_gradients(amp)  # on a GPU
    assert "Traceback" not in run.stderr
