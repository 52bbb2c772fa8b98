"""``--fixup-from-layernorm`` and ``--fixup-remove-norms`` in fairseq's commands.

A run starts from a checkpoint of fairseq's own Transformer, whose settings it takes over; what
holds the logits is added to the loss of any criterion.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from fairseq.logging import metrics
from fairseq.trainer import Trainer
from torch import Tensor

from fixup_mt.errors import UserError
from fixup_mt.host.patches import patch
from fixup_mt.host.teacher import make_teacher, outputs_seen
from fixup_mt.model.config import FixupOptions
from fixup_mt.model.removing import load_layernorm_

ARCHITECTURES = {"transformer": "transformer_fixup", "transformer_lm": "transformer_fixup_lm"}
"""Of fairseq's models, those of ours that have the same parts."""
TAKEN_OVER = (
    *("encoder_layers", "encoder_embed_dim", "encoder_ffn_embed_dim", "encoder_attention_heads"),
    *("decoder_layers", "decoder_embed_dim", "decoder_ffn_embed_dim", "decoder_attention_heads"),
    *("encoder_learned_pos", "decoder_learned_pos", "no_token_positional_embeddings"),
    *("share_decoder_input_output_embed", "share_all_embeddings", "no_scale_embedding"),
    *("activation_fn", "max_source_positions", "max_target_positions", "no_cross_attention"),
    "cross_self_attention",
)
"""Settings of a model that the new one has too."""
REFUSED = (
    *("layernorm_embedding", "no_decoder_final_norm", "base_layers", "adaptive_softmax_cutoff"),
    *("scale_fc", "scale_attn", "scale_heads", "scale_resids"),
)
"""Settings that no model of ours has."""


@patch(
    "fairseq.options:parse_args_and_arch",
    "parser input_args parse_known suppress_defaults modify_parser",
)
def take_over_settings(original: Any) -> Any:
    """A new model has the sizes of the one that it starts from, unless they are given."""

    def parse_args_and_arch(parser: Any, input_args: Any = None, *args: Any, **kwargs: Any) -> Any:
        parsed = original(parser, input_args, *args, **kwargs)
        options = parsed[0] if isinstance(parsed, tuple) else parsed
        if input_args is None:  # a command's line, and not a text that somebody looks at
            file = getattr(options, "fixup_from_layernorm", "")
            if file and hasattr(options, "max_update"):
                if getattr(options, "finetune_from_model", None):
                    raise UserError(
                        "--fixup-from-layernorm and --finetune-from-model both say where the run "
                        "starts: leave one of them out"
                    )
                take_over_(options, saved_model(file)[1], sys.argv[1:], file)
            check_removal(options)
        return parsed

    return parse_args_and_arch


@patch("fairseq.checkpoint_utils:load_checkpoint", "cfg trainer **passthrough_args")
def start_from_layernorm(original: Any) -> Any:
    """A run that has no checkpoint of its own yet starts from those weights."""

    def load_checkpoint(cfg: Any, trainer: Any, **passthrough_args: Any) -> Any:
        loaded = original(cfg, trainer, **passthrough_args)
        if not isinstance(trainer, Trainer):
            return loaded
        options = FixupOptions.of(trainer.cfg.model)
        file, distil = options.from_layernorm, options.removal_distil
        fresh = not trainer.get_num_updates()
        if file and (fresh or distil):
            saved = saved_model(file)[0]
            if fresh:
                load_layernorm_(trainer.model, saved, file)
                # In half precision the optimiser has copied the weights that were there before.
                trainer.reinitialize()
            if distil:
                trainer.get_model().teacher = make_teacher(trainer, saved, file, distil)
        return loaded

    return load_checkpoint


@patch("fairseq.checkpoint_utils:save_checkpoint", "cfg trainer epoch_itr val_loss")
def best_without_norms(original: Any) -> Any:
    """While norms are left no checkpoint counts as the best."""

    def save_checkpoint(cfg: Any, trainer: Any, epoch_itr: Any, val_loss: Any) -> Any:
        removal = getattr(trainer.get_model(), "removal", None)
        if removal is not None and removal.left:
            val_loss = None
        return original(cfg, trainer, epoch_itr, val_loss)

    return save_checkpoint


@patch("fairseq.trainer:Trainer.train_step", "self samples raise_oom")
def hold_the_logits(original: Any) -> Any:
    """The loss of a model whose norms go has the anchor, and the divergence from a teacher.

    It is added to what the criterion returns, since a task may have a step of its own.
    """

    def train_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        model = self.get_model()
        if getattr(model, "removal", None) is None:
            return original(self, *args, **kwargs)
        with outputs_seen(self.model) as seen:

            def hold(criterion: Any, given: Any, result: Any) -> Any:
                loss, sample_size, logged = result
                held = _held(model, seen, given[1])
                return loss + sample_size * held.to(loss), sample_size, logged

            # Before and not behind: a batch that found no memory leaves what it has returned.
            before = self.criterion.register_forward_pre_hook(lambda *given: seen.clear())
            behind = self.criterion.register_forward_hook(hold)
            try:
                return original(self, *args, **kwargs)
            finally:
                before.remove()
                behind.remove()

    return train_step


def _held(model: Any, seen: Sequence[Any], sample: Any) -> Tensor:
    """What a batch adds to the loss, for a word.

    Args:
        model: Its norms go.
        seen: What it returned.
        sample: The batch.
    """
    removal, teacher = model.removal, getattr(model, "teacher", None)
    metrics.log_scalar("norms_left", removal.share, priority=600, round=3)
    more = {} if removal.anchor is None else {"anchor": (1.0, removal.loss())}
    if teacher is not None:
        more["divergence"] = (teacher.weight, teacher.divergence(seen, sample))
    total = torch.zeros(())
    for name, (weight, value) in more.items():
        metrics.log_scalar(name, value.item(), priority=600, round=5)
        total = total.to(value) + weight * value
    return total


def saved_model(file: str) -> tuple[dict[str, Any], Any]:
    """The weights and the settings of a checkpoint of fairseq's.

    Raises:
        UserError: It is none, or of no Transformer.
    """
    if not Path(file).is_file():
        raise UserError(f"--fixup-from-layernorm: {file} does not exist: check the path")
    state: Any = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(state, dict) or "model" not in state:
        raise UserError(f"--fixup-from-layernorm: {file} is no checkpoint of fairseq's")
    settings = (state.get("cfg") or {}).get("model") or state.get("args")
    settings = settings if isinstance(settings, Namespace) else Namespace(**dict(settings or {}))
    return state["model"], settings


def take_over_(options: Namespace, saved: Namespace, line: Sequence[str], file: str) -> None:
    """Give ``options`` the settings of the model that a run starts from.

    Args:
        options: Of the command.
        saved: Of the model.
        line: The command's arguments: what is given there must be the same.
        file: The checkpoint, for messages.

    Raises:
        UserError: They differ, or the model has parts that none of ours has.
    """
    name = str(getattr(saved, "arch", None) or getattr(saved, "_name", ""))
    base = _family(name, ARCHITECTURES)
    if _family(str(options.arch), ARCHITECTURES.values()) != ARCHITECTURES.get(base):
        raise UserError(
            f"--fixup-from-layernorm: {file} is a model of --arch {name}, which cannot become one "
            f"of --arch {options.arch}: fairseq's {' and '.join(ARCHITECTURES)} can become "
            f"{' and '.join(ARCHITECTURES.values())}"
        )
    parts = [part for part in REFUSED if getattr(saved, part, None)]
    sides = {getattr(saved, f"{s}_normalize_before", None) for s in ("encoder", "decoder")} - {None}
    if parts or len(sides) != 1:
        what = _flag(parts[0]) if parts else "norms before one stack's branches, behind the other's"
        raise UserError(f"--fixup-from-layernorm: {file} has {what}, which no model of ours has")
    theirs = {part: getattr(saved, part) for part in TAKEN_OVER if hasattr(saved, part)}
    theirs["fixup_method"] = "prenorm" if sides.pop() else "postnorm"
    given = {part.partition("=")[0] for part in line}
    for part, value in theirs.items():
        own = getattr(options, part, None)
        if _flag(part) in given and own != value:
            raise UserError(
                f"{_flag(part)} is {own}, and {file} has {value}: leave it out, or give {value}"
            )
        setattr(options, part, value)


def check_removal(options: Any) -> None:
    """Raise ``UserError`` where the run ends before the last norm is gone."""
    if getattr(options, "fixup_remove_norms", "none") in ("none", None, "at_once"):
        return
    length, removal = getattr(options, "max_update", 0), options.fixup_removal_updates
    if length and length < removal:
        raise UserError(
            f"--max-update {length} ends the run before the last norm is gone: give "
            f"--fixup-removal-updates {int(0.8 * length)}, or more updates than {removal}"
        )


def _family(arch: str, families: Iterable[str]) -> str:
    """The longest of the names that an architecture begins with; empty where none does."""
    found = (name for name in families if f"{arch}_".startswith(f"{name}_"))
    return max(found, key=len, default="")


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
