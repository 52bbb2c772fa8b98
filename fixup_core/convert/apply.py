"""A plan carried out: norms removed, scalars attached, branches and head declared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import nn

from fixup_core.convert.attach import (
    Declared,
    attach_after_,
    attach_before_,
    attach_multiplier_,
)
from fixup_core.convert.plan import ConversionPlan, PlannedBranch, PlannedNorm
from fixup_core.convert.survey import Layer
from fixup_core.rules.branches import (
    ResidualBranch,
    WeightLayer,
    collect_branches,
    collect_classifiers,
)
from fixup_core.rules.frozen import RemovedNorm, frozen_norms
from fixup_core.rules.method import Method
from fixup_core.rules.placed import placed_constants
from fixup_core.rules.scalars import scalars
from fixup_core.rules.standards import (
    FORWARD,
    FORWARD_ACTIVATED,
    HE_PER_GROUP,
    TOKEN_NORMAL,
    XAVIER_PER_EXPERT,
    XAVIER_UNIFORM,
)

ATTENTION_ROLES = {
    "in_proj_weight": "value",
    "q_proj_weight": "query",
    "k_proj_weight": "key",
    "v_proj_weight": "value",
    "out_proj.weight": "out",
}
"""Of the weights of ``nn.MultiheadAttention``. The packed matrix is a factor of the branch by its
values alone."""


STANDARDS = {"conv": HE_PER_GROUP, "experts": XAVIER_PER_EXPERT}
"""By the role of a layer; Xavier's for all others."""


def apply_(net: nn.Module, plan: ConversionPlan, method: Method, frozen: bool) -> None:
    """Change the modules of ``net`` as planned; no weight is written.

    Args:
        net: The network that ``plan`` is for.
        plan: What to do.
        method: Its scalars are attached.
        frozen: Put a frozen norm in the place of every norm that one batch can set.
    """
    layers = {layer: weight_layer(net, layer) for layer in plan.layers()}
    _remove_norms_(net, plan.norms, biased=method.biases, frozen=frozen)
    for module in net.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # a fast path that calls no hooks, so no scalars
    attach_scalars_(net, plan, method)
    if not collect_branches(net):
        net.residual_branches = Declared(  # type: ignore[assignment]
            declared_branch(branch, layers) for branch in plan.branches
        )
    if not collect_classifiers(net):
        net.classifier_layers = Declared(  # type: ignore[assignment]
            # The factor of rule 2 is not for a head, nor is the distribution that it scales.
            replace(layers[layer], standard=None)
            for layer in plan.head
        )
    anew = [*(trunk_layer(net, layer) for layer in plan.trunk), *_tokens(net, plan.tokens)]
    if anew:
        net.standard_layers = Declared(anew)  # type: ignore[assignment]


def trunk_layer(net: nn.Module, layer: Layer) -> WeightLayer:
    """A layer outside the branches, drawn so that it keeps the size of what comes in."""
    standard = FORWARD_ACTIVATED if layer.activated else FORWARD
    return replace(weight_layer(net, layer), standard=standard)


def _tokens(net: nn.Module, names: tuple[str, ...]) -> list[WeightLayer]:
    paths = [name.rpartition(".") for name in names]
    return [
        WeightLayer(net.get_submodule(path), name, bias="", standard=TOKEN_NORMAL)
        for path, _, name in paths
    ]


def declared_branch(branch: PlannedBranch, layers: Mapping[Layer, WeightLayer]) -> ResidualBranch:
    """A branch of a plan as the rules take it."""
    ends = [n for n, layer in enumerate(branch.layers) if layer in branch.ends and branch.zero]
    own = tuple(layers[layer] for layer in branch.layers)
    return ResidualBranch(branch.name, own, m=branch.m or None, ends=tuple(ends))


def weight_layer(net: nn.Module, layer: Layer) -> WeightLayer:
    """A layer of a plan as the rules take it."""
    path, _, name = layer.weight.rpartition(".")
    module = net.get_submodule(path)
    if isinstance(module, nn.Embedding) and layer.unit:
        # An output layer that shares an embedding's weight, which is named after the embedding.
        module = net.get_submodule(layer.unit)
    role = _role(net, layer)
    return WeightLayer(
        module,
        name,
        layer.bias.rpartition(".")[2] if layer.bias else "",
        role=role,
        standard=STANDARDS.get(role, XAVIER_UNIFORM),
        copies=layer.copies,
    )


def _role(net: nn.Module, layer: Layer) -> str:
    unit = net.get_submodule(layer.unit) if layer.unit else None
    if isinstance(unit, nn.MultiheadAttention):
        return ATTENTION_ROLES[layer.weight.removeprefix(f"{layer.unit}.")]
    weight = net.get_parameter(layer.weight)
    if weight.dim() == 3 and not hasattr(net.get_submodule(layer.unit), "kernel_size"):
        return "experts"
    return "conv" if weight.dim() > 2 else "fc"


def _remove_norms_(
    net: nn.Module, norms: tuple[PlannedNorm, ...], *, biased: bool, frozen: bool
) -> None:
    """Put a ``RemovedNorm`` in the place of each norm; one that has two paths stays one."""
    modules = {norm.path: net.get_submodule(norm.path) for norm in norms}
    biases = {id(modules[norm.path]) for norm in norms if norm.biased and biased}
    constants = {id(modules[norm.path]) for norm in norms if norm.freezable and frozen}
    made: dict[int, RemovedNorm] = {}
    for path, norm in modules.items():
        if id(norm) not in made:
            made[id(norm)] = RemovedNorm(
                norm, biased=id(norm) in biases, frozen=id(norm) in constants
            )
        net.set_submodule(path, made[id(norm)])


def attach_scalars_(net: nn.Module, plan: ConversionPlan, method: Method) -> None:
    """Attach the scalars of a method where ``plan`` has them."""
    for path in plan.before if method.biases else ():
        attach_before_(net.get_submodule(path))
    for path in plan.multiplied:
        multiplier = method.branch_multiplier()
        if multiplier is not None:
            attach_multiplier_(net.get_submodule(path), multiplier)
    # Behind the multipliers: hooks run in the order in which they were registered.
    for path in plan.after if method.biases else ():
        attach_after_(net.get_submodule(path))
    device = next(net.parameters()).device
    for added in (*scalars(net), *placed_constants(net), *frozen_norms(net)):
        added.to(device)
