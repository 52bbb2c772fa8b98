"""What the documents promise to hold: labels, links, names, options, and the README's length."""

from __future__ import annotations

import argparse
import importlib
import re
from pathlib import Path

import pytest

import fixup_core
import fixup_core.__main__
import fixup_mt.__main__
import fixup_mt.model
import vision.__main__
import vision.data
import vision.nets
from tests.conftest import ROOT
from tests.documents.blocks import DOCUMENTS, all_blocks, blocks_of

DOCS = ROOT / "docs"
NOT_RUN_AT_MOST = 2


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= 150


def test_every_block_has_a_label() -> None:
    for block in all_blocks():
        assert block.label in {"python", "sh", "text"} or block.label[:1] == "{", block.where


def test_few_blocks_are_not_run() -> None:
    marked = [f"{block.where}: {block.not_run}" for block in all_blocks() if block.not_run]
    assert len(marked) <= NOT_RUN_AT_MOST, marked


def test_every_mark_stands_before_a_block() -> None:
    lines = [line for path in DOCUMENTS for line in path.read_text("utf-8").splitlines()]
    marks = [line for line in lines if line.lstrip().startswith("<!-- not run")]
    assert len(marks) == sum(bool(block.not_run) for block in all_blocks())


def test_blocks_are_found_where_they_stand() -> None:
    text = "```sh\na\n```\n<!-- not run: no GPU -->\n````text\n```\n````\n"
    first, second = blocks_of(text)
    assert (first.label, first.text, first.line, first.not_run) == ("sh", "a\n", 2, "")
    assert (second.label, second.text, second.not_run) == ("text", "```\n", "no GPU")
    with pytest.raises(ValueError, match="does not end"):
        list(blocks_of("```sh\na\n"))


def anchors(text: str) -> set[str]:
    """The names of a page's headings, as GitHub and MyST make them."""
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def broken_links(path: Path, text: str) -> list[str]:
    """Links of a document to what is not in the repository."""
    found = []
    for target, anchor in re.findall(r"\]\((?!https?:)([^()\s#]*)(?:#([^()\s]+))?\)", text):
        file = (path.parent / target).resolve() if target else path
        known = file.exists() and (not anchor or anchor in anchors(file.read_text("utf-8")))
        found += [] if known else [f"{path.name}: {target}#{anchor}"]
    return found


def test_links_lead_somewhere_in_the_repository_too() -> None:
    for path in DOCUMENTS:
        assert broken_links(path, path.read_text("utf-8")) == []
    wrong = "# A b\n[x](no.md) [x](#a-b) [x](#a) [x](docs/methods.md#the-table)"
    readme = ROOT / "README.md"
    assert broken_links(readme, wrong)[:1] == ["README.md: no.md#"]
    assert len(broken_links(readme, wrong)) == 3  # both anchors are the wrong document's


@pytest.mark.parametrize(
    ("page", "module"),
    [
        ("core", fixup_core),
        ("mt", fixup_mt.model),
        ("vision", vision.nets),
        ("vision", vision.data),
    ],
)
def test_every_public_name_is_in_the_reference(page: str, module: object) -> None:
    text = (DOCS / "reference" / f"{page}.md").read_text("utf-8")
    listed = set(re.findall(r"^\.\. (?:auto)?(?:function|class|data):: ([\w.]+)$", text, re.M))
    assert set(module.__all__) - listed == set()  # type: ignore[attr-defined]


@pytest.mark.parametrize("program", ["fixup_core", "fixup_mt", "vision"])
def test_every_command_is_in_the_reference(program: str) -> None:
    text = (DOCS / "reference" / "commands.md").read_text("utf-8")
    module = importlib.import_module(f"{program}.__main__")
    shown = set(re.findall(rf"\{{command-help}} python -m {program} (\w+)", text))
    shown |= {"fit", "validate", "test", "predict"} if program == "vision" else set()
    assert shown == set(module.COMMANDS)


def test_the_table_of_the_plugins_options_is_the_parsers() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    fixup_mt.model.FixupTransformerModel.add_args(parser)
    real = {name for name in parser._option_string_actions if name.startswith("--fixup-")}
    rows = re.findall(r"^\| `(--fixup-[\w-]+)", (DOCS / "translate.md").read_text("utf-8"), re.M)
    assert real and real == set(rows)


def test_every_page_is_in_the_table_of_contents() -> None:
    index = (DOCS / "index.md").read_text("utf-8")
    pages = {path.relative_to(DOCS).with_suffix("").as_posix() for path in DOCS.glob("**/*.md")}
    pages = {page for page in pages if not page.startswith(("_build", "auto_gallery", "gallery"))}
    entries = set(re.findall(r"^(?:.*<)?([\w/-]+)>?$", index, re.M))
    assert pages - {"index"} - entries == set()
