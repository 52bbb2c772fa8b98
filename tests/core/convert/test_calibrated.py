"""``fixup_(calibrate=True)``: what norms did to one batch stays."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fixup_core import fixup_, fixup_init_
from fixup_core.convert.attach import BEFORE
from fixup_core.errors import UserError
from fixup_core.rules.frozen import FrozenNorm
from tests.core.convert.nets import IMAGES, NETS, Basic, Small, assert_refused
from tests.core.foreign import PreActivation, Separable

CONSTANT = {
    "resnet18": {"bn1", *(f"layer{i}.0.downsample.1" for i in (2, 3, 4))},
    "encoder": {f"encoder.layers.{i}.norm{k}" for i in (0, 1) for k in (1, 2)},
    "encoder, norm first": {f"encoder.layers.{i}.norm{k}" for i in (0, 1) for k in (1, 2)},
    "PreActivation": {"norms.0", "norms.2", "norms.4", "norms.6", "norm"},
    "Separable": {"stem.1", "head.0"},
    "GatedMlp": {f"layers.{i}.norm{k}" for i in (0, 1, 2) for k in (1, 2)} | {"norm"},
}


@pytest.mark.parametrize("name", CONSTANT)
def test_what_norms_did_to_a_batch_is_kept(name: str) -> None:
    net = NETS[name][0]()
    torch.manual_seed(1)
    report = fixup_(net, example_inputs=3 * IMAGES + 2, calibrate=True, verbose=False)
    assert f"({len(CONSTANT[name])} are constants now)" in str(report)
    state = torch.get_rng_state()
    constants = {p.rpartition(".")[0]: m for p, m in net.named_modules() if type(m) is FrozenNorm}
    assert set(constants) == set(report.frozen) == CONSTANT[name]
    seen: dict[str, Tensor] = {}

    def look(path: str) -> Any:
        return lambda module, args, output: seen.update({path: output.detach()})

    for path, module in net.named_modules():
        if path.endswith(BEFORE) or module in constants.values():
            module.register_forward_hook(look(path))
    assert net(3 * IMAGES + 2).abs().max() == 0 and net.training
    assert torch.equal(state, torch.get_rng_state())
    for path, entering in seen.items():
        assert abs(entering.mean()) < 1e-4 * entering.abs().max(), path
        if not path.endswith(BEFORE):
            assert entering.var(correction=0) == pytest.approx(1.0, abs=1e-2)
    assert net.eval()(IMAGES).abs().max() == 0


def test_a_branch_has_back_what_its_input_was_divided_by() -> None:
    net = Small()
    report = fixup_(net, example_inputs=IMAGES, calibrate=True, verbose=False)
    assert set(report.frozen) == {"norm", "norm_q", "norm_head"}  # none behind a layer or head
    size = 0.01 * IMAGES.flatten(2)[..., :8].std(correction=0)
    for last in (net.o, net.down):
        assert last.fixup_multiplier.value().item() == pytest.approx(size.item(), rel=0.1)
    assert net.norm.frozen.scale.item() == pytest.approx(1 / size.item(), rel=0.1)
    assert net(IMAGES).abs().max() == 0
    fixup_init_(net)
    assert net.norm.frozen.scale == 1 and net.o.fixup_multiplier.value() == 1


def test_a_norm_with_two_names_becomes_one_constant() -> None:
    net = Small()
    net.also = net.norm
    fixup_(net, example_inputs=IMAGES, calibrate=True, verbose=False)
    assert net.also is net.norm and net.norm.frozen.scale > 50


def test_a_signal_that_is_not_there_is_not_magnified() -> None:
    net = nn.Sequential(nn.BatchNorm2d(3), Basic())
    images = IMAGES * torch.tensor([1.0, 0.0, 1.0])[:, None, None]
    fixup_(net, example_inputs=images, calibrate=True, verbose=False)
    assert net[0].frozen.scale[1] == 1


def test_named_branches_have_their_biases_set_alone() -> None:
    net = PreActivation(depth=1)
    options: Any = {"branches": {"block": ["convs.0", "convs.1"]}, "head": "fc"}
    report = fixup_(net, example_inputs=3 + IMAGES, calibrate=True, verbose=False, **options)
    assert not report.frozen and "the batch set biases alone" in str(report)
    assert net.convs[0].fixup_before.value() != 0


def test_the_constant_of_a_batch_norm_is_each_channels_own() -> None:
    net = Basic()
    net.conv1.weight.data.mul_(torch.tensor([1.0, 10.0, 100.0])[:, None, None, None])
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), net)
    before = copy.deepcopy(net)
    fixup_(net, example_inputs=IMAGES, calibrate=True, verbose=False)
    assert net[1].frozen.scale.shape == (3,)
    torch.testing.assert_close(net[:2](IMAGES), before[:2](IMAGES), rtol=1e-4, atol=1e-5)


def test_a_calibrated_network_is_loaded_and_runs_in_half_precision() -> None:
    nets = [Separable() for _ in range(2)]
    for net, images in zip(nets, (IMAGES, 5 + 2 * IMAGES), strict=True):
        fixup_(net, example_inputs=images, calibrate=True, verbose=False)
    nets[1].load_state_dict(nets[0].state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        assert nets[1](IMAGES).dtype == torch.bfloat16
    stem = [net.stem[1](net.stem[0](IMAGES)) for net in nets]
    assert torch.equal(*stem)
    assert nets[0].bfloat16()(IMAGES.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"branches": {"a": ["fc1", "fc2"]}}, "calibrate=True needs a batch"),
        ({"example_inputs": IMAGES, "keep_norms": True}, "calibrate=True needs a batch"),
        *(
            ({"example_inputs": IMAGES, "method": method}, f"{method}' lacks one of them")
            for method in ("fixup_no_bias", "fixup_no_multiplier", "fixup_rule2")
        ),
    ],
)
def test_what_cannot_be_calibrated_is_refused(options: dict[str, Any], message: str) -> None:
    assert_refused(PreActivation(), message, calibrate=True, **options)


def test_a_batch_that_is_not_finite_is_refused() -> None:
    net = PreActivation()
    before, shown = copy.deepcopy(net.state_dict()), repr(net)
    with pytest.raises(UserError, match="numbers that are not finite"):
        fixup_(net, example_inputs=IMAGES / 0, calibrate=True, verbose=False)
    assert repr(net) == shown and not any(m._forward_pre_hooks for m in net.modules())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
