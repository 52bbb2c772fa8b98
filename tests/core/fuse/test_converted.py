"""Networks that ``fixup_`` has converted, folded: plain, and with the outputs they had."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from fixup_core import Scalar, ScalarBias, export_onnx, fixup_, fold, scalars
from fixup_core.convert import attach
from fixup_core.convert.attach import attach_after_, attach_before_, attach_multiplier_
from fixup_core.errors import UserError
from fixup_core.fuse.constants import Affine, Unnormalised, WithConstants
from fixup_core.rules.frozen import FrozenNorm, RemovedNorm
from fixup_core.rules.placed import DepthMultiplier, PlacedConstant
from fixup_core.rules.scalars import ScalarMultiplier
from tests.core.convert.nets import BRANCHES, IMAGES, NETS, Basic, Encoder, Net, Small, Untraceable
from tests.core.foreign import GatedMlp, Separable, Tied

FOREIGN = {
    "Basic": (Basic, {"BorderedConv2d": 2, "Affine": 1, "Unnormalised": 1}),
    "Small": (Small, {"Unnormalised": 5}),
    "PreActivation": (NETS["PreActivation"][0], {"Affine": 9, "BorderedConv2d": 8}),
    "Separable": (Separable, {"Unnormalised": 5, "WithConstants": 3, "Affine": 3}),
    "GatedMlp": (GatedMlp, {"Unnormalised": 7}),
    "encoder": (Encoder, {"Unnormalised": 4}),
    "encoder, norm first": (NETS["encoder, norm first"][0], {"Unnormalised": 4}),
    "resnet18": (NETS["resnet18"][0], {"Affine": 9, "BorderedConv2d": 16, "Unnormalised": 11}),
    "timm vit": (NETS["timm vit, drop path"][0], {"Unnormalised": 5}),
}
"""Each with what stays of its scalars and norms, without a batch."""


def _converted(make: Callable[[], nn.Module], inputs: Any = IMAGES, **options: Any) -> nn.Module:
    """Converted, and as after a training: nothing is 0 or 1 any more."""
    torch.manual_seed(0)
    net = make()
    fixup_(net, example_inputs=inputs, verbose=False, **options)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.05 * torch.randn(parameter.shape)
    _scatter_(net)
    return net


def _scatter_(net: nn.Module) -> None:
    with torch.no_grad():
        for scalar in scalars(net):
            scalar.weight += 0.3 * torch.randn(1)


def _assert_same(found: Any, expected: Any, rtol: float = 1e-5) -> None:
    near = rtol * expected.abs().max().item()
    assert near > 0
    torch.testing.assert_close(found, expected, rtol=0, atol=near)


def _folded(net: nn.Module, inputs: Any = IMAGES, rtol: float = 1e-5) -> nn.Module:
    """Folded, and compared in evaluation without gradients, where PyTorch has its fast paths."""
    plain = fold(net)
    modes = [module.training for module in net.modules()]
    with torch.no_grad():
        _assert_same(plain(inputs), net.eval()(inputs), rtol)
    for module, mode in zip(net.modules(), modes, strict=True):
        module.training = mode
    ours = (Scalar, PlacedConstant, RemovedNorm, FrozenNorm)
    assert not [m for m in plain.modules() if isinstance(m, ours)]
    assert not any(hook.__module__ == attach.__name__ for hook in _hooks(plain))
    assert not any(m.training for m in plain.modules())
    assert not any(p.requires_grad for p in plain.parameters())
    assert not hasattr(plain, "residual_branches")
    return plain


def _hooks(net: nn.Module) -> list[Any]:
    tables = ((m._forward_pre_hooks, m._forward_hooks) for m in net.modules())
    return [hook for both in tables for table in both for hook in table.values()]


def _ours(net: nn.Module) -> dict[str, int]:
    names = [type(m).__name__ for m in net.modules() if type(m).__module__.startswith("fixup_")]
    return {name: names.count(name) for name in names}


@pytest.mark.parametrize("calibrate", [False, True])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_folded_network_is_plain_and_the_same(name: str, calibrate: bool) -> None:
    make, left = FOREIGN[name]
    net = _converted(make, calibrate=calibrate)
    plain = _folded(net)
    if not calibrate:
        assert _ours(plain) == left
    assert net.training and all(p.requires_grad for p in net.parameters())


def test_without_the_scalars_the_outputs_would_be_others() -> None:
    net = _converted(Basic)
    plain = fold(net)
    with torch.no_grad():
        for scalar in scalars(net):
            scalar.weight.fill_(scalar.initial)
        expected = net.eval()(IMAGES)
        off = (plain(IMAGES) - expected).abs().max()
    assert off > 0.01 * expected.abs().max()


@pytest.mark.parametrize("method", ["fixup_adam", "fixup_complete", "skipinit", "rezero"])
def test_other_methods_are_folded(method: str) -> None:
    _folded(_converted(Encoder, method=method))


def test_the_original_stays_as_it_is() -> None:
    net = _converted(Separable, calibrate=True)
    before, shown, outputs = copy.deepcopy(net.state_dict()), repr(net), net(IMAGES)
    plain = fold(net)
    for tensor in (*plain.parameters(), *plain.buffers()):
        tensor.zero_()
    assert repr(net) == shown and torch.equal(net(IMAGES), outputs)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_a_folded_network_is_copied_pickled_and_loaded() -> None:
    first, second = (_converted(make) for make in (Separable, Separable))
    _scatter_(second)
    folded, other = fold(first), fold(second)
    expected = folded(IMAGES)
    assert not torch.allclose(other(IMAGES), expected)
    other.load_state_dict(folded.state_dict())
    file = io.BytesIO()
    torch.save(folded, file)
    file.seek(0)
    for twin in (other, copy.deepcopy(folded), torch.load(file, weights_only=False)):
        assert torch.equal(twin(IMAGES), expected)


def test_a_state_dict_holds_the_borders() -> None:
    first, second = (_converted(Basic) for _ in range(2))
    _scatter_(second)
    folded, other = fold(first), fold(second)
    other.load_state_dict(folded.state_dict())
    assert torch.equal(other(IMAGES), folded(IMAGES))


class Odd(nn.Linear):
    """A linear layer that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


class Same(nn.Linear):
    """One that computes the same."""


class Conv1D(nn.Module):
    """As Hugging Face's: the weight is transposed."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.nf = outputs
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


class Wide(nn.Conv2d):
    """A convolution of its own class."""


def _parametrised() -> nn.Module:
    return nn.utils.parametrizations.weight_norm(nn.Linear(6, 5))


def _pruned() -> nn.Module:
    layer = nn.Linear(6, 5, dtype=torch.float64)  # the masked weight is not what double() changes
    layer.requires_grad_(False)  # and could not be copied otherwise
    prune.random_unstructured(layer, "weight", 0.5)
    return layer


SIGNAL, IMAGE, VOLUME = (2, 6), (2, 6, 7, 8), (2, 6, 4, 5, 6)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], bool]] = {
    "linear": (lambda: nn.Linear(6, 5), SIGNAL, True),
    "no bias vector": (lambda: nn.Linear(6, 5, bias=False), SIGNAL, True),
    "subclass": (lambda: Same(6, 5), SIGNAL, True),
    "another forward": (lambda: Odd(6, 5), SIGNAL, False),
    "Conv1D": (lambda: Conv1D(5, 6), SIGNAL, True),
    "weight norm": (_parametrised, SIGNAL, True),
    "spectral norm": (
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 5)),
        SIGNAL,
        True,
    ),
    "pruned": (_pruned, SIGNAL, False),
    "1d": (lambda: nn.Conv1d(6, 4, 3, padding=2), (2, 6, 9), True),
    "unpadded": (lambda: nn.Conv2d(6, 4, 3), IMAGE, True),
    "padded": (lambda: nn.Conv2d(6, 4, 3, padding=(1, 2), stride=2, bias=False), IMAGE, True),
    "same": (lambda: nn.Conv2d(6, 4, (2, 4), padding="same"), IMAGE, True),
    "grouped": (lambda: nn.Conv2d(6, 6, 3, padding=1, groups=3, dilation=2), IMAGE, True),
    "reflect": (lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"), IMAGE, True),
    "circular": (lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="circular"), IMAGE, True),
    "replicate": (lambda: nn.Conv2d(6, 4, 3, padding=1, padding_mode="replicate"), IMAGE, True),
    "own class, unpadded": (lambda: Wide(6, 4, 3), IMAGE, True),
    "own class, padded": (lambda: Wide(6, 4, 3, padding=1), IMAGE, False),
    "3d": (lambda: nn.Conv3d(6, 4, 3, padding=1), VOLUME, True),
    "transposed": (lambda: nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1), IMAGE, False),
    "transposed, grouped": (
        lambda: nn.ConvTranspose1d(6, 4, 3, groups=2, bias=False),
        (2, 6, 9),
        False,
    ),
    "another module": (lambda: nn.PReLU(6), SIGNAL, False),
}
"""A layer, the size of its input, and whether a bias before it goes into it."""


def _attached(layer: nn.Module, *, bias: bool = True) -> nn.Sequential:
    """The layer with all three scalars, in a network that has also lost a norm."""
    torch.manual_seed(1)
    if bias:
        attach_before_(layer)
    attach_multiplier_(layer, DepthMultiplier(1.0, lambda place: 0.5))
    attach_after_(layer)
    net = nn.Sequential(layer)
    layer.fixup_multiplier.constant.number.fill_(0.5)
    _scatter_(net)
    return net


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_takes_what_it_can(name: str) -> None:
    make, size, whole = LAYERS[name]
    net = _attached(make()).double()
    plain = _folded(net, torch.randn(size, dtype=torch.float64), rtol=1e-12)
    assert isinstance(plain[0], WithConstants) is not whole


@pytest.mark.parametrize("name", ["transposed", "own class, padded"])
def test_constants_stay_before_a_layer_alone(name: str) -> None:
    plain = fold(_attached(LAYERS[name][0]()))
    assert plain[0].before is not None
    assert plain[0].multiplier is None and plain[0].after is None
    without = fold(_attached(LAYERS[name][0](), bias=False))
    assert not isinstance(without[0], WithConstants)


def test_the_border_of_an_image_is_exact_and_would_not_be_without() -> None:
    net = _attached(nn.Conv2d(3, 4, 3, padding=1)).double()
    images = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    plain = _folded(net, images, rtol=1e-12)
    assert plain[0].fill == -net[0].fixup_before.value().item()
    plain[0].fill = 0.0
    off = (plain(images) - net(images)).abs().amax((0, 1))
    assert off[1:-1, 1:-1].max() < 1e-12 < 1e-3 < off[0].min()


def test_a_layer_without_scalars_keeps_its_parameters_and_gets_none() -> None:
    net = nn.Sequential(nn.Linear(3, 3, bias=False))
    attach_before_(net[0])
    plain = fold(net)
    assert plain[0].bias is None and torch.equal(plain[0].weight, net[0].weight)
    assert plain[0].weight is not net[0].weight


class Attention(nn.Module):
    """Attention within a module of somebody's own, to itself or to another signal."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        itself = self.attention(x, x, x, need_weights=False)[0]
        return itself + self.attention(x, key=x.flip(1), value=x.flip(1))[0]


@pytest.mark.parametrize("bias", [False, True])
def test_attention_that_is_not_known_keeps_the_bias_before_it(bias: bool) -> None:
    net = Attention(bias=bias, add_bias_kv=True)
    _attached(net.attention)
    plain = _folded(net, torch.randn(2, 5, 8))
    assert plain.attention.before is not None and plain.attention.multiplier is None
    assert plain.attention.embed_dim == 8 and plain.attention.layer.out_proj.bias is not None


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_attention_in_layers_of_pytorch_takes_all(norm_first: bool, bias: bool) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            options: Any = {"batch_first": True, "norm_first": norm_first, "bias": bias}
            self.seq = nn.Transformer(8, 2, 2, 2, 16, 0.0, **options)
            self.head = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.seq(x, 2 * x[:, :3]))

    x = torch.randn(2, 5, 8)
    plain = _folded(_converted(Both, x), x)
    assert set(_ours(plain)) == {"Unnormalised"}
    cross = plain.seq.decoder.layers[0].multihead_attn.in_proj_bias
    assert cross is not None and (bias or (cross[:8].any() and not cross[8:].any()))


def test_the_fast_path_of_an_encoder_does_not_bring_norms_back() -> None:
    net = _converted(Encoder, keep_norms=True)
    _folded(net)
    plain = fold(_converted(Encoder))
    plain.encoder.layers[0].activation_relu_or_gelu = 1
    with torch.no_grad(), pytest.raises(AttributeError, match="has no attribute 'device'"):
        plain(IMAGES)


WORDS = torch.arange(6).view(2, 3)


def test_a_tied_output_is_no_longer_tied_where_it_changes() -> None:
    net = _converted(Tied, WORDS)
    attach_multiplier_(net.out, ScalarMultiplier(1.7))
    plain = _folded(net, WORDS)
    assert plain.out.weight is not plain.embed.weight and plain.out.bias is not None
    assert torch.equal(plain.embed.weight, net.embed.weight)
    assert net.out.weight is net.embed.weight


def test_a_layer_that_is_called_twice_under_two_names_is_folded_once() -> None:
    net = Net(lambda n, x: n.e(n.other(n.a(x))))
    net.other = net.a
    attach_before_(net.a)
    attach_multiplier_(net.a, ScalarMultiplier(0.7))
    _scatter_(net)
    plain = _folded(net, torch.randn(2, 3, 8))
    assert plain.a is plain.other
    net = Net(lambda n, x: n.other(n.odd(x)))
    net.odd = net.other = Odd(8, 8)
    attach_before_(net.odd)
    _scatter_(net)
    assert isinstance(_folded(net, torch.randn(2, 3, 8)).other, WithConstants)


def test_a_removed_norm_takes_further_arguments_and_keeps_its_activation() -> None:
    norm = nn.BatchNorm2d(3)
    norm.act = nn.ReLU()
    images = IMAGES.clone()
    for options in ({"biased": True}, {"frozen": True}, {}):
        net = nn.Sequential(RemovedNorm(norm, **options))
        if "frozen" in options:
            net[0].frozen.scale.copy_(torch.tensor([1.0, 2.0, 3.0]))
        _scatter_(net)
        plain = _folded(net, images)
        assert isinstance(plain[0], Affine) and isinstance(plain[0].act, nn.ReLU)
    plain = fold(nn.Sequential(RemovedNorm(nn.LayerNorm(3))))[0]
    assert isinstance(plain, Unnormalised) and isinstance(plain, nn.Identity)
    assert plain(images, images) is images


def test_hooks_of_others_stay_and_see_what_they_saw() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), RemovedNorm(nn.LayerNorm(4), biased=True))
    net[0].register_forward_pre_hook(lambda module, args: (args[0].relu(),))
    for layer in net[:2]:
        attach_before_(layer)
        attach_multiplier_(layer, ScalarMultiplier(0.5))
    net[0].register_forward_hook(lambda module, args, output: output.tanh())
    net[1].register_forward_pre_hook(lambda module, args: (args[0].sigmoid(),))
    net[1].register_forward_pre_hook(lambda module, args: (args[0].exp(),), prepend=True)
    net[2].register_forward_hook(lambda module, args, output: output.square())
    _scatter_(net)
    plain = _folded(net, torch.randn(3, 4))
    assert type(plain[0]) is nn.Linear and isinstance(plain[1], WithConstants)
    assert len(_hooks(plain)) == 5


def test_half_precision_is_kept() -> None:
    net = _converted(Separable, calibrate=True).bfloat16()
    plain, images = fold(net), IMAGES.bfloat16()
    assert {p.dtype for p in plain.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        _assert_same(plain(images), net.eval()(images), rtol=0.05)


def test_what_cannot_be_folded_is_told() -> None:
    net = nn.Sequential(_attached(nn.Linear(4, 4)), ScalarBias())
    with pytest.raises(UserError, match="own forward pass uses the scalar 1,") as caught:
        fold(net)
    assert "\n" not in str(caught.value)
    net = _attached(nn.Linear(4, 4))
    net.kept = 2 * net[0].weight
    with pytest.raises(UserError, match="cannot be copied"):
        fold(net)
    with pytest.raises(UserError, match="convert it by fixup_"):
        fold(Basic())


def _engine() -> Any:
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    return pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("make", [Separable, Encoder])
def test_onnx_files_compute_the_same_for_any_batch(
    make: Callable[[], nn.Module], tmp_path: Path
) -> None:
    engine, file = _engine(), tmp_path / "net.onnx"
    net = _converted(make, calibrate=True)
    assert export_onnx(net, IMAGES[:1], file) < 1e-4
    assert net.training and [path.name for path in tmp_path.iterdir()] == ["net.onnx"]
    session = engine.InferenceSession(str(file))
    (found,) = session.run(["output"], {"images": IMAGES[:3].numpy()})
    with torch.no_grad():
        _assert_same(torch.from_numpy(found), net.eval()(IMAGES[:3]), rtol=1e-4)


class Named(nn.Module):
    """Named arguments, a mapping for its outputs, and a batch whose size is fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.scale = nn.Linear(8, 8), 2.0

    def forward(self, x: Tensor, *, mask: Tensor, twice: bool = False) -> dict[str, Any]:
        scores = self.fc(x.view(4, 8)).masked_fill(mask, -torch.inf)
        return {"scores": scores * (1 + twice), "none": None, "parts": (x, mask)}


def test_named_inputs_and_outputs_and_fixed_sizes(tmp_path: Path) -> None:
    engine, file = _engine(), tmp_path / "net.onnx"
    net = Named()
    _attached(net.fc)
    mask = torch.arange(32).view(4, 8) % 5 == 0
    inputs = {"mask": mask, "x": torch.randn(4, 8), "twice": True}
    assert export_onnx(net, inputs, file) < 1e-4
    session = engine.InferenceSession(str(file))
    assert [given.name for given in session.get_outputs()] == ["scores", "parts_0", "parts_1"]
    assert {given.name: given.shape for given in session.get_inputs()} == {
        "mask": [4, 8],
        "x": [4, 8],
    }


def test_nothing_is_written_where_an_export_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _engine()
    file = tmp_path / "net.onnx"
    file.write_text("before")
    net = Untraceable()
    fixup_(net, branches=BRANCHES, head="fc", verbose=False)
    with pytest.raises(
        UserError, match="Untraceable cannot be exported: Could not guard"
    ) as caught:
        export_onnx(net, torch.randn(2, 8), file)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="'x' is a set"):
        export_onnx(_attached(nn.Linear(4, 4)), {"x": {1}}, file)
    with pytest.raises(UserError, match="in half precision"):
        export_onnx(_attached(nn.Linear(4, 4)).half(), torch.randn(2, 4).half(), file)
    monkeypatch.setattr("fixup_core.fuse.onnx_export.fold", _spoilt)
    with pytest.raises(UserError, match="the outputs of onnxruntime differ"):
        export_onnx(_attached(nn.Linear(4, 4)), torch.randn(2, 4), file)
    assert file.read_text() == "before" and len(list(tmp_path.iterdir())) == 1


def _spoilt(net: nn.Module) -> nn.Module:
    plain = fold(net)
    plain[0].bias += 0.01
    return plain


def _gpt2() -> nn.Module:
    made = pytest.importorskip("transformers")
    return made.GPT2LMHeadModel(
        made.GPT2Config(
            vocab_size=11, n_positions=8, n_embd=16, n_layer=2, n_head=2, use_cache=False,
            bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip


def _bert() -> nn.Module:
    made = pytest.importorskip("transformers")
    return made.BertForMaskedLM(
        made.BertConfig(
            vocab_size=11, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=32,
        )
    )  # fmt: skip


GPT2_BRANCHES = {
    f"h.{i}.mlp": [f"transformer.h.{i}.mlp.c_fc", f"transformer.h.{i}.mlp.c_proj"] for i in (0, 1)
}


@pytest.mark.parametrize(
    ("make", "options"),
    [(_gpt2, {"branches": GPT2_BRANCHES, "head": "lm_head"}), (_bert, {})],
    ids=["gpt2", "bert"],
)
def test_networks_of_hugging_face(
    make: Callable[[], nn.Module], options: dict[str, Any], tmp_path: Path
) -> None:
    inputs = {"input_ids": WORDS}
    net = _converted(make, inputs, **options).eval()
    plain = fold(net)
    assert not any(isinstance(module, (Scalar, WithConstants)) for module in plain.modules())
    with torch.no_grad():
        _assert_same(plain(**inputs).logits, net(**inputs).logits)
    _engine()
    assert export_onnx(net, inputs, tmp_path / "net.onnx") < 1e-4
