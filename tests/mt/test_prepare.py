"""Preparing corpora: the texts that come out, and steps that survive kills and bad files."""

from __future__ import annotations

import gzip
import importlib.util
import io
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "mt"
NUM_PAIRS = 50
HEADER = {
    "de": ["<url>http://talk</url>", "<keywords>eins, zwei</keywords>", "<talkid>1</talkid>"],
    "en": ["<url>http://talk</url>", "<keywords>one, two</keywords>", "<talkid>1</talkid>"],
}
TITLES = {"de": "<title>Ein Titel &amp; mehr</title>", "en": "<title>A title &amp; more</title>"}
TOO_UNEVEN = {"de": "Ja .", "en": "This one is much too long ."}
EMPTY = {"de": "", "en": "Only here ."}


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, RECIPES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def iwslt() -> ModuleType:
    for needed in ("sacremoses", "subword_nmt"):
        pytest.importorskip(needed)
    return load("prepare_iwslt14")


def bash(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """The script after lib.sh, with the variables that a recipe would have set."""
    head = f'set -euo pipefail; source "{RECIPES}/lib.sh"; OUTPUT="$1"; PREPARED="$1/data"\n'
    command = ["bash", "-c", head + script, "recipe.sh", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def error_line(result: subprocess.CompletedProcess[str]) -> str:
    """The one line of a refusal."""
    assert result.returncode != 0, result.stdout
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]


def training_lines(language: str) -> list[str]:
    words = {"de": "Satz Nummer {}, gut.", "en": "Sentence number {}, good."}[language]
    lines = [words.format(number) for number in range(NUM_PAIRS)]
    return [*HEADER[language], TITLES[language], EMPTY[language], *lines, TOO_UNEVEN[language]]


def test_set_xml(language: str) -> str:
    word = {"de": "Prüfung", "en": "Test isn\N{RIGHT SINGLE QUOTATION MARK}t"}[language]
    rows = [f'<seg id="{number}"> {word} {number}. </seg>' for number in (1, 2)]
    return "\n".join(['<doc docid="1">', "<title>Kein Satz</title>", *rows, "</doc>"]) + "\n"


test_set_xml.__test__ = False  # type: ignore[attr-defined]


def write_corpus(folder: Path, module: ModuleType) -> Path:
    """A de-en folder in the form of the IWSLT'14 archive."""
    folder.mkdir(parents=True)
    for language in ("de", "en"):
        text = "".join(f"{line}\n" for line in training_lines(language))
        (folder / f"train.tags.de-en.{language}").write_text(text, encoding="utf-8")
        for name in module.TEST_SETS:
            path = folder / f"IWSLT14.{name}.de-en.{language}.xml"
            path.write_text(test_set_xml(language), encoding="utf-8")
    return folder


def lines_of(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def test_training_text_loses_marked_lines_but_keeps_titles(
    iwslt: ModuleType, tmp_path: Path
) -> None:
    folder = write_corpus(tmp_path / "de-en", iwslt)
    text = iwslt.training_text(folder / "train.tags.de-en.en")
    assert text[:3] == ["A title &amp; more", "Only here .", "Sentence number 0, good."]
    assert len(text) == NUM_PAIRS + 3


def test_pairs_are_filtered_by_length_and_ratio(iwslt: ModuleType) -> None:
    assert iwslt.is_clean("a b", "a b c")
    assert not iwslt.is_clean("a b", "a b c d")
    assert not iwslt.is_clean("a b c d", "a b")
    assert not iwslt.is_clean("", "")
    assert iwslt.is_clean("a " * 175, "b " * 175)
    assert not iwslt.is_clean("a " * 175, "b " * 176)


def test_every_23rd_pair_is_validation(iwslt: ModuleType) -> None:
    pairs = [(str(number), str(number)) for number in range(1, 70)]
    train, valid = iwslt.split_validation(pairs)
    assert [pair[0] for pair in valid] == ["23", "46", "69"]
    assert sorted(train + valid) == sorted(pairs)
    assert not set(train) & set(valid)


def test_prepared_iwslt_text(iwslt: ModuleType, tmp_path: Path) -> None:
    folder, out = write_corpus(tmp_path / "de-en", iwslt), tmp_path / "out"
    iwslt.prepare(folder, out, num_merges=30, num_workers=1)
    words = out / "words"
    # The title and 50 sentences survive; the empty and the uneven pair do not.
    assert lines_of(words / "train.en")[0] == "a title &amp; amp ; more"
    assert lines_of(words / "train.de")[1] == "satz nummer 0 , gut ."
    assert len(lines_of(words / "train.de")) + len(lines_of(words / "valid.de")) == NUM_PAIRS + 1
    assert len(lines_of(words / "valid.de")) == (NUM_PAIRS + 1) // 23
    assert lines_of(words / "test.en")[:2] == ["test isn &apos;t 1 .", "test isn &apos;t 2 ."]
    assert lines_of(out / "plain" / "test.en")[0] == "Test isn't 1."
    assert len(lines_of(words / "test.de")) == 2 * len(iwslt.TEST_SETS)
    assert "@@" in (out / "test.de").read_text(encoding="utf-8")
    for name in ("train", "valid", "test"):
        for language in ("de", "en"):
            pieces = (out / f"{name}.{language}").read_text(encoding="utf-8")
            whole = (words / f"{name}.{language}").read_text(encoding="utf-8")
            assert pieces.replace("@@ ", "") == whole


def test_workers_change_nothing(iwslt: ModuleType) -> None:
    lines = [f"It's number {number}." for number in range(20)]
    assert iwslt.tokenise(lines, "en", 1)[3] == "It &apos;s number 3 ."
    # The function itself must be importable in the workers, hence a process of its own.
    command = [sys.executable, str(RECIPES / "prepare_iwslt14.py"), "--help"]
    assert "--workers" in subprocess.run(command, capture_output=True, text=True).stdout


def test_incomplete_iwslt_folder_is_refused(iwslt: ModuleType, tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "de-en", iwslt)
    (folder / "IWSLT14.TED.tst2012.de-en.en.xml").unlink()
    with pytest.raises(SystemExit, match=r"error: .*tst2012.*is missing"):
        iwslt.plain_test_pairs(folder)
    path = folder / "train.tags.de-en.de"
    path.write_text(path.read_text(encoding="utf-8") + "Zuviel.\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="54 German but 53 English"):
        iwslt.training_pairs(folder, 1)


def test_multi30k_pieces_spell_the_text(tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    module = load("prepare_multi30k")
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    out.mkdir()
    text = [f"Ein Hund Nummer {number} läuft über die Wiese ." for number in range(60)]
    for name in module.SPLITS:
        for language in module.LANGUAGES:
            (raw / f"{name}.{language}").write_text("\n".join(text) + "\n", encoding="utf-8")
    model = module.learn_pieces(raw, out, 40)
    module.encode_file(model, raw / "val.de", out / "valid.de")
    pieces = lines_of(out / "valid.de")
    assert [line.replace(" ", "").replace("▁", " ").strip() for line in pieces] == text
    module.check_parallel(raw)
    (raw / "val.en").write_text("one line\n", encoding="utf-8")
    with pytest.raises(SystemExit, match="60 lines of German but 1 of English"):
        module.check_parallel(raw)
    with pytest.raises(SystemExit, match="cannot learn 99999 pieces"):
        module.learn_pieces(raw, out, 99999)


@pytest.mark.parametrize("name", ["prepare_multi30k", "prepare_iwslt14"])
def test_the_newline_alone_ends_a_line(name: str, tmp_path: Path) -> None:
    pytest.importorskip("sacremoses")
    (tmp_path / "text").write_bytes("a\rb\u2028c\nd\r\n\n".encode())
    assert load(name).read_lines(tmp_path / "text") == ["a\rb\u2028c", "d\r", ""]


def test_step_is_done_once_and_again_for_another_key(tmp_path: Path) -> None:
    script = 'log() { echo "$1" >>"$OUTPUT/log"; }; step "$OUTPUT" one "$2" log one; '
    script += 'step "$OUTPUT" two fixed log two'
    for key in ("a", "a", "b"):
        assert bash(script, tmp_path, key).returncode == 0
    # The second run does nothing; the third redoes the step and all that follows it.
    assert lines_of(tmp_path / "log") == ["one", "two", "one", "two"]


def test_failed_step_is_not_done(tmp_path: Path) -> None:
    script = 'step "$OUTPUT" one key false'
    assert bash(script, tmp_path).returncode != 0
    assert "done before" not in bash(script, tmp_path).stdout
    assert bash('step "$OUTPUT" one key true', tmp_path).returncode == 0
    assert "done before" in bash(script, tmp_path).stdout


def test_killed_step_is_redone_cleanly(tmp_path: Path) -> None:
    killed = 'fill() { echo half >"$1/leftover"; kill -9 $$; }\n'
    whole = 'fill() { echo all >"$1/result"; }\n'
    call = 'step "$OUTPUT" fill key whole_folder "$OUTPUT/target" fill'
    assert bash(killed + call, tmp_path).returncode == -signal.SIGKILL
    assert not (tmp_path / "target").exists(), "what is half done must not look finished"
    assert bash(whole + call, tmp_path).returncode == 0
    assert [path.name for path in (tmp_path / "target").iterdir()] == ["result"]


def test_killed_step_keeps_the_earlier_folder(tmp_path: Path) -> None:
    whole = 'fill() { echo all >"$1/result"; }\nwhole_folder "$OUTPUT/target" fill'
    failing = 'fill() { echo half >"$1/result"; false; }\nwhole_folder "$OUTPUT/target" fill'
    assert bash(whole, tmp_path).returncode == 0
    assert bash(failing, tmp_path).returncode != 0
    assert (tmp_path / "target" / "result").read_text() == "all\n"


def test_download_is_resumed(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "download" / "file"
    source.write_bytes(bytes(range(256)) * 40)
    target.parent.mkdir()
    Path(f"{target}.partial").write_bytes(source.read_bytes()[:1000])
    assert bash('fetch "$2" "$3"', tmp_path, f"file://{source}", target).returncode == 0
    assert target.read_bytes() == source.read_bytes()
    source.unlink()
    assert bash('fetch "$2" "$3"', tmp_path, f"file://{source}", target).returncode == 0


def test_failed_download_says_what_to_do(tmp_path: Path) -> None:
    result = bash('fetch "$2" "$3"', tmp_path, f"file://{tmp_path}/nowhere", tmp_path / "file")
    assert result.returncode != 0
    assert result.stderr.splitlines()[-1].endswith("or give the files with --data DIR")
    assert not (tmp_path / "file").exists()


def test_wrong_checksum_is_refused_and_nothing_deleted(tmp_path: Path) -> None:
    path, sums = tmp_path / "file", tmp_path / "sums"
    path.write_text("good\n")
    sums.write_text("0" * 64 + "  file\n")
    result = bash('CHECKSUMS="$3"; verify "$2" file', tmp_path, path, sums)
    assert "is not the expected file" in error_line(result)
    assert path.read_text() == "good\n"


def test_unknown_checksum_is_recorded_and_held_to(tmp_path: Path) -> None:
    path = tmp_path / "unlisted.tgz"
    path.write_text("good\n")
    first = bash('verify "$2" unlisted.tgz', tmp_path, path)
    assert "no official sha256 is known for unlisted.tgz; recorded" in first.stdout
    assert bash('verify "$2" unlisted.tgz', tmp_path, path).stdout == ""
    path.write_text("tampered with\n")
    assert "is not the expected" in error_line(bash('verify "$2" unlisted.tgz', tmp_path, path))


def recipe(name: str, *words: object) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(RECIPES / name), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_multi30k_refuses_altered_text(tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece")
    data, output = tmp_path / "data", tmp_path / "out"
    data.mkdir()
    for split in ("train", "val", "test_2016_flickr"):
        for language in ("de", "en"):
            with gzip.open(data / f"{split}.{language}.gz", "wt", encoding="utf-8") as file:
                file.write("Ein anderer Text .\n")
    result = recipe("multi30k.sh", "--data", data, "--output", output, "--prepare-only")
    message = error_line(result)
    assert f"{data}/train.de.gz is not the expected train.de" in message
    assert not (output / "data" / "raw").exists()
    (data / "val.en.gz").unlink()
    (tmp_path / "sums").touch()
    words = ("--data", data, "--output", output, "--checksums", tmp_path / "sums")
    assert "has neither val.en nor val.en.gz" in error_line(recipe("multi30k.sh", *words))
    (data / "train.en.gz").write_bytes(b"no gzip")
    assert "train.en.gz is damaged" in recipe("multi30k.sh", *words).stderr


def test_iwslt_archive_by_download(iwslt: ModuleType, tmp_path: Path) -> None:
    archive, output = tmp_path / "source.tgz", tmp_path / "out"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(write_corpus(tmp_path / "de-en", iwslt), arcname="de-en")
    words = ("--url", f"file://{archive}", "--output", output, "--prepare-only")
    result = recipe("iwslt14_de_en.sh", *words)
    assert result.returncode == 0, result.stderr
    prepared = output / "data"
    assert {"train.de-en.de.bin", "test.de-en.en.idx"} <= {
        path.name for path in (prepared / "bin").iterdir()
    }
    assert not (prepared / "orig").exists()
    # A second run touches nothing, not even the network.
    archive.unlink()
    shutil.rmtree(output / "download")
    again = recipe("iwslt14_de_en.sh", *words)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("done before") == 2


def test_iwslt_archive_must_stay_the_one_recorded(iwslt: ModuleType, tmp_path: Path) -> None:
    output, archive = tmp_path / "out", tmp_path / "de-en.tgz"
    record = output / "checksums" / "de-en.tgz.sha256"
    record.parent.mkdir(parents=True)
    record.write_text("0" * 64 + "\n")
    archive.write_bytes(b"some other archive")
    words = ("--data", archive, "--output", output, "--prepare-only")
    message = error_line(recipe("iwslt14_de_en.sh", *words))
    assert "is not the expected de-en.tgz" in message
    assert archive.read_bytes() == b"some other archive"
    record.unlink()
    assert "is damaged" in recipe("iwslt14_de_en.sh", *words).stderr
    (tmp_path / "empty").mkdir()
    words = ("--data", tmp_path / "empty", "--output", output)
    assert "holds neither" in error_line(recipe("iwslt14_de_en.sh", *words))


def write_wmt_archive(path: Path, *, without: str = "") -> None:
    names = ("train.tok.clean.bpe.32000", "newstest2013.tok.bpe.32000")
    with tarfile.open(path, "w:gz") as tar:
        for name in (*names, "newstest2014.tok.bpe.32000"):
            for language in ("en", "de"):
                info = tarfile.TarInfo(f"{name}.{language}")
                text = b"ein lan@@ ges Wort\nund en@@ de@@\n"
                info.size = len(text)
                if info.name != without:
                    tar.addfile(info, io.BytesIO(text))


@pytest.mark.slow
def test_wmt_archive_and_unpacked_folder_agree(tmp_path: Path) -> None:
    pytest.importorskip("sacremoses")
    archive, folder = tmp_path / "wmt16_en_de.tar.gz", tmp_path / "unpacked"
    write_wmt_archive(archive)
    folder.mkdir()
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    for name, data in (("a", archive), ("b", folder)):
        words = ("--data", data, "--output", tmp_path / name, "--prepare-only")
        result = recipe("wmt16_en_de.sh", *words)
        assert result.returncode == 0, result.stderr
        reference = tmp_path / name / "data" / "words" / "test.de"
        assert lines_of(reference) == ["ein langes Wort", "und ende"]
    same = [(tmp_path / name / "data/bin/train.en-de.de.bin").read_bytes() for name in "ab"]
    assert same[0] == same[1]


def test_wmt_incomplete_archive_and_web_page_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("sacremoses")
    archive, page = tmp_path / "wmt16_en_de.tar.gz", tmp_path / "page.html"
    write_wmt_archive(archive, without="newstest2013.tok.bpe.32000.de")
    words = ("--output", tmp_path / "out", "--prepare-only")
    result = recipe("wmt16_en_de.sh", "--data", archive, *words)
    assert "newstest2013.tok.bpe.32000.de is missing" in error_line(result)
    page.write_text("<html>Google Drive cannot scan this file</html>")
    result = recipe("wmt16_en_de.sh", "--url", f"file://{page}", *words)
    assert "pass it with --data FILE" in error_line(result)
    assert not (tmp_path / "out" / "download" / "wmt16_en_de.tar.gz").exists()
