"""Which checkpoint a command works with, and what the checkpoint decides."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fixup_core.errors import UserError
from vision.nets import is_class_path
from vision.training.checkpoints import read_checkpoint

DECISIVE = ("net", "method", "base_branches", "options")
"""Of a network's options, those that are named where a checkpoint has others."""


def choose_checkpoint(options: Any, command: str) -> None:
    """``best`` and ``last`` are those of the run's folder, for every command; all but fit take
    ``best`` where none is named.

    Args:
        options: Of the command; ``ckpt_path`` becomes a file.
        command: fit, validate, test or predict.

    Raises:
        UserError: No such checkpoint, or a new run in the folder of another.
    """
    checkpoints = Path(options.trainer.default_root_dir, "checkpoints")
    chosen = options.ckpt_path or ("" if command == "fit" else "best")
    if "://" in str(chosen):
        raise UserError(
            f"--ckpt_path {chosen} is an address: fetch the file first, and give its path. "
            "Lightning would load it without the check that it runs no code"
        )
    if chosen in ("best", "last"):
        file = checkpoints / f"{chosen}.ckpt"
        if not file.exists():
            raise UserError(f"{file} does not exist: {_why_missing(file, options)}")
        options.ckpt_path = str(file)
    if not chosen and (checkpoints / "last.ckpt").exists():
        raise UserError(
            f"{options.trainer.default_root_dir} holds a run: go on with it by --ckpt_path last, "
            "or give another --trainer.default_root_dir"
        )


def _why_missing(file: Path, options: Any) -> str:
    if file.stem == "best" and file.with_stem("last").exists():
        return "the run was not validated; --ckpt_path last is there"
    return "check --trainer.default_root_dir, or name a file in --ckpt_path"


def take_options(options: Any) -> tuple[str, ...]:
    """Let the options of the checkpoint's network speak: other ones would give wrong scores.

    Args:
        options: Of the command; ``model`` becomes as the network was trained.

    Returns:
        The names of the network's classes, empty in older checkpoints.

    Raises:
        UserError: The network is one of the user's own and is not the one given: a checkpoint must
            not choose what code is run.
    """
    checkpoint = read_checkpoint(Path(options.ckpt_path))
    trained = checkpoint["hyper_parameters"]
    net, given = trained.get("net", options.model.net), options.model.net
    if is_class_path(str(net)) and net != given:
        raise UserError(f"the checkpoint's network is {net}: give it as --model.net")
    before = options.model.clone()
    for name, value in trained.items():
        if name in options.model:
            options.model[name] = value
    changed = [name for name in DECISIVE if trained.get(name) != before[name]]
    if changed:
        said = ", ".join(f"{name} {options.model[name]}" for name in changed)
        print(f"taken from the checkpoint: {said}")
    return tuple(checkpoint.get("classes", ()))
