"""``--fixup-qk-norm`` and ``--fixup-logit-cap``: what they bound, and everything they go with."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fixup_core import METHODS, scalars
from fixup_mt.errors import UserError
from fixup_mt.model import attention
from fixup_mt.model.attention import FixupAttention, without_cudnn
from fixup_mt.serving import export
from tests.mt.helpers import batch, build, build_lm, task, trained

OPTIONS: dict[str, dict[str, Any]] = {
    "qk_norm": {"fixup_qk_norm": True},
    "cap": {"fixup_logit_cap": 2.0},
    "both": {"fixup_qk_norm": True, "fixup_logit_cap": 2.0},
}


def _attentions(model: Any) -> list[FixupAttention]:
    return [m for m in model.modules() if isinstance(m, FixupAttention)]


def _loss(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    logits, _ = model(**inputs)
    return F.cross_entropy(logits.flatten(0, 1), inputs["prev_output_tokens"].flatten())


def test_both_are_off_by_default() -> None:
    for model in (build(), build_lm()):
        assert all(a.temperature is None and a.logit_cap == 0 for a in _attentions(model))
        assert not any("temperature" in name for name in model.state_dict())


def test_queries_and_keys_have_a_root_mean_square_of_one() -> None:
    x = 100 * torch.randn(3, 2, 5, 16)
    torch.testing.assert_close(attention.unit_rms(x).square().mean(-1), torch.ones(3, 2, 5))
    half = attention.unit_rms(x.bfloat16())
    assert half.dtype == torch.bfloat16 and (half.float().square().mean(-1) - 1).abs().max() < 0.01
    assert not attention.unit_rms(torch.zeros(1, 4)).any()


def test_the_size_of_the_projections_does_not_matter_and_the_first_logits_are_usual() -> None:
    model = build(fixup_qk_norm=True).double().eval()
    inputs = batch()
    layer = model.encoder.layers[0].self_attn
    assert layer.temperature.value() == 1.0
    x = torch.randn(5, 2, 64, dtype=torch.double)
    before, weights = layer(x, x, x, need_head_weights=True)
    q, k = (attention.unit_rms(layer._split_heads(p(x))) for p in (layer.q_proj, layer.k_proj))
    expected = (q @ k.transpose(2, 3) * layer.head_dim**-0.5).softmax(-1)
    torch.testing.assert_close(weights.transpose(0, 1), expected)
    with torch.no_grad():
        layer.q_proj.weight.mul_(100.0)
        layer.k_proj.weight.mul_(0.5)
    torch.testing.assert_close(layer(x, x, x)[0], before, rtol=1e-4, atol=1e-4)
    assert model(**inputs)[0].isfinite().all()


def test_logits_are_bounded_by_the_cap_and_small_ones_stay() -> None:
    logits = torch.tensor([-1e6, -0.01, 0.0, 0.01, 1e6])
    found = attention.capped(logits, 5.0)
    torch.testing.assert_close(
        found, torch.tensor([-5.0, -0.01, 0.0, 0.01, 5.0]), atol=1e-5, rtol=0
    )
    module = FixupAttention(8, 2, self_attention=True, logit_cap=1.5)
    with torch.no_grad():
        module.q_proj.weight.mul_(1e3)
    x = torch.randn(6, 1, 8)
    weights = module(x, x, x, need_head_weights=True)[1]
    ratio = weights.amax(-1) / weights.amin(-1)
    assert ratio.max() <= torch.tensor(3.0).exp() * 1.001 and ratio.max() > 10


@pytest.mark.parametrize("weighed", [True, False])
def test_a_cap_that_is_never_reached_changes_nothing(weighed: bool) -> None:
    """The plain route is the fused one."""
    torch.manual_seed(0)
    capped = FixupAttention(8, 2, self_attention=True, logit_cap=1e8).double()
    plain = FixupAttention(8, 2, self_attention=True).double()
    plain.load_state_dict(capped.state_dict())
    x = torch.randn(6, 3, 8, dtype=torch.double)
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[1, :2] = True
    given = {"key_padding_mask": padding, "need_weights": weighed}
    for found, expected in zip(capped(x, x, x, **given), plain(x, x, x, **given), strict=True):
        assert (found is None) == (expected is None)
        if expected is not None:
            torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", OPTIONS)
def test_decoding_step_by_step_is_the_whole_forward_pass(name: str) -> None:
    model = trained(build(**OPTIONS[name])).double()
    inputs = batch()
    tokens = inputs.pop("prev_output_tokens")
    with torch.no_grad():
        out = model.encoder(**inputs)
        whole, _ = model.decoder(tokens, encoder_out=out)
        state: dict[str, Any] = {}
        steps = [
            model.decoder(tokens[:, :end], encoder_out=out, incremental_state=state)[0]
            for end in range(1, tokens.size(1) + 1)
        ]
    real = tokens.ne(1)
    torch.testing.assert_close(torch.cat(steps, 1)[real], whole[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("more", [{}, {"fixup_autocast": "bf16"}, {"checkpoint_activations": True}])
def test_training_lowers_the_loss(name: str, more: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, inputs = build(dropout=0.0, **OPTIONS[name], **more), batch()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = _loss(model, inputs)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    moved = [a.temperature for a in _attentions(model) if a.temperature is not None]
    assert bool(moved) == ("fixup_qk_norm" in OPTIONS[name])
    assert all(t.weight.grad is not None and t.weight.grad.any() for t in moved)


def test_activation_checkpointing_changes_no_gradient() -> None:
    plain, wrapped = (
        build(dropout=0.0, checkpoint_activations=w, **OPTIONS["both"]) for w in (False, True)
    )
    wrapped.load_state_dict(trained(plain).state_dict())
    for model in (plain, wrapped):
        _loss(model.train(), batch()).backward()
    for (n, p), (_, q) in zip(plain.named_parameters(), wrapped.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-6, msg=n)


DEFINED = [n for n, m in METHODS.items() if m.only != "ResNets" and not m.unit_variance]


@pytest.mark.parametrize("method", DEFINED)
def test_every_method_and_the_language_model_take_them(method: str) -> None:
    """Saved, loaded again; the temperatures are scalars like the others."""
    both = OPTIONS["both"] | {"fixup_method": method}
    for make, inputs in (
        (build, batch()),
        (build_lm, {"src_tokens": batch()["prev_output_tokens"]}),
    ):
        model, again = trained(make(**both)), make(**both).eval()
        again.load_state_dict(model.state_dict())
        logits = model(**inputs)[0]
        assert logits.isfinite().all() and torch.equal(again(**inputs)[0], logits)
        temperatures = {id(a.temperature) for a in _attentions(model)}
        assert temperatures <= {id(scalar) for scalar in scalars(model)}


@pytest.mark.parametrize("cap", [-1.0, float("nan"), float("inf")])
def test_a_cap_that_makes_no_sense_is_refused(cap: float) -> None:
    with pytest.raises(UserError, match=r"--fixup-logit-cap is .*: give a number above 0"):
        build(fixup_logit_cap=cap)


def _export(model: Any, place: Path, form: str) -> None:
    arguments = {"output": place, "format": form, "quantization": None, "sentencepiece": None}
    export.export(model, task(), SimpleNamespace(**arguments))


@pytest.mark.parametrize(
    "name", [n if n == "both" else pytest.param(n, marks=pytest.mark.slow) for n in OPTIONS]
)
@pytest.mark.parametrize("make", [build, build_lm])
def test_onnx_gives_the_models_log_probabilities(name: str, make: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model, place = trained(make(fixup_method="prenorm", **OPTIONS[name])), tmp_path / "out"
    _export(model, place, "onnx")
    theirs = export.FORMATS["onnx"].module.log_probabilities
    assert export.difference(theirs, place, model, task()) < 2e-4


@pytest.mark.parametrize("form", ["ctranslate2", "fairseq"])
@pytest.mark.parametrize(
    ("name", "flag"), [("qk_norm", "--fixup-qk-norm"), ("cap", "--fixup-logit-cap")]
)
def test_formats_without_them_say_so(name: str, flag: str, form: str, tmp_path: Path) -> None:
    pytest.importorskip("ctranslate2")
    model = trained(build(**OPTIONS[name]))
    with pytest.raises(UserError, match=f"{flag} has attention that .* give --format onnx"):
        _export(model, tmp_path / "out", form)
    assert not list(tmp_path.iterdir())


def test_cudnns_kernels_are_left_and_come_back() -> None:
    flags = torch.backends.cuda
    before = flags.cudnn_sdp_enabled(), flags.flash_sdp_enabled()
    with without_cudnn():
        assert (flags.cudnn_sdp_enabled(), flags.flash_sdp_enabled()) == (False, before[1])
    assert (flags.cudnn_sdp_enabled(), flags.flash_sdp_enabled()) == before
