"""Long commands run as subprocesses, with a log file and a progress bar each.

A command dies with the program that started it, however that ends: two trainings must never write
into one folder.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self

from tqdm import tqdm

from fixup_core.files import whole_file
from fixup_mt.errors import UserError

# Waits for the end of standard input, which comes when the starting program is gone, even killed.
WATCHED = """
import os, runpy, sys, threading
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(1)), daemon=True).start()
sys.argv = sys.argv[1:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""
# Stands before every start in a log, which goes on where an interrupted run left it.
STARTED = "== started: "
BAR = "{desc:20} {n_fmt}/{total_fmt} {unit}{postfix} |{bar}| {elapsed}<{remaining}"


def cores() -> int:
    """Those this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True)
class Job:
    """One command: a Python module and its arguments.

    ``on_line`` gets every line of standard output and the bar to move; there is no bar without a
    ``total``. With ``output`` those lines go to that file instead of the log; it gets its name only
    when the command has succeeded.
    """

    name: str
    module: str
    arguments: Sequence[str]
    log: Path
    on_line: Callable[[str, tqdm], object] = lambda line, bar: None
    total: int = 0
    unit: str = "steps"
    output: Path | None = None


class _Running:
    """A started job: its process, its open files and its bar."""

    def __init__(self, job: Job, *, position: int, threads: int) -> None:
        self.job = job
        job.log.parent.mkdir(parents=True, exist_ok=True)
        self.files = contextlib.ExitStack()
        self.log = self.files.enter_context(job.log.open("a", encoding="utf-8"))
        self.log.write(f"{STARTED}{job.module} {shlex.join(job.arguments)}\n")
        self.log.flush()
        self.sink: IO[str] = self.log
        if job.output is not None:
            partial = self.files.enter_context(whole_file(job.output))
            self.sink = self.files.enter_context(partial.open("w", encoding="utf-8"))
        self.process = subprocess.Popen(
            [sys.executable, "-c", WATCHED, job.module, *job.arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            bufsize=0,
            env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONWARNINGS": "ignore"},
        )
        self.rest = b""
        self.bar = tqdm(
            desc=job.name,
            total=job.total,
            unit=job.unit,
            position=position,
            disable=job.total == 0,
            bar_format=BAR,
            # A log file is no terminal: a line now and then is enough there.
            mininterval=0.2 if sys.stderr.isatty() else 30,
        )

    @property
    def stdout(self) -> IO[bytes]:
        assert self.process.stdout is not None
        return self.process.stdout

    def take(self) -> bool:
        """Handle what has been printed since; False at the end of the output."""
        block = os.read(self.stdout.fileno(), 1 << 16)
        *lines, self.rest = (self.rest + block).split(b"\n")
        for line in lines if block else [*lines, self.rest]:
            text = line.decode("utf-8", errors="replace")
            if text:
                self.sink.write(text + "\n")
                self.job.on_line(text, self.bar)
        self.sink.flush()
        return bool(block)

    def finish(self) -> None:
        """Close everything, and give a successful output its name."""
        with self:
            if self.process.wait() != 0:
                raise UserError(f"{self.job.module} ({self.job.name}) failed: {self._reason()}")

    def _reason(self) -> str:
        lines = self.job.log.read_text(encoding="utf-8", errors="replace").splitlines()
        said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
        return (f"{said[-1]}; " if said else "") + f"see {self.job.log}"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        """End the process, close everything and drop what is not whole; twice is harmless."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.bar.close()
        for pipe in (self.process.stdin, self.stdout):
            if pipe is not None:
                pipe.close()
        self.files.__exit__(*error)


def run_jobs(jobs: Sequence[Job], *, threads: int) -> None:
    """Run the jobs side by side, or one after the other where there is one thread only.

    Args:
        jobs: none of them may depend on another.
        threads: shared out among those that run at once.

    Raises:
        UserError: a command failed; the message names its log, and the others are ended.
    """
    if len(jobs) > 1 and threads < len(jobs):
        for job in jobs:
            run_jobs([job], threads=threads)
        return
    share = max(1, threads // max(1, len(jobs)))
    with contextlib.ExitStack() as stack:
        _follow(
            [
                stack.enter_context(_Running(job, position=position, threads=share))
                for position, job in enumerate(jobs)
            ]
        )


def _follow(running: Sequence[_Running]) -> None:
    with selectors.DefaultSelector() as selector:
        for item in running:
            selector.register(item.stdout, selectors.EVENT_READ, item)
        while selector.get_map():
            for key, _ in selector.select():
                if not key.data.take():
                    selector.unregister(key.fileobj)
                    key.data.finish()
