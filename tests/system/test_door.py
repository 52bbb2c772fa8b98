"""One custom at every door: each command line is driven with the same ten mistakes.

A mistake is one line on stderr that begins with ``error:``, and status 2.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import fixup_core.__main__
import fixup_mt.__main__
import vision.__main__
from tests.conftest import ROOT, train_flags
from vision.cli import VisionCLI

MISTAKES = (
    "unknown command",
    "unknown option",
    "wrong type",
    "out of range",
    "missing file",
    "folder for a file",
    "empty file",
    "garbage",
    "output",
    "missing option",
)
RECIPE = str(ROOT / "recipes" / "vision" / "digits_fixup_resnet20.yaml")
TINY = (
    *("--config", RECIPE, "--model.net", "cifar_resnet8", "--trainer.max_epochs", "1"),
    *("--data.train_size", "64", "--data.batch_size", "32", "--data.val_size", "32"),
    *("--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"),
    *("--trainer.log_every_n_steps", "1"),
)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with what can be wrong with a file in it."""
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "folder.png" / "own.txt").write_text("mine")
    for name in ("empty", "empty_net.py", "empty.yaml"):
        (tmp_path / name).touch()
    for name in ("garbage", "garbage_net.py", "garbage.yaml", "taken", "taken.pt"):
        (tmp_path / name).write_bytes(b"\x80\x02 garbage \xff: [ {" * 40)
    (tmp_path / "text").write_text("this is text")
    (tmp_path / "cut").write_bytes(b"PK\x03\x04" + bytes(5000))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["door"])
    return tmp_path


Line = list[str]
Lines = dict[str, list[Line]]

NET = "tests.core.measure.test_check:net"
CORE: Lines = {
    "unknown command": [["chekc"]],
    "unknown option": [["check", "cifar", "--nonsense"]],
    "wrong type": [["check", NET, "--seeds", "many"]],
    "out of range": [["check", NET, "--seeds", "0"], ["check", NET, "--depths", "0", "1", "2"]],
    "missing file": [["check", "nowhere:net"]],
    "folder for a file": [["check", "folder:net"], ["check", NET, "--plot", "folder.png"]],
    "empty file": [["check", "empty_net:net"]],
    "garbage": [["check", "garbage_net:net"]],
    "output": [["check", NET, "--plot", "taken/x.png"], ["check", NET, "--plot", "x.nonsense"]],
    "missing option": [[], ["check"]],
}

SCORE = ["score", "--tokenised", "--generated"]


def _translation(checkpoint: str, data: str) -> Lines:
    """Lines of ``python -m fixup_mt``."""
    average = ["average", "--output", "new.pt", "--inputs", checkpoint]
    export = ["export", "--output", "new", "--data-bin", data, "--checkpoint"]

    def reads(file: str) -> list[Line]:
        return [[*average, file], [*SCORE, file], [*export, file]]

    return {
        "unknown command": [["transalte"]],
        "unknown option": [["corpus", "new", "--nonsense", "1"], ["demo", "--nonsense"]],
        "wrong type": [["corpus", "new", "--train", "many"], ["demo", "--threads", "x"]],
        "out of range": [
            ["corpus", "new", "--train", "0"],
            ["demo", "--threads", "0"],
            ["average", "--output", "new.pt", "--checkpoint-dir", ".", "--last", "0"],
            ["translate", "--model", "folder.png", "--beam", "0"],
        ],
        "missing file": [
            *reads("nowhere"),
            ["translate", "--model", "nowhere"],
            [*export[:3], "--data-bin", "nowhere", "--checkpoint", checkpoint],
        ],
        "folder for a file": [*reads("folder.png"), ["translate", "--model", "folder.png"]],
        "empty file": reads("empty"),
        "garbage": [
            *(line for file in ("garbage", "text", "cut") for line in reads(file)),
            [*export, checkpoint, "--sentencepiece", "garbage"],
        ],
        "output": [
            ["average", "--inputs", checkpoint, "--output", "taken"],
            ["average", "--inputs", checkpoint, "--output", "taken/new.pt"],
            ["average", "--inputs", checkpoint, "--output", "folder.png", "--overwrite"],
            ["export", "--data-bin", data, "--checkpoint", checkpoint, "--output", "taken"],
            ["export", "--data-bin", data, "--checkpoint", checkpoint, "--output", "taken/new"],
            ["corpus", "taken/new", "--train", "9"],
            ["demo", "--output", "taken"],
        ],
        "missing option": [["average"], ["score"], ["export"], ["translate"], ["corpus"]],
    }


def _vision(checkpoint: str) -> Lines:
    """Lines of ``python -m vision``."""
    fit = ["fit", *TINY, "--trainer.default_root_dir", "run"]
    lesion = ["sweep", "lesion", "--data", "Digits", "--output", "lesion", "--checkpoint"]

    def reads(file: str) -> list[Line]:
        return [
            [*fit, "--ckpt_path", file],
            ["export", "--output", "new.onnx", "--checkpoint", file],
            [*lesion, file],
            ["compare", file],
        ]

    return {
        "unknown command": [["fti"], ["sweep", "dephts"]],
        "unknown option": [
            [*fit, "--nonsense", "1"],
            ["--nonsense"],
            ["compare", "x", "--nonsense"],
            ["sweep", "depth", "--recipe.data", "Digits", "--nonsense", "1"],
        ],
        "wrong type": [
            [*fit, "--model.lr", "fast"],
            ["sweep", "depth", "--recipe.data", "Digits", "--recipe.epochs", "many"],
        ],
        "out of range": [
            [*fit, "--model.lr", "-1"],
            ["sweep", "depth", "--recipe.data", "Digits", "--recipe.epochs", "0"],
        ],
        "missing file": [*reads("nowhere"), ["fit", "--config", "nowhere.yaml"]],
        "folder for a file": [*reads("folder.png"), ["fit", "--config", "folder.png"]],
        "empty file": [*reads("empty"), ["fit", "--config", "empty.yaml"]],
        "garbage": [
            *(line for file in ("garbage", "text", "cut") for line in reads(file)),
            ["fit", "--config", "garbage.yaml"],
        ],
        "output": [
            ["export", "--checkpoint", checkpoint, "--output", "taken"],
            ["export", "--checkpoint", checkpoint, "--output", "taken/new.onnx"],
            ["export", "--checkpoint", checkpoint, "--output", "folder.png", "--overwrite"],
            ["compare", str(Path(checkpoint).parents[1]), "--output", "taken/x.png"],
            ["fit", *TINY, "--trainer.default_root_dir", "taken"],
        ],
        "missing option": [[], ["export"], ["compare"], ["sweep", "lesion"], ["fit"]],
    }


def _drive(main: Callable[[Line], int], line: Line, capsys: pytest.CaptureFixture) -> str:
    """Run a line that holds a mistake; its error."""
    capsys.readouterr()
    status = main(line)
    error = capsys.readouterr().err
    assert status == 2, (line, error)
    assert error.startswith("error: ") and error.count("\n") == 1, (line, error)
    assert len(error) < 700 and "Traceback" not in error, (line, error)
    assert not list(Path.cwd().rglob(".tmp-*")), line
    return error


@pytest.mark.parametrize("mistake", MISTAKES)
def test_core(mistake: str, place: Path, capsys: pytest.CaptureFixture) -> None:
    for line in CORE[mistake]:
        _drive(fixup_core.__main__.main, line, capsys)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_translation(
    mistake: str, place: Path, trained: Path, data_bin: Path, capsys: pytest.CaptureFixture
) -> None:
    for line in _translation(str(trained / "checkpoint_last.pt"), str(data_bin))[mistake]:
        if line:
            _drive(fixup_mt.__main__.main, line, capsys)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of ``python -m vision fit``."""
    folder = tmp_path_factory.mktemp("vision") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["vision"])
        VisionCLI(["fit", *TINY, "--trainer.default_root_dir", str(folder)])
    return folder


@pytest.mark.parametrize("mistake", MISTAKES)
def test_images(mistake: str, place: Path, run: Path, capsys: pytest.CaptureFixture) -> None:
    for line in _vision(str(run / "checkpoints" / "last.ckpt"))[mistake]:
        error = _drive(vision.__main__.main, line, capsys)
        if mistake == "output":
            assert "taken" in error or "folder.png" in error, error


def _train(data: str, *more: str) -> list[str]:
    flags = train_flags(Path(data), Path("run"), "--user-dir", "", *more)
    return ["train", *(str(flag) for flag in flags)]


def _fairseq(checkpoint: str, data: str) -> Lines:
    """Lines of fairseq's own commands; the first word is the command."""
    generate = ["generate", data, "--cpu", "--path"]

    def reads(file: str) -> list[Line]:
        return [[*generate, file], _train(data, "--restore-file", file)]

    return {
        "unknown command": [
            _train(data, "--arch", "transformer_fixpu"),
            _train(data, "--task", "x"),
        ],
        "unknown option": [_train(data, "--nonsense", "1"), [*generate, checkpoint, "--nonsense"]],
        "wrong type": [
            _train(data, "--encoder-layers", "many"),
            _train(data, "--lr", "fast"),
            _train(data, "--adam-betas", "nonsense"),
            [*generate, checkpoint, "--beam", "many"],
            [*generate, checkpoint, "--model-overrides", "{bad"],
        ],
        "out of range": [
            _train(data, "--encoder-layers", "0"),
            _train(data, "--decoder-attention-heads", "3"),
            _train(data, "--encoder-embed-dim", "0"),
            _train(data, "--max-tokens", "0"),
            _train(data, "--dropout", "1.5"),
            _train(data, "--update-freq", "0"),
            _train(data, "--num-workers", "-1"),
            _train(data, "--distributed-world-size", "4"),
            [*generate, checkpoint, "--beam", "0"],
        ],
        "missing file": [
            *reads("nowhere.pt"),
            _train("nowhere"),
            ["generate", "nowhere", "--cpu", "--path", checkpoint],
        ],
        "folder for a file": [[*generate, "folder.png"]],
        "empty file": [*reads("empty"), _train("empty")],
        "garbage": [*reads("garbage"), *reads("text"), *reads("cut")],
        "output": [
            _train(data, "--save-dir", "taken"),
            _train(data, "--save-dir", "taken/run"),
            [*generate, checkpoint, "--results-path", "taken"],
        ],
        "missing option": [["train"], ["train", data], ["generate", data, "--cpu"]],
    }


SAYS = {
    "transformer_fixpu": "nearest: transformer_fixup",
    "nonsense": "--adam-betas: 'nonsense' is not a Python literal",
    "0": " 0",
    "3": "does not divide --decoder-embed-dim 64",
    "1.5": "--dropout is 1.5: give 0 to 1",
    "nowhere.pt": "nowhere.pt",
    "empty": "empty is empty or ends too early",
    "garbage": "garbage cannot be loaded safely: it is damaged",
    "text": "text is damaged, or not a checkpoint",
    "cut": "cut is damaged, or not a checkpoint",
    "folder.png": "folder.png is a folder",
}
"""What the error says of a line of fairseq's, by the line's last word."""


@pytest.fixture
def fairseq_main(monkeypatch: pytest.MonkeyPatch) -> Callable[[Line], int]:
    """A fairseq command in this process; what Python does with its error is done by hand."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)

    def main(line: Line) -> int:
        command = importlib.import_module(f"fairseq_cli.{line[0]}")
        monkeypatch.setattr(sys, "argv", list(line))
        try:
            command.cli_main()
        except SystemExit as stop:
            return int(stop.code or 0)
        except BaseException as error:
            try:
                sys.excepthook(type(error), error, error.__traceback__)
            except SystemExit as stop:
                return int(stop.code or 0)
            return 1
        return 0

    return main


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_fairseq(
    mistake: str,
    place: Path,
    trained: Path,
    data_bin: Path,
    fairseq_main: Callable[[Line], int],
    capsys: pytest.CaptureFixture,
) -> None:
    for line in _fairseq(str(trained / "checkpoint_last.pt"), str(data_bin))[mistake]:
        assert SAYS.get(line[-1], "") in _drive(fairseq_main, line, capsys)
