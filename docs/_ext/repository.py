"""Links to files of the repository, in pages that are read there as well.

A page may be a file outside ``docs/`` that the book includes. A link to such a file leads to its
page; a link to a folder, which has no page, becomes plain text. A link to nothing is a warning, as
everywhere.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from sphinx.application import Sphinx

DOCS = Path(__file__).resolve().parents[1]
ROOT = DOCS.parent
PAGES = {
    "README.md": "index",
    "recipes/README.md": "recipes",
    "benchmarks/README.md": "benchmarks",
    "CONTRIBUTING.md": "contributing",
    "CHANGELOG.md": "changelog",
}
"""Files outside ``docs/`` and the pages that include them, or stand for them."""

LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\])\((?!https?:)([^()\s#]+)(#[^()\s]*)?\)")


def mend_links(text: str, file: Path, page: Path) -> str:
    """``text`` of ``file``, its links as they must be in ``page``."""

    def mended(match: re.Match[str]) -> str:
        label, path, anchor = match[1], match[2], match[3] or ""
        target = (file.parent / path).resolve()
        if not target.exists():
            return match[0]
        if target.is_dir():
            return label[1:-1]
        inside = target.relative_to(ROOT).as_posix()
        if inside in PAGES:
            target = DOCS / f"{PAGES[inside]}.md"
        return f"{label}({os.path.relpath(target, page.parent)}{anchor})"

    return LINK.sub(mended, text)


def _page(app: Sphinx, docname: str) -> Path:
    return Path(app.env.doc2path(docname))


def _read(app: Sphinx, docname: str, content: list[str]) -> None:
    page = _page(app, docname)
    if page.suffix == ".md":
        content[0] = mend_links(content[0], page, page)


def _include(app: Sphinx, path: Path, docname: str, content: list[str]) -> None:
    content[0] = mend_links(content[0], (DOCS / path).resolve(), _page(app, docname))


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.connect("source-read", _read)
    app.connect("include-read", _include)
    return {"parallel_read_safe": True}
