"""The rivals compute what a plain re-statement of their equations computes, weights copied over."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fixup_core import METHODS
from fixup_core.errors import UserError
from fixup_mt.model.config import FixupOptions
from fixup_mt.model.depth_nets import transformer
from tests.mt.helpers import batch, build, build_lm, trained

N, M, WIDTH, HEADS = 3, 2, 64, 2
SIZES = {"encoder_layers": N, "decoder_layers": M, "dropout": 0.0}
BRANCHES = 2 * N + 3 * M


class Plain:
    """An encoder and a decoder in a few lines, in double precision, from a state dict alone.

    ``join(path, layer, stack, x, branch)`` says how a branch is applied and added.
    """

    def __init__(self, model: Any, join: Callable[..., Tensor], end: Callable[..., Tensor]) -> None:
        self.w = {name: value.double() for name, value in model.state_dict().items()}
        self.model, self.join, self.end = model, join, end

    def linear(self, path: str, x: Tensor) -> Tensor:
        return F.linear(x, self.w[f"{path}.weight"], self.w[f"{path}.bias"])

    def attend(self, path: str, x: Tensor, memory: Tensor, hidden: Tensor) -> Tensor:
        """[B, T, D]; ``hidden`` [B, T, S] is true where nothing may be seen."""
        q, k, v = (
            self.linear(f"{path}.{name}_proj", y).unflatten(2, (HEADS, -1)).transpose(1, 2)
            for name, y in (("q", x), ("k", memory), ("v", memory))
        )
        logits = q @ k.transpose(2, 3) / math.sqrt(WIDTH / HEADS)
        weights = logits.masked_fill(hidden[:, None], -math.inf).softmax(3)
        return self.linear(f"{path}.out_proj", (weights @ v).transpose(1, 2).flatten(2))

    def feed(self, path: str, x: Tensor) -> Tensor:
        return self.linear(f"{path}.fc2", torch.relu(self.linear(f"{path}.fc1", x)))

    def embed(self, stack: str, tokens: Tensor) -> Tensor:
        positions = getattr(self.model, stack).embed_positions(tokens).double()
        return math.sqrt(WIDTH) * self.w[f"{stack}.embed_tokens.weight"][tokens] + positions

    def __call__(self, src_tokens: Tensor, src_lengths: Tensor, prev_output_tokens: Tensor):
        padding = src_tokens.eq(1)[:, None]
        memory = self.embed("encoder", src_tokens)
        memory = memory * ~padding.transpose(1, 2)  # as fairseq: padded places start at 0
        for layer in range(1, N + 1):
            path = f"encoder.layers.{layer - 1}"
            memory = self.join(
                self, f"{path}.self_attn", layer, "encoder", memory,
                lambda x, p=path: self.attend(f"{p}.self_attn", x, x, padding),
            )  # fmt: skip
            memory = self.join(
                self, f"{path}.final", layer, "encoder", memory, lambda x, p=path: self.feed(p, x)
            )
        memory = self.end(self, "encoder.layer_norm", memory)
        x = self.embed("decoder", prev_output_tokens)
        future = torch.ones(x.size(1), x.size(1)).triu(1).bool()[None]
        for layer in range(1, M + 1):
            path = f"decoder.layers.{layer - 1}"
            x = self.join(
                self, f"{path}.self_attn", layer, "decoder", x,
                lambda y, p=path: self.attend(f"{p}.self_attn", y, y, future),
            )  # fmt: skip
            x = self.join(
                self, f"{path}.encoder_attn", layer, "decoder", x,
                lambda y, p=path: self.attend(f"{p}.encoder_attn", y, memory, padding),
            )  # fmt: skip
            x = self.join(
                self, f"{path}.final", layer, "decoder", x, lambda y, p=path: self.feed(p, y)
            )
        x = self.end(self, "decoder.layer_norm", x)
        return F.linear(x, self.w["decoder.output_projection.weight"])


def _layer_norm(net: Plain, path: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, (WIDTH,), net.w[f"{path}.weight"], net.w[f"{path}.bias"])


def _nothing(net: Plain, path: str, x: Tensor) -> Tensor:
    return x


def _squash(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def norm(net: Plain, path: str, x: Tensor) -> Tensor:
        shift = net.w.get(f"{path}.shift", 0.0)
        squashed = function(net.w[f"{path}.slope"] * x + shift)
        return net.w[f"{path}.weight"] * squashed + net.w[f"{path}.bias"]

    return norm


def _pre(norm: Callable[..., Tensor], scale: Any = None, slot: str = "_layer_norm") -> Any:
    """``x + scale * F(norm(x))``."""

    def join(net: Plain, path: str, layer: int, stack: str, x: Tensor, branch: Any) -> Tensor:
        factor = 1.0 if scale is None else scale(net, path, layer)
        return x + factor * branch(norm(net, path + slot, x))

    return join


def _post(shortcut: Any) -> Any:
    """``norm(shortcut * x + F(x))``."""

    def join(net: Plain, path: str, layer: int, stack: str, x: Tensor, branch: Any) -> Tensor:
        path = f"{path}_layer_norm.residual"
        return _layer_norm(net, f"{path}.norm", shortcut(net, path, stack) * x + branch(x))

    return join


def _last(path: str) -> str:
    """Of the branch's last layer."""
    return path.replace(".final", ".fc2") if ".final" in path else f"{path}.out_proj"


def _gate(net: Plain, path: str, layer: int) -> Tensor:
    """An anchored scalar that started at 0."""
    path = f"{_last(path)}.multiplier"
    return net.w[f"{path}.rate"] * net.w[f"{path}.weight"]


def _layer_gate(net: Plain, path: str, layer: int) -> Tensor:
    """ReZero's: one a layer, wherever the branch."""
    return _gate(net, f"{path.rpartition('.')[0]}.self_attn", layer)


def _deepnorm_alpha(net: Plain, path: str, stack: str) -> float:
    return 0.81 * (N**4 * M) ** (1 / 16) if stack == "encoder" else (3 * M) ** (1 / 4)


def _scaled_layer_norm(net: Plain, path: str, x: Tensor) -> Tensor:
    layer = int(path.split(".")[2]) + 1
    return _layer_norm(net, f"{path}.0", x) / math.sqrt(layer)


REFERENCES: dict[str, tuple[Any, Any]] = {
    "rezero": (_pre(_nothing, _layer_gate), _nothing),
    "skipinit": (_pre(_nothing, _gate), _nothing),
    "t_fixup": (_pre(_nothing), _nothing),
    "t_fixup_adam": (_pre(_nothing, lambda *_: 15 / BRANCHES), _nothing),
    "prenorm": (_pre(_layer_norm), _layer_norm),
    "postnorm": (_post(lambda net, path, stack: 1.0), _nothing),
    "ds_init": (_post(lambda net, path, stack: 1.0), _nothing),
    "deepnorm": (_post(_deepnorm_alpha), _nothing),
    "admin": (_post(lambda net, path, stack: net.w[f"{path}.shortcut.weight"]), _nothing),
    "layerscale": (
        _pre(_layer_norm, lambda net, path, layer: net.w[f"{_last(path)}.multiplier.weight"]),
        _layer_norm,
    ),
    "layernorm_scaling": (_pre(_scaled_layer_norm), _layer_norm),
    "completep": (_pre(_layer_norm, lambda *_: 15 / BRANCHES), _layer_norm),
    "depth_mup": (_pre(_layer_norm, lambda *_: math.sqrt(15 / BRANCHES)), _layer_norm),
    "dyt": (_pre(_squash(torch.tanh)), _squash(torch.tanh)),
    "derf": (_pre(_squash(torch.erf)), _squash(torch.erf)),
}


def test_every_rival_of_transformers_has_a_reference() -> None:
    rivals = {
        name
        for name, m in METHODS.items()
        if not name.startswith("fixup") and m.only != "ResNets" and m.standard is None
    }
    assert rivals == set(REFERENCES)


@pytest.mark.parametrize("name", REFERENCES)
def test_a_rival_computes_its_equations(name: str) -> None:
    options = {"fixup_method": name, "fixup_output_bias": "none"}
    model = trained(build(**options, **SIZES)).double()
    inputs = batch()
    logits, _ = model(**inputs)
    expected = Plain(model, *REFERENCES[name])(**inputs)
    words = inputs["prev_output_tokens"] != 1  # nobody reads what stands at padding
    torch.testing.assert_close(logits[words], expected[words], rtol=1e-6, atol=1e-6)


def _std(model: Any, name: str) -> float:
    return model.get_parameter(name).std().item()


def _xavier(fan_in: int, fan_out: int) -> float:
    return math.sqrt(2 / (fan_in + fan_out))


WIDE = {"encoder_embed_dim": 128, "encoder_ffn_embed_dim": 512, "encoder_attention_heads": 2}


@pytest.mark.parametrize("shared", [False, True])
def test_t_fixup_draws_as_its_paper_says(shared: bool) -> None:
    options = {"share_all_embeddings": True} if shared else {}
    model = build(fixup_method="t_fixup", decoder_attention_heads=2, **SIZES, **WIDE, **options)
    d, inside = 128, 512
    encoder, decoder = 0.67 * N**-0.25, (9 * M) ** -0.25
    wanted = {
        "encoder.layers.2.fc1.weight": encoder * _xavier(d, inside),
        "encoder.layers.2.fc2.weight": encoder * _xavier(d, inside),
        "encoder.layers.0.self_attn.v_proj.weight": encoder * _xavier(d, d),
        "encoder.layers.0.self_attn.out_proj.weight": encoder * _xavier(d, d),
        "encoder.layers.0.self_attn.q_proj.weight": _xavier(d, d) / math.sqrt(2),
        "decoder.layers.1.encoder_attn.v_proj.weight": decoder * _xavier(d, d),
        "decoder.layers.1.encoder_attn.k_proj.weight": _xavier(d, d) / math.sqrt(2),
        "decoder.layers.1.fc1.weight": decoder * _xavier(d, inside),
        "encoder.embed_tokens.weight": (9 * N) ** -0.25 * d**-0.5,
        "decoder.embed_tokens.weight": (9 * (N if shared else M)) ** -0.25 * d**-0.5,
    }
    for name, std in wanted.items():
        if "embed" in name and name not in dict(model.named_parameters()):
            continue
        assert _std(model, name) == pytest.approx(std, rel=0.04), name


@pytest.mark.parametrize("layers", [1, 12])
def test_t_fixup_adam_draws_as_at_its_base_depth(layers: int) -> None:
    stacks = {"encoder_layers": layers, "decoder_layers": layers}
    model = build(fixup_method="t_fixup_adam", decoder_attention_heads=2, **stacks, **WIDE)
    encoder, decoder = 0.67 * 3**-0.25, (9 * 3) ** -0.25
    for name, std in {
        "encoder.layers.0.fc1.weight": encoder * _xavier(128, 512),
        "decoder.layers.0.encoder_attn.out_proj.weight": decoder * _xavier(128, 128),
        "encoder.layers.0.self_attn.q_proj.weight": _xavier(128, 128) / math.sqrt(2),
        "encoder.embed_tokens.weight": (9 * 3) ** -0.25 * 128**-0.5,
    }.items():
        assert _std(model, name) == pytest.approx(std, rel=0.04), name


def test_t_fixup_adam_is_t_fixup_where_the_rate_was_tuned() -> None:
    stacks = {"encoder_layers": 3, "decoder_layers": 3}
    logits = {}
    for method in ("t_fixup", "t_fixup_adam"):
        torch.manual_seed(5)
        options = {"fixup_method": method, "fixup_output_bias": "none"}
        logits[method] = build(**options, **SIZES | stacks)(**batch())[0]
    torch.testing.assert_close(logits["t_fixup"], logits["t_fixup_adam"], rtol=0, atol=0)


def test_deepnorm_draws_by_beta_and_shortens_nothing_else() -> None:
    model = build(fixup_method="deepnorm", decoder_attention_heads=2, **SIZES, **WIDE)
    encoder, decoder = 0.87 * (N**4 * M) ** (-1 / 16), (12 * M) ** -0.25
    for name, factor in {
        "encoder.layers.0.fc1.weight": encoder * _xavier(128, 512),
        "encoder.layers.0.self_attn.v_proj.weight": encoder * _xavier(128, 128),
        "encoder.layers.0.self_attn.q_proj.weight": _xavier(128, 128),
        "decoder.layers.0.encoder_attn.out_proj.weight": decoder * _xavier(128, 128),
    }.items():
        assert _std(model, name) == pytest.approx(factor, rel=0.04), name


def test_a_language_model_takes_the_scales_of_one_stack() -> None:
    model = build_lm(fixup_method="deepnorm", decoder_layers=4)
    alpha = model.decoder.layers[3].final_layer_norm.residual.shortcut.number.item()
    assert alpha == pytest.approx((2 * 4) ** 0.25)


def test_admin_and_layerscale_start_where_their_papers_say() -> None:
    admin = build(fixup_method="admin", **SIZES)
    omega = admin.encoder.layers[0].self_attn_layer_norm.residual.shortcut.weight
    n = 2 * N
    assert omega.tolist() == pytest.approx([math.sqrt((n + 1) / math.log(n + 1) - 1)] * WIDTH)
    scale = build(fixup_method="layerscale", **SIZES).decoder.layers[1].fc2.multiplier.weight
    assert scale.tolist() == pytest.approx([0.1] * WIDTH)


def test_rezero_has_one_multiplier_a_layer() -> None:
    layer = build(fixup_method="rezero", **SIZES).decoder.layers[0]
    first = layer.self_attn.out_proj.multiplier
    assert first is layer.encoder_attn.out_proj.multiplier is layer.fc2.multiplier
    assert first.value().item() == 0


@pytest.mark.parametrize("depth", [1, 3, 30])
def test_the_constant_of_fixup_adam_counts_the_built_model(depth: int) -> None:
    model = transformer("fixup_adam")["make_net"](depth)
    multiplier = model.encoder.layers[0].fc2.multiplier
    assert multiplier.value().item() == pytest.approx(15 / (5 * depth))
    assert multiplier.weight.item() == multiplier.initial_weight()  # the constant is no start


def test_base_branches_are_an_option_and_survive_half_precision() -> None:
    model = build(fixup_method="fixup_adam", fixup_base_branches=4.0, **SIZES).half()
    value = model.decoder.layers[0].fc2.multiplier.value()
    assert value.dtype == torch.float32 and value.item() == pytest.approx(4 / BRANCHES)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "fixup_adam", "base_branches": 0.0}, "base branches are 0"),
        ({"method": "fixup_adam", "base_branches": -3.0}, "base branches are -3"),
        ({"method": "fixup_adam", "base_branches": math.nan}, "base branches are nan"),
        ({"method": "t_fixup_adam", "base_branches": 1e-300}, "base branches are 1e-300"),
        ({"method": "fixup", "base_branches": 4.0}, "'fixup' has no factor of the depth"),
    ],
)
def test_base_branches_that_make_no_sense(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        _ = FixupOptions(**options).record
