"""A Transformer for CTranslate2: its ``Translator``, or its ``Generator`` for a language model.

A language model goes on with a text that begins with the end of the one before it::

    generator = ctranslate2.Generator("folder")
    generator.generate_batch([["</s>", "a", "piece"]], max_length=50)

That engine drops a layer's residual silently where it has no norm. So a model without norms has RMS
norms with an epsilon of 2^30 and a gain of its root: the identity, to the last digits of float32.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fixup_core.rules.norms import POINTWISE
from fixup_mt.errors import UserError
from fixup_mt.model.model import FixupLanguageModel
from fixup_mt.serving.fold import (
    END,
    PROJECTIONS,
    SLOTS,
    fold_transformer,
    positions,
    refuse_other_attention,
    slots,
    stacks,
)

EPSILON = 2.0**30
MAX_SOURCE, MAX_TARGET = "max_source_positions", "max_target_positions"
"""Keys of ``config.json``: how many positions the encoder and the decoder have."""
ACTIVATIONS = {
    "relu": "RELU",
    "gelu": "GELU",
    "gelu_fast": "GELUTanh",
    "gelu_accurate": "GELUTanh",
    "swish": "SWISH",
    "tanh": "Tanh",
}
"""fairseq's activation functions that CTranslate2 has, by its names."""


def write(folder: Path, model: Any, task: Any, quantization: str | None = None) -> None:
    """Write the engine's files into ``folder``.

    Args:
        folder: Exists.
        model: A ``transformer_fixup`` or ``transformer_fixup_lm``.
        task: It has the dictionaries.
        quantization: Of the weights, as CTranslate2 names it; none: float32.

    Raises:
        UserError: The engine is not installed, or has no part of that kind.
    """
    specification = _specification(model, task)
    if quantization:
        specification.optimize(quantization=quantization)
    specification.save(str(folder))


def log_probabilities(
    folder: Path, source: list[list[str]] | None, target: list[list[str]], model: Any, task: Any
) -> Any:
    """Of each piece of ``target`` and of the sentence's end, in float32; a language model has no
    ``source``.

    What was written holds all that is needed: ``model`` and ``task`` are not looked at.
    """
    import ctranslate2

    if source is None:
        generator = ctranslate2.Generator(str(folder), compute_type="float32")
        end = json.loads((folder / "config.json").read_text("utf-8"))["eos_token"]
        rows = [[end, *row, end] for row in target]
        return [result.log_probs for result in generator.score_batch(rows)]
    translator = ctranslate2.Translator(str(folder), compute_type="float32")
    return [result.log_probs for result in translator.score_batch(source, target)]


def _specification(model: Any, task: Any) -> Any:
    """CTranslate2's description of the model, with its weights."""
    try:
        import ctranslate2.specs
        from ctranslate2.specs.common_spec import Activation
    except ModuleNotFoundError as error:
        raise UserError("this wants CTranslate2: pip install ctranslate2") from error

    refuse_other_attention(model, "CTranslate2")
    epsilon = _epsilon(model)
    weights = fold_transformer(model)
    activation = str(model.decoder.cfg.activation_fn)
    if activation not in ACTIVATIONS:
        raise UserError(f"CTranslate2 has no activation function {activation}")
    method = model.decoder.layers[0].method
    gone = model.removal is not None
    kind = {
        "pre_norm": gone or not method.norm_on_sum,
        "rms_norm": gone or method.norm is None,
        "activation": getattr(Activation, ACTIVATIONS[activation]),
    }
    if isinstance(model, FixupLanguageModel):
        spec = _language_model(model, task, ctranslate2.specs, kind)
    else:
        spec = _translator(model, task, ctranslate2.specs, kind)
    for name, stack in stacks(model).items():
        _set_stack(getattr(spec, name), stack, weights, name)
        limit = MAX_SOURCE if name == "encoder" else MAX_TARGET
        spec.config.add_attribute(limit, int(stack.max_positions()))
    _set_linear(spec.decoder.projection, weights, "decoder.output_projection")
    spec.config.layer_norm_epsilon = epsilon
    spec.validate()
    return spec


def _epsilon(model: Any) -> float:
    """Of all norms: the engine has one for a model.

    Raises:
        UserError: The engine cannot express what the model has for norms.
    """
    method = model.decoder.layers[0].method
    if method.norm not in (None, "layer"):
        raise UserError(
            f"a model of --fixup-method {method.name} has {POINTWISE[method.norm].__name__} in the "
            "place of its norms, which CTranslate2 has not: give --format onnx"
        )
    found = {norm.eps if isinstance(norm, nn.LayerNorm) else EPSILON for norm in _norms_of(model)}
    if len(found) > 1:
        raise UserError("CTranslate2 has one kind of norm for a model, and this one has several")
    return found.pop()


def _norms_of(model: Any) -> Iterator[nn.Module | None]:
    """Of all branches."""
    for stack in stacks(model).values():
        for layer in stack.layers:
            yield from (parts.norm for parts in slots(layer).values())


def _translator(model: Any, task: Any, specs: Any, kind: dict[str, Any]) -> Any:
    encoder, decoder = model.encoder, model.decoder
    heads = {layer.self_attn.num_heads for layer in (*encoder.layers, *decoder.layers)}
    if len(heads) > 1:
        raise UserError(
            "CTranslate2 wants as many attention heads in the encoder as in the decoder"
        )
    layers = (len(encoder.layers), len(decoder.layers))
    spec: Any = specs.TransformerSpec.from_config(layers, heads.pop(), **kind)
    spec.register_source_vocabulary(_words(task.source_dictionary))
    spec.register_target_vocabulary(_words(task.target_dictionary))
    spec.config.decoder_start_token = spec.config.eos_token
    spec.config.add_source_eos = True
    return spec


def _language_model(model: Any, task: Any, specs: Any, kind: dict[str, Any]) -> Any:
    layers = model.decoder.layers
    heads = layers[0].self_attn.num_heads
    spec: Any = specs.TransformerDecoderModelSpec.from_config(len(layers), heads, **kind)
    spec.register_vocabulary(_words(task.target_dictionary))
    # A text begins with the end of the one before it.
    spec.config.bos_token = spec.config.eos_token
    return spec


def _set_stack(spec: Any, stack: Any, weights: dict[str, Tensor], name: str) -> None:
    width = stack.embed_tokens.embedding_dim
    table = spec.embeddings[0] if isinstance(spec.embeddings, list) else spec.embeddings
    table.weight = weights[f"{name}.embed_tokens.weight"].numpy()
    spec.scale_embeddings = stack.embed_scale
    spec.position_encodings.encodings = positions(stack).numpy()
    norms = {END: spec.layer_norm} if hasattr(spec, "layer_norm") else {}
    for number, layer in enumerate(spec.layer):
        path = f"{name}.layers.{number}"
        own = layer.self_attention
        _set_fused(own.linear[0], weights, f"{path}.self_attn", PROJECTIONS)
        _set_linear(own.linear[1], weights, f"{path}.self_attn.out_proj")
        _set_linear(layer.ffn.linear_0, weights, f"{path}.fc1")
        _set_linear(layer.ffn.linear_1, weights, f"{path}.fc2")
        norms[f"layers.{number}.{SLOTS['self_attn']}"] = own.layer_norm
        norms[f"layers.{number}.{SLOTS['ffn']}"] = layer.ffn.layer_norm
        if hasattr(layer, "attention"):
            cross, path = layer.attention, f"{path}.encoder_attn"
            _set_linear(cross.linear[0], weights, f"{path}.q_proj")
            _set_fused(cross.linear[1], weights, path, PROJECTIONS[1:])
            _set_linear(cross.linear[2], weights, f"{path}.out_proj")
            norms[f"layers.{number}.{SLOTS['encoder_attn']}"] = cross.layer_norm
    for place, norm in norms.items():
        _set_norm(norm, weights, f"{name}.{place}", width)


def _set_norm(spec: Any, weights: dict[str, Tensor], path: str, width: int) -> None:
    """A layer norm, or the identity."""
    if f"{path}.weight" in weights:
        spec.gamma, spec.beta = (weights[f"{path}.{part}"].numpy() for part in ("weight", "bias"))
    else:
        spec.gamma = torch.full((width,), EPSILON**0.5).numpy()


def _set_linear(spec: Any, weights: dict[str, Tensor], path: str) -> None:
    spec.weight, spec.bias = (weights[f"{path}.{part}"].numpy() for part in ("weight", "bias"))


def _set_fused(spec: Any, weights: dict[str, Tensor], path: str, names: tuple[str, ...]) -> None:
    spec.weight, spec.bias = (
        torch.cat([weights[f"{path}.{name}.{part}"] for name in names]).numpy()
        for part in ("weight", "bias")
    )


def _words(dictionary: Any) -> list[str]:
    return ["<blank>" if word == dictionary.pad_word else word for word in dictionary.symbols]
