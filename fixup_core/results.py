"""The results of many short trainings: a table of points, and what all of them share.

A point that is in the table is not computed again, so that a sweep goes on where it was stopped.
``recipe.json`` beside the table holds what its points share; a sweep of another recipe does not go
on there.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Generic, TypeVar

from fixup_core.errors import UserError
from fixup_core.files import write_text

P = TypeVar("P")
R = TypeVar("R")
TABLE, RECIPE = "points.csv", "recipe.json"


class Table(Generic[P, R]):
    """Results in a CSV file, one row a point.

    Args:
        file: Of the table; it need not be there.
        point: A frozen dataclass: what a training is. Fields are texts, whole or real numbers,
            or mappings, which are written as JSON.
        result: Another: what it gave.

    Raises:
        UserError: The file is not such a table, or is damaged.
    """

    def __init__(self, file: Path, point: type[P], result: type[R]) -> None:
        self.file, self.point, self.result = file, point, result
        kinds: tuple[Any, Any] = (point, result)
        self.columns = tuple(field.name for kind in kinds for field in fields(kind))
        self.rows: dict[P, R] = {}
        if file.exists():
            self._read()

    def add(self, point: P, result: R) -> None:
        """Write the table with one more row at once, so that a kill loses no finished point."""
        rows = self.rows | {point: result}
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writeheader()
        for each, numbers in rows.items():
            given: list[Any] = [each, numbers]
            row = asdict(given[0]) | asdict(given[1])
            writer.writerow({name: _cell(value) for name, value in row.items()})
        write_text(self.file, text.getvalue())
        self.rows = rows

    def _read(self) -> None:
        text = self.file.read_text(encoding="utf-8")
        lines = csv.DictReader(io.StringIO(text))
        if tuple(lines.fieldnames or ()) != self.columns or not text.endswith("\n"):
            raise UserError(f"{self.file} is damaged or no table of points: remove it")
        for row in lines:
            try:
                self.rows[_typed(self.point, row)] = _typed(self.result, row)
            except (TypeError, ValueError) as error:
                raise UserError(
                    f"{self.file}, line {lines.line_num}, is damaged: remove the line"
                ) from error


def keep_to(recipe: Mapping[str, Any], output: Path) -> None:
    """Let all points of the table in a folder be trained alike.

    Args:
        recipe: What decides a point's numbers and is not in its row.
        output: The folder.

    Raises:
        UserError: The points that are there were trained otherwise.
    """
    file, own = output / RECIPE, json.dumps(recipe, default=str, indent=1)
    if not file.exists():
        if (output / TABLE).exists():
            raise UserError(f"{output} has points but no {RECIPE}: give another --output")
        write_text(file, own + "\n")
        return
    try:
        there, here = json.loads(file.read_text(encoding="utf-8")), json.loads(own)
    except json.JSONDecodeError as error:
        raise UserError(f"{file} is damaged: give another --output") from error
    for name, value in sorted(there.items()):  # older ones have fewer
        if value != here.get(name):
            raise UserError(
                f"the points in {output} were trained with {name} {value}, not {here.get(name)}: "
                "give another --output"
            )


def _cell(value: Any) -> Any:
    if not isinstance(value, Mapping):
        return value
    return json.dumps(dict(value), sort_keys=True) if value else ""


def parse_options(text: str) -> dict[str, Any]:
    """A mapping; older tables have "name=value" pairs with spaces between."""
    if text.startswith("{"):
        return dict(json.loads(text))
    return dict(pair.split("=") for pair in text.split())


_CASTS: dict[str, Any] = {
    "str": str,
    "int": int,
    "float": float,
    "Mapping[str, Any]": parse_options,
}


def _typed(kind: Any, row: dict[str, str]) -> Any:
    return kind(**{f.name: _CASTS[str(f.type)](row[f.name]) for f in fields(kind)})
