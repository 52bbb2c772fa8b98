"""Who may import whom: torch -> fixup_core -> fixup_mt, vision; never each other."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FORBIDDEN = {
    "fixup_mt": {"vision", "lightning", "torchvision", "tests", "benchmarks"},
    "vision": {"fixup_mt", "fairseq", "tests", "benchmarks"},
}


def _imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", sorted((ROOT / "fixup_core").rglob("*.py")), ids=lambda p: p.name)
def test_the_core_needs_torch_alone(path: Path) -> None:
    assert _imports(path) <= {"torch", "fixup_core"} | sys.stdlib_module_names


@pytest.mark.parametrize("package", FORBIDDEN)
def test_packages_do_not_import_each_other(package: str) -> None:
    for path in (ROOT / package).rglob("*.py"):
        assert not _imports(path) & FORBIDDEN[package], path


def test_a_forbidden_import_would_be_seen(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(
        "def f():\n    from fairseq import utils\n    import vision.x\n"
    )
    assert _imports(tmp_path / "bad.py") == {"fairseq", "vision"}


EXPONENT = re.compile(r"2\*\w+-2|\*\*\(-1/|\*\*-1/")


def test_the_exponent_in_scaling_would_be_seen() -> None:
    code = (ROOT / "fixup_core" / "rules" / "scaling.py").read_text(encoding="utf-8")
    assert EXPONENT.search("".join(code.split()))


def test_exponents_of_the_depth_stand_in_one_file() -> None:
    """``(2 * m - 2)`` and its like appear in ``scaling.py`` only."""
    for package in ("fixup_core", "fixup_mt", "vision"):
        for path in (ROOT / package).rglob("*.py"):
            if path.name != "scaling.py":
                code = "".join(ast.unparse(ast.parse(path.read_text(encoding="utf-8"))).split())
                assert not EXPONENT.search(code), path
