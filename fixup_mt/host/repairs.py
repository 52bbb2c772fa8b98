"""Repairs of what today's fairseq does silently wrong, applied when the plugin is imported.

``FIXUP_MT_REPAIRS=0`` in the environment turns all of them off, but not what our own options need
(checkpoints of fairseq's own models then need fairseq's own ways of loading them). fairseq
used as a library goes on working: a repair acts where a command would go wrong, and there alone.
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

import numpy
import torch
from fairseq.models import ARCH_MODEL_REGISTRY

from fixup_core.command_line import speak_utf8
from fixup_mt.errors import install_hook
from fixup_mt.host import checkpoints, generation, tasks, texts
from fixup_mt.host.checkpoints import load_checkpoints_safely
from fixup_mt.host.clipping import clip_adaptively_where_asked
from fixup_mt.host.flow_log import log_gradients_where_asked
from fixup_mt.host.generation import (
    batches_of_a_shard,
    give_numpy_its_old_names,
    share_out,
    take_numpys_old_names_away,
)
from fixup_mt.host.layernorm import (
    best_without_norms,
    hold_the_logits,
    start_from_layernorm,
    take_over_settings,
)
from fixup_mt.host.literals import uncover_eval
from fixup_mt.host.options import check_architecture, check_options
from fixup_mt.host.patches import Patch, arguments, patch

logger = logging.getLogger(__name__)

SWITCH = "FIXUP_MT_REPAIRS"


@patch("fairseq.nan_detector:NanDetector.__init__", "self model forward backward")
def keep_the_nan_detector_alive(original: Any) -> Any:
    """Its backward hooks die of the encoder's dict of lists and hide the divergence they report.

    So only its forward hooks stay, which name the first layer with a bad output.
    """

    def init(self: Any, model: Any, forward: bool = True, backward: bool = False) -> None:
        original(self, model, forward, backward)

    return init


@patch("fairseq.nan_detector:NanDetector.__exit__", "self exc_type exc_value exc_traceback")
def name_the_bad_gradients(original: Any) -> Any:
    """At a divergence fairseq prints the whole gradients; the parameters' names are enough."""

    def leave(self: Any, *exception: Any) -> None:
        bad = [
            name
            for name, parameter in self.named_parameters
            if parameter.grad is not None and not torch.isfinite(parameter.grad).all()
        ]
        logger.warning("gradients with NaN or Inf: %d parameters, first %s", len(bad), bad[:3])
        self.close()

    return leave


@patch(
    "fairseq.data.data_utils:batch_by_size",
    "indices num_tokens_fn num_tokens_vec max_tokens max_sentences required_batch_size_multiple "
    "fixed_shapes",
)
def keep_the_last_batch(original: Any) -> Any:
    """The last batch is dropped when its size is no multiple of 8: in training, validation and
    generation, where the dropped sentences are the longest and BLEU is taken over the rest.
    """

    def batch_by_size(*args: Any, **kwargs: Any) -> Any:
        given = arguments(original, *args, **kwargs)
        indices = given["indices"]
        if not isinstance(indices, numpy.ndarray):
            indices = given["indices"] = numpy.fromiter(indices, dtype=numpy.int64, count=-1)
        batches = original(**given)
        if given["fixed_shapes"] is not None:
            return batches
        kept = sum(len(batch) for batch in batches)
        return batches if kept == len(indices) else [*batches, indices[kept:]]

    return batch_by_size


@patch(
    "fairseq.tasks.fairseq_task:FairseqTask.get_batch_iterator",
    "self dataset max_tokens max_sentences max_positions ignore_invalid_inputs "
    "required_batch_size_multiple seed num_shards shard_id num_workers epoch data_buffer_size "
    "disable_iterator_cache skip_remainder_batch grouped_shuffling update_epoch_batch_itr",
)
def resume_with_the_same_batches(original: Any) -> Any:
    """Batches are made once a run, from ``seed + the epoch the run starts in``: a run resumed in a
    later epoch sees others. Make them from ``seed + 1`` always; their order follows the epoch.
    """

    def get_batch_iterator(*args: Any, **kwargs: Any) -> Any:
        given = batches_of_a_shard(arguments(original, *args, **kwargs))
        task, dataset, epoch = given["self"], given["dataset"], given["epoch"]
        anew = given["update_epoch_batch_itr"] or getattr(task.cfg, "rebuild_batches", False)
        # Some data sets draw other sentences every epoch; their batches follow the epoch already.
        if anew or given["disable_iterator_cache"] or not task.can_reuse_epoch_itr(dataset):
            return original(**given)
        iterator = original(**given | {"epoch": 1})
        dataset.set_epoch(epoch)
        if iterator._cur_epoch_itr is None and iterator._next_epoch_itr is None:
            iterator.epoch = max(epoch, 1)
        return iterator

    return get_batch_iterator


@patch("fairseq.distributed.utils:infer_init_method", "cfg force_distributed")
def join_the_ranks_of_torchrun(original: Any) -> Any:
    """Not torchrun's ranks are counted but a machine's GPUs: without a GPU, or with one on each
    node, every rank trains alone, into the same folder.
    """

    def infer_init_method(cfg: Any, force_distributed: bool = False) -> None:
        ranks = int(os.environ.get("WORLD_SIZE", 1))
        if ranks > 1 and "RANK" in os.environ:
            cfg.distributed_world_size = ranks
            if not torch.cuda.is_available():
                cfg.distributed_init_method = "env://"
                cfg.distributed_rank = int(os.environ["RANK"])
                cfg.distributed_no_spawn = True
        original(cfg, force_distributed)

    return infer_init_method


@patch(
    "fairseq.options:parse_args_and_arch",
    "parser input_args parse_known suppress_defaults modify_parser",
)
def explain_mistakes(original: Any) -> Any:
    """A misspelt ``--arch`` and other mistakes end in one line."""

    def parse_args_and_arch(parser: Any, input_args: Any = None, *args: Any, **kwargs: Any) -> Any:
        command = input_args is None
        if command:
            install_hook(parser)  # here, and not at import: only fairseq's commands come by
            speak_utf8()
            texts.read_interactive_lines()
        line = sys.argv[1:] if command else input_args
        if line:
            # Whoever calls this from Python may pass None for an argument, as argparse allows.
            check_architecture([part or "" for part in line], list(ARCH_MODEL_REGISTRY))
        parsed = original(parser, input_args, *args, **kwargs)
        if command:
            options = parsed[0] if isinstance(parsed, tuple) else parsed
            check_options(options)
            share_out(options)
        return parsed

    return parse_args_and_arch


REPAIRS: tuple[Patch, ...] = (
    keep_the_nan_detector_alive,
    name_the_bad_gradients,
    keep_the_last_batch,
    resume_with_the_same_batches,
    join_the_ranks_of_torchrun,
    explain_mistakes,
    *checkpoints.REPAIRS,
    *generation.REPAIRS,
    *texts.REPAIRS,
    *tasks.REPAIRS,
)

OPTIONS = (
    *(take_over_settings, start_from_layernorm, best_without_norms, hold_the_logits),
    *(clip_adaptively_where_asked, log_gradients_where_asked),
)
"""What stands behind options of our own. The last is outermost: gradients are logged as they come,
before they are clipped."""


def apply() -> None:
    """Apply what our options need, and all repairs unless the switch is off; say so in the log.

    Twice is harmless.
    """
    for option in OPTIONS:
        option.apply()
    if os.environ.get(SWITCH) == "0":
        logger.warning("the repairs of fairseq are off (%s=0)", SWITCH)
        return
    load_checkpoints_safely()
    give_numpy_its_old_names()
    plain = (load_checkpoints_safely.__name__, give_numpy_its_old_names.__name__)
    on = ", ".join([*plain, *(r.name for r in REPAIRS if r.apply())])
    logger.info("repairs of fairseq are on (%s=0 turns them off): %s", SWITCH, on)


def undo() -> None:
    """Take all patches off. The classes that checkpoints may hold stay allowed."""
    for item in (*reversed(OPTIONS), *reversed(REPAIRS)):
        item.undo()
    uncover_eval()
    take_numpys_old_names_away()
