"""Linear layers with the scalars of rule 3.

Shapes: V vocabulary, D width.

The scalars are fused into the weight and the bias vector where a pass over a weight is shorter than
one over the activations: in training, but not when generating a word at a time. fairseq calls
``make_generation_fast_`` on its models before it generates: from then on the products are kept.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fixup_core import Scalar, ScalarBias, ScalarMultiplier
from fixup_core.errors import UserError
from fixup_core.fuse.ops import value_of


class ScalarLinear(nn.Linear):
    """``multiplier * (weight @ (x + before) + bias) + after``; each scalar may be left out.

    With all of them left out this is PyTorch's linear layer. A bias vector stands inside the
    multiplier: a multiplier at 0 turns the whole layer off.

    Args:
        in_features: Width of the input.
        out_features: Width of the output.
        before: Added to the input.
        multiplier: Of the product and the bias vector.
        after: Added to the output.
        bias: Whether there is a bias vector.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        before: Scalar | None = None,
        multiplier: Scalar | None = None,
        after: Scalar | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias)
        # In this order: optimisers' states in checkpoints go by the order of the parameters.
        self.multiplier = multiplier
        self.before = before
        self.after = after
        keep_for_generation(self, "kept_weight", "kept_bias")

    def forward(self, input: Tensor) -> Tensor:
        if self.kept_weight is not None:
            return F.linear(input, self.kept_weight, self.kept_bias)
        if self.kept_bias is not None:
            return F.linear(input, self.weight, self.kept_bias)
        if self._passes_over_weight and input.numel() < self.weight.numel():
            return self._by_parts(input)
        return F.linear(input, *self.folded())

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias vector of the plain linear layer that computes the same."""
        weight: Tensor = self.weight
        bias: Tensor | None = self.bias
        if self.multiplier is not None:
            multiplier = self.multiplier.value()
            weight = weight * multiplier
            bias = None if bias is None else bias * multiplier
        if self.before is not None:
            bias = _sum(bias, weight.sum(dim=1) * self.before.value())
        if self.after is not None:
            bias = _sum(bias, self.after.value().to(weight.dtype).expand(self.out_features))
        return weight, bias

    def make_generation_fast_(self, **options: Any) -> None:
        """The weights change no more: compute once what differs from them."""
        with torch.no_grad():
            weight, bias = self.folded()
        self.kept_weight = None if weight is self.weight else weight
        self.kept_bias = None if bias is self.bias else bias

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
        return F.linear(self.gain(input * self.scale), self.weight)

    def folded(self) -> tuple[Tensor, None]:
        """Weight of the plain linear layer that computes the same; there is no bias vector."""
        return self.weight * (self.scale * value_of(self.gain, 1.0)), None


def folded(layer: Any, *slots: nn.Module) -> tuple[Tensor, Tensor]:
    """One weight and one bias vector for a linear layer and what its input goes through first.

    Args:
        layer: A linear layer, of this file or PyTorch's own.
        slots: In the order of the forward pass: scalars, identities, or ``nn.Sequential`` of them.

    Returns:
        Weight [out, in] and bias vector [out], which is zeros where nothing is added.

    Raises:
        UserError: A slot holds another module, such as a normalisation layer.
    """
    own = layer.folded() if hasattr(layer, "folded") else (layer.weight, layer.bias)
    weight, bias = own
    for slot in reversed(list(_flat(slots))):
        if isinstance(slot, ScalarMultiplier):
            weight = weight * slot.value()
        elif isinstance(slot, ScalarBias):
            bias = _sum(bias, weight.sum(dim=1) * slot.value())
        elif not isinstance(slot, nn.Identity):
            raise UserError(f"a {type(slot).__name__} cannot be folded into a linear layer")
    return weight, torch.zeros_like(weight[:, 0]) if bias is None else bias


def keep_for_generation(module: nn.Module, *names: str) -> None:
    """Give ``module`` empty buffers for what it computes once before generating.

    They are not part of its state dict, and are emptied when another one is loaded.
    """
    for name in names:
        module.register_buffer(name, None, persistent=False)
    module.register_load_state_dict_post_hook(functools.partial(_empty, names))


def _empty(names: tuple[str, ...], module: nn.Module, incompatible_keys: Any) -> None:
    for name in names:
        setattr(module, name, None)


def _sum(bias: Tensor | None, more: Tensor) -> Tensor:
    return more if bias is None else bias + more


def _flat(slots: Any) -> Any:
    for slot in slots:
        if isinstance(slot, nn.Sequential):
            yield from _flat(slot)
        else:
            yield slot
