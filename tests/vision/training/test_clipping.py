"""Adaptive clipping as a callback: what a step sees, half precision, resuming, mistakes."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fixup_core.clipping import clip_adaptively_
from fixup_core.errors import UserError
from tests.vision.conftest import on_digits, run
from vision.training.callbacks import AdaptiveClipping

CLIPPED = ("--trainer.callbacks+=AdaptiveClipping", "--trainer.callbacks.share=0.02")
ONE = ("--trainer.limit_train_batches", "1", "--model.method", "none")


def _ratio(net: nn.Module, scale: float = 1.0) -> float:
    """The largest norm of a unit's gradient over that of its weights, but for the head's."""
    ratios = [
        p.grad.flatten(1).norm(dim=1) / p.detach().flatten(1).norm(dim=1).clamp(min=1e-3) / scale
        for name, p in net.named_parameters()
        if p.grad is not None and p.dim() > 1 and "head" not in name
    ]
    return torch.cat(ratios).max().item()


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_units_are_clipped_whatever_the_scaler_has_left(scale: float) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Linear(3, 4))
    for p in net.parameters():
        p.grad = torch.full_like(p, 5.0 * scale)
    scaler = SimpleNamespace(get_scale=lambda: scale)
    trainer: Any = SimpleNamespace(precision_plugin=SimpleNamespace(scaler=scaler))
    optimizer: Any = SimpleNamespace(_step_supports_amp_scaling=scale > 1)
    AdaptiveClipping(0.1).on_before_optimizer_step(trainer, net, optimizer)  # type: ignore[arg-type]
    assert _ratio(net, scale) == pytest.approx(0.1, rel=1e-4)


def test_a_scaler_that_is_off_already_counts_no_more() -> None:
    net = nn.Linear(3, 4)
    net.weight.grad = torch.ones_like(net.weight)
    plugin = SimpleNamespace(scaler=SimpleNamespace(get_scale=lambda: 1024.0))
    trainer: Any = SimpleNamespace(precision_plugin=plugin)
    AdaptiveClipping(0.1).on_before_optimizer_step(trainer, net, torch.optim.SGD([net.weight]))  # type: ignore[arg-type]
    assert _ratio(net) == pytest.approx(0.1, rel=1e-4)


def test_a_run_is_clipped_and_goes_on_with_the_same_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[float, float]] = []

    def clip(net: nn.Module, *args: float, **more: float) -> int:
        before = _ratio(net)
        clipped = clip_adaptively_(net, *args, **more)
        seen.append((before, _ratio(net)))
        return clipped

    monkeypatch.setattr("vision.training.callbacks.clip_adaptively_", clip)
    found = run("fit", tmp_path, *on_digits(*ONE, *CLIPPED))
    (callback,) = (c for c in found.trainer.callbacks if isinstance(c, AdaptiveClipping))
    assert callback.share == 0.02
    assert seen and all(after <= 0.02 * 1.001 < before for before, after in seen)
    other = (*CLIPPED[:1], "--trainer.callbacks.share=0.5")
    for changed, says in ((other, "0.5"), ((), "none")):
        with pytest.raises(UserError, match=f"AdaptiveClipping of share 0.02, not {says}"):
            run("fit", tmp_path, *on_digits(*ONE, *changed), "--ckpt_path", "last")


def test_what_cannot_be_clipped_is_refused() -> None:
    with pytest.raises(UserError, match="above 0"):
        AdaptiveClipping(0.0)
    strategy = type("FSDPStrategy", (), {})()
    trainer: Any = SimpleNamespace(strategy=strategy)
    with pytest.raises(UserError, match="whole weights, which FSDPStrategy shares out"):
        AdaptiveClipping().setup(trainer, nn.Linear(1, 1), "fit")  # type: ignore[arg-type]
