"""Layer norms taken out of a Transformer while fairseq trains it: ``--fixup-remove-norms``."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fixup_core import NormRemoval
from fixup_core.rules.scalars import KeepsFloat32
from fixup_mt.errors import UserError
from fixup_mt.model.config import FixupOptions

logger = logging.getLogger(__name__)
METHODS = ("prenorm", "postnorm")
"""Those with layer norms and nothing else that fairseq's own Transformer lacks."""
WRAPPED = re.compile(r"(layer_norm)(\.residual)?(\.norm)+\.")
"""In names of ours, where fairseq's have ``layer_norm`` alone."""
NOT_THEIRS = re.compile(r"vocabulary|\.statistics\.|anchor_target|_float_tensor|\.version$")
"""In names of state dicts: no weights of a layer."""


class AnchorTarget(KeepsFloat32):
    """Where a checkpoint keeps the size that enters the output layer: ``value``, [1]."""

    value: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("value", torch.zeros(1))


def remove_norms_(model: Any, options: FixupOptions) -> None:
    """Let the layer norms of ``model`` go as training goes on; ``model.removal`` says how far.

    Args:
        model: A ``transformer_fixup`` or ``transformer_fixup_lm``, weights drawn.
        options: Of it.

    Raises:
        UserError: The method has no layer norms, or the schedule is too short.
    """
    model.removal = None
    if not options.removes_norms:
        return
    if options.record.name not in METHODS:
        raise UserError(
            f"--fixup-remove-norms takes layer norms out of a model of --fixup-method prenorm or "
            f"postnorm, not {options.method}: train or load one (--fixup-from-layernorm)"
        )
    before = not options.record.norm_on_sum
    head = None if model.decoder.output_projection is None else "decoder.output_projection"
    if head is None and options.removal_anchor:
        logger.warning("an adaptive softmax has no anchor: the logits may grow as norms go")
    model.anchor_target = AnchorTarget()
    model.removal = NormRemoval(
        model,
        schedule=options.remove_norms,
        steps=options.removal_updates,
        # Behind a sum a map stands on the residual stream, which takes one number a channel.
        centring=before,
        anchor=options.removal_anchor if head else 0.0,
        head=head,
        values=_values(model) if before else {},
    )


def follow_(model: Any, updates: int) -> None:
    """Put the norms where they are after ``updates``; keep the anchor's target in the model."""
    removal, target = model.removal, model.anchor_target.value
    # fairseq counts the updates of a model that it loads before it has loaded the weights.
    if not all(norm.observed for norm in removal.norms.values()):
        return
    removal.at(updates)
    if removal.anchor is not None:
        if removal.anchor.target:
            target.fill_(removal.anchor.target)
        else:
            removal.anchor.target = target.item()


def load_layernorm_(model: nn.Module, saved: Mapping[str, Tensor], file: str) -> None:
    """Give ``model`` the weights of fairseq's own Transformer.

    Args:
        model: A model of ours with layer norms; they may be on their way out.
        saved: The state dict of ``transformer`` or ``transformer_lm``.
        file: Where it is from, for messages.

    Raises:
        UserError: They are weights of another architecture.
    """
    weights = model.state_dict()
    own = {name: WRAPPED.sub(r"\1.", name) for name in weights}
    wanted = {name: theirs for name, theirs in own.items() if not NOT_THEIRS.search(name)}
    given = {name for name in saved if not NOT_THEIRS.search(name)}
    odd = sorted(set(wanted.values()) ^ given)
    odd += [t for name, t in wanted.items() if t in saved and weights[name].shape != saved[t].shape]
    if odd:
        raise UserError(
            f"{file} is a checkpoint of another architecture, or of other dictionaries: the "
            f"models differ in {', '.join(odd[:3])}"
        )
    with torch.no_grad():
        for name, theirs in wanted.items():
            weights[name].copy_(saved[theirs])


def _values(model: Any) -> dict[str, str]:
    """The values of self-attention, and the norms that feed them."""
    stacks = ("encoder", "decoder") if hasattr(model, "encoder") else ("decoder",)
    layers = [
        f"{stack}.layers.{number}"
        for stack in stacks
        for number in range(len(getattr(model, stack).layers))
    ]
    return {f"{path}.self_attn.v_proj": f"{path}.self_attn_layer_norm" for path in layers}
