"""The help texts of the command lines: complete, and quick."""

from __future__ import annotations

import subprocess
import sys

import pytest

import fixup_core.__main__
import fixup_mt.__main__
import vision.__main__
from tests.conftest import ENVIRONMENT, ROOT


@pytest.mark.parametrize(
    "line",
    ["vision --help", "vision compare --help", "fixup_mt --help", "fixup_core --help", "fixup_mt"],
)
def test_a_help_text_waits_for_torch_at_the_most(line: str) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", *line.split()],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        cwd=ROOT,
        check=True,
    )
    imported = {row.rpartition("|")[2].strip() for row in done.stderr.splitlines()}
    assert "pathlib" in imported and done.stdout
    heavy = {"lightning", "torchvision", "fairseq", "matplotlib", "sacrebleu", "jsonargparse"}
    assert not imported & (heavy if line != "fixup_mt" else heavy | {"torch"})


def test_every_command_is_in_the_help(capsys: pytest.CaptureFixture) -> None:
    for module in (fixup_core.__main__, fixup_mt.__main__, vision.__main__):
        assert module.main(["--help"]) == 0
        listed = capsys.readouterr().out
        assert all(f"\n    {name}" in listed for name in module.COMMANDS), listed


def test_importing_the_command_line_silences_nothing() -> None:
    code = (
        "import logging, warnings; before = list(warnings.filters)\n"
        "import vision.cli as cli\n"
        "texts = {str(f[1] and f[1].pattern) for f in warnings.filters if f not in before}\n"
        "assert not texts & set(cli.NEEDLESS), texts\n"
        "assert not logging.getLogger('lightning.pytorch.utilities.rank_zero').filters\n"
        "cli.silence_needless()\n"
        "texts = {str(f[1] and f[1].pattern) for f in warnings.filters if f not in before}\n"
        "assert set(cli.NEEDLESS) <= texts, texts\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=ENVIRONMENT, cwd=ROOT)
