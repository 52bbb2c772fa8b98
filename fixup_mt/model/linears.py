"""Linear layers with the scalars of rule 3.

Shapes: V vocabulary, D width.

The scalars are fused into the weight and the bias vector where a pass over a weight is shorter than
one over the activations: in training, but not when generating a word at a time. A batch that is
decoded step by step computes the products once (``keep_products``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fixup_core import Scalar, ScalarBias, ScalarMultiplier
from fixup_core.errors import UserError
from fixup_core.fuse.ops import value_of
from fixup_core.removal.leaving import LeavingNorm
from fixup_core.rules.method import Multiplier
from fixup_core.rules.placed import PlacedConstant

Products = tuple[Tensor, Tensor | None]
"""A weight and a bias vector."""
KEPT = "kept"
"""Key of the products in the state of step-by-step decoding."""


class ScalarLinear(nn.Linear):
    """``multiplier * (weight @ (x + before) + bias) + after``; each of them may be left out.

    With all of them left out this is PyTorch's linear layer. A bias vector stands inside the
    multiplier: a multiplier at 0 turns the whole layer off.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        before: Added to the input.
        multiplier: Of the product and the bias vector: a scalar, a constant, or a vector.
        after: Added to the output.
        bias: Whether there is a bias vector.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        before: Scalar | None = None,
        multiplier: Multiplier | None = None,
        after: Scalar | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        # In this order: optimisers' states in checkpoints go by the order of the parameters.
        self.multiplier = multiplier
        self.before = before
        self.after = after
        self.kept: Products | None = None

    def forward(self, input: Tensor) -> Tensor:
        kept = self.kept
        if kept is not None:
            return F.linear(input, *kept)
        if self._passes_over_weight and input.numel() < self.weight.numel():
            return self._by_parts(input)
        return F.linear(input, *self.folded())

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias vector of the plain linear layer that computes the same."""
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if self.multiplier is not None:
            multiplier = self.multiplier.value()
            # A vector has an element for each row.
            weight = weight * (multiplier if multiplier.dim() == 0 else multiplier[:, None])
            bias = None if bias is None else bias * multiplier
        if self.before is not None:
            bias = _sum(bias, weight.sum(dim=1) * self.before.value())
        if self.after is not None:
            bias = _sum(bias, self.after.value().to(weight.dtype).expand(self.out_features))
        return weight, bias

    def products(self) -> Products:
        """What ``kept`` holds while a batch is decoded."""
        return self.folded()

    @property
    def _passes_over_weight(self) -> bool:
        """Whether fusing the scalars reads the whole weight; ``after`` alone is a bias vector."""
        return self.before is not None or self.multiplier is not None

    def _by_parts(self, x: Tensor) -> Tensor:
        x = x if self.before is None else x + self.before.value()
        x = F.linear(x, self.weight, self.bias)
        x = x if self.multiplier is None else x * self.multiplier.value()
        return x if self.after is None else x + self.after.value()


class TiedProjection(nn.Linear):
    """Output layer that shares the embeddings and so cannot start at 0 (rule 1).

    Args:
        weight: The embeddings, [V, D].
        how: "leave": the logits are those of any tied Transformer. "scale": they are multiplied by
            ``D ** -0.5``. "gain": by a scalar that starts at 0, so that they start at 0 as rule 1
            asks.
    """

    def __init__(self, weight: nn.Parameter, how: str) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False)
        self.weight = weight
        self.scale = weight.shape[1] ** -0.5 if how == "scale" else 1.0
        self.gain = ScalarMultiplier(0.0) if how == "gain" else nn.Identity()

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(self.gain(input * self.scale), self.weight, self.bias)

    def folded(self) -> Products:
        """Weight and bias vector of the plain linear layer that computes the same."""
        return self.weight * (self.scale * value_of(self.gain, 1.0)), self.bias


def folded(layer: Any, *slots: nn.Module) -> tuple[Tensor, Tensor]:
    """One weight and one bias vector for a linear layer and what its input goes through first.

    Args:
        layer: A linear layer, of this file or PyTorch's own.
        slots: In the order of the forward pass: scalars, fixed numbers, identities, or
            ``nn.Sequential`` of them.

    Returns:
        Weight [out, in] and bias vector [out], which is zeros where nothing is added.

    Raises:
        UserError: A slot holds another module, such as a normalisation layer.
    """
    own = layer.folded() if hasattr(layer, "folded") else (layer.weight, layer.bias)
    weight, bias = own
    for slot in reversed(list(_flat(slots))):
        if isinstance(slot, ScalarMultiplier | PlacedConstant):
            weight = weight * slot.value()
        elif isinstance(slot, ScalarBias):
            bias = _sum(bias, weight.sum(dim=1) * slot.value())
        elif isinstance(slot, LeavingNorm):
            weight, bias = _behind_map(weight, bias, slot)
        elif not isinstance(slot, nn.Identity):
            raise UserError(f"a {type(slot).__name__} cannot be folded into a linear layer")
    return weight, torch.zeros_like(weight[:, 0]) if bias is None else bias


@contextlib.contextmanager
def keep_products(stack: nn.Module, state: dict[str, Any] | None) -> Iterator[None]:
    """Let the layers of ``stack`` use what they computed at the first step of a batch.

    The products lie in the state of step-by-step decoding and end with it: weights that somebody
    changes in place (pruning, averaging) count from the next batch on.

    Args:
        stack: A decoder; its layers that keep anything have ``kept`` and ``products()``.
        state: Of step-by-step decoding, ``None`` outside it.
    """
    if state is None or torch.is_grad_enabled():
        yield
        return
    if KEPT not in state:
        layers: list[Any] = [m for m in stack.modules() if hasattr(m, "products")]
        state[KEPT] = [(layer, layer.products()) for layer in layers]
    for layer, products in state[KEPT]:
        layer.kept = products
    try:
        yield
    finally:
        for layer, _ in state[KEPT]:
            layer.kept = None


def _behind_map(weight: Tensor, bias: Tensor | None, norm: LeavingNorm) -> Products:
    """With the affine map that a norm has become before the layer."""
    scale, shift = norm.constants()
    if shift is not None:
        bias = _sum(bias, weight @ shift)
    weight = weight * scale
    return weight - weight.mean(1, keepdim=True) if norm.centring else weight, bias


def _sum(bias: Tensor | None, more: Tensor) -> Tensor:
    return more if bias is None else bias + more


def _flat(slots: Any) -> Any:
    for slot in slots:
        if isinstance(slot, nn.Sequential):
            yield from _flat(slot)
        else:
            yield slot
