"""Repairs of what today's fairseq does silently wrong, applied when the plugin is imported.

``FIXUP_MT_REPAIRS=0`` in the environment turns all of them off (checkpoints of fairseq's own
models then need fairseq's own ways of loading them).
"""

from __future__ import annotations

import argparse
import collections
import functools
import importlib
import logging
import os
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import omegaconf
import torch
from fairseq import checkpoint_utils, options
from fairseq.data import data_utils
from fairseq.distributed import utils as distributed_utils
from fairseq.file_io import PathManager
from fairseq.models import ARCH_MODEL_REGISTRY
from fairseq.nan_detector import NanDetector
from fairseq.tasks import FairseqTask
from omegaconf.base import ContainerMetadata, Metadata
from omegaconf.nodes import AnyNode

from fixup_core.files import whole_file
from fixup_mt.errors import UserError, check_architecture, check_options, install_hook

logger = logging.getLogger(__name__)

SWITCH = "FIXUP_MT_REPAIRS"


def load_checkpoints_safely() -> None:
    """Torch >= 2.6 refuses fairseq's checkpoints; allow exactly the classes that they hold.

    That is the command line's namespace, numpy's BLEU counts, and, where a distributed run
    broadcasts the state, the configuration. All of them are plain data.
    """
    core: Any = importlib.import_module("numpy._core.multiarray")
    both_names = [
        (getattr(core, name), f"numpy.{package}.multiarray.{name}")
        for name in ("_reconstruct", "scalar")
        for package in ("_core", "core")
    ]
    dtypes = [type(numpy.dtype(t)) for t in ("int64", "int32", "float64", "float32", "bool")]
    configuration = [
        *(omegaconf.DictConfig, omegaconf.ListConfig, ContainerMetadata, Metadata, AnyNode),
        *(typing.Any, dict, list, int, collections.defaultdict),
        distributed_utils._TensorPlaceholder,
    ]
    arrays: list[Any] = [numpy.ndarray, numpy.dtype, *both_names, *dtypes]
    torch.serialization.add_safe_globals([argparse.Namespace, *arrays, *configuration])


def copy_checkpoints_atomically() -> None:
    """A kill while ``checkpoint_last.pt`` is copied over in place leaves it truncated."""
    original = PathManager.copy

    def copy(src_path: str, dst_path: str, overwrite: bool = False) -> Any:
        if "://" in dst_path:  # a remote store, through iopath
            return original(src_path, dst_path, overwrite=overwrite)
        with whole_file(dst_path) as temporary:
            original(src_path, str(temporary), overwrite=True)
        return dst_path

    PathManager.copy = staticmethod(copy)


def keep_the_nan_detector_alive() -> None:
    """Its backward hooks die of the encoder's dict of lists and hide the divergence they report.

    So only its forward hooks stay, which name the first layer with a bad output. At the end the
    parameters with bad gradients are named, where fairseq prints the whole tensors.
    """
    original = NanDetector.__init__
    original.__defaults__ = (True, False)

    def leave(self: NanDetector, *exception: Any) -> None:
        bad = [
            name
            for name, parameter in self.named_parameters
            if parameter.grad is not None and not torch.isfinite(parameter.grad).all()
        ]
        logger.warning("gradients with NaN or Inf: %d parameters, first %s", len(bad), bad[:3])
        self.close()

    NanDetector.__exit__ = leave


def keep_the_last_batch() -> None:
    """The last batch is dropped when its size is no multiple of 8: in training, validation and
    generation, where the dropped sentences are the longest and BLEU is taken over the rest.
    """
    original = data_utils.batch_by_size

    @functools.wraps(original)
    def batch_by_size(indices: Any, *args: Any, **options: Any) -> Any:
        if not isinstance(indices, numpy.ndarray):
            indices = numpy.fromiter(indices, dtype=numpy.int64, count=-1)
        batches = original(indices, *args, **options)
        if options.get("fixed_shapes") is not None:
            return batches
        kept = sum(len(batch) for batch in batches)
        return batches if kept == len(indices) else [*batches, indices[kept:]]

    data_utils.batch_by_size = batch_by_size


def resume_with_the_same_batches() -> None:
    """Batches are made once a run, from ``seed + the epoch the run starts in``: a run resumed in a
    later epoch sees others. Make them from ``seed + 1`` always; their order follows the epoch.
    """
    original = FairseqTask.get_batch_iterator

    @functools.wraps(original)
    def get_batch_iterator(self: FairseqTask, dataset: Any, *args: Any, **options: Any) -> Any:
        epoch = options.get("epoch", 1)
        anew = options.get("update_epoch_batch_itr") or getattr(self.cfg, "rebuild_batches", False)
        # Some data sets draw other sentences every epoch; their batches follow the epoch already.
        if anew or options.get("disable_iterator_cache") or not self.can_reuse_epoch_itr(dataset):
            return original(self, dataset, *args, **options)
        iterator = original(self, dataset, *args, **(options | {"epoch": 1}))
        dataset.set_epoch(epoch)
        if iterator._cur_epoch_itr is None and iterator._next_epoch_itr is None:
            iterator.epoch = max(epoch, 1)
        return iterator

    FairseqTask.get_batch_iterator = get_batch_iterator


def find_the_restore_file() -> None:
    """``--restore-file checkpoint_best.pt`` is not looked for in the save directory; the run then
    starts from scratch and overwrites what lies there.
    """
    original = checkpoint_utils.load_checkpoint

    @functools.wraps(original)
    def load_checkpoint(cfg: Any, trainer: Any, **options: Any) -> Any:
        name, beside = cfg.restore_file, Path(cfg.save_dir, cfg.restore_file)

        def exists(path: str | Path) -> bool:
            return Path(str(path).replace(".pt", f"{trainer.checkpoint_suffix}.pt")).exists()

        if name != "checkpoint_last.pt" and "://" not in name and not exists(name):
            if not exists(beside):
                raise UserError(f"--restore-file: neither {name} nor {beside} exists")
            cfg.restore_file = str(beside)
        return original(cfg, trainer, **options)

    checkpoint_utils.load_checkpoint = load_checkpoint


def join_the_ranks_of_torchrun() -> None:
    """Not torchrun's ranks are counted but a machine's GPUs: without a GPU, or with one on each
    node, every rank trains alone, into the same folder.
    """
    original = distributed_utils.infer_init_method

    @functools.wraps(original)
    def infer_init_method(cfg: Any, force_distributed: bool = False) -> None:
        ranks = int(os.environ.get("WORLD_SIZE", 1))
        if ranks > 1 and "RANK" in os.environ:
            cfg.distributed_world_size = ranks
            if not torch.cuda.is_available():
                cfg.distributed_init_method = "env://"
                cfg.distributed_rank = int(os.environ["RANK"])
                cfg.distributed_no_spawn = True
        original(cfg, force_distributed)

    distributed_utils.infer_init_method = infer_init_method


def explain_mistakes() -> None:
    """A misspelt ``--arch`` and other mistakes are told in one line."""
    original = options.parse_args_and_arch

    @functools.wraps(original)
    def parse_args_and_arch(parser: Any, input_args: Any = None, *args: Any, **kwargs: Any) -> Any:
        install_hook(parser)  # here, and not at import: only fairseq's commands come by
        check_architecture(input_args or sys.argv[1:], list(ARCH_MODEL_REGISTRY))
        parsed = original(parser, input_args, *args, **kwargs)
        check_options(parsed[0] if isinstance(parsed, tuple) else parsed)
        return parsed

    options.parse_args_and_arch = parse_args_and_arch


REPAIRS: tuple[Callable[[], None], ...] = (
    load_checkpoints_safely,
    copy_checkpoints_atomically,
    keep_the_nan_detector_alive,
    keep_the_last_batch,
    resume_with_the_same_batches,
    find_the_restore_file,
    join_the_ranks_of_torchrun,
    explain_mistakes,
)


def apply() -> None:
    """Apply all repairs, unless the switch is off; say so in the log."""
    if os.environ.get(SWITCH) == "0":
        logger.warning("the repairs of fairseq are off (%s=0)", SWITCH)
        return
    for repair in REPAIRS:
        repair()
    names = ", ".join(repair.__name__ for repair in REPAIRS)
    # `python -m fixup_mt` is no fairseq command, and scripts read what it prints.
    if sys.argv[0] != "-m":
        logger.info("repairs of fairseq are on (%s=0 turns them off): %s", SWITCH, names)
