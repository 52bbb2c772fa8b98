"""Queries and keys see one side of a norm, values the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fixup_core import NormRemoval
from fixup_core.removal.sides import look_at
from tests.core.removal.nets import (
    IMAGES,
    PATHS,
    TOKENS,
    Model,
    Texts,
    gpt2,
    llama,
    norms_in,
    outputs,
    scatter_,
    timm_net,
)

WORDS = Texts(0, size=3, length=6).batch()


class Own(nn.Module):
    """``nn.MultiheadAttention`` behind a norm, its values given by name or by place."""

    def __init__(self, named: bool = False) -> None:
        super().__init__()
        self.norm, self.named = nn.LayerNorm(8), named
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        given: tuple[Any, Any] = ((h, h), {"value": h}) if self.named else ((h, h, h), {})
        return self.head(x + self.attention(*given[0], **given[1], need_weights=False)[0])


def _removal(net: nn.Module, inputs: Any, **options: Any) -> NormRemoval:
    """The norms seen by one batch, none gone."""
    removal = NormRemoval(net, inputs, schedule="one_by_one", steps=1000, anchor=0.0, **options)
    net.train()
    net(**inputs) if isinstance(inputs, dict) else net(inputs)
    return removal


def _open(removal: NormRemoval, first: float, second: float) -> None:
    for norm in removal.norms.values():
        norm.set_gates_(first, second)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("gates", [(0.0, 1.0), (1.0, 0.0), (0.4, 0.8)])
def test_packed_attention_makes_values_of_the_other_side(named: bool, gates: Any) -> None:
    net = scatter_(Own(named))
    removal = _removal(net, TOKENS)
    _open(removal, *gates)
    norm = removal.norms["norm"]
    whole, fixed = norm.norm(TOKENS), norm.plain()(TOKENS)
    first, second = (gate * whole + (1 - gate) * fixed for gate in gates)
    attended = net.attention(first, first, second, need_weights=False)[0]
    torch.testing.assert_close(net(TOKENS), net.head(TOKENS + attended))
    assert not torch.allclose(first, second)


def test_written_attention_makes_values_of_the_other_side() -> None:
    net = scatter_(Model())
    removal = _removal(net, WORDS)
    _open(removal, 0.0, 1.0)
    block, norm = net.blocks[0], removal.norms["blocks.0.norm1"]
    x = net.embed(WORDS) + net.place.weight[: WORDS.size(1)]
    first, second = norm.plain()(x), norm.norm(x)
    seen: dict[str, Tensor] = {}
    for name in ("q_proj", "k_proj", "v_proj", "up"):
        layer = block.get_submodule(name)
        layer.register_forward_hook(lambda m, a, out, name=name: seen.update({name: out}))
    net(WORDS)
    torch.testing.assert_close(seen["q_proj"], block.q_proj(first))
    torch.testing.assert_close(seen["k_proj"], block.k_proj(first))
    torch.testing.assert_close(seen["v_proj"], block.v_proj(second))
    assert not torch.allclose(block.v_proj(first), block.v_proj(second))


def _packed(net: nn.Module, inputs: Any, path: str, norm_path: str) -> None:
    """The values' third of a packed layer is made of the values' side."""
    removal = _removal(net, inputs)
    _open(removal, 0.0, 1.0)
    norm, layer = removal.norms[norm_path], net.get_submodule(path)
    seen: list[Tensor] = []
    norm.register_forward_pre_hook(lambda m, args: seen.append(args[0].detach()))
    layer.register_forward_hook(lambda m, args, out: seen.append(out.detach()))
    outputs(net, inputs)
    entering, made = seen
    third = made.size(-1) // 3
    with torch.no_grad():
        first, second = (layer.forward(part(entering)) for part in (norm.plain(), norm.norm))
    torch.testing.assert_close(made[..., : 2 * third], first[..., : 2 * third])
    torch.testing.assert_close(made[..., 2 * third :], second[..., 2 * third :])
    assert not torch.allclose(first[..., 2 * third :], second[..., 2 * third :])


def test_gpt2_makes_values_of_the_other_side() -> None:
    net, inputs = gpt2()
    _packed(scatter_(net), inputs, "transformer.h.1.attn.c_attn", "transformer.h.1.ln_1")


def test_timms_vit_makes_values_of_the_other_side() -> None:
    net = timm_net("vit_tiny_patch16_224", img_size=32, depth=2)
    images = F.interpolate(IMAGES, size=32)
    _packed(scatter_(net), images, "blocks.0.attn.qkv", "blocks.0.norm1")


def test_llama_makes_values_of_the_other_side() -> None:
    net, inputs = llama()
    removal = _removal(scatter_(net), inputs)
    _open(removal, 0.0, 1.0)
    attention = net.get_submodule("model.layers.0.self_attn")
    norm = removal.norms["model.layers.0.input_layernorm"]
    seen: dict[str, Tensor] = {}
    norm.register_forward_pre_hook(lambda m, args: seen.update(x=args[0]))
    for name in ("k_proj", "v_proj"):
        layer = attention.get_submodule(name)
        layer.register_forward_hook(lambda m, a, out, name=name: seen.update({name: out}))
    outputs(net, inputs)
    with torch.no_grad():
        torch.testing.assert_close(seen["k_proj"], attention.k_proj(norm.plain()(seen["x"])))
        torch.testing.assert_close(seen["v_proj"], attention.v_proj(norm.norm(seen["x"])))


def test_values_can_be_named_without_a_batch() -> None:
    values = {f"blocks.{i}.v_proj": f"blocks.{i}.norm1" for i in (0, 1)}
    seen = look_at(Model(), WORDS, {path: Model().get_submodule(path) for path in PATHS})
    assert not seen.order  # of another network
    net = Model()
    found = look_at(net, WORDS, {path: net.get_submodule(path) for path in PATHS})
    assert found.values == values and found.order == PATHS
    without = NormRemoval(net, schedule="one_by_one", steps=7, values=values)
    given = NormRemoval(Model(), WORDS, schedule="one_by_one", steps=7)
    assert without.schedule == given.schedule


def test_a_look_leaves_no_trace() -> None:
    net = Model().train()
    net.norm.eval()
    modes = [m.training for m in net.modules()]
    look_at(net, WORDS, {path: net.get_submodule(path) for path in PATHS})
    assert [m.training for m in net.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_finishing_takes_the_hooks_away() -> None:
    net = Model()
    removal = _removal(net, WORDS)
    assert any(m._forward_pre_hooks for m in net.modules())
    removal.finish(force=True)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert not norms_in(net)
