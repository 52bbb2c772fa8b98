"""When norms go: for every step, how much of each is left. Pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from fixup_core.errors import UserError

CALIBRATION = 0.1
"""Share of a taper's steps in which the norms are whole and their statistics are taken."""
Gates = tuple[float, float]
"""Of one norm: what is left of it for queries and keys, or for everything, and for values."""


@dataclass(frozen=True)
class Turn:
    """One side of a norm, or a norm.

    Attributes:
        path: Of the norm.
        sides: 0 for queries and keys, 1 for values; both for the whole.
    """

    path: str
    sides: tuple[int, ...] = (0, 1)

    def __str__(self) -> str:
        names: dict[tuple[int, ...], str] = {(0,): ", queries and keys", (1,): ", values"}
        side = names.get(self.sides, "")
        return f"{self.path}{side}"


class Schedule(Protocol):
    """How much is left of each norm."""

    @property
    def name(self) -> str:
        """One of ``SCHEDULES``."""
        ...

    @property
    def steps(self) -> int:
        """Until the last norm is gone."""
        ...

    def gates(self, step: int) -> dict[str, Gates]:
        """By path, after ``step`` steps."""
        ...


@dataclass(frozen=True)
class Taper:
    """All norms at once, from 1 to 0 by half a cosine; whole in the first tenth of the steps."""

    paths: tuple[str, ...]
    steps: int
    name: str = "taper"

    def gates(self, step: int) -> dict[str, Gates]:
        start = math.ceil(CALIBRATION * self.steps)
        done = min(max(step - start, 0) / max(self.steps - start, 1), 1.0)
        left = 0.0 if step >= self.steps else 0.5 * (1 + math.cos(math.pi * done))
        return dict.fromkeys(self.paths, (left, left))


@dataclass(frozen=True)
class OneByOne:
    """One turn after the other, at equal distances; the last at the last step."""

    turns: tuple[Turn, ...]
    steps: int
    name: str = "one_by_one"

    def gates(self, step: int) -> dict[str, Gates]:
        left = {turn.path: [1.0, 1.0] for turn in self.turns}
        for number, turn in enumerate(self.turns, start=1):
            if step * len(self.turns) >= number * self.steps:
                for side in turn.sides:
                    left[turn.path][side] = 0.0
        return {path: (first, second) for path, (first, second) in left.items()}


@dataclass(frozen=True)
class AtOnce:
    """All norms at the first step. With BatchNorm the network is that of evaluation then."""

    paths: tuple[str, ...]
    steps: int = 1
    name: str = "at_once"

    def gates(self, step: int) -> dict[str, Gates]:
        return dict.fromkeys(self.paths, (0.0, 0.0) if step else (1.0, 1.0))


SCHEDULES = ("taper", "one_by_one", "at_once")


def make_schedule(name: str, turns: Sequence[Turn], steps: int) -> Schedule:
    """A schedule by its name.

    Args:
        name: One of ``SCHEDULES``.
        turns: In the order in which norms go, each side once.
        steps: Until the last is gone.

    Raises:
        UserError: There is no such schedule, or it has fewer steps than there are turns.
    """
    paths = tuple(dict.fromkeys(turn.path for turn in turns))
    if name == "at_once":
        return AtOnce(paths)
    if name not in SCHEDULES:
        raise UserError(f"there is no schedule {name!r}: take one of {', '.join(SCHEDULES)}")
    least = len(turns) if name == "one_by_one" else 2
    if steps < least:
        raise UserError(
            f"{steps} steps are too few for the schedule {name!r} of {len(paths)} norms: take "
            f"{least} at the least, and some hundred for it to work"
        )
    return OneByOne(tuple(turns), steps) if name == "one_by_one" else Taper(paths, steps)


def in_order(paths: Sequence[str], split: Sequence[str]) -> list[Turn]:
    """The turns of a network's norms: those of the feed-forward branches, the queries' and keys'
    side of those before attention, their values' side, and the last norm of all at the end.

    Args:
        paths: In the order of the forward pass.
        split: Those that feed queries, keys and values.
    """
    whole = [Turn(path) for path in paths if path not in split]
    last = [whole.pop()] if whole and whole[-1].path == paths[-1] else []
    sided = [Turn(path, (side,)) for side in (0, 1) for path in paths if path in split]
    return [*whole, *sided, *last]
