"""The only writer of weights: ``initialise_``, by a method of the registry; and its short names.

It makes a plan for every parameter of the built network, and only then writes: where it raises,
the network is as it was.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Generator, Tensor, nn

from fixup_core.errors import UserError
from fixup_core.rules.branches import (
    WeightLayer,
)
from fixup_core.rules.frozen import frozen_norms
from fixup_core.rules.init_plan import Entry, InitPlan, write_
from fixup_core.rules.method import Method
from fixup_core.rules.methods import method_named
from fixup_core.rules.parametrised import plain_weights
from fixup_core.rules.report import InitReport, Row
from fixup_core.rules.standards import (
    CONVOLUTIONS,
    HE_NORMAL,
    TORCH_DEFAULT,
    Standard,
)


def initialise_(
    net: nn.Module,
    method: str | Method,
    *,
    batch: Any = None,
    keep: Iterable[nn.Parameter] = (),
    gains: Iterable[nn.Parameter] = (),
    generator: Generator | None = None,
) -> InitReport:
    """Write every parameter of ``net`` as a method of the registry has it.

    L and every m are counted from the branches that the blocks declare. Scalars get their initial
    value, bias vectors 0 and gains 1; what a batch has set (``fixup_``'s ``calibrate``) is gone.
    Everything is drawn anew, so a second call is harmless.

    Differs: a classifier that shares its weight with an embedding cannot be 0; it is drawn as
    the embedding it is, and the report says so.

    Args:
        net: Built, on any device, in any dtype.
        method: A name in ``METHODS``, or a record of one's own: an ablation is
            ``dataclasses.replace(METHODS["fixup"], factor=...)``.
        batch: What ``net`` is called with, once, by a method of unit variance (LSUV): a tensor or
            a tuple of arguments. Others do not look at it.
        keep: Parameters to leave as they are, such as pretrained embeddings.
        gains: Parameters that multiply element by element, such as layer scales: they start at 1.
        generator: Source of the random numbers; PyTorch's own by default.

    Returns:
        What was written, one row a parameter; ``str()`` of it is a table.

    Raises:
        UserError: A parameter that no rule covers (it is named), a network without branches where
            the method needs them, a weight that lies in two branches, a method of unit variance
            without a batch, or last gains where no norm ends a branch. Nothing has been written.
    """
    method = method_named(method)
    if method.unit_variance and batch is None:
        raise UserError(f"the method {method.name!r} looks at data: give it a batch=")
    with plain_weights(net) as parametrised:
        kept = {id(parameter): parameter for parameter in keep}
        for module in parametrised:
            kept |= {id(parameter): parameter for parameter in module.plain(kept)}
        plan = InitPlan(net, method, kept.values())
        plan.add_everything(gains)
        for module in parametrised:
            module.check(plan.entries)
        for norm in frozen_norms(net):
            norm.reset_()
        report = plan.write_(generator)
    return _unit_variance_(net, batch, report) if method.unit_variance else report


def fixup_init_(
    net: nn.Module,
    *,
    keep: Iterable[nn.Parameter] = (),
    gains: Iterable[nn.Parameter] = (),
    generator: Generator | None = None,
) -> InitReport:
    """Initialise ``net`` by the Fixup rules (Zhang et al. 2019, section 4).

    The last layer of each branch and the classifier become 0, the other layers of a branch are
    drawn from their standard distribution times the factor of rule 2, layers outside the branches
    from their standard distribution. Short for ``initialise_(net, "fixup")``, which says
    what the arguments are and what is raised.
    """
    return initialise_(net, "fixup", keep=keep, gains=gains, generator=generator)


def standard_init_(
    net: nn.Module,
    *,
    convolution: Standard = HE_NORMAL,
    zero_last_gains: bool = False,
    generator: Generator | None = None,
) -> InitReport:
    """Initialise ``net`` as a network without Fixup is: what it is compared with.

    Convolutions and linear layers are drawn from one distribution, classifiers as PyTorch draws
    them, normalisation layers get gain 1, bias vectors 0.

    Args:
        net: Built, on any device, in any dtype.
        convolution: The distribution, He's or Xavier's.
        zero_last_gains: ZeroInit (Goyal et al. 2017, section 5.1): the normalisation layers that
            the blocks declare in ``last_norms()``, those that end a branch, get gain 0.
        generator: Source of the random numbers; PyTorch's own by default.

    Returns:
        What was written, one row a parameter.

    Raises:
        UserError: As ``initialise_``.
    """
    method = Method(
        "standard",
        "one distribution for all layers, norms at 1",
        "",
        standard=convolution,
        norm="any",
        zero_last_gains=zero_last_gains,
    )
    return initialise_(net, method, generator=generator)


def lsuv_init_(net: nn.Module, *args: Any, generator: Generator | None = None) -> InitReport:
    """Layer-sequential unit-variance initialisation (Mishkin and Matas 2016, algorithm 1).

    Convolutions and linear layers are drawn orthonormal, then each is divided by the standard
    deviation of its output on one batch, in the order in which the data pass them.

    Differs: the paper repeats the division until the variance is within 0.1 of 1. A layer is linear
    but for its bias, the same number in all channels, which has no part in the variance: one
    division makes it 1, and one pass serves all layers.

    Args:
        net: Built; it is called once, in its present mode.
        args: The batch, as ``net`` takes it.
        generator: Source of the random numbers; PyTorch's own by default.

    Returns:
        What was written; the standard deviations are those after the division.
    """
    # The registry's method is without norms; a network of one's own may have them.
    method = replace(method_named("lsuv"), norm="any")
    return initialise_(net, method, batch=args, generator=generator)


def _unit_variance_(net: nn.Module, batch: Any, report: InitReport) -> InitReport:
    """Divide every layer by the standard deviation of its output, in the order of the call."""
    args = batch if isinstance(batch, tuple) else (batch,)
    layers = [module for module in net.modules() if isinstance(module, (*CONVOLUTIONS, nn.Linear))]

    def divide(module: Any, inputs: Any, output: Tensor) -> Tensor:
        std = output.std().clamp_min(torch.finfo(output.dtype).tiny)
        module.weight.div_(std)
        return module.forward(*inputs)

    hooks = [layer.register_forward_hook(divide) for layer in layers]
    try:
        with torch.no_grad():
            net(*args)
    finally:
        for hook in hooks:
            hook.remove()
    parameters = dict(net.named_parameters())
    rows = tuple(
        row if row.value is not None else replace(row, std=parameters[row.name].std().item())
        for row in report.rows
    )
    return replace(report, rows=rows)


def draw_zero_heads_(
    heads: Iterable[nn.Module | WeightLayer], *, generator: Generator | None = None
) -> None:
    """Draw those of the layers whose weight is 0 as PyTorch does.

    For measurements on a network that rule 1 has just initialised: behind a head at 0 nothing but
    the head can move.
    """
    for head in heads:
        layer = head if isinstance(head, WeightLayer) else WeightLayer(head)
        with torch.no_grad(), plain_weights(layer.module):
            weight = layer.parameter
            if not weight.any():
                row = Row("", "classifier", std=TORCH_DEFAULT.std(weight, layer.module))
                write_(Entry(weight, row, shape=TORCH_DEFAULT.shape), generator)
