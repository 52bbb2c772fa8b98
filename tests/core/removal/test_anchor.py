"""The anchor: what enters the head keeps its size."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fixup_core import NormRemoval
from fixup_core.errors import UserError
from fixup_core.removal.anchor import Anchor
from tests.core.removal.nets import TOKENS, mlp


def _sizes(anchor: Anchor, net: nn.Module, batches: list[torch.Tensor]) -> list[float]:
    sizes = []
    hook = net[-1].register_forward_pre_hook(
        lambda m, args: sizes.append(args[0].square().mean().sqrt().item())
    )
    for batch in batches:
        net(batch)
    hook.remove()
    return sizes


def test_the_target_is_a_running_mean_and_the_loss_relative_to_it() -> None:
    net = mlp(nn.LayerNorm(8))
    anchor = Anchor(net, None, 0.25)
    first, second, third = _sizes(anchor, net, [TOKENS, 3 * TOKENS + 1, 2 - TOKENS])
    target = 0.9 * (0.9 * first + 0.1 * second) + 0.1 * third
    assert anchor.target == pytest.approx(target)
    assert anchor.loss().item() == pytest.approx(0.25 * (third / target - 1) ** 2, rel=1e-4)


def test_the_target_stays_from_the_first_step_at_which_a_norm_goes() -> None:
    net = mlp(nn.LayerNorm(8))
    removal = NormRemoval(net, TOKENS, steps=20)
    for step in range(6):
        with torch.no_grad():
            net[0].weight.mul_(1.1)
            net[1].weight.mul_(1.2)
        net(TOKENS)
        before = removal.anchor.target
        removal.step()
        assert removal.anchor.calibrating == (step < 2)
    net(3 * TOKENS)
    assert removal.anchor.target == before


def test_its_gradient_draws_the_size_to_the_target() -> None:
    net = mlp(nn.LayerNorm(8))
    anchor = Anchor(net, None, 1.0)
    anchor.load({"target": 2.0, "calibrating": False})
    optimizer = torch.optim.Adam(net.parameters(), lr=0.02)
    losses = []
    for _ in range(100):
        net(TOKENS)
        anchor.loss().backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(anchor.loss().item())
    assert losses[-1] < 0.02 * losses[0]


def test_it_looks_in_training_alone() -> None:
    net = mlp(nn.LayerNorm(8))
    anchor = Anchor(net, None, 1.0)
    net.eval()(TOKENS)
    with torch.no_grad():
        net.train()(TOKENS)
    with pytest.raises(UserError, match="comes after a call of the network in training mode"):
        anchor.loss()


def test_a_copy_has_no_graph_and_looks_for_itself() -> None:
    net = mlp(nn.LayerNorm(8))
    anchor = Anchor(net, None, 1.0)
    net(TOKENS)
    twin = copy.deepcopy(net)
    twin(9 * TOKENS)
    target = anchor.target
    twin(TOKENS)
    assert anchor.target == target


class Named(nn.Module):
    """Its head is given its input by name; it is not the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head, self.other = nn.LayerNorm(8), nn.Linear(8, 3), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(input=self.other(self.norm(x)))


def test_a_head_that_is_named() -> None:
    net = Named()
    anchor = Anchor(net, "head", 1.0)
    net(TOKENS)
    entering = net.other(net.norm(TOKENS))
    assert anchor.target == pytest.approx(entering.square().mean().sqrt().item())


def test_what_has_no_head_is_refused() -> None:
    with pytest.raises(UserError, match="head='fc': the network has no such module"):
        Anchor(mlp(nn.LayerNorm(8)), "fc", 1.0)
    with pytest.raises(
        UserError, match=r"no output layer was found: name it, head=, or .*anchor=0"
    ):
        Anchor(nn.Sequential(nn.LayerNorm(8)), None, 1.0)
