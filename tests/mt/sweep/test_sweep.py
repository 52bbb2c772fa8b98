"""``python -m fixup_mt sweep``: points, what a log says, what a sweep shows, and mistakes."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import pytest

from fixup_core.errors import UserError
from fixup_core.results import TABLE, Table
from fixup_mt.sweep import sweep
from fixup_mt.sweep.points import Point, Recipe, Result, arguments, read_result
from fixup_mt.sweep.summary import markdown, summarise

POINT = Point("fixup_adam", 3, 0.005, 100, 1)
LOG = """== started: fairseq_cli.train ...
2026 | INFO | train_inner | {"loss": "9.0", "gnorm": "1.0", "num_updates": "1"}
== started: fairseq_cli.train ...
2026 | INFO | train_inner | {"loss": "8.0", "gnorm": "1.5", "num_updates": "1"}
2026 | INFO | train_inner | {"loss": "70.5", "gnorm": "912.0", "num_updates": "2"}
"""
VALID = '2026 | INFO | valid | {"valid_loss": "6.25", "valid_num_updates": "2"}\n'


def _options(*line: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    sweep.add_arguments(parser)
    return parser.parse_args(line)


@pytest.fixture
def binary(tmp_path: Path) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "dict.en.txt").write_text("a 3\nb 2\n")
    return folder


def test_a_log_is_read_from_its_last_start(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    log.write_text(LOG + VALID)
    assert read_result(log, broke_off=False) == Result(6.25, 70.5, 912.0, 2)


def test_a_training_that_diverged_has_no_loss(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    log.write_text(LOG + "error: the gradients are no numbers: lower --lr\n")
    result = read_result(log, broke_off=True)
    assert math.isnan(result.valid_loss) and result.updates == 2


def test_a_training_that_failed_otherwise_ends_the_sweep(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    log.write_text(LOG + "error: no space left on device\n")
    with pytest.raises(UserError, match="a training has failed; see"):
        read_result(log, broke_off=True)


@pytest.mark.parametrize(("task", "stacks"), [("translation", 2), ("language_modeling", 1)])
def test_a_point_is_a_line_of_fairseq(task: str, stacks: int, binary: Path) -> None:
    line = arguments(POINT, Recipe(binary, task=task, flags=("--lr", "1")), Path("folder"))
    assert sum(part.endswith("-layers") for part in line) == stacks
    assert line[line.index("--fixup-method") + 1] == "fixup_adam"
    assert line[line.index("--warmup-updates") + 1] == "100"
    assert line[-2:] == ["--lr", "1"]  # what the user gives comes last, and so holds


def test_what_a_sweep_shows(tmp_path: Path) -> None:
    table = Table(tmp_path / TABLE, Point, Result)
    losses = {(3, 0.002): 5.0, (3, 0.005): 4.0, (12, 0.002): 4.5, (12, 0.005): math.nan}
    for (depth, lr), loss in losses.items():
        table.add(Point("fixup", depth, lr, 0, 1), Result(loss, 9.0, 1.0, 250))
    shallow, deep = summarise(table, chance=10.0)
    assert (shallow.best_lr, shallow.best_loss, shallow.diverged) == (0.005, 4.0, 0)
    assert (deep.best_lr, deep.best_loss, deep.diverged, deep.trainings) == (0.002, 4.5, 1, 2)
    assert deep.shallow_loss is not None and math.isnan(deep.shallow_loss)
    assert markdown([deep]).endswith("| fixup | 0 | 12 | 0.002 | 4.500 | nan | 1 of 2 |\n")


def test_a_rate_that_was_not_run_is_not_told_as_diverged(tmp_path: Path) -> None:
    table = Table(tmp_path / TABLE, Point, Result)
    for depth, lr in ((3, 0.005), (12, 0.002)):
        table.add(Point("fixup", depth, lr, 0, 1), Result(4.0, 9.0, 1.0, 250))
    assert markdown(summarise(table, chance=10.0)).endswith("| 4.000 | not run | 0 of 1 |\n")


def test_a_table_goes_on_where_it_was(tmp_path: Path) -> None:
    table = Table(tmp_path / TABLE, Point, Result)
    table.add(POINT, Result(4.0, 9.0, 1.0, 250))
    assert Table(tmp_path / TABLE, Point, Result).rows == table.rows


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["--methods", "fixpu"], "did you mean 'fixup'"),
        (["--methods", "batchnorm"], "not defined for Transformers"),
        (["--methods", "fixup", "--depths", "0"], "depths and jobs are at least 1"),
        (["--methods", "fixup", "--lrs", "0"], "rates above 0"),
        (["--methods", "fixup", "--warmup", "250"], "leaves nothing of --max-update"),
    ],
)
def test_a_mistake_is_told_before_a_training(line: list[str], says: str, binary: Path) -> None:
    with pytest.raises(UserError, match=says):
        sweep.points_of(_options("--data-bin", str(binary), *line))


def test_a_folder_without_data(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give what fairseq-preprocess wrote"):
        sweep.recipe_of(_options("--data-bin", str(tmp_path), "--methods", "fixup"))


def test_a_sweep_trains_draws_and_goes_on(
    data_bin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--width", "16", "--ffn", "16", "--heads", "2", "--max-update", "2", "--jobs", "2"]
    grid = ["--methods", "fixup_adam", "prenorm", "--depths", "1", "--lrs", "0.01"]
    line = ["--data-bin", str(data_bin), *sizes, "--warmup", "0", "--output", str(tmp_path)]
    sweep.run(_options(*line, *grid))
    before = (tmp_path / TABLE).read_text()
    assert len(before.splitlines()) == 3 and "nan" not in before
    assert (tmp_path / "transfer.png").exists() and (tmp_path / "summary.md").exists()
    assert not list(tmp_path.rglob("*.pt"))
    capsys.readouterr()
    sweep.run(_options(*line, *grid))
    assert "2 trainings, 2 of them done before" in capsys.readouterr().out
    assert (tmp_path / TABLE).read_text() == before
    with pytest.raises(UserError, match="were trained with max_update 2, not 3"):
        sweep.run(_options(*[*line, *grid], "--max-update", "3"))
