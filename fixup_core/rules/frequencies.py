"""The bias vector of the output layer at the frequencies of the classes.

While the output layer is 0 all classes are equally likely, and the first thing to learn is which
are frequent. That gradient is the same at every position: all branches together push the stream in
one direction, under Adam, whose steps do not know how small a gradient is, by far too much. A bias
vector that starts at the logarithm of the frequencies leaves nothing of it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fixup_core.errors import UserError
from fixup_core.rules.branches import WeightLayer, collect_classifiers


@torch.no_grad()
def start_at_frequencies_(net: nn.Module, labels: Tensor) -> None:
    """Let the output of ``net`` start at the classes' frequencies.

    The output layer's bias vector becomes ``log((n + 1) / sum(n + 1))`` for n labels of a class,
    and learns from there; a layer without one gets one, ``bias``. ``fixup_init_`` takes it back to
    the same start. For classes of different frequencies, as words are; call it before the
    optimiser is made.

    Args:
        net: Converted by ``fixup_``, or with ``classifier_layers()``; one output layer.
        labels: Of training data, integers from 0, of any shape; a batch will do, more is better.
            Negative ones are left out (``cross_entropy``'s ``ignore_index``).

    Raises:
        UserError: There is not one output layer, it is no layer with a row of weights a class, its
            bias vector is frozen, or the labels are no classes of it. ``net`` is as it was.
    """
    layer = _output_layer(net)
    counts = _counts(labels, layer.parameter.shape[0]) + 1
    start = (counts / counts.sum()).log().to(layer.parameter)
    module, bias = layer.module, layer.bias_vector
    if bias is None:
        module.register_parameter("bias", nn.Parameter(start.clone()))
    else:
        bias.copy_(start)
    module.initial_bias = start  # read by the initialisation, which writes all weights


def _output_layer(net: nn.Module) -> WeightLayer:
    layers = collect_classifiers(net)
    if len(layers) != 1:
        raise UserError(
            f"{type(net).__name__} has {len(layers)} output layers, and frequencies are for one: "
            "convert it by fixup_ first, with head= where there are more"
        )
    module = layers[0].module
    path = next(path for path, one in net.named_modules() if one is module)
    if not hasattr(module, "bias") or getattr(module, "transposed", False):
        raise UserError(f"{path} ({type(module).__name__}) takes no bias vector for its classes")
    # A layer that was converted without a bias vector names none.
    layer = WeightLayer(module, layers[0].weight)
    bias = layer.bias_vector
    if bias is not None and not (bias.requires_grad and bias.shape == layer.parameter.shape[:1]):
        raise UserError(f"{path}.bias is frozen, or has not one number for each class")
    return layer


def _counts(labels: Tensor, classes: int) -> Tensor:
    """How often each class is found, [classes], in float64."""
    if labels.is_floating_point() or labels.is_complex():
        raise UserError(f"labels are integers, got {labels.dtype}")
    found = labels.flatten()
    found = found[found >= 0].long()
    if not len(found) or found.max() >= classes:
        seen = f"the largest is {int(found.max())}" if len(found) else "there are none"
        raise UserError(f"labels are from 0 to {classes - 1} here, and {seen}")
    return torch.bincount(found, minlength=classes).double().to(labels.device)
