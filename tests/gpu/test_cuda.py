"""On a CUDA device: the fused route, half precision, the compiler, folding, a whole training.

Run by ``make test-gpu``; every test is skipped where there is no such device.
"""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fixup_core import METHODS, fixup_, fold, initialise_, param_groups, scalars
from fixup_core.fuse import ops
from tests.conftest import ROOT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
NETS = {
    "cifar_resnet20": {},
    "cifar_wrn16_2": {},
    "imagenet_resnet18": {},
    "imagenet_resnet50": {"checkpointing": True},
}
DEVICE = "cuda"


def _net(name: str, method: str = "fixup", **options) -> nn.Module:
    nets = pytest.importorskip("vision.nets")
    torch.manual_seed(0)
    net = nets.build_net(name, method=method, **NETS.get(name, {}) | options)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return net.to(DEVICE, memory_format=torch.channels_last)


def _batch(size: int = 8, side: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(size, 3, side, side, generator=generator)
    return images.to(DEVICE), torch.arange(size, device=DEVICE) % 10


def _step(net: nn.Module, *, plain: bool, dtype: torch.dtype | None = None):
    images, labels = _batch()
    images = images.to(next(net.parameters()).dtype)
    net.zero_grad()
    route = ops.plain_route() if plain else torch.enable_grad()
    with route, torch.autocast(DEVICE, dtype or torch.bfloat16, enabled=dtype is not None):
        logits = net(images)
        F.cross_entropy(logits.float() if dtype else logits, labels).backward()
    return logits.detach(), {name: p.grad.clone() for name, p in net.named_parameters()}


@pytest.mark.parametrize("name", NETS)
def test_the_fused_route_is_the_plain_one(name: str) -> None:
    net = _net(name).double()
    assert net.fuses(net.blocks())
    (logits, grads), (expected, plain) = (_step(net, plain=p) for p in (False, True))
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    for key, grad in plain.items():
        near = 1e-9 * max(grad.abs().max().item(), 1e-6)
        torch.testing.assert_close(grads[key], grad, rtol=1e-9, atol=near, msg=key)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["cifar_resnet20", "cifar_wrn16_2"])
def test_half_precision_is_no_less_exact_than_the_definition(name: str, dtype: torch.dtype) -> None:
    net = _net(name)
    assert all(scalar.weight.dtype is torch.float32 for scalar in scalars(net))
    _, exact = _step(copy.deepcopy(net).double(), plain=True)
    off = {}
    for plain in (False, True):
        _, grads = _step(net, plain=plain, dtype=dtype)
        differences = [
            (grads[key].double() - grad).norm() / grad.norm().clamp_min(1e-12)
            for key, grad in exact.items()
        ]
        off[plain] = torch.stack(differences).median().item()
    assert off[False] < 1.2 * off[True] + 1e-3


def test_the_scalars_stay_float32_in_a_half_precision_network() -> None:
    net = _net("cifar_resnet20").half()
    assert {p.dtype for p in net.parameters() if p.dim() > 1} == {torch.float16}
    assert all(scalar.weight.dtype is torch.float32 for scalar in scalars(net))
    with torch.no_grad():
        assert net(_batch()[0].half()).isfinite().all()


def test_the_compiler_keeps_the_numbers() -> None:
    """In double precision: float32 convolutions are rounded to TF32, by each kernel in its way."""
    net = _net("cifar_resnet20").double()
    eager, grads = _step(net, plain=False)
    net.compile()
    compiled, found = _step(net, plain=False)
    torch.testing.assert_close(compiled, eager, rtol=1e-8, atol=1e-8)
    for key, grad in grads.items():
        near = 1e-8 * max(grad.abs().max().item(), 1e-3)
        torch.testing.assert_close(found[key], grad, rtol=1e-7, atol=near, msg=key)


@pytest.mark.parametrize("name", NETS)
def test_a_folded_network_computes_the_same(name: str) -> None:
    net = _net(name).double().eval()
    images = _batch()[0].double()
    with torch.no_grad():
        torch.testing.assert_close(fold(net)(images), net(images), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("method", ["fixup", "none", "batchnorm"])
def test_weights_are_drawn_on_the_device(method: str) -> None:
    net = _net("cifar_resnet20", method)
    initialise_(net, METHODS[method], generator=torch.Generator(DEVICE).manual_seed(3))
    first = [p.clone() for p in net.parameters()]
    initialise_(net, METHODS[method], generator=torch.Generator(DEVICE).manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(first, net.parameters(), strict=True))


def test_a_network_of_others_is_converted_and_learns() -> None:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    net = torchvision.models.resnet18(num_classes=10).to(DEVICE)
    images, labels = _batch(16, 64)
    fixup_(net, example_inputs=images, calibrate=True, verbose=False)
    assert all(p.device.type == DEVICE for p in net.parameters())
    optimizer = torch.optim.SGD(param_groups(net, lr=0.05), momentum=0.9)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(images), labels)
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
def test_a_training_by_its_command(precision: str, tmp_path: Path) -> None:
    pytest.importorskip("jsonargparse")
    recipe = ROOT / "recipes" / "vision" / "digits_fixup_resnet20.yaml"
    line = [sys.executable, "-m", "vision", "fit", "--config", str(recipe)]
    line += ["--trainer.accelerator", "gpu", "--trainer.devices", "1"]
    line += ["--trainer.precision", precision, "--trainer.max_epochs", "3"]
    line += ["--trainer.default_root_dir", str(tmp_path / "run")]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run" / "checkpoints" / "best.ckpt").exists()
