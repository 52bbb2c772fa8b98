"""When norms go."""

from __future__ import annotations

import math

import pytest

from fixup_core.errors import UserError
from fixup_core.removal.schedule import Turn, in_order, make_schedule

PATHS = ["a.norm1", "a.norm2", "b.norm1", "b.norm2", "norm"]
TURNS = in_order(PATHS, ["a.norm1", "b.norm1"])


def test_the_order_of_turns() -> None:
    """Feed-forward branches, queries and keys, values, the last norm."""
    assert [str(turn) for turn in TURNS] == [
        "a.norm2",
        "b.norm2",
        "a.norm1, queries and keys",
        "b.norm1, queries and keys",
        "a.norm1, values",
        "b.norm1, values",
        "norm",
    ]


def test_a_last_norm_that_feeds_attention_goes_with_the_others() -> None:
    turns = in_order(["a", "b"], ["b"])
    assert turns == [Turn("a"), Turn("b", (0,)), Turn("b", (1,))]
    assert in_order(["a"], []) == [Turn("a")]


def test_every_step_of_a_taper() -> None:
    schedule = make_schedule("taper", TURNS, 50)
    for step in range(60):
        if step <= 5:  # a tenth, in which the statistics are taken
            left = 1.0
        elif step < 50:
            left = 0.5 + 0.5 * math.cos(math.pi * (step - 5) / 45)
        else:
            left = 0.0
        gates = schedule.gates(step)
        assert set(gates) == set(PATHS)
        assert all(gate == pytest.approx((left, left)) for gate in gates.values())
    assert schedule.gates(5)["norm"] == (1, 1) and schedule.gates(6)["norm"] < (1, 1)
    assert schedule.gates(49)["norm"] > (0, 0) and schedule.gates(50)["norm"] == (0, 0)


@pytest.mark.parametrize("steps", [7, 10, 70, 100])
def test_every_step_of_one_by_one(steps: int) -> None:
    schedule = make_schedule("one_by_one", TURNS, steps)
    for step in range(steps + 5):
        gone = [turn for number, turn in enumerate(TURNS, 1) if step >= number * steps / 7]
        for path, gates in schedule.gates(step).items():
            expected = [1.0, 1.0]
            for turn in gone:
                for side in turn.sides:
                    expected[side] = expected[side] * (turn.path != path)
            assert gates == tuple(expected)
    last = [set(schedule.gates(step).values()) == {(0.0, 0.0)} for step in (steps - 1, steps)]
    assert last == [False, True]


def test_at_once_is_one_step() -> None:
    schedule = make_schedule("at_once", TURNS, 2000)
    assert schedule.steps == 1
    assert set(schedule.gates(0).values()) == {(1.0, 1.0)}
    assert set(schedule.gates(1).values()) == {(0.0, 0.0)}


@pytest.mark.parametrize(
    ("name", "steps", "message"),
    [
        ("one_by_one", 6, "6 steps are too few for the schedule 'one_by_one' of 5 norms: take 7"),
        ("taper", 1, "1 steps are too few for the schedule 'taper' of 5 norms: take 2"),
        ("taper", -3, "are too few"),
        ("slowly", 100, "there is no schedule 'slowly': take one of taper, one_by_one, at_once"),
    ],
)
def test_what_is_no_schedule(name: str, steps: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_schedule(name, TURNS, steps)
