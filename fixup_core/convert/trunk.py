"""What lies outside the branches, and needs another start once the norms are gone."""

from __future__ import annotations

from collections.abc import Collection

from torch.fx import Node

from fixup_core.convert.operations import (
    ACTIVATIONS,
    BOUNDED,
    DROPPING,
    POOLING,
    VIEWS,
)
from fixup_core.convert.survey import Layer, Survey
from fixup_core.convert.tracing import Trace, Use, is_view, operation
from fixup_core.rules.standards import FORWARD, FORWARD_ACTIVATED, fans

FAR = 2.0
"""A layer that is wider or narrower than its inputs ask for by more than this is drawn anew."""


def unsized_layers(survey: Survey, head: Collection[Layer]) -> tuple[Layer, ...]:
    """The layers outside all branches whose output a removed norm had sized, and whose own weights
    make a signal much smaller or larger.

    They are drawn by He's forward rule (He et al. 2015, equation 10). All others stay as their
    author made them.
    """
    known = {layer.weight for layer in head}
    once = [use.weight for use in survey.uses]
    found = []
    for use in survey.uses:
        outside = use.node not in survey.inside and use.weight not in known
        plain = not use.computed and once.count(use.weight) == 1 and survey.unit(use)
        if outside and plain and _enters_a_norm(survey.trace, use.node):
            layer = _layer(survey, use)
            if _is_far_off(survey, layer):
                found.append(layer)
    return tuple(found)


def empty_tokens(survey: Survey) -> tuple[str, ...]:
    """Parameters at 0 that are put beside the signal, as class tokens are: with a head at 0 too
    nothing would ever reach them.
    """
    net, trace = survey.net, survey.trace
    names = {
        name
        for node in trace.nodes
        if operation(node) == "cat" and node in trace.sources and node not in survey.inside
        for given in node.all_input_nodes
        if given not in trace.sources and trace.parameters.get(given) and is_view(given)
        for name in trace.parameters[given]
    }
    return tuple(
        name
        for name in sorted(names)
        if not net.get_parameter(name).is_meta and not net.get_parameter(name).any()
    )


def _layer(survey: Survey, use: Use) -> Layer:
    activated = _is_activated(survey.trace, use.given)
    return Layer(use.weight, use.bias, survey.unit(use), activated=activated)


def _enters_a_norm(trace: Trace, node: Node) -> bool:
    """Whether a norm, and nothing else, takes what ``node`` gives."""
    users = [user for user in node.users if user in trace.visible]
    if len(users) != 1:
        return bool(users) and all(trace.norms_of(user) for user in users)
    moved = operation(users[0]) in VIEWS | DROPPING
    return bool(trace.norms_of(users[0])) or (moved and _enters_a_norm(trace, users[0]))


def _is_activated(trace: Trace, node: Node) -> bool:
    while operation(node) in VIEWS | DROPPING | POOLING and len(trace.flowing(node)) == 1:
        node = trace.flowing(node)[0]
    return operation(node) in ACTIVATIONS - BOUNDED


def _is_far_off(survey: Survey, layer: Layer) -> bool:
    weight = survey.net.get_parameter(layer.weight)
    if weight.is_meta or not weight.requires_grad or weight.dim() < 2:
        return False
    module = survey.net.get_submodule(layer.unit)
    if fans(weight, module)[0] < 1:
        return False
    standard = FORWARD_ACTIVATED if layer.activated else FORWARD
    ratio = float(weight.detach().float().std()) / standard.std(weight, module)
    return not 1 / FAR < ratio < FAR
