"""Write a trained Transformer for other engines, its scalars folded away.

``--format ctranslate2`` makes a folder that ``python -m fixup_mt translate`` serves, and any other
program that uses CTranslate2. That engine drops a layer's residual silently where it has no norm,
so every norm is an RMS norm with an epsilon of 1e9 and a gain of its root: the identity, to the
last digits of float32. Nothing is written that does not give the model's own log-probabilities.
``--format fairseq`` writes the folded weights as a state dict, under the names of fairseq's
pre-norm transformer.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fairseq.checkpoint_utils import load_checkpoint_to_cpu, load_model_ensemble_and_task
from fairseq.tasks.translation import TranslationConfig, TranslationTask
from torch import Tensor

from fixup_mt.average import save_atomically
from fixup_mt.errors import UserError
from fixup_mt.fold import PROJECTIONS, fold_transformer

EPSILON = 1e9
TOLERANCE = 1e-3
"""Of the log-probability of a piece, in float32."""
PIECES_CHECKED = 24
ACTIVATIONS = {
    "relu": "RELU",
    "gelu": "GELU",
    "gelu_fast": "GELUTanh",
    "gelu_accurate": "GELUTanh",
    "swish": "SWISH",
    "tanh": "Tanh",
}
"""fairseq's activation functions that CTranslate2 has, by its names."""
SENTENCEPIECE = "sentencepiece.model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, metavar="FILE", help="of fairseq-train")
    add("--data-bin", type=Path, required=True, metavar="DIR", help="its data: the dictionaries")
    add("--output", type=Path, required=True, metavar="PATH", help="folder, or file, to write")
    add("--format", choices=sorted(FORMATS), default="ctranslate2", help="default: %(default)s")
    add(
        "--sentencepiece",
        type=Path,
        metavar="FILE",
        help="model of the pieces, kept in the folder, so that translate takes plain text",
    )
    add(
        "--quantization",
        choices=("int8", "int8_float32", "int16", "bfloat16"),
        help="of the weights on disk (ctranslate2 alone; default: float32)",
    )


def run(args: argparse.Namespace) -> None:
    if args.output.exists():
        raise UserError(f"{args.output} exists: remove it, or give another --output")
    for file in (args.checkpoint, args.sentencepiece):
        if file and not file.is_file():
            raise UserError(f"{file} does not exist: check the path")
    model, task = load(args.checkpoint, args.data_bin)
    FORMATS[args.format](args, model, task)
    print(f"written: {args.output}")


def load(checkpoint: Path, data_bin: Path) -> tuple[Any, Any]:
    """The model of a checkpoint, in evaluation mode, and a translation task of its languages."""
    if not data_bin.is_dir():
        raise UserError(f"{data_bin} does not exist: give the folder of fairseq-preprocess")
    trained = load_checkpoint_to_cpu(str(checkpoint))["cfg"]["task"]
    languages = {name: trained.get(name) for name in ("source_lang", "target_lang")}
    config = TranslationConfig(data=str(data_bin), **languages)
    task = TranslationTask.setup_task(config)
    models, _, _ = load_model_ensemble_and_task([str(checkpoint)], task=task)
    return models[0].eval(), task


def _export_fairseq(args: argparse.Namespace, model: Any, task: Any) -> None:
    _refuse(args.quantization, "--quantization")
    _refuse(args.sentencepiece, "--sentencepiece")
    save_atomically({"model": fold_transformer(model)}, args.output)


def _refuse(value: object, option: str) -> None:
    if value:
        raise UserError(f"{option} belongs to --format ctranslate2")


def _export_ctranslate2(args: argparse.Namespace, model: Any, task: Any) -> None:
    """In float32 first, which is held against the model; then as asked for."""
    args.output.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=args.output.parent, prefix=f".{args.output.name}."))
    try:
        _specification(model, task).save(str(folder))
        off = difference(folder, model, task)
        if not off <= TOLERANCE:
            raise UserError(
                f"CTranslate2's log-probabilities differ from the model's by up to {off:.1e}: "
                "nothing is written"
            )
        print(f"log-probabilities differ from the model's by {off:.1e} at the most (float32)")
        if args.quantization:
            specification = _specification(model, task)
            specification.optimize(quantization=args.quantization)
            specification.save(str(folder))
        if args.sentencepiece:
            shutil.copy(args.sentencepiece, folder / SENTENCEPIECE)
        folder.chmod(0o755)
        folder.rename(args.output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


FORMATS: dict[str, Callable[[argparse.Namespace, Any, Any], None]] = {
    "ctranslate2": _export_ctranslate2,
    "fairseq": _export_fairseq,
}


def _specification(model: Any, task: Any) -> Any:
    """CTranslate2's description of the model, with its weights."""
    try:
        from ctranslate2.specs import TransformerSpec
        from ctranslate2.specs.common_spec import Activation
    except ModuleNotFoundError as error:
        raise UserError("this wants CTranslate2: pip install 'fixup[export]'") from error

    weights = fold_transformer(model)
    encoder, decoder = model.encoder, model.decoder
    heads = {layer.self_attn.num_heads for layer in (*encoder.layers, *decoder.layers)}
    if len(heads) > 1:
        raise UserError(
            "CTranslate2 wants as many attention heads in the encoder as in the decoder"
        )
    activation = str(model.cfg.activation_fn)
    if activation not in ACTIVATIONS:
        raise UserError(f"CTranslate2 has no activation function {activation}")
    spec: Any = TransformerSpec.from_config(
        (len(encoder.layers), len(decoder.layers)),
        heads.pop(),
        pre_norm=True,
        rms_norm=True,
        activation=getattr(Activation, ACTIVATIONS[activation]),
    )
    for name, stack in (("encoder", encoder), ("decoder", decoder)):
        _set_stack(getattr(spec, name), stack, weights, name)
    _set_linear(spec.decoder.projection, weights, "decoder.output_projection")
    spec.register_source_vocabulary(_words(task.source_dictionary))
    spec.register_target_vocabulary(_words(task.target_dictionary))
    spec.config.decoder_start_token = spec.config.eos_token
    spec.config.add_source_eos = True
    spec.config.layer_norm_epsilon = EPSILON
    spec.validate()
    return spec


def _set_stack(spec: Any, stack: Any, weights: dict[str, Tensor], name: str) -> None:
    width = stack.embed_tokens.embedding_dim
    table = spec.embeddings[0] if isinstance(spec.embeddings, list) else spec.embeddings
    table.weight = weights[f"{name}.embed_tokens.weight"].numpy()
    spec.scale_embeddings = stack.embed_scale
    spec.position_encodings.encodings = _positions(stack, width)
    norms = [spec.layer_norm]
    for number, layer in enumerate(spec.layer):
        path = f"{name}.layers.{number}"
        own = layer.self_attention
        _set_fused(own.linear[0], weights, f"{path}.self_attn", PROJECTIONS)
        _set_linear(own.linear[1], weights, f"{path}.self_attn.out_proj")
        _set_linear(layer.ffn.linear_0, weights, f"{path}.fc1")
        _set_linear(layer.ffn.linear_1, weights, f"{path}.fc2")
        norms += [own.layer_norm, layer.ffn.layer_norm]
        if name == "decoder":
            cross, path = layer.attention, f"{path}.encoder_attn"
            _set_linear(cross.linear[0], weights, f"{path}.q_proj")
            _set_fused(cross.linear[1], weights, path, PROJECTIONS[1:])
            _set_linear(cross.linear[2], weights, f"{path}.out_proj")
            norms.append(cross.layer_norm)
    for norm in norms:
        norm.gamma = torch.full((width,), EPSILON**0.5).numpy()


def _positions(stack: Any, width: int) -> Any:
    table = stack.embed_positions
    if table is None:
        return torch.zeros(max(stack.max_positions(), 1), width).numpy()
    first = int(table.padding_idx or 0) + 1
    if isinstance(table, torch.nn.Embedding):
        return table.weight.detach()[first:].numpy()
    length = first + int(stack.max_positions())
    weights = table.get_embedding(length, width, table.padding_idx)
    return weights[first:].numpy()


def _set_linear(spec: Any, weights: dict[str, Tensor], path: str) -> None:
    spec.weight, spec.bias = (weights[f"{path}.{part}"].numpy() for part in ("weight", "bias"))


def _set_fused(spec: Any, weights: dict[str, Tensor], path: str, names: tuple[str, ...]) -> None:
    spec.weight, spec.bias = (
        torch.cat([weights[f"{path}.{name}.{part}"] for name in names]).numpy()
        for part in ("weight", "bias")
    )


def _words(dictionary: Any) -> list[str]:
    return ["<blank>" if word == dictionary.pad_word else word for word in dictionary.symbols]


def difference(folder: Path, model: Any, task: Any) -> float:
    """The largest difference of a piece's log-probability, CTranslate2's against the model's."""
    import ctranslate2

    generator = torch.Generator().manual_seed(0)
    source, target = (
        _random_words(dictionary, generator)
        for dictionary in (task.source_dictionary, task.target_dictionary)
    )
    translator = ctranslate2.Translator(str(folder), compute_type="float32")
    sides = ((source, task.source_dictionary), (target, task.target_dictionary))
    tokens = [[[words.symbols[i] for i in row] for row in rows] for rows, words in sides]
    theirs = [result.log_probs for result in translator.score_batch(*tokens)]
    ours = _log_probabilities(model, task.target_dictionary.eos(), source, target)
    return max(
        abs(a - b) for x, y in zip(theirs, ours, strict=True) for a, b in zip(x, y, strict=True)
    )


def _random_words(dictionary: Any, generator: torch.Generator) -> list[list[int]]:
    shape = (4, PIECES_CHECKED)
    return torch.randint(dictionary.nspecial, len(dictionary), shape, generator=generator).tolist()


def _log_probabilities(
    model: Any, eos: int, source: list[list[int]], target: list[list[int]]
) -> list[list[float]]:
    words = torch.tensor([[*row, eos] for row in target])
    with torch.no_grad():
        logits, _ = model(
            torch.tensor([[*row, eos] for row in source]),
            torch.full((len(source),), len(source[0]) + 1),
            words.roll(1, dims=1),  # the decoder begins with the end of a sentence
        )
        chosen = logits.float().log_softmax(dim=-1).gather(2, words.unsqueeze(2))
    return chosen.squeeze(2).tolist()
