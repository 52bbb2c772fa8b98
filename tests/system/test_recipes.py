"""The translation recipes as a user starts them."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "mt"
ROOT = RECIPES.parents[1]
TRAINING = ["multi30k.sh", "iwslt14_de_en.sh", "wmt16_en_de.sh"]
RUNNABLE = [*TRAINING, "evaluate.sh"]
SCRIPTS = [*RUNNABLE, "lib.sh"]
TINY = (
    *("--encoder-layers", "1", "--decoder-layers", "1", "--max-tokens", "400"),
    *("--encoder-embed-dim", "16", "--decoder-embed-dim", "16"),
    *("--encoder-ffn-embed-dim", "16", "--decoder-ffn-embed-dim", "16"),
)


def run(name: str, *words: object, **variables: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(RECIPES / name), *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


def error_line(result: subprocess.CompletedProcess[str]) -> str:
    assert result.returncode == 2, (result.returncode, result.stdout)
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]


@pytest.mark.parametrize("name", SCRIPTS)
def test_bash_accepts(name: str) -> None:
    result = subprocess.run(["bash", "-n", str(RECIPES / name)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_accepts(name: str) -> None:
    command = ["shellcheck", "-x", name]
    result = subprocess.run(command, capture_output=True, text=True, cwd=RECIPES)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("name", RUNNABLE)
def test_scripts_can_be_started_and_stop_at_errors(name: str) -> None:
    path = RECIPES / name
    assert os.access(path, os.X_OK)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in text


@pytest.mark.parametrize("name", RUNNABLE)
def test_help(name: str) -> None:
    result = run(name, "--help")
    assert result.returncode == 0
    assert result.stderr == ""
    assert "Launch:" in result.stdout and "--output DIR" in result.stdout
    if name in TRAINING:
        for promised in ("Reproduces:", "Target", "Hardware:", "Time", "srun", "torchrun"):
            assert promised in result.stdout


@pytest.mark.parametrize("name", TRAINING)
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--colour", "red"], "unknown option --colour"),
        (["--lr", "0.1"], "go after --"),
        (["--seed"], "--seed needs a value"),
        (["--seed", "zero"], "--seed is zero"),
        (["--max-update", "0"], "--max-update is 0"),
        (["--method", "batchnorm"], "choose one of: fixup"),
        (["--data", "/no/such/folder"], "/no/such/folder does not exist"),
        (["--reference", "/no/such/file"], "/no/such/file does not exist"),
        (["--checksums", "/no/such/file"], "/no/such/file does not exist"),
    ],
)
def test_bad_options_end_in_one_line(name: str, words: list[str], message: str) -> None:
    assert message in error_line(run(name, *words))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "add --checkpoint"),
        (["--checkpoint", "a.pt"], "add --data-bin"),
        (["--checkpoint", "a.pt", "--data-bin", "."], "add --output"),
        (["--checkpoint", "a.pt", "--data-bin", "/no", "--output", "x"], "/no is not a folder"),
        (["--checkpoint", "a.pt:b.pt", "--data-bin", ".", "--output", "x"], "a.pt does not exist"),
        (["--beem", "5"], "unknown option --beem"),
        (["fast"], "unknown option fast"),
    ],
)
def test_bad_evaluate_options_end_in_one_line(words: list[str], message: str) -> None:
    assert message in error_line(run("evaluate.sh", *words))


@pytest.mark.parametrize("name", TRAINING)
@pytest.mark.parametrize("method", ["fixup", "postnorm", "prenorm"])
def test_dry_run_prints_the_training_command(name: str, method: str, tmp_path: Path) -> None:
    output = tmp_path / "out"
    words = ("--method", method, "--seed", 3, "--dry-run", "--output", output)
    result = run(name, *words, "--", "--lr", "0.7")
    assert result.returncode == 0, result.stderr
    command = result.stdout
    assert ("--arch transformer_fixup" in command) == (method == "fixup")
    assert ("--encoder-normalize-before" in command) == (method == "prenorm")
    for flag in ("--required-batch-size-multiple 1", "--seed 3", "/fixup_mt"):
        assert flag in command
    # The user's flag comes after the recipe's, so that it wins.
    assert command.rindex("--lr 0.7") > command.index("--lr 0.0")
    assert not output.exists()


@pytest.mark.parametrize("flag", ["--keep-last-epochs", "--max-epoch", "--max-update"])
def test_more_checkpoints_than_are_left_are_missed_at_the_start(flag: str, tmp_path: Path) -> None:
    words = ("--output", tmp_path / "out", "--average", 3, "--dry-run", "--", flag)
    assert f"but {flag} 2 leaves 2 at the most" in error_line(run("multi30k.sh", *words, 2))
    assert run("multi30k.sh", *words, 3).returncode == 0


@pytest.mark.parametrize("status", [1, 2, 130])
def test_a_training_that_fails_gives_its_status(status: int, tmp_path: Path) -> None:
    script = (
        f"source {RECIPES / 'lib.sh'}; RUN={tmp_path}; "
        f"TRAIN_COMMAND=(bash -c 'exit {status}'); train"
    )
    done = subprocess.run(
        ["bash", "-c", f"set -euo pipefail; {script}"], capture_output=True, text=True
    )
    assert done.returncode == status
    assert f"stopped with status {status}" in done.stderr


FAKE = """#!/bin/sh
# Stands for the python that sets up: it makes the environment, of which it is the python, too.
echo "$@" >>log
sleep 0.3
[ "$2" != venv ] || { mkdir -p .venv/bin && cp "$0" .venv/bin/python; }
"""


def test_two_set_ups_at_once_are_one(tmp_path: Path) -> None:
    for tool in ("make", "flock"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "python"
    python.write_text(FAKE)
    python.chmod(0o755)
    line = ["make", "setup", f"PYTHON={python}"]
    started = [
        subprocess.Popen(line, cwd=tmp_path, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    said = [process.communicate(timeout=60)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert sum("another set-up is running" in text for text in said) == 1
    assert sum("== 1/3 torch" in text for text in said) == 1
    assert (tmp_path / "log").read_text().count("pip install") == 3


def test_missing_modules_are_named(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" = -c ] && exit 1\necho torch fairseq\n')
    python.chmod(0o755)
    result = run("multi30k.sh", "--output", tmp_path / "out", PYTHON=str(python))
    assert "lacks: torch fairseq" in error_line(result)
    assert "does not run" in error_line(run("multi30k.sh", PYTHON="/no/such/python"))


def write_slice(folder: Path) -> None:
    folder.mkdir()
    for split, count in (("train", 120), ("val", 21), ("test_2016_flickr", 21)):
        for language, text in (("de", "Ein Hund Nummer {} läuft ."), ("en", "Dog {} runs .")):
            lines = "".join(text.format(number) + "\n" for number in range(count))
            (folder / f"{split}.{language}").write_text(lines, encoding="utf-8")


@pytest.mark.parametrize("method", ["t_fixup", "fixup_adam", "t_fixup_adam"])
def test_multi30k_has_the_rivals_without_norms(method: str, tmp_path: Path) -> None:
    result = run("multi30k.sh", "--method", method, "--dry-run", "--output", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    assert f"--fixup-method {method}" in result.stdout
    assert "choose one of: fixup" in error_line(run("wmt16_en_de.sh", "--method", method))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["t_fixup", "prenorm"])
def test_multi30k_from_text_to_score(method: str, tmp_path: Path) -> None:
    for needed in ("sentencepiece", "sacrebleu", "fairseq"):
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed")
    data, output, sums = tmp_path / "data", tmp_path / "out", tmp_path / "sums"
    write_slice(data)
    sums.touch()
    words = ("--data", data, "--output", output, "--checksums", sums, "--method", method)
    words = (*words, "--max-update", 40, "--average", 2, "--", *TINY, "--max-epoch", 3)
    result = run("multi30k.sh", *words, PIECES="45")
    assert result.returncode == 0, result.stdout + result.stderr
    folder = output / f"{method}-seed1"
    content = json.loads((folder / "score.json").read_text())
    assert content["sentences"] == 21
    assert content["settings"]["setting"]["beam"] == "5"
    assert len(content["checkpoints"][0]["averaged_from"]) == 2
    assert content["checkpoints"][0]["training"]["model"]["encoder_layers"] == 1
    assert list((folder / "tensorboard").rglob("events.*"))
    again = run("multi30k.sh", *words, PIECES="45")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("done before") == 6
