"""Weights of other networks, and what stays frozen."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from fixup_core.errors import UserError
from vision.nets import build_net
from vision.training.fine_tuning import freeze_, load_weights_


def test_weights_of_torchvision_start_a_network_of_other_classes(tmp_path: Path, capsys) -> None:
    other = torchvision.models.resnet18()
    torch.save(other.state_dict(), tmp_path / "other.pth")
    net = build_net("imagenet_resnet18", method="batchnorm", num_classes=7)
    fresh = net.head.fc.weight.clone()
    load_weights_(net, tmp_path / "other.pth")
    assert "new: head.fc.bias, head.fc.weight" in capsys.readouterr().out
    assert torch.equal(net.head.fc.weight, fresh)
    net.head.fc, other.fc = nn.Identity(), nn.Identity()
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(net.eval()(images), other.eval()(images))


def test_a_classifier_of_the_same_classes_is_kept(tmp_path: Path) -> None:
    first, second = (build_net("cifar_resnet8", method="fixup") for _ in range(2))
    nn.init.normal_(first.head.fc.weight)
    torch.save(first.state_dict(), tmp_path / "net.pt")
    load_weights_(second, tmp_path / "net.pt")
    assert all(
        torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)
    )


@pytest.mark.parametrize("saved", [{}, {"state_dict": {"a": 1}}, [1]])
def test_what_holds_no_weights_is_told(saved: object, tmp_path: Path) -> None:
    torch.save(saved, tmp_path / "x.pt")
    with pytest.raises(UserError, match="holds no state dict"):
        load_weights_(build_net("cifar_resnet8"), tmp_path / "x.pt")


def test_weights_of_another_depth_are_refused(tmp_path: Path) -> None:
    torch.save(build_net("cifar_resnet14").state_dict(), tmp_path / "x.pt")
    net = build_net("cifar_resnet8")
    before = [parameter.clone() for parameter in net.parameters()]
    with pytest.raises(UserError, match="the state dict is of another network"):
        load_weights_(net, tmp_path / "x.pt")
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_frozen_modules_learn_nothing_and_keep_their_statistics() -> None:
    net = build_net("cifar_resnet8", method="batchnorm")
    frozen = freeze_(net, ["stem", "stages.0"])
    assert [module.training for module in frozen] == [False, False] and net.stages[1].training
    learned = {name for name, p in net.named_parameters() if p.requires_grad}
    assert learned and all(name.startswith(("stages.1", "stages.2", "head")) for name in learned)
