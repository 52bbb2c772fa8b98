"""The points of a sweep: one short fairseq training each, scored on the validation set."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fixup_core.errors import UserError
from fixup_core.results import Table
from fixup_mt.host.jobs import STARTED, Job

PLUGIN = Path(__file__).resolve().parents[1]
ARCHITECTURES = {"translation": "transformer_fixup", "language_modeling": "transformer_fixup_lm"}
"""By fairseq's name of the task."""
LOGGED = re.compile(r"\| (train_inner|valid) \| (\{.*\})")
BROKE_OFF = re.compile(r"error: .*(gradient|NaN|Inf|loss)")


@dataclass(frozen=True)
class Point:
    """One training.

    Attributes:
        method: Of the registry.
        depth: Layers of every stack.
        lr: Learning rate.
        warmup: Updates.
        seed: Of weights, order and dropout.
    """

    method: str
    depth: int
    lr: float
    warmup: int
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.method}_d{self.depth}_lr{self.lr:g}_w{self.warmup}_s{self.seed}"


@dataclass(frozen=True)
class Result:
    """What a point gave.

    Attributes:
        valid_loss: After the last update, in bits; not a number where the training broke off.
        top_loss: The highest training loss of an update, in bits: a spike shows here.
        top_gnorm: The largest gradient norm, before clipping.
        updates: How many there were.
    """

    valid_loss: float
    top_loss: float
    top_gnorm: float
    updates: int


@dataclass(frozen=True)
class Recipe:
    """How every point of a sweep is trained.

    Attributes:
        data_bin: What ``fairseq-preprocess`` wrote.
        task: A key of ``ARCHITECTURES``.
        max_update: Length; the rate falls to 0 by then, in a straight line.
        max_tokens: Of a batch.
        width: Of the model.
        ffn: Width inside the feed-forward branches.
        heads: Of attention.
        dropout: Probability.
        clip_norm: Of the gradients; 0: they are not clipped.
        autocast: "bf16" or "none".
        flags: More of ``fairseq-train``'s.
    """

    data_bin: Path
    task: str = "translation"
    max_update: int = 250
    max_tokens: int = 1024
    width: int = 128
    ffn: int = 512
    heads: int = 4
    dropout: float = 0.1
    clip_norm: float = 1.0
    autocast: str = "bf16"
    flags: tuple[str, ...] = ()

    def description(self) -> dict[str, Any]:
        """What decides a point's numbers and is not in its row."""
        return {key: str(value) for key, value in vars(self).items()}

    def sizes(self, depth: int) -> dict[str, int]:
        """The flags of fairseq for the sizes of all stacks."""
        stacks = ("encoder", "decoder") if self.task == "translation" else ("decoder",)
        parts = {
            "layers": depth,
            "embed-dim": self.width,
            "ffn-embed-dim": self.ffn,
            "attention-heads": self.heads,
        }
        return {f"{stack}-{part}": size for stack in stacks for part, size in parts.items()}


Results = Table[Point, Result]


def arguments(point: Point, recipe: Recipe, folder: Path) -> list[str]:
    """Of ``fairseq-train``."""
    values: dict[str, Any] = {
        "task": recipe.task,
        "arch": ARCHITECTURES[recipe.task],
        "user-dir": PLUGIN,
        "save-dir": folder / "checkpoints",
        **recipe.sizes(point.depth),
        "fixup-method": point.method,
        "fixup-autocast": recipe.autocast,
        "seed": point.seed,
        "dropout": recipe.dropout,
        "criterion": "cross_entropy",
        "optimizer": "adam",
        "adam-betas": "(0.9, 0.98)",
        "clip-norm": recipe.clip_norm,
        "lr": point.lr,
        "lr-scheduler": "polynomial_decay",
        "warmup-updates": point.warmup,
        "total-num-update": recipe.max_update,
        "max-update": recipe.max_update,
        "max-tokens": recipe.max_tokens,
        "required-batch-size-multiple": 1,
        "num-workers": 0,
        "log-format": "json",
        "log-interval": 1,
        # The last update alone is validated and saved; a cut training begins again from the start
        # of the epoch that it was in.
        "validate-interval-updates": recipe.max_update,
        "validate-interval": 10**6,
        "save-interval": 10**6,
        "keep-last-epochs": 1,
    }
    given = [part for name, value in values.items() for part in (f"--{name}", str(value))]
    return [str(recipe.data_bin), *given, "--no-epoch-checkpoints", *recipe.flags]


def job(point: Point, recipe: Recipe, output: Path) -> Job:
    """The training of a point."""
    folder = output / "points" / point.name

    def on_line(line: str, bar: Any) -> None:
        found = LOGGED.search(line)
        if found and found[1] == "train_inner":
            bar.update(int(json.loads(found[2])["num_updates"]) - bar.n)

    return Job(
        point.name,
        "fairseq_cli.train",
        arguments(point, recipe, folder),
        log=folder / "train.log",
        on_line=on_line,
        total=recipe.max_update,
        unit="updates",
    )


def read_result(log: Path, *, broke_off: bool) -> Result:
    """What the log of a training says; of several starts, the last counts.

    Raises:
        UserError: The training has ended otherwise than by numbers that are none.
    """
    text = log.read_text(encoding="utf-8", errors="replace").rpartition(STARTED)[2]
    if broke_off and not BROKE_OFF.search(text):
        raise UserError(f"a training has failed; see {log}")
    found = [(kind, json.loads(numbers)) for kind, numbers in LOGGED.findall(text)]
    steps = [numbers for kind, numbers in found if kind == "train_inner"]
    valid = [float(numbers["valid_loss"]) for kind, numbers in found if kind == "valid"]
    return Result(
        valid_loss=valid[-1] if valid and not broke_off else math.nan,
        top_loss=_top(steps, "loss"),
        top_gnorm=_top(steps, "gnorm"),
        updates=int(steps[-1]["num_updates"]) if steps else 0,
    )


def clear(point: Point, output: Path) -> None:
    """Remove the checkpoints of a finished point; its log stays."""
    shutil.rmtree(output / "points" / point.name / "checkpoints", ignore_errors=True)


def _top(steps: list[dict[str, Any]], name: str) -> float:
    values = [float(numbers[name]) for numbers in steps if name in numbers]
    return max(values, default=math.nan)
