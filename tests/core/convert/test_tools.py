"""What trainings put around a network, around one that was converted."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fixup_core import collect_branches, fixup_, param_groups, scalars
from tests.core.convert.hugging_face import NETS
from tests.core.convert.nets import IMAGES, Encoder, disturb_, timm_net


def converted(name: str = "gpt2") -> tuple[nn.Module, dict[str, Tensor]]:
    """A network of transformers with scalars that are not where they start."""
    net, batch = NETS[name].make()
    fixup_(net, batch, check=False, verbose=False)
    disturb_(net)
    return net, batch


def gradients(net: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a loss; dropout draws the same numbers in each call."""
    torch.manual_seed(0)
    net.zero_grad()
    net(**batch).logits.square().mean().backward()
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def test_groups_hold_every_parameter_once() -> None:
    net, _ = converted("t5")
    groups = param_groups(net, lr=0.1, weight_decay=0.1)
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(map(id, net.parameters()))
    slow = {
        id(p) for group in groups for p in group["params"] if group["lr"] == pytest.approx(0.01)
    }
    assert slow >= {id(scalar.weight) for scalar in scalars(net)}


def test_an_average_of_the_weights_averages_the_scalars_too() -> None:
    net = Encoder()
    fixup_(net, IMAGES, check=False, verbose=False)
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.75))
    average.update_parameters(net)
    start = copy.deepcopy(net)
    disturb_(net)
    average.update_parameters(net)
    pairs = zip(scalars(average.module), scalars(start), scalars(net), strict=True)
    for mean, before, after in pairs:
        torch.testing.assert_close(mean.weight, 0.75 * before.weight + 0.25 * after.weight)
    own = set(average.module.modules())
    branches = collect_branches(average.module)
    assert len(branches) == 4 and all(x.module in own for b in branches for x in b.layers)
    assert not torch.equal(average(IMAGES), net(IMAGES))  # its hooks use scalars of its own


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    net, batch = converted()
    net.train()
    plain = gradients(net, batch)
    net.gradient_checkpointing_enable()
    saved = gradients(net, batch)
    assert plain.keys() == saved.keys() == dict(net.named_parameters()).keys()
    for name, grad in plain.items():
        torch.testing.assert_close(saved[name], grad)


def test_the_compiler_makes_one_graph_of_it() -> None:
    torch._dynamo.reset()
    net, batch = converted()
    compiled = torch.compile(net.eval(), backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**batch).logits, net(**batch).logits)
        disturb_(net)  # the scalars are the graph's inputs, not constants in it
        torch.testing.assert_close(compiled(**batch).logits, net(**batch).logits)


@pytest.mark.parametrize("first", ["cast", "converted"])
def test_in_half_precision_scalars_stay_float32(first: str) -> None:
    net, batch = NETS["gpt2"].make()
    if first == "cast":
        net.to(torch.bfloat16)
    fixup_(net, batch, verbose=False)
    net.to(torch.bfloat16)
    assert {scalar.weight.dtype for scalar in scalars(net)} == {torch.float32}
    own = {id(scalar.weight) for scalar in scalars(net)}
    assert {p.dtype for p in net.parameters() if id(p) not in own} == {torch.bfloat16}
    grads = gradients(net, batch)
    assert net(**batch).logits.dtype == torch.bfloat16
    assert grads.keys() == dict(net.named_parameters()).keys()


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_sharded_in_float32_it_computes_in_half_precision(process_group: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    net, batch = converted()
    options = {
        "mesh": init_device_mesh("cpu", (1,)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16),
    }
    for block in net.transformer.h:
        fully_shard(block, **options)
    fully_shard(net, **options)
    optimizer = torch.optim.SGD(param_groups(net, lr=0.1, weight_decay=0.0))
    before = [scalar.weight.full_tensor().clone() for scalar in scalars(net)]
    out = net(**batch).logits
    assert out.dtype == torch.bfloat16
    out.float().square().mean().backward()
    optimizer.step()
    moved = [s.weight.full_tensor() != b for s, b in zip(scalars(net), before, strict=True)]
    assert all(moved) and {p.dtype for p in net.parameters()} == {torch.float32}


def test_what_timms_training_uses_keeps_scalars_and_their_rate() -> None:
    pytest.importorskip("timm")
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import ModelEmaV3

    net = timm_net("vit_tiny_patch16_224", depth=1, img_size=32)()
    fixup_(net, IMAGES, check=False, verbose=False)
    groups = param_groups(net, lr=0.4, weight_decay=0.05)
    optimizer = create_optimizer_v2(groups, opt="adamw", lr=0.4, weight_decay=0.05)
    schedule, _ = create_scheduler_v2(optimizer, "cosine", num_epochs=8, warmup_epochs=2, min_lr=0)
    for epoch in (2, 4, 6):
        schedule.step(epoch)
        weights, small = (group["lr"] for group in optimizer.param_groups)
        assert small == pytest.approx(0.1 * weights) and weights > 0
    average = ModelEmaV3(net, decay=0.75)
    disturb_(net)
    average.update(net)
    for mean, own in zip(scalars(average.module), scalars(net), strict=True):
        torch.testing.assert_close(mean.weight, own.initial + 0.25 * (own.weight - own.initial))
