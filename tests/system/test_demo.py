"""The whole demo, very small: its files, its table, and that finished steps are not done again."""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from sacrebleu.metrics import BLEU

from fixup_core.files import PREFIX
from fixup_mt.__main__ import main
from fixup_mt.errors import UserError
from fixup_mt.host.jobs import Job, run_jobs

ROOT = Path(__file__).resolve().parents[2]
STEPS = ("corpus", "pieces", "data")
SMALL = ["--train-pairs=300", "--test-pairs=12", "--max-update=6", "--threads=2"]


def demo(output: Path, *options: str) -> tuple[int, str, str]:
    """Status, standard output and standard error of the command."""
    said, complained = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complained):
        status = main(["demo", f"--output={output}", *SMALL, *options])
    return status, said.getvalue(), complained.getvalue()


def modified(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in folder.rglob("*") if p.name != ".lock"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    output = tmp_path_factory.mktemp("demo") / "run"
    status, said, complained = demo(output)
    assert status == 0, complained
    return output, said


def test_the_demo_leaves_everything_in_one_folder(finished: tuple[Path, str]) -> None:
    output, _ = finished
    assert not list(output.rglob("*.tmp")) and not list(output.rglob(".tmp-*"))
    assert (output / "loss_curves.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((output / "result.json").read_text(encoding="utf-8"))
    models = content["models"]
    assert [model["name"] for model in models] == ["Fixup", "T-Fixup", "LayerNorm"]
    for model in models:
        assert (model["updates"], model["sentences"]) == (6, 12)
        assert [update for update, _ in model["validation_curve"]] == [1, 2, 3, 4, 5, 6]
        assert 0 <= model["bleu"] <= 100
        assert "nrefs:1" in model["signature"]
    # They differ by scalars and the output's bias against LayerNorm's gains and biases.
    sizes = [model["parameters"] for model in models]
    assert max(sizes) / min(sizes) < 1.01


def test_the_demo_prints_a_table_and_ten_translations(finished: tuple[Path, str]) -> None:
    output, text = finished
    for row in ("parameters", "updates", "best valid loss", "BLEU", "seconds"):
        line = next(line for line in text.splitlines() if line.startswith(row))
        assert len(line.removeprefix(row).split()) == 3
    sources = (output / "corpus" / "test.de").read_text(encoding="utf-8").splitlines()
    shown = [line for line in text.splitlines() if line.startswith("German ")]
    assert [line.split(None, 1)[1] for line in shown] == sources[:10]


def test_only_what_is_missing_is_done_again(finished: tuple[Path, str]) -> None:
    output, _ = finished
    (output / "layernorm" / "translations.txt").unlink()
    (output / f"{PREFIX}pieces").mkdir()
    before = {name: modified(output / name) for name in (*STEPS, "fixup")}
    status, said, complained = demo(output)
    assert status == 0, complained
    assert said.count("done before") == len(STEPS)
    assert (output / "layernorm" / "translations.txt").exists()
    assert before == {name: modified(output / name) for name in before}


def test_other_settings_do_not_mix_into_a_folder(finished: tuple[Path, str]) -> None:
    status, _, complained = demo(finished[0], "--seed=2")
    assert status == 2
    assert complained.startswith("error: ")
    assert "other settings" in complained
    assert complained.count("\n") == 1


def test_two_demos_never_share_a_folder(finished: tuple[Path, str]) -> None:
    with (finished[0] / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        status, _, complained = demo(finished[0])
    assert status == 2
    assert "another demo is at work" in complained


def write_speaker(folder: Path) -> None:
    (folder / "speak.py").write_text(
        "import sys, time\n"
        "print('one\\ntwo', flush=True)\n"
        "if 'fail' in sys.argv: sys.exit('error: no such thing')\n"
        "if 'sleep' in sys.argv: time.sleep(60)\n"
        "print('three', end='')\n"
    )


def job(tmp_path: Path, module: str, *arguments: str) -> Job:
    write_speaker(tmp_path)
    return Job(
        "speaker",
        module,
        arguments,
        log=tmp_path / f"{'-'.join(arguments) or 'plain'}.log",
        total=3,
        on_line=lambda line, bar: bar.update(1),
        output=None if arguments else tmp_path / "said.txt",
    )


@pytest.fixture
def speaking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def test_a_job_keeps_its_output(speaking: Path) -> None:
    run_jobs([job(speaking, "speak")], threads=1)
    assert (speaking / "said.txt").read_text() == "one\ntwo\nthree\n"


def test_a_failed_job_ends_the_others_and_names_its_log(speaking: Path) -> None:
    jobs = [job(speaking, "speak", "sleep"), job(speaking, "speak", "fail")]
    with pytest.raises(UserError, match=r"no such thing; see .*fail\.log"):
        run_jobs(jobs, threads=2)


def test_a_job_ends_with_the_program_that_started_it(speaking: Path) -> None:
    """Killed hard, the program cannot tell its jobs; they notice by themselves."""
    write_speaker(speaking)
    jobs = f"[Job('s', 'speak', ['sleep'], Path({str(speaking / 'l')!r}), print)]"
    code = (
        "from pathlib import Path\nfrom fixup_mt.host import jobs\n"
        "from fixup_mt.host.jobs import *\n"
        "start = jobs.subprocess.Popen\n"
        "def popen(*a, **k):\n"
        "    process = start(*a, **k); print(process.pid, flush=True); return process\n"
        f"jobs.subprocess.Popen = popen; run_jobs({jobs}, threads=1)\n"
    )
    command = [sys.executable, "-u", "-W", "ignore", "-c", code]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as program:
        assert program.stdout is not None
        child = int(next(line for line in program.stdout if line.strip().isdigit()))
        assert program.stdout.readline().startswith("one")
        program.kill()
    wait_for_end(child)


def wait_for_end(pid: int, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail(f"process {pid} is still there")


@pytest.mark.slow
def test_the_exported_demo_model_translates_as_well(tmp_path: Path) -> None:
    """BLEU through CTranslate2 is fairseq-generate's, in float32 and, nearly, in int8."""
    pytest.importorskip("ctranslate2")
    assert main(["demo", f"--output={tmp_path}", "--threads=2"]) == 0
    expected = json.loads((tmp_path / "result.json").read_text())["models"][0]["bleu"]
    model = str(tmp_path / "model")
    line = ["--checkpoint", str(tmp_path / "fixup" / "checkpoint_best.pt"), "--output", model]
    pieces = ["--sentencepiece", str(tmp_path / "pieces" / "sentencepiece.model")]
    assert main(["export", *line, "--data-bin", str(tmp_path / "data"), *pieces]) == 0
    references = (tmp_path / "corpus" / "test.en").read_text().splitlines()
    for kind, near in (("float32", 0.1), ("int8", 0.5)):
        output = tmp_path / kind
        files = ["--input", str(tmp_path / "corpus" / "test.de"), "--output", str(output)]
        assert main(["translate", "--model", model, "--compute-type", kind, *files]) == 0
        bleu = BLEU().corpus_score(output.read_text().splitlines(), [references]).score
        assert bleu == pytest.approx(expected, abs=near), kind
