"""Every method of the registry on every family of networks: built and whole, or refused by name."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fixup_core import METHODS, fold
from fixup_core.errors import UserError
from vision.nets import build_net, check_net

NETS = {
    "cifar_resnet8": {"width": 4},
    "cifar_wrn10_1": {},
    "imagenet_resnet18": {},
    "imagenet_plain18": {},
    "highway3": {"image_size": 16},
    "highway_conv4": {"widths": (4, 8, 16)},
}
IMAGES = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
REFUSED = {
    ("", lambda m: m.only == "Transformers"): "is not defined for",
    ("imagenet_plain", lambda m: m.needs_branches): "which have no residual branches",
    ("highway", lambda m: m.needs_branches or m.norm): "gates in place of norms",
    ("cifar_wrn", lambda m: m.zero_last_gains): "ends with a normalisation layer",
}


def _refusal(name: str, method: str) -> str:
    record = METHODS[method]
    said = [says for (start, of), says in REFUSED.items() if name.startswith(start) and of(record)]
    return said[0] if said else ""


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", NETS)
def test_a_method_builds_saves_resumes_and_folds_or_is_refused(name: str, method: str) -> None:
    torch.manual_seed(0)
    refusal = _refusal(name, method)
    if refusal:
        with pytest.raises(UserError, match=refusal):
            build_net(name, method=method, num_classes=5, batch=IMAGES, **NETS[name])
        return
    net = build_net(name, method=method, num_classes=5, batch=IMAGES, **NETS[name])
    assert net.report.method == method
    assert [row.name for row in net.report.rows] == [n for n, _ in net.named_parameters()]
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    logits = net.eval()(IMAGES)
    assert logits.isfinite().all() and logits.abs().max() > 0
    again = build_net(name, method=method, num_classes=5, batch=IMAGES, **NETS[name]).eval()
    assert not torch.equal(again(IMAGES), logits)
    again.load_state_dict(copy.deepcopy(net.state_dict()))
    assert torch.equal(again(IMAGES), logits)
    if METHODS[method].scalars and METHODS[method].foldable:
        torch.testing.assert_close(fold(net)(IMAGES), logits, rtol=1e-4, atol=1e-5)
    else:
        with pytest.raises(UserError, match="folded"):
            fold(net)


@pytest.mark.parametrize("order", ["post", "pre"])
@pytest.mark.parametrize("method", ["fixup", "batchnorm"])
def test_state_dicts_of_version_0_1_load_under_their_new_names(method: str, order: str) -> None:
    net = build_net("cifar_resnet8", method=method, num_classes=5, order=order)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter))
    last = 1 if order == "post" else -1
    names = (
        ("residual.end.", f"norms.{last}."),
        ("residual.multiplier.", "multiplier."),
        ("before_convs.", "shifts."),
        ("before_acts.", "norms."),
        ("before_activation.", "norm."),
        ("before_fc.", "shift."),
    )
    old = {}
    for key, value in net.state_dict().items():
        for now, before in names:
            key = key.replace(now, before)
        old[key] = value.clone()
    assert set(old) != set(net.state_dict()) or method == "batchnorm"
    again = build_net("cifar_resnet8", method=method, num_classes=5, order=order)
    again.load_state_dict(old)
    assert torch.equal(again.eval()(IMAGES), net.eval()(IMAGES))


@pytest.mark.parametrize(("base", "expected"), [(None, 15 / 3), (6.0, 2.0)])
def test_base_branches_set_the_fixed_multiplier(base: float | None, expected: float) -> None:
    net = build_net("cifar_resnet8", method="fixup_adam", base_branches=base)
    assert [b.residual.multiplier.value().item() for b in net.blocks()] == [expected] * 3
    assert {row.m for row in net.report.rows if row.branch} == {2}


@pytest.mark.parametrize(
    ("method", "base", "says"),
    [
        ("fixup", 4.0, "'fixup' has no factor of the depth"),
        ("nf", 4.0, "'nf' has no factor of the depth"),
        ("as_it_is", 4.0, "writes no weights"),
        *(("fixup_adam", base, "the base branches are") for base in (0.0, -3.0, float("nan"))),
    ],
)
def test_base_branches_that_make_no_sense(method: str, base: float, says: str) -> None:
    for build in (build_net, check_net):
        with pytest.raises(UserError, match=says) as refused:
            build("cifar_resnet8", method=method, base_branches=base)
        assert "\n" not in str(refused.value)


def test_blocks_know_no_method_by_name() -> None:
    """A record that the registry has never seen builds, trains and folds like any other."""
    from dataclasses import replace

    from vision.nets.design import Design
    from vision.nets.resnet import ResNet

    own = replace(METHODS["fixup"], name="own", multiplier=0.5, factor=lambda place: 0.25)
    net = ResNet(Design(own), counts=(1, 1, 1), widths=(4, 8, 16), num_classes=5)
    assert [b.residual.multiplier.value().item() for b in net.blocks()] == [0.5] * 3
    assert isinstance(net.blocks()[0].residual.end, nn.Module)
