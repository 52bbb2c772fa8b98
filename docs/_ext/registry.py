"""``{methods}``: the records of ``fixup_core.METHODS`` as a definition list, at build."""

from __future__ import annotations

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from fixup_core import METHODS, Method


def _item(name: str, method: Method) -> nodes.definition_list_item:
    texts = [method.text, f"Source: {method.source}"]
    texts += [f"Differs: {method.differs}"] if method.differs else []
    texts += [f"For {method.only} alone."] if method.only else []
    return nodes.definition_list_item(
        "",
        nodes.term("", "", nodes.literal(name, name)),
        nodes.definition("", *(nodes.paragraph(text, text) for text in texts)),
    )


class Methods(SphinxDirective):
    """The list."""

    def run(self) -> list[nodes.Node]:
        items = [_item(name, method) for name, method in METHODS.items()]
        return [nodes.definition_list("", *items)]


def setup(app: Sphinx) -> dict[str, bool]:
    """Called by Sphinx."""
    app.add_directive("methods", Methods)
    return {"parallel_read_safe": True}
