"""How a command ends that does not come to its end: Ctrl-C, SIGTERM, a closed pipe, a full disk."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

from fixup_core.command_line import INTERRUPTED, PIPE_CLOSED, TERMINATED, run_command
from fixup_core.errors import UserError
from tests.conftest import ENVIRONMENT, ROOT, train_flags
from tests.system.test_door import TINY


def _raising(error: BaseException) -> Callable[[], None]:
    def command() -> None:
        raise error

    return command


@contextlib.contextmanager
def _started(
    *line: object, prepare: Callable[[], object] = lambda: None
) -> Iterator[subprocess.Popen[str]]:
    """A command of ours, which is killed if the test leaves it running."""

    def before() -> None:
        # A shell starts what runs in the background with Ctrl-C ignored, and that is inherited.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        prepare()

    process = subprocess.Popen(
        [sys.executable, "-m", *map(str, line)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        cwd=ROOT,
        preexec_fn=before,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def _status(process: subprocess.Popen[str]) -> int:
    """As the shell has it: a signal's number above 128."""
    return 128 - process.returncode if process.returncode < 0 else process.returncode


def _wait_for(ready: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not ready():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


SIGNALS = [
    (signal.SIGINT, INTERRUPTED, "interrupted"),
    pytest.param(signal.SIGTERM, TERMINATED, "terminated", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("number", "status", "says"), SIGNALS)
def test_a_training_of_images_that_is_stopped(
    number: signal.Signals, status: int, says: str, tmp_path: Path
) -> None:
    flags = ("--trainer.max_epochs", "5000", "--trainer.default_root_dir", tmp_path)
    with _started("vision", "fit", *TINY, *flags) as run:
        last = tmp_path / "checkpoints" / "last.ckpt"
        _wait_for(last.exists, run)
        run.send_signal(number)
        _, error = run.communicate(timeout=60)
    assert _status(run) == status
    assert error.splitlines()[-1].startswith(says) and "Traceback" not in error
    assert torch.load(last, weights_only=True)["global_step"] > 0
    assert not list(tmp_path.rglob(".tmp-*"))


@pytest.mark.parametrize(("number", "status", "says"), SIGNALS)
def test_a_training_of_translation_that_is_stopped(
    number: signal.Signals, status: int, says: str, data_bin: Path, tmp_path: Path
) -> None:
    flags = train_flags(data_bin, tmp_path, "--max-epoch", "5000", "--no-epoch-checkpoints")
    with _started("fairseq_cli.train", *flags) as run:
        assert run.stdout is not None
        next(line for line in run.stdout if '"num_updates": "2"' in line)
        run.send_signal(number)
        _, error = run.communicate(timeout=60)
    assert _status(run) == status and "Traceback" not in error
    if number == signal.SIGINT:
        assert error.splitlines()[-1] == says


def test_a_reader_that_has_gone_is_no_mistake(tmp_path: Path) -> None:
    log = tmp_path / "metrics" / "version_0" / "metrics.csv"
    log.parent.mkdir(parents=True)
    log.write_text("epoch,step,train/loss\n0,5,1.5\n")
    figure = tmp_path / "figure.png"
    with _started("vision", "compare", tmp_path, "--output", figure) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        error = process.stderr.read()
    assert process.returncode == PIPE_CLOSED and error == ""


def test_a_file_that_grows_too_large_is_a_mistake(trained: Path, tmp_path: Path) -> None:
    limit = (100_000, 100_000)
    checkpoint, output = trained / "checkpoint_last.pt", tmp_path / "new.pt"
    with _started(
        *("fixup_mt", "average", "--inputs", checkpoint, "--output", output),
        prepare=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    ) as process:
        _, error = process.communicate(timeout=60)
    assert process.returncode == 2 and not list(tmp_path.iterdir())
    assert error.startswith("error: a file ") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ENOENT, "the/file does not exist"),
        (errno.EACCES, "the/file is not yours to read or write"),
        (errno.ENOSPC, "no space is left on the disk"),
        (errno.EDQUOT, "no space is left on the disk"),
        (errno.EFBIG, "ulimit -f"),
        (errno.EISDIR, "the/file is a folder"),
        (errno.ENOTDIR, "the/file goes through a file"),
        (errno.EROFS, "the/file lies on a read-only disk"),
        (errno.ENAMETOOLONG, "this name is too long: the/file"),
        (errno.EEXIST, "the/file is in the way"),
    ],
)
def test_what_the_system_refuses_is_one_line(
    number: int, says: str, capsys: pytest.CaptureFixture
) -> None:
    assert run_command(_raising(OSError(number, os.strerror(number), "the/file"))) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and says in line


@pytest.mark.parametrize("error", [KeyError("x"), MemoryError(), OSError(errno.ENOTTY, "odd")])
def test_a_bug_keeps_its_traceback(error: Exception, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(type(error)):
        run_command(_raising(error))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("out of memory"), RuntimeError("CUDA error: an assert")]
)
def test_a_device_that_fails_does_not_make_the_file_damaged(
    error: Exception, tmp_path: Path
) -> None:
    def move(storage: object, location: str) -> object:
        raise error

    def command() -> None:
        torch.load(tmp_path / "file", map_location=move)

    torch.save(torch.ones(2), tmp_path / "file")
    with pytest.raises(type(error), match=str(error)):
        run_command(command)


def test_a_file_sought_in_vain_does_not_explain_a_bug() -> None:
    def command() -> None:
        try:
            Path("/nowhere").read_text()
        except OSError:
            raise KeyError("a bug") from None

    def hiding() -> None:
        try:
            Path("/nowhere").read_text()
        except OSError:
            {}["a bug"]

    for each in (command, hiding):
        with pytest.raises(KeyError):
            run_command(each)


def test_the_line_stands_below_an_open_progress_bar(capsys: pytest.CaptureFixture) -> None:
    bar = tqdm(total=3, file=sys.stderr, desc="at work")
    bar.update(1)
    assert run_command(_raising(UserError("mend it"))) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "error: mend it" and "at work" in lines[-2]


def test_a_framework_that_stops_by_itself_has_not_done_the_work() -> None:
    """Lightning puts its handler before ours, and exits with 0 where work was left."""

    def stopped() -> None:
        ours = signal.getsignal(signal.SIGTERM)
        assert callable(ours)
        signal.signal(signal.SIGTERM, lambda *received: ours(*received))
        os.kill(os.getpid(), signal.SIGTERM)
        raise SystemExit(0)

    def interrupted() -> None:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    before = signal.getsignal(signal.SIGTERM)
    assert run_command(stopped) == TERMINATED
    assert run_command(interrupted) == INTERRUPTED
    assert signal.getsignal(signal.SIGTERM) is before


def test_statuses_of_commands_that_end_by_themselves() -> None:
    assert run_command(lambda: None) == 0
    assert run_command(lambda: 1) == 1
    assert run_command(_raising(SystemExit(0))) == 0
    assert run_command(_raising(SystemExit(3))) == 3
