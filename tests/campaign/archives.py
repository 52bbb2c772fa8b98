"""Hostile archives: nothing is written outside, no link or device is made; one line.

Each kind goes to fairseq's ``from_pretrained``, which takes archives of models, and to ``vision
fit``, which takes archives of images. ``--count`` is the number of kinds.
"""

from __future__ import annotations

import io
import shutil
import stat
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from fairseq import file_utils

from fixup_core.errors import explain
from fixup_mt.errors import KNOWN
from tests.campaign.common import campaign, run


def _member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "", mode: int = 0o644) -> Any:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.mode = kind, link, mode
    member.size = 4 if kind == tarfile.REGTYPE else 0
    return member


def _kinds(outside: Path) -> dict[str, list[tarfile.TarInfo]]:
    return {
        "up": [_member("../escaped")],
        "far up": [_member("x/../../../escaped")],
        "absolute": [_member(f"{outside}/escaped")],
        "a link, then through it": [
            _member("x", tarfile.SYMTYPE, str(outside)),
            _member("x/escaped"),
        ],
        "a relative link": [_member("x", tarfile.SYMTYPE, "../../escaped")],
        "a hard link": [_member("x", tarfile.LNKTYPE, "/etc/passwd")],
        "a device": [_member("x", tarfile.CHRTYPE)],
        "a pipe": [_member("x", tarfile.FIFOTYPE)],
        "a cut one": [_member("x")],
        "no archive": [],
    }


def attack(count: int, seed: int, folder: Path) -> tuple[int, int]:
    """Unpack ``count`` kinds in both halves."""
    outside = folder / "outside"
    outside.mkdir()
    tempfile.tempdir = str(folder / "temporary")
    Path(tempfile.tempdir).mkdir()
    held = total = 0
    for kind, members in list(_kinds(outside).items())[:count]:
        for taker in (_from_pretrained, _fit):
            file = folder / "inbox" / "model.tar.gz"
            file.parent.mkdir()
            _write(file, kind, members)
            told = taker(file, folder)
            bad = [path for path in folder.rglob("*") if _is_bad(path, folder)]
            good = told and not bad
            held, total = held + good, total + 1
            if not good:
                print(f"{kind}, {taker.__name__}: {told=}, {bad}")
            for path in bad:
                path.unlink(missing_ok=True)
            shutil.rmtree(file.parent)
    tempfile.tempdir = None
    return held, total


def _write(file: Path, kind: str, members: list[tarfile.TarInfo]) -> None:
    with tarfile.open(file, "w:gz") as tar:
        for member in members:
            tar.addfile(member, io.BytesIO(b"bad\n") if member.isreg() else None)
    if kind == "a cut one":
        file.write_bytes(file.read_bytes()[:-20])
    if not members:
        file.write_bytes(b"no archive")


def _from_pretrained(file: Path, folder: Path) -> bool:
    try:
        file_utils.load_archive_file(str(file))
    except Exception as error:
        return explain(error, KNOWN) is not None
    return False


def _fit(file: Path, folder: Path) -> bool:
    data = ("--data", "ImageFolderData", "--data.root", file, "--data.cache", folder / "cache")
    run_folder = ("--trainer.default_root_dir", folder / "run")
    ended = run(["vision", "fit", "--model.net", "cifar_resnet8", *data, *run_folder])
    if not ended.refused:
        print(ended.status, ended.error[-500:])
    return ended.refused


def _is_bad(path: Path, folder: Path) -> bool:
    """A link, a device or a pipe, or a file that is not in the folder it was unpacked into."""
    special = path.is_symlink() or stat.S_ISFIFO(path.lstat().st_mode) or path.is_char_device()
    place = path.relative_to(folder).parts
    inside = place[0] in ("temporary", "cache", "inbox") and len(place) > 2
    return special or (path.name == "escaped" and not inside)


if __name__ == "__main__":
    campaign(attack, count=10, closes="archives unpacked nothing outside, answered by one line")
