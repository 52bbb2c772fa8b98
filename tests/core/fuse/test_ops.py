"""The fused route against the plain one: values, gradients, memory, and when it is taken."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fixup_core.errors import UserError
from fixup_core.fuse import ops
from fixup_core.fuse.fold import fold
from fixup_core.fuse.ops import ActivationScalars

NETS = [
    ("cifar_resnet14", {}, 17),
    ("cifar_resnet14", {"shortcut": "B"}, 16),
    ("cifar_resnet14", {"shortcut": "C", "checkpointing": True}, 16),
    ("cifar_resnet14", {"order": "pre"}, 9),
    ("cifar_wrn16_2", {}, 8),
    ("imagenet_resnet18", {}, 33),
    ("imagenet_resnet50", {}, 64),
]
METHODS = ("fixup", "fixup_no_bias", "fixup_no_multiplier")


def _net(name: str, method: str = "fixup", *, noise: float = 0.05, **options) -> nn.Module:
    nets = pytest.importorskip("vision.nets")
    torch.manual_seed(0)
    net = nets.build_net(name, method=method, **options)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return net


def _step(net: nn.Module, images: torch.Tensor, *, plain: bool, autocast: bool = False):
    """Logits and all gradients, the images' among them."""
    net.zero_grad()
    images = images.detach().requires_grad_()
    labels = torch.arange(len(images)) % 10
    with ops.plain_route() if plain else contextlib.nullcontext():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logits = net(images)
        F.cross_entropy(logits.float() if autocast else logits, labels).backward()
    grads = {name: p.grad.clone() for name, p in net.named_parameters()}
    return logits.detach(), grads | {"images": images.grad}


def _assert_same(net: nn.Module, images: torch.Tensor, rtol: float, **how) -> None:
    (logits, grads), (plain_logits, plain_grads) = (
        _step(net, images, plain=plain, **how) for plain in (False, True)
    )
    torch.testing.assert_close(logits, plain_logits, rtol=rtol, atol=rtol)
    for name, grad in plain_grads.items():
        near = rtol * max(grad.abs().max().item(), 1e-6)
        torch.testing.assert_close(grads[name], grad, rtol=rtol, atol=near, msg=name)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("name", "options", "size"), NETS)
def test_both_routes_agree(name: str, options: dict, size: int, method: str) -> None:
    net = _net(name, method, **options).double()
    images = torch.randn(3, 3, size, size, dtype=torch.float64)
    assert net.fuses(net.blocks())
    _assert_same(net, images, rtol=1e-11)


@pytest.mark.parametrize("channels_last", [False, True])
def test_both_routes_agree_where_everything_lies_on_a_floor(channels_last: bool) -> None:
    """At initialisation the branches are 0, and half of the sums equal their floor exactly."""
    net = _net("cifar_resnet14", noise=0.0)
    images = torch.randn(4, 3, 16, 16)
    if channels_last:
        net, images = (x.to(memory_format=torch.channels_last) for x in (net, images))
    _assert_same(net, images, rtol=1e-5)


def test_both_routes_agree_under_autocast() -> None:
    net = _net("cifar_resnet14")
    images = torch.randn(8, 3, 16, 16)
    exact = _step(net, images, plain=True)[1]
    (_, fused), (_, plain) = (_step(net, images, plain=p, autocast=True) for p in (False, True))
    off = {
        route: sum(((grads[n] - exact[n]).norm() / exact[n].norm()).item() for n in exact)
        for route, grads in (("fused", fused), ("plain", plain))
    }
    assert off["fused"] < 1.1 * off["plain"], "no less exact than the definition in bfloat16"


def test_evaluation_and_a_batch_of_one_pixel() -> None:
    net = _net("cifar_resnet14").eval()
    for images in (torch.randn(1, 3, 1, 1), torch.randn(0, 3, 8, 8)):
        with torch.no_grad():
            fused = net(images)
            with ops.plain_route():
                torch.testing.assert_close(fused, net(images))


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("with_shortcut", [True, False])
@pytest.mark.parametrize(
    "geometry", [{}, {"stride": 2, "padding": 0}, {"groups": 2, "dilation": 2}]
)
def test_gradients_of_a_convolution(geometry: dict, with_shortcut: bool, relu: bool) -> None:
    torch.manual_seed(0)
    options = {"padding": 1, "bias": True} | geometry
    conv = nn.Conv2d(2, 4, 3, **options).double()
    x = torch.randn(2, 2, 7, 6, dtype=torch.float64, requires_grad=True)
    numbers = torch.tensor([0.3, -0.2, 0.1, 1.4], dtype=torch.float64, requires_grad=True)
    shortcut = torch.randn_like(conv(x)).requires_grad_() if with_shortcut else None

    def fused(x, weight, bias, numbers, shortcut):
        before, after, on_shortcut, scale = numbers.unbind()
        parameters = {"weight": weight, "bias": bias}
        constant = on_shortcut.detach() if with_shortcut else 0.0
        scalars = ActivationScalars(before, after, constant, relu=relu)

        class Bound:
            stride, padding, dilation, groups = (
                conv.stride,
                conv.padding,
                conv.dilation,
                conv.groups,
            )

        bound = Bound()
        bound.weight, bound.bias = parameters["weight"], parameters["bias"]
        return ops.convolution(bound, x, scalars, scale=scale, shortcut=shortcut)

    inputs = (x, conv.weight, conv.bias, numbers, shortcut)
    constants = numbers.detach()
    assert torch.autograd.gradcheck(
        lambda x, weight, bias, learnt, shortcut: fused(
            x, weight, bias, torch.cat((learnt[:2], constants[2:3], learnt[2:])), shortcut
        ),
        (*inputs[:3], constants[[0, 1, 3]].requires_grad_(), shortcut),
    )
    before, after, on_shortcut, scale = constants.unbind()
    plain = F.conv2d(x, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
    out = scale * (plain + conv.bias[:, None, None]) + before
    out = out if shortcut is None else out + shortcut - on_shortcut
    torch.testing.assert_close(fused(*inputs), (out.relu() if relu else out) + after)


def test_gradients_of_an_activation() -> None:
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    numbers = torch.tensor([0.2, -0.3], dtype=torch.float64, requires_grad=True)

    def fused(x, numbers):
        before, after = numbers.unbind()
        h = x + (before + after).detach()
        return ops.activation(h, before, after)

    def plain(x, numbers):
        before, after = numbers.unbind()
        return (x + before).relu() + after

    grads = []
    for route in (fused, plain):
        out = route(x, numbers)
        grads.append(torch.autograd.grad((out * torch.arange(4.0)).sum(), (x, numbers)))
        torch.testing.assert_close(out, plain(x, numbers))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_what_lies_on_the_floor_is_told(dtype: torch.dtype) -> None:
    """0.3 is no half-precision number: the output's floor is a little off, the mask must not be."""
    after = torch.tensor(0.3, requires_grad=True)
    x = torch.tensor([-1.0, 1.0, 0.0], dtype=dtype, requires_grad=True)
    ops.activation(x, 0.0, after).sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 0.0] and after.grad.item() == 3.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sum_of_many_halves_keeps_its_digits(dtype: torch.dtype) -> None:
    grad = (1 + torch.rand(64, 8, 16, 16)).to(dtype)
    total = ops._total(grad)
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(grad.double().sum().item(), rel=1e-3)


def test_what_is_no_number_stays_none() -> None:
    """A divergence must be seen at the loss."""
    net = _net("cifar_resnet14").to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    images[0, 0, 0, 0] = float("nan")
    for route in (net, torch.compile(net, backend="eager"), fold(net)):
        logits = route(images)
        assert logits[0].isnan().all() and logits[1].isfinite().all()


def _saved_bytes(net: nn.Module, images: torch.Tensor) -> int:
    storages = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net(images)
    return sum(storages.values())


def test_no_more_is_kept_for_the_backward_pass_than_without_scalars() -> None:
    images = torch.randn(16, 3, 32, 32)
    bare = _saved_bytes(_net("cifar_resnet32", "fixup_rule2"), images)
    fused = _saved_bytes(_net("cifar_resnet32"), images)
    with ops.plain_route():
        plain = _saved_bytes(_net("cifar_resnet32"), images)
    weights = sum(4 * block.convs[-1].weight.numel() for block in _net("cifar_resnet32").blocks())
    assert fused < bare + weights + 10_000, "the last weights times their multiplier, and scalars"
    assert plain > 2 * bare


def test_who_listens_hears_every_module() -> None:
    net = _net("cifar_resnet8")
    images, heard = torch.randn(2, 3, 8, 8), []
    norm = net.blocks()[1].before_acts[0]
    assert net.fuses(net.blocks())
    handle = norm.register_forward_hook(lambda *_: heard.append(1))
    net(images)
    assert heard == [1] and not net.fuses(net.blocks())
    handle.remove()
    assert net.fuses(net.blocks())
    everywhere = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert not net.fuses(net.blocks())
    everywhere.remove()
    with net.blocks()[0].left_out():
        assert not net.fuses(net.blocks())


@pytest.mark.parametrize(
    "change",
    [
        lambda block: setattr(block, "activation", nn.GELU()),
        lambda block: block.before_acts.__setitem__(0, nn.BatchNorm2d(16)),
        lambda block: block.convs.__setitem__(
            1, nn.Conv2d(16, 16, 3, 1, 1, padding_mode="reflect")
        ),
        lambda block: block.convs.__setitem__(1, Doubled(16, 16, 3, 1, 1)),
    ],
)
def test_what_was_put_into_a_network_is_used(change) -> None:
    net = _net("cifar_resnet8").eval()
    change(net.blocks()[0])
    images = torch.randn(2, 3, 8, 8)
    with ops.plain_route():
        expected = net(images)
    torch.testing.assert_close(net(images), expected)
    with pytest.raises(UserError, match="can be folded"):
        fold(net)


class Doubled(nn.Conv2d):
    """A convolution with a forward pass of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_recorders_hear_the_plain_route() -> None:
    net = _net("cifar_resnet8").eval()
    images = torch.randn(2, 3, 8, 8)
    traced = torch.jit.trace(net, images)
    torch.testing.assert_close(traced(images), net(images))


def test_compilers_and_function_transforms_trace_the_fused_route() -> None:
    net = _net("cifar_resnet8").double()
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    expected = _step(net, images, plain=True)[1]
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    labels = torch.arange(3)

    net.zero_grad()
    F.cross_entropy(compiled(images), labels).backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])

    parameters = dict(net.named_parameters())

    def loss(parameters, image, label):
        logits = torch.func.functional_call(net, parameters, (image[None],))
        return F.cross_entropy(logits, label[None])

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, images, labels)
    for name, grads in each.items():
        torch.testing.assert_close(grads.mean(0), expected[name])


def test_second_derivatives_want_the_plain_route() -> None:
    net = _net("cifar_resnet8")
    images = torch.randn(2, 3, 8, 8, requires_grad=True)
    (grad,) = torch.autograd.grad(net(images).sum(), images, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
    with ops.plain_route():
        (grad,) = torch.autograd.grad(net(images).sum(), images, create_graph=True)
        grad.sum().backward()


def test_no_number_is_read_from_another_device() -> None:
    """Reading one waits for the device; the meta device, which has none, stands for it here."""
    net = _net("cifar_resnet8", order="pre").to("meta")
    net(torch.randn(2, 3, 8, 8, device="meta")).sum().backward()
    post = _net("cifar_resnet8").to("meta")
    post(torch.randn(2, 3, 8, 8, device="meta")).sum().backward()
    for parameter in (*net.parameters(), *post.parameters()):
        assert parameter.grad.shape == parameter.shape
