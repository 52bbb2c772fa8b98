"""What ``fixup_init_`` did, as data and as a table."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One parameter.

    Attributes:
        name: Its name in the model.
        role: "branch", "classifier", "embedding", "tied output", "standard", "scalar", "kept", or
            one of these with "bias vector".
        std: Standard deviation it was drawn with; 0 for a constant.
        branch: Path of its residual branch, else "".
        m: Weight layers in the branch.
        L: Number of branches the factor was computed with.
        factor: What rule 2 multiplied the standard deviation by; 0 for a branch's last layer.
        standard: The distribution's name.
        value: The value of a scalar or bias vector.
    """

    name: str
    role: str
    std: float = 0.0
    branch: str = ""
    m: int | None = None
    L: int | None = None
    factor: float | None = None
    standard: str = ""
    value: float | None = None


@dataclass(frozen=True)
class FixupReport:
    """Everything ``fixup_init_`` wrote, in the order of the model's parameters.

    Attributes:
        num_branches: L, counted from the model.
        rows: One for each parameter.
    """

    num_branches: int
    rows: tuple[Row, ...]

    def __str__(self) -> str:
        """A table of all weights (scalars are summed up in the last line)."""
        header = ("parameter", "role", "branch", "m", "L", "factor", "std")
        weights = [row for row in self.rows if row.value is None]
        cells = [header, *(_cells(row) for row in weights)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
        lines = ["  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in cells]
        return "\n".join([*(line.rstrip() for line in lines), self.summary()])

    def summary(self) -> str:
        """One line: L, the m of the branches, and how many parameters had each role."""
        roles = Counter(row.role for row in self.rows)
        depths = Counter(row.m for row in self.rows if row.factor == 0.0)
        branches = ", ".join(f"{n} of m = {m}" for m, n in sorted(depths.items()))
        counts = ", ".join(f"{n} {role}" for role, n in sorted(roles.items()))
        return f"L = {self.num_branches} residual branches ({branches}); parameters: {counts}"


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.name,
        row.role,
        row.branch,
        "" if row.m is None else str(row.m),
        "" if row.L is None else str(row.L),
        "" if row.factor is None else f"{row.factor:.4f}",
        "kept" if row.role == "kept" else f"{row.std:.5f}",
    )
