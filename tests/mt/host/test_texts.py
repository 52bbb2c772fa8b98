"""How fairseq's commands read text, and what they say of damaged data."""

from __future__ import annotations

import io
import itertools
import shutil
import subprocess
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
from fairseq import binarizer
from fairseq.data import Dictionary, data_utils
from fairseq.file_chunker_utils import Chunker

import fixup_mt  # noqa: F401 (applies the repairs)
from fixup_mt.errors import UserError
from fixup_mt.host import texts
from tests.conftest import ENVIRONMENT, ROOT, fairseq, zygote

TEXT = "a b\rc\u2028d\nä e\r\n\nf\n"
LINES = ["a b\rc\u2028d\n", "ä e\r\n", "\n", "f\n"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_bytes(TEXT.encode())
    return path


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_the_newline_alone_ends_a_line(workers: int, file: Path) -> None:
    offsets = binarizer.find_offsets(str(file), workers)
    found: list[str] = []
    for start, end in itertools.pairwise(offsets):
        with Chunker(str(file), start, end) as lines:
            found += lines
    assert found == LINES
    with Chunker(str(file), 0, 0) as lines:
        assert list(lines) == LINES


def test_without_the_repair_a_carriage_return_ends_one(file: Path) -> None:
    code = (
        "import fixup_mt, sys\nfrom fairseq.file_chunker_utils import Chunker\n"
        "with Chunker(sys.argv[1], 0, 0) as lines: print(len(list(lines)))"
    )
    counts = []
    for switch in "01":
        done = zygote().run("-c", [code, str(file)], env={"FIXUP_MT_REPAIRS": switch})
        counts.append(int(done.stdout))
    assert counts == [5, 4]


def test_a_line_that_is_no_text_is_named(tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    bad.write_bytes(b"a\nb\n\xff c\n")
    words = Dictionary()
    with pytest.raises(UserError, match=r"bad: line 3 is not UTF-8 text"):
        Dictionary.add_file_to_dictionary(str(bad), words, str.split, 1)
    flags = ("-s", "de", "-t", "en", "--trainpref", tmp_path / "x", "--destdir", tmp_path / "bin")
    for language in ("de", "en"):
        shutil.copy(bad, tmp_path / f"x.{language}")
    done = fairseq("preprocess", "--user-dir", "fixup_mt", *flags, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path}/x.de: line 3 is not UTF-8")


@pytest.mark.parametrize("place", ["file", "stdin"])
def test_interactive_lines_are_kept_up_to_the_bad_one(
    place: str, tmp_path: Path, monkeypatch
) -> None:
    content = b"a\rb\nc\nd\n\xff e\nf\n"
    (tmp_path / "in").write_bytes(content)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="ascii"))
    read = texts.buffered_read("-" if place == "stdin" else str(tmp_path / "in"), 2)
    assert next(read) == ["a\rb", "c"] and next(read) == ["d"]
    with pytest.raises(UserError, match="line 4 is not UTF-8 text"):
        next(read)


def test_interactive_speaks_utf8_and_copies_unknown_words(data_bin: Path, trained: Path) -> None:
    flags = ("--user-dir", "fixup_mt", "--cpu", "--path", trained / "checkpoint_best.pt")
    done = subprocess.run(
        [sys.executable, "-m", "fairseq_cli.interactive", data_bin, *flags, "--replace-unk"],
        input="w1 ä\n".encode(),
        capture_output=True,
        cwd=ROOT,
        env=ENVIRONMENT | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    # As the dictionary knows it.
    assert "S-0\tw1 <unk>" in done.stdout.decode() and "H-0\t" in done.stdout.decode()


def _cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


DAMAGE: dict[str, tuple[str, int, str]] = {
    "empty index": ("idx", 0, "is damaged, or no index"),
    "cut header": ("idx", 12, "is damaged, or no index"),
    "cut index": ("idx", 60, "is damaged, or no index"),
    "empty data": ("bin", 0, "not the one of its index"),
    "cut data": ("bin", 60, "not the one of its index"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_data_are_named(damage: str, data_bin: Path, tmp_path: Path) -> None:
    ending, size, says = DAMAGE[damage]
    for each in data_bin.glob("test.de-en.de.*"):
        shutil.copy(each, tmp_path)
    path = tmp_path / "test.de-en.de"
    words = Dictionary.load(str(data_bin / "dict.de.txt"))
    assert len(data_utils.load_indexed_dataset(str(path), words)) == 41
    _cut(path.with_name(f"{path.name}.{ending}"), size)
    with pytest.raises(UserError, match=says) as caught:
        data_utils.load_indexed_dataset(str(path), words)
    assert f"{path}.{ending}" in str(caught.value)


def test_an_empty_text_is_told_before_training(tmp_path: Path, data_bin: Path) -> None:
    (tmp_path / "x.de").touch()
    flags: list[Any] = ["--only-source", "-s", "de", "--trainpref", tmp_path / "x"]
    flags += ["--srcdict", data_bin / "dict.de.txt", "--destdir", tmp_path / "bin"]
    fairseq("preprocess", *flags)
    path = next((tmp_path / "bin").glob("train*.bin"))
    with pytest.raises(UserError, match="holds no sentences"):
        data_utils.load_indexed_dataset(str(path.with_suffix("")), None)


@pytest.mark.parametrize(
    "line", [b"two words\n", b"w1 1\n", b"\xff 3\n"], ids=["format", "twice", "no text"]
)
def test_a_malformed_dictionary_is_one_line(
    line: bytes, data_bin: Path, trained: Path, tmp_path: Path
) -> None:
    for each in data_bin.iterdir():
        shutil.copy(each, tmp_path)
    with (tmp_path / "dict.de.txt").open("ab") as file:
        file.write(line)
    flags = ("--user-dir", "fixup_mt", "--cpu", "--path", trained / "checkpoint_best.pt")
    done = fairseq("generate", tmp_path, *flags, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "error: a dict.*.txt of the data is damaged" in done.stderr.splitlines()[-1]


def _texts(folder: Path, **contents: str) -> Namespace:
    for name, content in contents.items():
        (folder / f"train.{name}").write_text(content)
    options = {"only_source": False, "dict_only": False, "validpref": None, "testpref": None}
    prefix = str(folder / "train")
    return Namespace(trainpref=prefix, source_lang="de", target_lang="en", **options)


@pytest.mark.parametrize(
    ("german", "english", "says"),
    [
        ("a\nb\n", "A\n", r"lines: .*train\.de 2 and .*train\.en 1"),
        ("a\nb", "A\n", r"train\.de 2 and"),
        ("", "", r"train\.de holds no lines"),
    ],
)
def test_texts_that_are_no_pairs_are_refused(
    german: str, english: str, says: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=says):
        texts.check_parallel_text(_texts(tmp_path, de=german, en=english))


def test_pairs_and_a_single_text_are_not_refused(tmp_path: Path) -> None:
    args = _texts(tmp_path, de="a\nb", en="A\nB\n")
    texts.check_parallel_text(args)
    args.target_lang = None
    with pytest.raises(UserError, match="--only-source"):
        texts.check_parallel_text(args)
    args.only_source = True
    texts.check_parallel_text(args)


def test_the_mark_at_the_head_of_a_file_is_no_word(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("a b\n\ufeffc\n", encoding="utf-8-sig")
    with Chunker(str(tmp_path / "text"), 0, 0) as lines:
        assert list(lines) == ["a b\n", "\ufeffc\n"]
