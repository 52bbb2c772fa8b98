"""Average the weights of several checkpoints of one run into one.

Which checkpoints is decided without the test set: either they are named (``--inputs``), or they
are the last N (``--last``), or they are the N neighbouring checkpoints whose mean validation value
is the best (``--best-by-valid``). That value is the one fairseq recorded in each checkpoint, of
its ``--best-checkpoint-metric`` (the validation loss unless the run said otherwise).
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fixup_core.errors import explain
from fixup_core.files import add_output, refuse_existing, whole_file
from fixup_mt import register
from fixup_mt.errors import KNOWN, UserError

FILE_PATTERNS = {
    "epoch": re.compile(r"checkpoint(\d+)\.pt"),
    "update": re.compile(r"checkpoint_\d+_(\d+)\.pt"),
}
BEST = re.compile(r"checkpoint\.best_.*\.pt")


@dataclass(frozen=True)
class Candidate:
    """A checkpoint on disk: its place in the run and its validation value, where it has one."""

    path: Path
    position: int
    value: float | None
    larger_is_better: bool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--inputs", nargs="+", type=Path, metavar="FILE", help="the checkpoints to average"
    )
    source.add_argument(
        "--checkpoint-dir", type=Path, metavar="DIR", help="choose among this run's checkpoints"
    )
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "--best-by-valid",
        type=int,
        metavar="N",
        help="the N neighbouring checkpoints that are best on the validation set",
    )
    choice.add_argument("--last", type=int, metavar="N", help="the last N checkpoints")
    parser.add_argument(
        "--kind",
        choices=sorted(FILE_PATTERNS),
        default="epoch",
        help="checkpointN.pt, or checkpoint_EPOCH_UPDATE.pt (default: %(default)s)",
    )
    add_output(parser)


def run(args: argparse.Namespace) -> None:
    refuse_existing(args.output, args.overwrite)
    paths = choose_inputs(args)
    save_atomically(average_checkpoints(paths), args.output)
    print(f"averaged {len(paths)} checkpoints into {args.output}:")
    for path in paths:
        print(f"  {path}")


def choose_inputs(args: argparse.Namespace) -> list[Path]:
    by_rule = args.best_by_valid is not None or args.last is not None
    if args.inputs is not None:
        if by_rule:
            raise UserError(
                "--best-by-valid and --last choose within --checkpoint-dir, not --inputs"
            )
        return list(args.inputs)
    if not by_rule:
        raise UserError("say which checkpoints: add --best-by-valid N or --last N")
    if args.last is not None:
        return last_checkpoints(args.checkpoint_dir, args.last, kind=args.kind)
    return best_window(args.checkpoint_dir, args.best_by_valid, kind=args.kind)


def last_checkpoints(folder: Path, count: int, *, kind: str = "epoch") -> list[Path]:
    return [path for _, path in list_checkpoints(folder, count, kind)[-count:]]


def best_window(folder: Path, count: int, *, kind: str = "epoch") -> list[Path]:
    """The ``count`` consecutive checkpoints with the best mean validation value.

    Consecutive means neighbours among those still in the folder. A tie goes to the later window.

    Raises:
        UserError: too few checkpoints, or one of them holds no validation value.
    """
    candidates = [
        read_candidate(path, position) for position, path in list_checkpoints(folder, count, kind)
    ]
    for candidate in candidates:
        if candidate.value is None:
            raise UserError(
                f"{candidate.path} holds no validation value; train with validation, or use --last"
            )
    sign = -1.0 if candidates[0].larger_is_better else 1.0
    values = [sign * candidate.value for candidate in candidates if candidate.value is not None]
    starts = range(len(values) - count + 1)
    start = min(starts, key=lambda i: (sum(values[i : i + count]), -i))
    return [candidate.path for candidate in candidates[start : start + count]]


def list_checkpoints(folder: Path, count: int, kind: str) -> list[tuple[int, Path]]:
    """At least ``count`` checkpoints of this kind as (epoch or update, path), in order."""
    if count < 1:
        raise UserError(f"cannot average {count} checkpoints; give a number above 0")
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give the run's --save-dir")
    pattern = FILE_PATTERNS[kind]
    matches = ((pattern.fullmatch(path.name), path) for path in folder.iterdir())
    found = sorted((int(match[1]), path) for match, path in matches if match)
    if len(found) < count:
        raise UserError(
            f"{folder} holds {len(found)} {kind} checkpoints but {count} are to be averaged; "
            + _advice(folder, kind)
        )
    return found


def _advice(folder: Path, kind: str) -> str:
    """What to do about too few checkpoints, by what else the run has kept."""
    names = [path.name for path in folder.iterdir()]
    other = next(name for name in FILE_PATTERNS if name != kind)
    if any(FILE_PATTERNS[other].fullmatch(name) for name in names):
        return f"ask for fewer, or take the others with --kind {other}"
    if any(BEST.fullmatch(name) for name in names):
        return (
            "those that --keep-best-checkpoints has kept are averaged with --inputs "
            f"{folder}/checkpoint.best_*.pt"
        )
    keep = "--keep-last-epochs" if kind == "epoch" else "--keep-interval-updates"
    return f"ask for fewer, train longer, or keep more of them ({keep})"


def read_candidate(path: Path, position: int) -> Candidate:
    state = load_checkpoint(path)
    extra_state = state.get("extra_state") or {}
    value = extra_state.get("val_loss")
    checkpoint_args = config_section(state, "checkpoint")
    return Candidate(
        path=path,
        position=position,
        value=None if value is None else float(value),
        larger_is_better=bool(checkpoint_args.get("maximize_best_checkpoint_metric", False)),
    )


def config_section(state: Mapping[str, Any], name: str) -> dict[str, Any]:
    """One section of the training configuration as a plain dict; empty when there is none."""
    section = (state.get("cfg") or {}).get(name)
    if section is None:
        return {}
    return dict(vars(section) if isinstance(section, argparse.Namespace) else section)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A fairseq checkpoint in CPU memory, its tensors mapped from the file until they are used.

    Raises:
        UserError: missing, truncated, or not a fairseq checkpoint.
    """
    register()  # allows the classes that fairseq's checkpoints hold
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        line = explain(error, KNOWN)
        if line is None:
            raise
        raise UserError(line) from error
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise UserError(f"{path} holds no model; give a checkpoint that fairseq-train wrote")
    return state


def average_checkpoints(paths: Sequence[Path]) -> dict[str, Any]:
    """The last checkpoint's state with the mean weights of all; the optimizer's state is dropped.

    Sums are taken in float64. Half-precision weights come back in float32, so that the mean is
    not rounded to half again; every other tensor keeps its type. Integer tensors and anything that
    is no tensor must be equal in all checkpoints.

    Raises:
        UserError: no checkpoint, or they are not of the same model.
    """
    if not paths:
        raise UserError("there is nothing to average; give at least one checkpoint")
    result = load_checkpoint(paths[0])
    reference = result["model"]
    sums = {name: tensor.double() for name, tensor in reference.items() if is_averaged(tensor)}
    for path in paths[1:]:
        result = load_checkpoint(path)
        check_same_model(reference, result["model"], paths[0], path)
        for name in sums:
            sums[name] = sums[name] + result["model"][name]
    result["model"] = {
        name: mean_like(sums[name], len(paths), value) if name in sums else value
        for name, value in reference.items()
    }
    result.pop("last_optimizer_state", None)
    extra_state = result.get("extra_state") or {}
    result["extra_state"] = {**extra_state, "averaged_from": [str(path) for path in paths]}
    return result


def is_averaged(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def mean_like(total: torch.Tensor, count: int, like: torch.Tensor) -> torch.Tensor:
    is_half = like.dtype in (torch.float16, torch.bfloat16)
    return (total / count).to(torch.float32 if is_half else like.dtype)


def check_same_model(
    first: Mapping[str, Any], other: Mapping[str, Any], first_path: Path, other_path: Path
) -> None:
    advice = "average checkpoints of one run only"
    for name in [*first, *other]:
        if name not in first or name not in other:
            owner = first_path if name in first else other_path
            lacking = other_path if name in first else first_path
            raise UserError(f"{owner} holds {name} but {lacking} does not; {advice}")
    for name, value in first.items():
        if isinstance(value, torch.Tensor) and value.shape != other[name].shape:
            shapes = f"{tuple(value.shape)} and {tuple(other[name].shape)}"
            raise UserError(
                f"{name} has shapes {shapes} in {first_path} and {other_path}; {advice}"
            )
        if not is_averaged(value) and not is_equal(value, other[name]):
            raise UserError(f"{name} differs between {first_path} and {other_path}; {advice}")


def is_equal(left: Any, right: Any) -> bool:
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return torch.equal(left, right)
    return bool(left == right)


def save_atomically(state: Mapping[str, Any], path: Path) -> None:
    """Written beside its place and renamed, so that a killed run harms no earlier file."""
    with whole_file(path) as temporary:
        torch.save(dict(state), temporary)
