"""Files and folders that are whole or not there, and the rule for what exists."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fixup_core.errors import UserError
from fixup_core.files import (
    hold_folder,
    once,
    refuse_existing,
    whole_file,
    whole_folder,
    write_text,
)
from tests.conftest import ENVIRONMENT, ROOT


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_when_its_successor_is_whole(tmp_path: Path) -> None:
    file = tmp_path / "new" / "file.txt"
    write_text(file, "first")
    with whole_file(file) as temporary:
        temporary.write_text("second")
        assert temporary.suffix == ".txt" and file.read_text() == "first"
    assert file.read_text() == "second" and _names(file.parent) == ["file.txt"]


@pytest.mark.parametrize("name", ["model", ".model", "a.b/model", "..."])
def test_torch_saves_under_any_name(tmp_path: Path, name: str) -> None:
    """It takes no file whose name is empty up to the last dot."""
    file = tmp_path / name
    with whole_file(file) as temporary:
        torch.save({"weight": torch.ones(2)}, temporary)
    assert torch.load(file)["weight"].sum() == 2 and _names(file.parent) == [file.name]


def test_a_block_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    write_text(file, "first")
    for whole in (whole_file(file), whole_file(tmp_path / "none"), whole_folder(folder)):
        with pytest.raises(KeyboardInterrupt), whole as temporary:
            (temporary / "half" if temporary.is_dir() else temporary).write_text("half")
            raise KeyboardInterrupt
    assert file.read_text() == "first" and _names(tmp_path) == ["file"]


def test_what_a_kill_leaves_is_cleared_by_the_next_writer(tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom fixup_core.files import whole_file\n"
        "with whole_file(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('half'); time.sleep(60)\n"
    )
    file = tmp_path / "file"
    write_text(file, "first")
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", code, str(file)], env=environment) as writer:
        deadline = time.monotonic() + 60
        while len(_names(tmp_path)) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        writer.send_signal(signal.SIGKILL)
    assert file.read_text() == "first" and len(_names(tmp_path)) == 2
    write_text(file, "second")
    assert file.read_text() == "second" and _names(tmp_path) == ["file"]


def test_a_device_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with whole_file(pipe) as place:
        assert place == pipe
    assert pipe.is_fifo()


def test_a_folder_is_replaced_only_by_its_own_kind(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    for text in ("first", "second"):
        with whole_folder(folder) as temporary:
            (temporary / "part").mkdir()
            (temporary / "part" / "a").write_text(text)
    assert (folder / "part" / "a").read_text() == "second" and _names(tmp_path) == ["folder"]
    with (
        pytest.raises(UserError, match=r"holds other files \(part/a\)"),
        whole_folder(folder) as temporary,
    ):
        (temporary / "b").touch()
    assert (folder / "part" / "a").read_text() == "second" and _names(tmp_path) == ["folder"]


def test_files_and_folders_are_not_taken_for_each_other(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(UserError, match="is a file: give a folder"),
        whole_folder(tmp_path / "file"),
    ):
        pass
    with pytest.raises(UserError, match="is a folder: give a file"), whole_file(tmp_path):
        pass


def test_the_faster_of_two_processes_wins(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with whole_folder(folder, shared=True) as temporary:
        (temporary / "mine").touch()
        folder.mkdir()
        (folder / "others").touch()
    assert _names(folder) == ["others"] and _names(tmp_path) == ["folder"]


def test_a_shared_folder_that_cannot_take_its_name_is_an_error(tmp_path: Path) -> None:
    """Only another process's folder is in the way without a word."""
    (tmp_path / "above").mkdir()
    with (
        pytest.raises(FileNotFoundError),
        whole_folder(tmp_path / "above" / "folder", shared=True) as temporary,
    ):
        temporary.parent.rename(tmp_path / "moved")


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    place = tmp_path / "place"
    file, folder = tmp_path / "file", tmp_path / "folder"
    write_text(place / "file", "first")
    file.symlink_to(place / "file")
    folder.symlink_to(place / "new")
    write_text(file, "second")
    with whole_folder(folder) as temporary:
        (temporary / "part").touch()
    assert file.is_symlink() and folder.is_symlink()
    assert (place / "file").read_text() == "second" and _names(place / "new") == ["part"]
    assert _names(place) == ["file", "new"] and _names(tmp_path) == ["file", "folder", "place"]


def test_a_step_is_done_once(tmp_path: Path) -> None:
    done = []

    def build(place: Path) -> None:
        done.append(place)
        place.mkdir()

    assert once(tmp_path / "step", build) and not once(tmp_path / "step", build)
    assert len(done) == 1

    def fail(place: Path) -> None:
        place.touch()
        raise OSError

    with pytest.raises(OSError):
        once(tmp_path / "other", fail)
    assert _names(tmp_path) == ["step"]


def test_what_exists_is_refused_unless_it_is_to_be_overwritten(tmp_path: Path) -> None:
    refuse_existing(tmp_path / "new")
    refuse_existing(tmp_path, overwrite=True)
    with pytest.raises(UserError, match="exists: give another --output, or add --overwrite"):
        refuse_existing(tmp_path)


HOLD = """
import sys, time
from pathlib import Path
from fixup_core.files import hold_folder
hold_folder(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_one_process_writes_into_a_folder_and_a_kill_frees_it(tmp_path: Path) -> None:
    folder, here = tmp_path / "run", ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-c", HOLD, str(folder)]
    other = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=here)
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"process {other.pid} writes into .*run: wait"):
            hold_folder(folder)
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
        other.stdout.close()
    hold_folder(folder)
    hold_folder(folder)  # one's own lock is no obstacle
