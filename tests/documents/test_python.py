"""The Python blocks of the documents run: page by page, in order, in one namespace a page."""

from __future__ import annotations

import linecache
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.documents.blocks import Block, labelled
from tests.documents.givens import FILES, GIVENS

PAGES = labelled("python")
SLOW = {"docs/any-network.md", "docs/serving.md"}
"""They convert a dozen networks, a ResNet-50 among them, and export three models."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    yield tmp_path
    if dist.is_initialized():
        dist.destroy_process_group()


def run(blocks: list[Block], names: dict[str, Any]) -> None:
    """Run the blocks of a page, and the tests that it has defined."""
    givens = GIVENS.get(blocks[0].page, {})
    for block in blocks:
        for snippet, make in givens.items():
            if snippet in block.text:
                names.update(make())
        # A traceback then shows the page's own lines.
        linecache.cache[block.where] = (1, None, block.text.splitlines(True), block.where)
        exec(compile(block.text, block.where, "exec"), names)
    for name, value in list(names.items()):
        if name.startswith("test_"):
            value()


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=[pytest.mark.slow] if page in SLOW else []) for page in PAGES],
)
def test_the_blocks_of_a_page_run(
    page: str, folder: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture
) -> None:
    if page in FILES:
        FILES[page](request)
    run(PAGES[page], {"__name__": "page"})


def test_a_block_that_is_wrong_fails() -> None:
    wrong = Block("page.md", 3, "python", "import fixup_core as fc\nfc.fixup(None)\n")
    with pytest.raises(AttributeError, match="fixup"):
        run([wrong], {})


def test_what_is_given_is_needed_once() -> None:
    """A snippet that no block has, or two, would give names to nobody or at the wrong place."""
    for page, givens in GIVENS.items():
        for snippet in givens:
            holders = [block.where for block in PAGES[page] if snippet in block.text]
            assert len(holders) == 1, (page, snippet, holders)
    assert set(FILES) <= set(PAGES)
