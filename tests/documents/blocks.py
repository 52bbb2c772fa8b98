"""The code blocks of the documents.

A block has a label: ``python``, ``sh`` or ``text``. One that cannot run where the tests run has a
line before it, which no page shows::

    <!-- not run: needs two GPUs -->
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from tests.conftest import ROOT

DOCUMENTS = (
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "recipes" / "README.md",
    ROOT / "benchmarks" / "README.md",
    *sorted(path for path in (ROOT / "docs").glob("*.md")),
)
FENCE = re.compile(r"^( *)(```+)(.*)$")
NOT_RUN = re.compile(r"^ *<!-- not run: (\S.*) -->$")


@dataclass(frozen=True)
class Block:
    """A code block.

    Attributes:
        page: Path from the repository's root.
        line: Of its first line of code, counted from 1.
        label: The language, ``{toctree}`` and so on for a directive, "" for none.
        text: Without the fences.
        not_run: Why it does not run here; "" where it runs.
    """

    page: str
    line: int
    label: str
    text: str
    not_run: str = ""

    @property
    def where(self) -> str:
        """As editors and pytest write places."""
        return f"{self.page}:{self.line}"


def blocks_of(text: str, page: str = "") -> Iterator[Block]:
    """The blocks of a document, in order."""
    opened: tuple[str, str, str] | None = None
    start, code, before = 0, [], ""
    for number, line in enumerate(text.splitlines(), start=1):
        fence = FENCE.match(line)
        if opened and fence and fence[2] == opened[1] and not fence[3].strip():
            yield Block(page, start, opened[0], "\n".join(code) + "\n", opened[2])
            opened = None
        elif opened:
            code.append(line)
        elif fence:
            marked = NOT_RUN.match(before)
            label = fence[3].strip().split(" ")[0]
            opened, start, code = (label, fence[2], marked[1] if marked else ""), number + 1, []
        before = line
    if opened:
        raise ValueError(f"{page}:{start}: a code block that does not end")


@cache
def all_blocks() -> tuple[Block, ...]:
    """Those of every document."""
    return tuple(
        block
        for path in DOCUMENTS
        for block in blocks_of(path.read_text("utf-8"), path.relative_to(ROOT).as_posix())
    )


def spans() -> dict[str, list[str]]:
    """Page by page, the code within sentences."""
    found = {}
    for path in DOCUMENTS:
        prose = re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.M | re.S)
        found[path.relative_to(ROOT).as_posix()] = [
            " ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)
        ]
    return found


def labelled(label: str) -> dict[str, list[Block]]:
    """Page by page, those with a label that run."""
    pages: dict[str, list[Block]] = {}
    for block in all_blocks():
        if block.label == label and not block.not_run:
            pages.setdefault(block.page, []).append(block)
    return pages
