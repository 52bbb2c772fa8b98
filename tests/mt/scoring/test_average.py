"""Averaging checkpoints: the arithmetic, the refusals, and the choice by validation."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

from fixup_mt.__main__ import main
from fixup_mt.errors import UserError
from fixup_mt.scoring import average


def write_checkpoint(
    path: Path,
    model: dict[str, Any],
    *,
    val_loss: float | None = None,
    maximize: bool = False,
) -> Path:
    """The parts of a fairseq checkpoint that matter here, an argparse.Namespace among them."""
    state = {
        "cfg": {
            "model": argparse.Namespace(arch="transformer_fixup"),
            "checkpoint": {"maximize_best_checkpoint_metric": maximize},
        },
        "model": model,
        "extra_state": {"val_loss": val_loss},
        "optimizer_history": [{"num_updates": 7}],
        "last_optimizer_state": {"state": {0: torch.ones(3)}},
    }
    torch.save(state, path)
    return path


def random_model(seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "encoder.weight": torch.randn(3, 4, generator=generator),
        "encoder.scale": torch.randn(1, generator=generator),
        "decoder.version": torch.tensor([3]),
    }


def write_run(folder: Path, values: list[float | None], *, maximize: bool = False) -> None:
    for epoch, value in enumerate(values, 1):
        path = folder / f"checkpoint{epoch}.pt"
        write_checkpoint(path, random_model(epoch), val_loss=value, maximize=maximize)


def run_command(*words: object) -> None:
    parser = argparse.ArgumentParser()
    average.add_arguments(parser)
    average.run(parser.parse_args([str(word) for word in words]))


def names(paths: list[Path]) -> list[str]:
    return [path.name for path in paths]


def test_mean_equals_a_hand_computation(tmp_path: Path) -> None:
    models = [random_model(seed) for seed in range(3)]
    paths = [write_checkpoint(tmp_path / f"{i}.pt", model) for i, model in enumerate(models)]
    result = average.average_checkpoints(paths)["model"]
    for name in ("encoder.weight", "encoder.scale"):
        expected = sum(model[name].double() for model in models) / 3
        assert torch.equal(result[name], expected.float())
        assert not torch.equal(result[name], models[0][name])


def test_sums_are_taken_in_float64(tmp_path: Path) -> None:
    values = [torch.tensor([2.0**24]), torch.tensor([1.0]), torch.tensor([1.0])]
    paths = [write_checkpoint(tmp_path / f"{i}.pt", {"w": v}) for i, v in enumerate(values)]
    assert average.average_checkpoints(paths)["model"]["w"].item() == (2**24 + 2) / 3
    assert (sum(values) / 3).item() != (2**24 + 2) / 3, "float32 sums must not pass"


def test_average_of_one_is_itself(tmp_path: Path) -> None:
    model = random_model(0)
    result = average.average_checkpoints([write_checkpoint(tmp_path / "a.pt", model)])
    assert result["model"].keys() == model.keys()
    for name, tensor in model.items():
        assert torch.equal(result["model"][name], tensor)
        assert result["model"][name].dtype == tensor.dtype


def test_half_precision_is_averaged_into_float32(tmp_path: Path) -> None:
    low, high = torch.tensor([1.0]).half(), torch.tensor([1.0 + 2**-10]).half()
    paths = [write_checkpoint(tmp_path / f"{i}.pt", {"w": v}) for i, v in enumerate((low, high))]
    result = average.average_checkpoints(paths)["model"]["w"]
    assert result.dtype == torch.float32
    assert result.item() == 1.0 + 2**-11
    assert result.half().item() != result.item(), "half precision could not hold this mean"


def test_optimizer_state_is_dropped_and_origin_kept(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path / "a.pt", random_model(0), val_loss=2.0)
    result = average.average_checkpoints([path])
    assert "last_optimizer_state" not in result
    assert result["extra_state"] == {"val_loss": 2.0, "averaged_from": [str(path)]}
    assert result["cfg"]["model"].arch == "transformer_fixup"


@pytest.mark.parametrize("lacking", [0, 1])
def test_unequal_keys_are_refused_by_name(tmp_path: Path, lacking: int) -> None:
    models = [random_model(0), random_model(1)]
    del models[lacking]["encoder.scale"]
    paths = [write_checkpoint(tmp_path / f"{i}.pt", model) for i, model in enumerate(models)]
    with pytest.raises(UserError, match=rf"encoder\.scale.*{lacking}\.pt does not"):
        average.average_checkpoints(paths)


@pytest.mark.parametrize(
    ("name", "value"),
    [("decoder.version", torch.tensor([4])), ("encoder.weight", torch.zeros(3, 5))],
)
def test_unequal_integers_and_shapes_are_refused(tmp_path: Path, name: str, value: Any) -> None:
    first = write_checkpoint(tmp_path / "a.pt", random_model(0))
    other = write_checkpoint(tmp_path / "b.pt", random_model(0) | {name: value})
    with pytest.raises(UserError, match=name):
        average.average_checkpoints([first, other])


def test_best_window_is_of_neighbours(tmp_path: Path) -> None:
    write_run(tmp_path, [5.0, 3.0, 3.1, 1.0, 9.0])
    chosen = names(average.best_window(tmp_path, 2))
    assert chosen == ["checkpoint3.pt", "checkpoint4.pt"]
    assert chosen != ["checkpoint2.pt", "checkpoint4.pt"], "the two best are no neighbours"


def test_best_window_follows_the_direction_of_the_metric(tmp_path: Path) -> None:
    write_run(tmp_path, [30.0, 35.0, 34.0, 20.0], maximize=True)
    assert names(average.best_window(tmp_path, 2)) == ["checkpoint2.pt", "checkpoint3.pt"]
    write_run(tmp_path, [30.0, 35.0, 34.0, 20.0], maximize=False)
    assert names(average.best_window(tmp_path, 2)) == ["checkpoint3.pt", "checkpoint4.pt"]


def test_epochs_are_ordered_as_numbers(tmp_path: Path) -> None:
    for epoch in (2, 9, 10, 11):
        write_checkpoint(tmp_path / f"checkpoint{epoch}.pt", random_model(epoch))
    for other in ("checkpoint_best.pt", "checkpoint_last.pt", "checkpoint_3_500.pt"):
        write_checkpoint(tmp_path / other, random_model(0))
    chosen = names(average.last_checkpoints(tmp_path, 3))
    assert chosen == ["checkpoint9.pt", "checkpoint10.pt", "checkpoint11.pt"]
    by_update = average.last_checkpoints(tmp_path, 1, kind="update")
    assert names(by_update) == ["checkpoint_3_500.pt"]


def test_too_few_or_unvalidated_checkpoints_are_refused(tmp_path: Path) -> None:
    write_run(tmp_path, [3.0, None])
    with pytest.raises(UserError, match="holds 2 epoch checkpoints but 3"):
        average.last_checkpoints(tmp_path, 3)
    with pytest.raises(UserError, match=r"checkpoint2\.pt holds no validation value"):
        average.best_window(tmp_path, 1)
    with pytest.raises(UserError, match="not a folder"):
        average.best_window(tmp_path / "nowhere", 1)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ("checkpoint.best_loss_2.1.pt", r"--inputs .*/checkpoint\.best_\*\.pt"),
        ("checkpoint_3_500.pt", "--kind update"),
        ("checkpoint_last.pt", r"train longer, or keep more of them \(--keep-last-epochs\)"),
    ],
)
def test_the_advice_goes_by_what_the_run_has_kept(other: str, says: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / other, random_model(0))
    with pytest.raises(UserError, match=f"holds 0 epoch checkpoints but 2.*{says}"):
        average.last_checkpoints(tmp_path, 2)


def test_command_writes_the_mean_of_the_best_window(tmp_path: Path) -> None:
    write_run(tmp_path, [3.0, 1.0, 1.0])
    output = tmp_path / "new" / "averaged.pt"
    run_command("--checkpoint-dir", tmp_path, "--best-by-valid", 2, "--output", output)
    written = torch.load(output, weights_only=True)["model"]["encoder.scale"]
    expected = (random_model(2)["encoder.scale"].double() + random_model(3)["encoder.scale"]) / 2
    assert torch.equal(written, expected.float())


def test_choice_must_be_complete_and_unambiguous(tmp_path: Path) -> None:
    write_run(tmp_path, [3.0])
    with pytest.raises(UserError, match="add --best-by-valid N or --last N"):
        run_command("--checkpoint-dir", tmp_path, "--output", tmp_path / "o.pt")
    with pytest.raises(UserError, match="not --inputs"):
        run_command("--inputs", "a.pt", "--last", 1, "--output", tmp_path / "o.pt")


@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "text", "no model"])
def test_unreadable_input_harms_no_earlier_output(tmp_path: Path, damage: str) -> None:
    bad, output = tmp_path / "bad.pt", tmp_path / "averaged.pt"
    good = write_checkpoint(tmp_path / "good.pt", random_model(0))
    output.write_text("an earlier result")
    if damage == "truncated":
        bad.write_bytes(good.read_bytes()[: good.stat().st_size // 2])
    elif damage == "no model":
        torch.save({"weights": 1}, bad)
    elif damage != "missing":
        bad.write_text("" if damage == "empty" else "these are no weights")
    with pytest.raises(UserError, match=r"bad\.pt"):
        run_command("--inputs", good, bad, "--output", output, "--overwrite")
    assert output.read_text() == "an earlier result"


def test_failed_write_leaves_the_earlier_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def full_disk(_state: object, path: Path) -> None:
        Path(path).write_text("half a file")
        raise OSError(28, "No space left on device")

    good = write_checkpoint(tmp_path / "good.pt", random_model(0))
    output = tmp_path / "averaged.pt"
    output.write_text("an earlier result")
    monkeypatch.setattr(torch, "save", full_disk)
    line = ["average", "--inputs", str(good), "--output", str(output)]
    assert main(line) == 2 and "add --overwrite" in capsys.readouterr().err
    assert main([*line, "--overwrite"]) == 2
    assert capsys.readouterr().err.startswith("error: no space is left on the disk")
    assert output.read_text() == "an earlier result"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["averaged.pt", "good.pt"]
