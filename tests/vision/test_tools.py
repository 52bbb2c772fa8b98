"""Sweeps, lesion study, comparison of runs, and the recipes."""

from __future__ import annotations

import csv
import math
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import yaml

from fixup_core.errors import UserError
from fixup_core.results import Table, parse_options
from tests.conftest import ROOT
from vision.cli import VisionCLI
from vision.compare import compare, distinct_names, read_run
from vision.data import Digits
from vision.export import export
from vision.nets import build_net
from vision.sweep import figures, points
from vision.sweep.lesion import lesion
from vision.sweep.points import Point, Recipe, Result, run_point
from vision.training.lit_classifier import LitClassifier, load_classifier

RECIPES = sorted((ROOT / "recipes" / "vision").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["vision"])


@pytest.fixture
def recipe() -> Recipe:
    return Recipe(Digits(train_size=128), checkpointing=14, accelerator="cpu")


def _rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_a_depth_sweep_goes_on_where_it_was_stopped(
    recipe: Recipe, tmp_path: Path, monkeypatch
) -> None:
    figures.depth(recipe, tmp_path, depths=(8,), methods=("fixup",))
    counted = []

    def count(point, recipe):
        counted.append((point.depth, point.method))
        return run_point(point, recipe)

    monkeypatch.setattr(points, "run_point", count)
    figures.depth(recipe, tmp_path, depths=(8, 14), methods=("fixup", "lsuv"))
    assert counted == [(8, "lsuv"), (14, "fixup"), (14, "lsuv")]
    rows = _rows(tmp_path / "points.csv")
    assert len(rows) == 4 and all(0 <= float(row["test_accuracy"]) <= 1 for row in rows)
    assert (tmp_path / "depth.png").stat().st_size > 5000


def test_points_of_one_table_are_trained_alike(recipe: Recipe, tmp_path: Path) -> None:
    figures.lr(recipe, tmp_path, net="highway3", rates=(0.1,), methods=("none",))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "points.csv").write_text((tmp_path / "points.csv").read_text())
    with pytest.raises(UserError, match=r"has points but no recipe\.json"):
        figures.lr(recipe, tmp_path / "other", net="highway3", rates=(0.1,), methods=("none",))
    other = replace(recipe, mixup=0.2)
    with pytest.raises(UserError, match=r"were trained with mixup 0\.0, not 0\.2: give another"):
        figures.lr(other, tmp_path, net="highway3", rates=(0.3,), methods=("none",))
    assert len(_rows(tmp_path / "points.csv")) == 1


def test_a_point_that_diverges_is_a_row_of_its_own(recipe: Recipe, tmp_path: Path) -> None:
    figures.lr(recipe, tmp_path, net="cifar_resnet8", rates=(0.01, 1e15), methods=("none",))
    good, lost = _rows(tmp_path / "points.csv")
    assert float(good["train_loss"]) > 0 and math.isnan(float(lost["test_accuracy"]))
    assert (tmp_path / "lr.png").exists()
    assert len(_table(tmp_path / "points.csv").rows) == 2


def test_degradation_trains_plain_and_residual_networks(recipe: Recipe, tmp_path: Path) -> None:
    figures.degradation(recipe, tmp_path, depths=(8,))
    options = [parse_options(row["options"]) for row in _rows(tmp_path / "points.csv")]
    assert options == [{"shortcut": "none"}, {"shortcut": "A"}]


POINT = Point("cifar_resnet8", "fixup", {"shortcut": "A"}, 8, 0.1, 1, 1)
COLUMNS = [field.name for kind in (Point, Result) for field in fields(kind)]
HEADER = ",".join(COLUMNS)


def _table(file: Path) -> Table:
    return Table(file, Point, Result)


def test_a_table_keeps_the_types_of_options_and_reads_older_ones(tmp_path: Path) -> None:
    wide = replace(POINT, options={"width": 2, "shortcut": "A"})
    table = _table(tmp_path / "points.csv")
    table.add(wide, Result(0.5, 1.0))
    table.add(POINT, Result(0.25, 2.0))
    assert _table(tmp_path / "points.csv").rows == table.rows
    old = "cifar_resnet8,fixup,shortcut=A,8,0.1,1,1,0.25,2.0"
    (tmp_path / "old.csv").write_text(f"{HEADER}\r\n{old}\r\n")
    assert _table(tmp_path / "old.csv").rows == {POINT: Result(0.25, 2.0)}


@pytest.mark.parametrize(
    "text",
    ["", "a,b\n1,2\n", f"{HEADER}\nnet,fixup,,8,0.1,1,1,0.2", f"{HEADER}\nnet,fixup,,8,0.1,1\n"],
    ids=["empty", "foreign", "cut number", "cut row"],
)
def test_a_damaged_table_is_not_gone_on_with(text: str, tmp_path: Path) -> None:
    (tmp_path / "points.csv").write_text(text)
    with pytest.raises(UserError, match=r"points\.csv.* is damaged"):
        _table(tmp_path / "points.csv")
    assert (tmp_path / "points.csv").read_text() == text


def test_checkpointing_changes_no_number(tmp_path: Path) -> None:
    point = Point("cifar_resnet14", "fixup", {}, 14, 0.1, 1, 1)
    data = Digits(train_size=128)
    with_it, without = (
        run_point(point, Recipe(data, checkpointing=limit, accelerator="cpu")) for limit in (1, 99)
    )
    assert with_it.train_loss == pytest.approx(without.train_loss, rel=1e-5)


def _fit(folder: Path, *more: str) -> None:
    line = ["--config", str(ROOT / "recipes/vision/digits_fixup_resnet20.yaml")]
    line += ["--model.net", "cifar_resnet8", "--trainer.max_epochs", "2"]
    line += ["--data.train_size", "128", "--trainer.default_root_dir", str(folder)]
    VisionCLI(["fit", *line, "--trainer.log_every_n_steps", "1", *more])


def test_lesion_and_comparison_of_a_finished_run(tmp_path: Path, capsys) -> None:
    run = tmp_path / "run"
    _fit(run, "--data.batch_size", "16", "--model.method", "batchnorm")
    lesion(run / "checkpoints" / "last.ckpt", Digits(), tmp_path, accelerator="cpu")
    rows = _rows(tmp_path / "lesion.csv")
    assert [row["block left out (-1: none)"] for row in rows] == ["-1", "0", "1", "2"]
    assert len({row["test accuracy"] for row in rows}) > 1
    compare([run, run], tmp_path / "both.png")
    assert capsys.readouterr().out.count("run                ") == 3
    assert (tmp_path / "both.png").stat().st_size > 5000


def test_runs_of_one_name_are_told_apart_by_the_folders_above(tmp_path: Path) -> None:
    for runs, names in (
        (["a/x", "a/y"], ["x", "y"]),
        (["a/x", "b/x"], ["a/x", "b/x"]),
        (["a/x/1", "b/x/1", "b/y/1"], ["a/x/1", "b/x/1", "b/y/1"]),
        (["a/x", "a/x"], ["x", "x"]),
        (["a/b/..", "c"], ["a", "c"]),
    ):
        assert distinct_names([tmp_path / run for run in runs]) == names
    assert distinct_names([Path(), tmp_path])[0] == Path.cwd().name


@pytest.mark.parametrize("method", ["fixup", "batchnorm"])
def test_an_exported_network_is_the_same_for_any_batch(method: str, tmp_path: Path, capsys) -> None:
    runtime = pytest.importorskip("onnxruntime")
    _fit(tmp_path, "--model.method", method, "--trainer.max_epochs", "1")
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    export(checkpoint, tmp_path / "new" / "model.onnx")
    assert "the logits of onnxruntime differ by" in capsys.readouterr().out
    session = runtime.InferenceSession(str(tmp_path / "new" / "model.onnx"))
    names = session.get_modelmeta().custom_metadata_map["classes"]
    assert names == '["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]'
    images = torch.randn(5, 1, 8, 8)
    (logits,) = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        expected = load_classifier(checkpoint).net.eval()(images)
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-4)
    kinds = {
        node.op_type
        for node in pytest.importorskip("onnx").load(tmp_path / "new/model.onnx").graph.node
    }
    assert kinds <= {
        "Conv",
        "Clip",
        "Relu",
        "Max",
        "Add",
        "AveragePool",
        "Pad",
        "ReduceMean",
        "Gemm",
    }


def test_an_export_that_differs_is_not_written(tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("onnxruntime")
    _fit(tmp_path, "--trainer.max_epochs", "1")
    monkeypatch.setattr("vision.export.difference", lambda *_: float("nan"))
    with pytest.raises(
        UserError, match="logits of onnxruntime differ from the network's by up to nan"
    ):
        export(tmp_path / "checkpoints/last.ckpt", tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()


def test_comparison_reads_a_run_that_went_on(tmp_path: Path) -> None:
    for version, text in enumerate(("0,5,1.5,\n1,9,1.0,\n", "1,9,0.9,\n1,9,,0.8\n")):
        folder = tmp_path / "metrics" / f"version_{version}"
        folder.mkdir(parents=True)
        (folder / "metrics.csv").write_text(f"epoch,step,train/loss,test/accuracy\n{text}")
    run = read_run(tmp_path)
    assert run.curve("train/loss", "x").points == [(1, 1.5), (2, 0.9)]
    assert run.last("test/accuracy") == 0.8 and math.isnan(run.last("val/accuracy"))
    with pytest.raises(UserError, match="holds no metrics of a training"):
        read_run(tmp_path / "metrics")


def test_lesion_wants_a_checkpoint_of_a_network_of_blocks(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.ckpt does not exist"):
        lesion(tmp_path / "none.ckpt", Digits())
    _fit(
        tmp_path,
        "--model.net",
        "highway5",
        "--model.method",
        "none",
        "--model.options.image_size",
        "8",
    )
    with pytest.raises(UserError, match="highway5 is not made of blocks"):
        lesion(tmp_path / "checkpoints" / "last.ckpt", Digits())


def test_the_checkpoint_of_a_moving_average_holds_the_average(tmp_path: Path) -> None:
    """The best checkpoint holds the averaged weights, the run goes on from the others."""
    average = ("--trainer.callbacks+=EMAWeightAveraging", "--trainer.callbacks.decay=0.5")
    _fit(tmp_path, *average)
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    weights, current = saved["state_dict"], saved["current_model_state"]
    changed = [name for name in weights if not torch.equal(weights[name], current[name])]
    assert "net.stem.conv.weight" in changed
    model = LitClassifier.load_from_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert torch.equal(model.net.stem.conv.weight, weights["net.stem.conv.weight"])


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_says_what_it_does_and_builds_its_network(file: Path, capsys) -> None:
    text = file.read_text()
    for part in (
        "# Reproduces:",
        "# Target:",
        "# Hardware:",
        f"--config recipes/vision/{file.name}",
    ):
        assert part in text
    with pytest.raises(SystemExit) as stop:
        VisionCLI(["fit", "--config", str(file), "--print_config"])
    assert stop.value.code == 0
    resolved = capsys.readouterr().out
    assert f"runs/vision/{file.stem}\n" in resolved and "weight_decay" in resolved


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_every_recipe_builds_its_network(file: Path) -> None:
    model = yaml.safe_load(file.read_text())["model"]
    with torch.device("meta") if model["method"] != "lsuv" else torch.device("cpu"):
        net = build_net(
            model["net"],
            method=model["method"],
            num_classes=model["num_classes"],
            **model.get("options", {}),
        )
    assert sum(p.numel() for p in net.parameters()) > 1000
