"""Translation on a CUDA device: the attention kernels, half precision by fairseq's command."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from tests.conftest import fairseq, train_flags

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_attention_leaves_the_kernels_that_plan_for_each_length(monkeypatch) -> None:
    from fixup_mt.model.attention import FixupAttention

    real, seen = F.scaled_dot_product_attention, []

    def attend(*args, **kwargs):
        seen.append(
            (torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cuda.flash_sdp_enabled())
        )
        return real(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    net = FixupAttention(64, 4, self_attention=True).cuda().half()
    x = torch.randn(7, 3, 64, device="cuda", dtype=torch.float16, requires_grad=True)
    padding = torch.zeros(3, 7, dtype=torch.bool, device="cuda")
    padding[1, 5:] = True
    out, _ = net(x, x, x, key_padding_mask=padding, need_weights=False)
    out.float().square().sum().backward()
    assert seen == [(False, True)] and torch.backends.cuda.cudnn_sdp_enabled() == before
    exact, _ = net.double()(*[x.detach().double()] * 3, padding, need_weights=False)
    torch.testing.assert_close(out.double(), exact, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("method", ["fixup", "fixup_adam", "t_fixup", "t_fixup_adam"])
def test_a_training_in_half_precision(method: str, data_bin: Path, tmp_path: Path) -> None:
    flags = [flag for flag in train_flags(data_bin, tmp_path) if flag != "--cpu"]
    fairseq("train", *flags, "--fixup-method", method, "--fp16")
    state = torch.load(tmp_path / "checkpoint_last.pt", weights_only=False)
    assert all(p.isfinite().all() for p in state["model"].values() if p.is_floating_point())
