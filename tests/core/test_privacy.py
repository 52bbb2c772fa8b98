"""Where BatchNorm is forbidden: differential privacy, and batches of one."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet18
from torchvision.models.resnet import BasicBlock, ResNet

from fixup_core import anchor_scalars_, fixup_
from fixup_core.errors import UserError
from fixup_core.privacy import grad_sample_module
from fixup_core.rules.scalars import ScalarBias, ScalarMultiplier
from tests.core.foreign import GatedMlp, PreActivation, Separable

pytestmark = [
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
    pytest.mark.filterwarnings("ignore:Secure RNG turned off:UserWarning"),
]
LABELS = torch.tensor([1, 2, 3])
NETS: dict[str, Callable[[], nn.Module]] = {
    "torchvision": lambda: ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10),
    "PreActivation": lambda: PreActivation(depth=2, width=8),
    "Separable": lambda: Separable(depth=2, width=8),  # a layer that Opacus has no sampler for
    "GatedMlp": lambda: GatedMlp(depth=2, width=16),
}


def _images(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def _moved(net: nn.Module) -> nn.Module:
    """With nothing at 0 or 1 any more."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


def _converted(name: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    net = NETS[name]()
    fixup_(net, example_inputs=_images(), verbose=False, **options)
    return _moved(net)


def _one_by_one(net: nn.Module, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """The gradients of one-sample backward passes, stacked."""
    found: dict[str, list[Tensor]] = {}
    for i in range(len(inputs)):
        net.zero_grad()
        F.cross_entropy(net(inputs[i : i + 1]), labels[i : i + 1]).backward()
        for name, parameter in net.named_parameters():
            assert parameter.grad is not None, name
            found.setdefault(name, []).append(parameter.grad.clone())
    return {name: torch.stack(grads) for name, grads in found.items()}


def _wrong(net: nn.Module, wrap: Callable[[nn.Module], Any]) -> list[str]:
    """The parameters whose per-sample gradients are not those of one sample at a time."""
    expected = _one_by_one(copy.deepcopy(net), _images(), LABELS)
    F.cross_entropy(wrap(net)(_images()), LABELS).backward()
    found: dict[str, Any] = {name: p.grad_sample for name, p in net.named_parameters()}
    assert found.keys() == expected.keys()
    return [
        name
        for name, grads in expected.items()
        if not torch.allclose(found[name], grads, rtol=1e-3, atol=1e-4 * grads.abs().max() + 1e-6)
    ]


@pytest.fixture
def opacus() -> Any:
    return pytest.importorskip("opacus")


@pytest.fixture(autouse=True)
def _samplers(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opacus's registry is as it was after every test."""
    if "opacus" in request.fixturenames:
        module = pytest.importorskip("opacus").GradSampleModule
        monkeypatch.setattr(module, "GRAD_SAMPLERS", dict(module.GRAD_SAMPLERS))


@pytest.mark.parametrize("calibrate", [False, True])
@pytest.mark.parametrize("name", NETS)
def test_every_sample_has_its_own_gradient(opacus: Any, name: str, calibrate: bool) -> None:
    net = _converted(name, calibrate=calibrate)
    if name == "GatedMlp" and calibrate:
        # Positions are the network's own parameter, so Opacus takes it as one module.
        with pytest.raises(UserError, match="GatedMlp has parameters of its own and buffers"):
            grad_sample_module(net)
    else:
        assert not _wrong(net, grad_sample_module)


def test_without_our_samplers_layers_with_multipliers_would_be_wrong(opacus: Any) -> None:
    wrong = _wrong(_converted("PreActivation"), opacus.GradSampleModule)
    assert wrong == ["convs.1.weight", "convs.3.weight"]


def test_fixed_numbers_and_anchored_scalars(opacus: Any) -> None:
    net = _converted("PreActivation", method="fixup_adam")
    anchor_scalars_(net, 0.3)
    with pytest.raises(NotImplementedError, match="buffers"):
        opacus.GradSampleModule(copy.deepcopy(net))
    assert not _wrong(_moved(net), grad_sample_module)


def test_wrapped_again(opacus: Any) -> None:
    net = _converted("Separable")
    grad_sample_module(net).remove_hooks()
    assert not _wrong(net, grad_sample_module)


def test_an_empty_batch(opacus: Any) -> None:
    net: Any = _converted("Separable")
    wrapped = grad_sample_module(net)
    F.cross_entropy(wrapped(_images(0)), LABELS[:0]).backward()
    assert net.blocks[0].up.weight.grad_sample.shape == (0, *net.blocks[0].up.weight.shape)
    assert net.blocks[0].up.fixup_multiplier.weight.grad_sample.shape == (0, 1)


class Twice(nn.Module):
    """Each scalar used twice in one forward pass, the batch second."""

    def __init__(self) -> None:
        super().__init__()
        self.bias, self.multiplier = ScalarBias(), ScalarMultiplier(0.5)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = torch.tanh(self.multiplier(self.bias(x)))
        return x


@pytest.mark.parametrize("batch_first", [True, False])
def test_scalars_that_are_used_twice(opacus: Any, batch_first: bool) -> None:
    net, x = Twice(), torch.randn(4, 5, 6, dtype=torch.float64)
    by_sample = x if batch_first else x.transpose(0, 1)
    expected = []
    for sample in by_sample:
        net(sample).square().sum().backward()
        expected.append([p.grad.clone() for p in net.parameters() if p.grad is not None])
        net.zero_grad()
    wrapped = grad_sample_module(net, batch_first=batch_first, loss_reduction="sum")
    wrapped(x).square().sum().backward()
    for i, parameter in enumerate(net.parameters()):
        grads: Any = parameter.grad_sample  # type: ignore[attr-defined]
        assert torch.allclose(grads, torch.stack([one[i] for one in expected]).to(grads))


def _private(opacus: Any, net: Any, parameters: Any, mode: str = "hooks") -> Any:
    data = torch.utils.data.TensorDataset(_images(8), torch.arange(8))
    return opacus.PrivacyEngine().make_private(
        module=net,
        optimizer=torch.optim.SGD(parameters, lr=0.1),
        data_loader=torch.utils.data.DataLoader(data, batch_size=4),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        grad_sample_mode=mode,
    )


def test_a_private_step_moves_the_weights(opacus: Any) -> None:
    net = _converted("torchvision")
    assert opacus.validators.ModuleValidator.validate(net) == []
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    private, optimizer, loader = _private(opacus, grad_sample_module(net), net.parameters())
    images, labels = next(batch for batch in loader if len(batch[0]))
    F.cross_entropy(private(images), labels).backward()
    optimizer.step()
    for name, parameter in net.named_parameters():
        assert parameter.isfinite().all() and not torch.equal(parameter, before[name]), name


@pytest.mark.parametrize("mode", ["ew", "ghost"])
def test_other_modes_are_refused(opacus: Any, mode: str) -> None:
    """Opacus would compute gradients by its own rules, or none."""
    net = _converted("PreActivation")
    with pytest.raises(ValueError, match="doesn't match new arguments"):
        _private(opacus, grad_sample_module(net), net.parameters(), mode)


def test_batchnorm_is_refused(opacus: Any) -> None:
    net = resnet18(num_classes=10)
    with pytest.raises(opacus.validators.errors.UnsupportedModuleError, match="BatchNorm"):
        _private(opacus, net, net.parameters())
    with pytest.raises(UserError, match="train ResNet with privacy: BatchNorm"):
        grad_sample_module(net)


def test_buffers_that_are_no_constants_of_ours_are_refused(opacus: Any) -> None:
    net = nn.Sequential(nn.Linear(3, 3))
    net[0].register_buffer("mean", torch.zeros(3))
    with pytest.raises(UserError, match="0 has parameters of its own and buffers"):
        grad_sample_module(net)


def test_without_opacus_there_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opacus", None)
    with pytest.raises(UserError, match="pip install opacus"):
        grad_sample_module(nn.Linear(2, 2))


def test_batches_of_one() -> None:
    """BatchNorm has no variance of one value for each channel."""
    torch.manual_seed(0)
    net = resnet18(num_classes=10)  # 1x1 in its last stage for images of 32x32
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        net(_images(1))
    fixup_(net, example_inputs=_images(), verbose=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    losses = []
    for _ in range(16):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(_images(1)), LABELS[:1])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
