"""The models' options: fairseq's own, without those that only normalisation needs, and Fixup's.

fairseq's ``TransformerConfig`` nests the encoder's and decoder's options, and its command line
silently ignores such nested options in a registered model. So the options are taken from it,
flattened (``encoder_layers``, ``decoder_layers``, ...), and nested again when a model is built.
"""

from __future__ import annotations

import dataclasses
import math
from argparse import Namespace
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Optional, get_type_hints

import torch
from fairseq.dataclass import ChoiceEnum, FairseqDataclass
from fairseq.models.transformer import TransformerConfig
from fairseq.models.transformer.transformer_config import (
    DecoderConfig,
    EncDecBaseConfig,
    QuantNoiseConfig,
)
from fairseq.models.transformer_lm import TransformerLanguageModelConfig
from omegaconf import II, DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError

from fixup_core import METHODS, Method
from fixup_core.clipping import check_share
from fixup_core.removal.anchor import ANCHOR
from fixup_core.removal.schedule import SCHEDULES
from fixup_core.rules.method import BASE_BRANCHES
from fixup_core.rules.methods import TRANSFORMERS, check_defined, method_named
from fixup_mt.errors import UserError
from fixup_mt.model.slots import NORMS

PREFIX = "fixup_"

NESTED = {"encoder": EncDecBaseConfig, "decoder": DecoderConfig, "quant_noise": QuantNoiseConfig}

NOT_OFFERED = frozenset(
    {
        # There is no normalisation to place, drop, export or add.
        *("normalize_before", "layernorm_embedding", "no_decoder_final_norm", "export"),
        *("scale_fc", "scale_attn", "scale_heads", "scale_resids"),
        # BASE layers contain LayerNorm; xFormers replaces the attention module.
        *("base_layers", "base_sublayers", "base_shuffle", "xformers_att_config"),
        # fairseq looks the exact classes of the layers up, and ours are not among them.
        *("quant_noise_scalar", "scalar"),
        # Fully sharded training flattens the parameters by which scalars and rules are found.
        "min_params_to_wrap",
        # fairseq appends the target's words to the source's but leaves the prepared word ids alone.
        "merge_src_tgt_embed",
        # Declared by fairseq but read by none of its Transformers, or an old name.
        *("char_inputs", "relu_dropout"),
    }
)
"""fairseq's options that a normalisation-free Transformer cannot have: giving one is an error."""

OWN_TYPES: dict[str, tuple[Any, Any]] = {
    # fairseq declares a list but reads a comma-separated string.
    "encoder_layers_to_keep": (Optional[str], None),
    "decoder_layers_to_keep": (Optional[str], None),
    # None takes the width of the decoder's layers.
    "decoder_input_dim": (Optional[int], None),
    "decoder_output_dim": (Optional[int], None),
}

LIKE_THE_ENCODER: dict[str, tuple[Any, Any]] = {
    # None takes the encoder's, as fairseq's architectures do.
    "decoder_embed_dim": (Optional[int], None),
    "decoder_ffn_embed_dim": (Optional[int], None),
}


PRECISIONS: dict[str, torch.dtype | None] = {"none": None, "bf16": torch.bfloat16}


def _option(default: Any, text: str, choices: Iterable[str] = ()) -> Any:
    return dataclasses.field(default=default, metadata={"help": text, "choices": tuple(choices)})


@dataclasses.dataclass(frozen=True)
class FixupOptions:
    """The options ``--fixup-*``: their names, types, defaults and help texts stand here alone."""

    method: str = _option(
        "fixup", f"what makes the model trainable, of the registry: {', '.join(METHODS)}"
    )
    base_branches: float = _option(
        BASE_BRANCHES,
        "residual branches of the model whose learning rate is known (5 a pair of layers, 2 a "
        "layer of a stack alone); fixup_adam, t_fixup_adam, completep and depth_mup take it over "
        "to any depth",
    )
    scalar_lr_ratio: float = _option(
        1.0, "learning rate of Fixup's scalars divided by that of the weights"
    )
    tied_output: str = _option(
        "leave",
        "what replaces a zero output layer when it shares the embeddings: leave (nothing), "
        "scale (logits times d^-1/2), gain (logits times a scalar that starts at 0)",
        choices=("leave", "scale", "gain"),
    )
    output_bias: str = _option(
        "auto",
        "where a bias vector of the output layer starts: frequencies (logarithms of those of the "
        "words in the training data), none (there is no such vector), auto (as the method has it)",
        choices=("auto", "frequencies", "none"),
    )
    qk_norm: bool = _option(
        False, "divide queries and keys by their root mean square; one learned number scales logits"
    )
    logit_cap: float = _option(
        0.0, "keep the logits x of attention within C * tanh(x / C), such as 50; 0: do not"
    )
    autocast: str = _option(
        "none",
        "run the model under torch.autocast in this type; scalars, logits and loss stay float32",
        choices=PRECISIONS,
    )
    compile: bool = _option(
        False, "train with layers compiled by torch.compile; needs a C++ compiler, or a GPU"
    )
    agc: float = _option(
        0.0, "clip gradients by the size of the weights: the largest share, such as 0.01; 0: do not"
    )
    from_layernorm: str = _option(
        "", "checkpoint of fairseq's transformer or transformer_lm to start from, settings and all"
    )
    remove_norms: str = _option(
        "none",
        "take the layer norms out while training: taper (all together, little by little), "
        "one_by_one, at_once",
        choices=("none", *SCHEDULES),
    )
    removal_updates: int = _option(2000, "updates until the last norm is gone")
    removal_anchor: float = _option(
        ANCHOR, "weight, in the loss, of what holds the size of the logits while norms go; 0: none"
    )
    removal_distil: float = _option(
        0.0,
        "weight, in the loss, of the divergence from the checkpoint with norms, whose words are "
        "soft targets to the end of the run; 0: none",
    )
    log_gradients: bool = _option(False, "log the gradient norm of every layer, to TensorBoard too")

    @classmethod
    def of(cls, cfg: Any) -> FixupOptions:
        """The options in a model's configuration; those that it lacks have their defaults.

        Args:
            cfg: A configuration of ours or of another model of fairseq, its namespace, or the
                dict that a checkpoint holds.
        """
        kinds = get_type_hints(cls)
        read = cfg.get if isinstance(cfg, dict) else partial(getattr, cfg)
        given = {name: read(PREFIX + name, None) for name in kinds}
        # fairseq's parsers leave None where the command line says nothing.
        values = {name: kinds[name](v) for name, v in given.items() if v is not None}
        options = cls(**values)
        if options.agc:
            check_share(options.agc)
        if not 0 <= options.logit_cap < math.inf:
            raise UserError(
                f"--fixup-logit-cap is {options.logit_cap:g}: give a number above 0, such as "
                "50, or 0 for none"
            )
        if not 0 <= options.removal_distil < math.inf:
            raise UserError(
                f"--fixup-removal-distil is {options.removal_distil:g}: give 0 or a weight above"
            )
        if options.removal_distil and not (options.from_layernorm and options.removes_norms):
            raise UserError(
                "--fixup-removal-distil learns from the model with norms as they go: give it, "
                "--fixup-from-layernorm CHECKPOINT, and --fixup-remove-norms"
            )
        return options

    @property
    def removes_norms(self) -> bool:
        """Whether norms go while the model trains."""
        return self.remove_norms != "none"

    @property
    def record(self) -> Method:
        """The method of ``--fixup-method``.

        Raises:
            UserError: There is no such method, or it is not defined for Transformers.
        """

        def defined(method: Method) -> bool:
            # fairseq builds a model before it has a batch.
            known = method.norm is None or method.norm in NORMS
            return known and not method.unit_variance and method.only in ("", TRANSFORMERS)

        method = check_defined(method_named(self.method), TRANSFORMERS, defined)
        given = self.base_branches != BASE_BRANCHES
        return method.with_base(self.base_branches if given else None)

    @property
    def starts_at_frequencies(self) -> bool:
        """Whether the output layer has a bias vector that starts at the words' frequencies."""
        asked = self.output_bias == "auto" and self.record.head_prior
        return asked or self.output_bias == "frequencies"

    @property
    def precision(self) -> torch.dtype | None:
        """The type of ``--fixup-autocast``; ``None`` without it."""
        return PRECISIONS[self.autocast]


def _host_fields() -> dict[str, tuple[Any, Any]]:
    """The fields of ``FixupOptions`` as fairseq reads them."""
    kinds = get_type_hints(FixupOptions)
    fields: dict[str, tuple[Any, Any]] = {}
    for field in dataclasses.fields(FixupOptions):
        choices = field.metadata["choices"]
        kind = ChoiceEnum(list(choices)) if choices else kinds[field.name]
        fields[PREFIX + field.name] = _field(kind, field.default, field.metadata["help"])
    return fields


def _field(kind: Any, default: Any, text: str | None) -> tuple[Any, Any]:
    return kind, dataclasses.field(default=default, metadata={"help": text})


FIXUP_FIELDS = _host_fields() | {
    # Without a help text fairseq adds no option; the name makes it copy the value of --optimizer.
    "optimizer": _field(str, II("optimizer._name"), None),
}


def _flat_fields(config: type, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    fields: dict[str, tuple[Any, Any]] = {}
    for field in dataclasses.fields(config):
        if field.name in NESTED:
            fields |= _flat_fields(NESTED[field.name], f"{field.name}_")
        elif field.name != "_name" and _offered(field.name):
            copy = dataclasses.field(default=field.default, metadata=dict(field.metadata))
            fields[prefix + field.name] = field.type, copy
    return fields


def _offered(name: str) -> bool:
    return name.removeprefix("decoder_") not in NOT_OFFERED


def config_class(
    name: str,
    base: type,
    own: dict[str, tuple[Any, Any]],
    new: dict[str, tuple[Any, Any, str]] | None = None,
    offered: Callable[[str], bool] = lambda name: True,
) -> type:
    """A flat configuration: options of fairseq's, and Fixup's.

    Args:
        name: Of the class.
        base: fairseq's configuration, nested or not.
        own: Types and defaults in the place of fairseq's, of the options that ``base`` has.
        new: Types, defaults and help texts of options that it has not.
        offered: Whether an option stays.
    """
    fields = _flat_fields(base)
    for key, (kind, default) in own.items():
        if key in fields:
            text = fields[key][1].metadata.get("help")
            fields[key] = _field(kind, default, text)
    fields |= {key: _field(*parts) for key, parts in (new or {}).items()}
    fields |= FIXUP_FIELDS
    spec = [(key, kind, default) for key, (kind, default) in fields.items() if offered(key)]
    return dataclasses.make_dataclass(name, spec, bases=(FairseqDataclass,))


FixupTransformerConfig: Any = config_class(
    "FixupTransformerConfig", TransformerConfig, OWN_TYPES | LIKE_THE_ENCODER
)
FixupLanguageModelConfig: Any = config_class(
    "FixupLanguageModelConfig", TransformerLanguageModelConfig, OWN_TYPES
)


def with_defaults(config: Any, name: str, values: dict[str, Any]) -> Any:
    """A copy of the dataclass ``config`` in which some options have other defaults."""
    known = {field.name: field for field in dataclasses.fields(config)}
    spec = [
        (key, known[key].type, dataclasses.field(default=value, metadata=known[key].metadata))
        for key, value in values.items()
    ]
    return dataclasses.make_dataclass(name, spec, bases=(config,))


def nested(cfg: DictConfig | Namespace) -> TransformerConfig:
    """The nested configuration that fairseq's stacks read, from our flat one.

    ``normalize_before`` is fairseq's name for "a module stands at the start of every branch", where
    Fixup has its scalar biases, and not behind the sum. ``fixup`` holds the ``FixupOptions``.

    Raises:
        UserError: A size that no Transformer can have.
    """
    values = plain(cfg)
    for key in LIKE_THE_ENCODER:
        values[key] = values.get(key) or values[key.replace("decoder", "encoder")]
    for side in ("encoder", "decoder"):
        if f"{side}_layers" in values:
            _check_sizes(values, side)
    for width in ("decoder_input_dim", "decoder_output_dim"):
        values[width] = values.get(width) or values["decoder_embed_dim"]
    config = TransformerConfig.from_namespace(Namespace(**values))
    config.no_decoder_final_norm = False
    config.fixup = FixupOptions.of(cfg)
    before = not config.fixup.record.norm_on_sum
    config.encoder.normalize_before = config.decoder.normalize_before = before
    return config


def optimizer_name(cfg: DictConfig | Namespace) -> str:
    """The optimiser's name in fairseq; "adam" when a model is built without an optimiser."""
    # Without a configuration around it the interpolation ${optimizer} refers to itself.
    standing_alone = OmegaConf.is_config(cfg) and cfg._get_root() is cfg
    if standing_alone and OmegaConf.is_interpolation(cfg, "optimizer"):
        return "adam"
    try:
        return cfg.optimizer or "adam"
    except InterpolationResolutionError:
        return "adam"


def plain(cfg: DictConfig | Namespace) -> dict[str, Any]:
    """The options as a dict of Python's own types, without those of the optimiser."""
    if isinstance(cfg, Namespace):
        return dict(vars(cfg))
    values = {str(key): cfg[key] for key in cfg if key not in ("_name", "optimizer")}
    return {
        key: OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
        for key, value in values.items()
    }


def _check_sizes(values: dict[str, Any], side: str) -> None:
    layers, heads = values[f"{side}_layers"], values[f"{side}_attention_heads"]
    width = values[f"{side}_embed_dim"]
    if layers < 1:
        raise UserError(f"--{side}-layers must be at least 1, got {layers}")
    if heads < 1 or width % heads:
        raise UserError(
            f"--{side}-attention-heads {heads} does not divide --{side}-embed-dim {width}: "
            "choose a number of heads that does"
        )
