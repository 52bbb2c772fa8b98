"""Transformers without scalars: everything folded into weights and biases, for other engines.

The result is the state dict of fairseq's ``transformer``, or ``transformer_lm``: the same names, a
bias vector for every projection. Linear layers fold their own scalars and those of the slots before
them (``fixup_mt.model.linears``). What ends the encoder goes into the keys and values of the
cross-attention, what ends the decoder into the output layer.

Norms, and the functions that stand in their place, stay under the names of fairseq's layer norms.
A factor on a shortcut goes with the stream: into the norm, or the embeddings, that the stream comes
from, and out of the layers that read it.

Where norms behind the sums were taken out, a map stands on the residual stream itself, x' = s (x +
f(x)) + t. Then the stream is written in other coordinates, x = d z + e, in which it is a sum again:
z' = z + f(d z + e) / d, with d' = s d and e' = s e + t.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fixup_core.errors import UserError
from fixup_mt.model.attention import FixupAttention
from fixup_mt.model.linears import folded
from fixup_mt.model.model import FixupLanguageModel, FixupTransformerModel
from fixup_mt.model.slots import Parts

PROJECTIONS = ("q_proj", "k_proj", "v_proj")
SLOTS = {
    "self_attn": "self_attn_layer_norm",
    "encoder_attn": "encoder_attn_layer_norm",
    "ffn": "final_layer_norm",
}
"""fairseq's names of a layer's slots, by its branches in their order."""
MODERATE = 1 / 32
"""A product of maps that is smaller makes the stream too large for CTranslate2's identity."""
END = "layer_norm"
"""fairseq's name of what ends a stack."""


@dataclass(frozen=True)
class Stream:
    """A residual stream as it is folded, z, and as the model has it, x = scale z + shift.

    Attributes:
        scale: [], or [D].
        shift: Likewise.
        unit: What the outputs of branches are divided by.
    """

    scale: Tensor | float = 1.0
    shift: Tensor | float = 0.0
    unit: Tensor | None = None

    def behind(self, parts: Parts, factor: Tensor) -> Stream:
        """Behind a branch; ``factor`` is that of the next one's shortcut."""
        if parts.gone is None:
            return Stream(1 / factor, self.shift, self.unit) if self.unit is None else self
        scale, shift = parts.gone.constants()
        unit = scale * self.scale
        return Stream(unit, scale * self.shift + (0.0 if shift is None else shift), unit)


Before = tuple[nn.Module, Stream]
"""What the input of a layer goes through: a slot, and the stream that it comes from."""


def fold_transformer(model: nn.Module) -> dict[str, Tensor]:
    """The weights of ``model`` without scalars, on the CPU, in float32.

    Args:
        model: A ``transformer_fixup`` or ``transformer_fixup_lm``; it is left as it is.

    Returns:
        fairseq's names, those of layer norms where there are any, and
        ``decoder.output_projection.bias``. The embeddings are to be added to ``positions``.

    Raises:
        UserError: The model has a part that cannot be folded (it is named).
    """
    check(model)
    module: Any = model
    result: dict[str, Tensor] = {}
    # What the layers that read a stack go through first; a language model has no encoder.
    ends: dict[str, Before] = {"encoder": (nn.Identity(), Stream())}
    with torch.no_grad():
        for name, stack in stacks(module).items():
            start = _start(stack)
            result[f"{name}.embed_tokens.weight"] = stack.embed_tokens.weight * start
            if isinstance(stack.embed_positions, nn.Embedding):
                result[f"{name}.embed_positions.weight"] = stack.embed_positions.weight * start
            ends[name] = _fold_stack(result, name, stack, start, ends["encoder"])
        slot, stream = ends["decoder"]
        _fold(
            result,
            "decoder.output_projection",
            module.decoder.output_projection,
            slot,
            stream=stream,
        )
    # Copies: a weight that no scalar multiplies is the model's own until here.
    return {name: t.detach().to("cpu", torch.float32, copy=True) for name, t in result.items()}


def stacks(model: Any) -> dict[str, Any]:
    """The encoder, which a language model has not, and the decoder."""
    return {name: getattr(model, name) for name in ("encoder", "decoder") if hasattr(model, name)}


def slots(layer: Any) -> dict[str, Parts]:
    """Of a layer's branches, in their order."""
    present = {branch: getattr(layer, name, None) for branch, name in SLOTS.items()}
    return {branch: Parts.of(slot) for branch, slot in present.items() if slot is not None}


def positions(stack: Any) -> Tensor:
    """The embeddings of the positions of an encoder or decoder, folded as all are: [maximum, D]."""
    return _positions(stack) * _start(stack).detach().float().cpu()


def refuse_other_attention(model: nn.Module, engine: str) -> None:
    """Raise ``UserError`` for attention that ``engine`` has not, whatever the method."""
    for module in model.modules():
        if isinstance(module, FixupAttention):
            for option, used in (
                ("--fixup-qk-norm", module.temperature is not None),
                ("--fixup-logit-cap", bool(module.logit_cap)),
            ):
                if used:
                    raise UserError(
                        f"a model with {option} has attention that {engine} has not: give "
                        "--format onnx"
                    )


def check(model: nn.Module) -> None:
    """Raise ``UserError`` unless every part of the model can be folded exactly."""
    if not isinstance(model, FixupTransformerModel | FixupLanguageModel):
        raise UserError(
            "only transformer_fixup and transformer_fixup_lm models are folded and exported, not "
            f"{type(model).__name__}"
        )
    if model.training:
        raise UserError("only a model in evaluation mode is folded: call eval() first")
    translates = isinstance(model, FixupTransformerModel)
    decoder: Any = model.decoder
    removal: Any = model.removal
    if removal is not None and removal.left:
        raise UserError(
            f"{len(removal.left)} of {len(removal.norms)} norms are not gone yet: train the model "
            "to the end of --fixup-removal-updates first, and average checkpoints from behind it"
        )
    refused = {
        "--quant-noise-pq": any(s.quant_noise is not None for s in stacks(model).values()),
        "--adaptive-softmax-cutoff": decoder.adaptive_softmax is not None,
        "--adaptive-input or --character-embeddings": type(decoder.embed_tokens)
        is not nn.Embedding,
        "--decoder-input-dim": decoder.project_in_dim is not None,
        "--decoder-output-dim": decoder.project_out_dim is not None,
        "--no-cross-attention": translates and any(not _attends(i) for i in decoder.layers),
        "--cross-self-attention": decoder.cross_self_attention,
    }
    for option, used in refused.items():
        if used:
            raise UserError(f"a model with {option} cannot be exported exactly")
    for stack in stacks(model).values():
        if any(not factor.all() for factor in (*_factors(stack), *_maps(stack))):
            raise UserError(
                "a factor on a shortcut is exactly 0, and no weight can take that in: train on, or "
                "export another checkpoint"
            )


def _attends(layer: Any) -> bool:
    """Whether a decoder's layer has cross-attention."""
    return getattr(layer, "encoder_attn", None) is not None


def _positions(stack: Any) -> Tensor:
    table, width = stack.embed_positions, stack.embed_tokens.embedding_dim
    if table is None:
        return torch.zeros(int(stack.max_positions()), width)
    first = int(table.padding_idx or 0) + 1
    if isinstance(table, nn.Embedding):
        return table.weight.detach()[first:].float().cpu()
    weights: Tensor = table.get_embedding(first + int(stack.max_positions()), width, first - 1)
    return weights[first:]


def _factors(stack: Any) -> Iterator[Tensor]:
    """Of the shortcuts, in the order of the branches, and 1 for what comes behind them."""
    one = stack.embed_tokens.weight.new_ones(())
    for layer in stack.layers:
        for parts in slots(layer).values():
            yield one if parts.shortcut is None else parts.shortcut
    yield one


def _maps(stack: Any) -> list[Tensor]:
    """The scales of the maps that stand on the stream, where norms on sums were taken out."""
    parts = [each for layer in stack.layers for each in slots(layer).values()]
    return [each.gone.constants()[0].detach() for each in parts if each.gone is not None]


def _start(stack: Any) -> Tensor:
    """What the embeddings are multiplied by: the first shortcut's factor, and, where maps stand on
    the stream, what keeps their product, by which it is divided, from making it large. Not where
    it stays moderate: fairseq's own transformer cannot scale its positions.
    """
    first = next(_factors(stack))
    product, sizes = torch.ones((), dtype=torch.float64), [1.0]
    for scale in _maps(stack):
        product = product * scale.double().cpu()
        sizes.append(product.abs().mean().item())
    return first * min(sizes) if min(sizes) < MODERATE else first


def _fold_stack(
    result: dict[str, Tensor], name: str, stack: Any, start: Tensor, memory: Before
) -> Before:
    """``start`` is what the embeddings have been multiplied by, ``memory`` what the keys and values
    of cross-attention go through first.

    Returns:
        What the layers that read this stack go through first.
    """
    factors = _factors(stack)
    factor = next(factors)
    width = stack.embed_tokens.embedding_dim
    unit = (factor / start).expand(width) if _maps(stack) else None
    stream = Stream(1 / start, unit=unit)
    for number, layer in enumerate(stack.layers):
        path = f"{name}.layers.{number}"
        for branch, parts in slots(layer).items():
            factor = next(factors)
            _keep_norm(result, f"{path}.{SLOTS[branch]}", parts.norm, factor)
            own = (parts.scalars, stream)
            if branch == "ffn":
                _fold(result, f"{path}.fc1", layer.fc1, parts.scalars, stream=stream)
                _fold(result, f"{path}.fc2", layer.fc2, unit=stream.unit)
            else:
                kv = memory if branch == "encoder_attn" else own
                _fold_attention(result, f"{path}.{branch}", getattr(layer, branch), own, kv)
            stream = stream.behind(parts, factor)
    last = Parts.of(stack.layer_norm)
    _keep_norm(result, f"{name}.{END}", last.norm, factor)
    if last.norm is not None:
        # fairseq drops the norm that ends a stack from a state dict without a version.
        result[f"{name}.version"] = torch.tensor([3.0])
    return last.scalars, stream


def _fold_attention(
    result: dict[str, Tensor], path: str, attention: Any, query: Before, memory: Before
) -> None:
    """``query`` and ``memory`` are what the queries, and the keys and values, go through first."""
    if attention.temperature is not None:
        result[f"{path}.temperature"] = attention.temperature.value().reshape(1)
    for name in PROJECTIONS:
        slot, stream = query if name == "q_proj" else memory
        _fold(result, f"{path}.{name}", getattr(attention, name), slot, stream=stream)
    _fold(result, f"{path}.out_proj", attention.out_proj, unit=query[1].unit)


def _fold(
    result: dict[str, Tensor],
    path: str,
    layer: Any,
    *slots: nn.Module,
    stream: Stream | None = None,
    unit: Tensor | None = None,
) -> None:
    """``stream``: where the input comes from; ``unit``: of the stream that the output goes to."""
    weight, bias = folded(layer, *slots)
    if stream is not None:
        bias = bias + (weight * stream.shift).sum(1)
        weight = weight * stream.scale
    if unit is not None:
        weight, bias = weight / unit[:, None], bias / unit
    result[f"{path}.weight"], result[f"{path}.bias"] = weight, bias


def _keep_norm(
    result: dict[str, Tensor], path: str, norm: nn.Module | None, factor: Tensor
) -> None:
    """Under the names of its own parameters; its output is multiplied by ``factor``."""
    if norm is None:
        return
    for name, value in norm.state_dict().items():
        scaled = name in ("weight", "bias")
        result[f"{path}.{name}"] = value * factor if scaled else value
