"""Repairs of how fairseq writes, finds and loads checkpoints."""

from __future__ import annotations

import argparse
import collections
import importlib
import logging
import tarfile
import typing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import omegaconf
import torch
from fairseq import file_utils
from fairseq.distributed import utils as distributed_utils
from fairseq.file_io import PathManager
from fairseq.trainer import Trainer
from omegaconf.base import ContainerMetadata, Metadata
from omegaconf.nodes import AnyNode

from fixup_core.files import hold_folder, whole_file
from fixup_mt.errors import UserError
from fixup_mt.host.literals import shadow_eval
from fixup_mt.host.patches import Patch, patch
from fixup_mt.model.config import PREFIX, FixupOptions

logger = logging.getLogger(__name__)

BUILT_BY = (
    *("method", "base_branches", "tied_output", "output_bias", "qk_norm", "logit_cap"),
    *("remove_norms", "removal_updates"),
)
"""Options of ours that a model is built by, and a checkpoint's weights may not show."""


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


@patch("fairseq.file_io:PathManager.copy", "src_path dst_path overwrite")
def copy_checkpoints_atomically(original: Any) -> Any:
    """A kill while ``checkpoint_last.pt`` is copied over in place leaves it truncated."""

    def copy(src_path: str, dst_path: str, overwrite: bool = False) -> Any:
        if "://" in dst_path:  # a remote store, through iopath
            return original(src_path, dst_path, overwrite=overwrite)
        with whole_file(dst_path) as temporary:
            original(src_path, str(temporary), overwrite=True)
        return dst_path

    return copy


@patch("fairseq.checkpoint_utils:_torch_persistent_save", "obj f")
def save_once(original: Any) -> Any:
    """On a full disk fairseq tries three times, behind what it has written into the same file, and
    logs three tracebacks before it gives up.
    """
    return lambda obj, f: torch.save(obj, f)


@patch("fairseq.checkpoint_utils:load_checkpoint_to_cpu", "path arg_overrides load_on_all_ranks")
def run_no_code_of_a_checkpoint(original: Any) -> Any:
    """A checkpoint's settings are strings that fairseq gives to ``eval`` as it builds the model:
    a file of plain data could run anything (``fixup_mt.host.literals``).
    """
    shadow_eval()

    def load_checkpoint_to_cpu(*args: Any, **kwargs: Any) -> Any:
        shadow_eval()  # modules that have been imported since
        return original(*args, **kwargs)

    return load_checkpoint_to_cpu


@patch("fairseq.file_utils:load_archive_file", "archive_file")
def keep_archives_in_their_folder(original: Any) -> Any:
    """A member of a model's archive that is called ``../x`` is written beside the folder."""

    class DataArchive(tarfile.TarFile):
        extraction_filter = staticmethod(tarfile.data_filter)

    def load_archive_file(archive_file: str) -> Any:
        before, file_utils.tarfile = file_utils.tarfile, SimpleNamespace(open=DataArchive.open)
        try:
            return original(archive_file)
        except tarfile.FilterError as error:
            raise UserError(f"{archive_file} is not unpacked: {error}") from error
        finally:
            file_utils.tarfile = before

    return load_archive_file


@patch("fairseq.checkpoint_utils:load_checkpoint", "cfg trainer **passthrough_args")
def go_on_as_it_was_begun(original: Any) -> Any:
    """A file of weights alone is passed over: the run starts from scratch and overwrites it. And
    options of ours that a checkpoint was not trained with go unseen where its weights fit.
    """

    def load_checkpoint(cfg: Any, trainer: Any, **passthrough_args: Any) -> Any:
        anew = cfg.save_dir is None or cfg.finetune_from_model
        if isinstance(trainer, Trainer) and not anew:
            file = _of_rank(str(Path(cfg.save_dir, cfg.restore_file or "")), trainer)
            state = _state(file)
            if not cfg.reset_optimizer:
                _check_optimizer(file, state)
            _check_method(file, state, trainer.cfg.model)
        return original(cfg, trainer, **passthrough_args)

    return load_checkpoint


@patch("fairseq.checkpoint_utils:load_checkpoint", "cfg trainer **passthrough_args")
def find_the_restore_file(original: Any) -> Any:
    """``--restore-file checkpoint_best.pt`` is not looked for in the save directory, and a file
    that is not there is passed over: the run starts from scratch and overwrites what lies there.
    """

    def load_checkpoint(cfg: Any, trainer: Any, **passthrough_args: Any) -> Any:
        name, folder = cfg.restore_file, cfg.save_dir
        given = getattr(cfg, "finetune_from_model", None)
        if given and "://" not in given and _of_rank(given, trainer).is_dir():
            raise UserError(f"--finetune-from-model: {given} is a folder: give a file in it")
        if folder is not None and name not in (None, "checkpoint_last.pt"):
            cfg.restore_file = _restore_file(name, Path(folder, name), trainer)
        return original(cfg, trainer, **passthrough_args)

    return load_checkpoint


@patch("fairseq.checkpoint_utils:load_checkpoint", "cfg trainer **passthrough_args")
def stop_where_the_run_is_done(original: Any) -> Any:
    """``--max-update`` is looked at behind an update: a run that is done and started again makes
    one more each time, and overwrites its checkpoints.
    """

    def load_checkpoint(cfg: Any, trainer: Any, **passthrough_args: Any) -> Any:
        loaded = original(cfg, trainer, **passthrough_args)
        if isinstance(trainer, Trainer):
            done, limit = trainer.get_num_updates(), trainer.cfg.optimization.max_update
            if 0 < limit <= done:
                logger.info("this run has made %d updates, and --max-update is %g", done, limit)
                trainer.cfg.optimization.max_epoch = -1  # fairseq's loop is not entered
        return loaded

    return load_checkpoint


@patch("fairseq.checkpoint_utils:load_checkpoint", "cfg trainer **passthrough_args")
def one_run_in_a_folder(original: Any) -> Any:
    """Nothing stops a second run in the same save directory."""

    def load_checkpoint(cfg: Any, trainer: Any, **passthrough_args: Any) -> Any:
        writes = isinstance(trainer, Trainer) and trainer.is_data_parallel_master
        if writes and cfg.save_dir is not None and not cfg.no_save:
            hold_folder(Path(cfg.save_dir))
        return original(cfg, trainer, **passthrough_args)

    return load_checkpoint


def _restore_file(name: str, beside: Path, trainer: Any) -> str:
    if "://" in name:
        if not PathManager.exists(name):
            raise UserError(f"--restore-file: {name} cannot be reached: give a file")
        return name
    for path in (name, str(beside)):
        if _of_rank(path, trainer).is_dir():
            raise UserError(f"--restore-file: {path} is a folder: give a file in it")
        if _of_rank(path, trainer).exists():
            return path
    raise UserError(f"--restore-file: neither {name} nor {beside} exists")


def _state(file: Path) -> dict[str, Any]:
    """What the file holds; nothing where it is not there."""
    if not file.is_file():
        return {}
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception:
        return {}  # a damaged file is explained where fairseq loads it


def _check_optimizer(file: Path, state: dict[str, Any]) -> None:
    """Raise unless the file holds what a run goes on with."""
    if state and not state.get("last_optimizer_state"):
        raise UserError(
            f"{file} holds weights but no optimiser, so that no run can go on from it: start one "
            f"from its weights by --finetune-from-model {file} in another --save-dir, or add "
            "--reset-optimizer"
        )


def _check_method(file: Path, state: dict[str, Any], model: Any) -> None:
    """Raise where the file's model was built by other options of ours."""
    saved = (state.get("cfg") or {}).get("model")
    if saved is None or not hasattr(model, f"{PREFIX}method"):
        return
    there, here = FixupOptions.of(saved), FixupOptions.of(model)
    for name in BUILT_BY:
        was, now = getattr(there, name), getattr(here, name)
        if was != now:
            flag = f"--{(PREFIX + name).replace('_', '-')}"
            raise UserError(
                f"{file} was trained with {flag} {was}, not {now}: give what it was trained with, "
                f"or start from its weights by --finetune-from-model {file} in another --save-dir"
            )


def _of_rank(path: str, trainer: Any) -> Path:
    return Path(path.replace(".pt", f"{trainer.checkpoint_suffix or ''}.pt"))


REPAIRS: tuple[Patch, ...] = (
    run_no_code_of_a_checkpoint,
    keep_archives_in_their_folder,
    copy_checkpoints_atomically,
    save_once,
    # Each around the one before: the folder is held first, the file is found, then looked into.
    go_on_as_it_was_begun,
    find_the_restore_file,
    stop_where_the_run_is_done,
    one_run_in_a_folder,
)
