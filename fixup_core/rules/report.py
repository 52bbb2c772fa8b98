"""What ``fixup_init_`` and ``fixup_`` did, as data and as tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
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
        L: Residual branches of the network.
        factor: What the method multiplied the standard deviation by; 0 for a branch's last layer.
        standard: The distribution's name.
        value: The value of a scalar or bias vector; the mean where its elements differ.
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
class InitReport:
    """Everything an initialisation wrote, in the order of the network's parameters.

    Attributes:
        num_branches: L, counted from the network.
        rows: One for each parameter.
        method: Its name in the registry.
    """

    num_branches: int
    rows: tuple[Row, ...]
    method: str = "fixup"

    def __str__(self) -> str:
        """A table of all weights (scalars are summed up in the last line)."""
        header = ("parameter", "role", "branch", "m", "L", "factor", "std")
        weights = [row for row in self.rows if row.value is None]
        lines = _table([header, *(_cells(row) for row in weights)])
        return "\n".join([*lines, self.summary()])

    def summary(self) -> str:
        """One line: L, the m of the branches, and how many parameters had each role."""
        roles = Counter(row.role for row in self.rows)
        depths = Counter({row.branch: row.m for row in self.rows if row.branch}.values())
        branches = ", ".join(f"{n} of m = {m}" for m, n in sorted(depths.items()))
        counts = ", ".join(f"{n} {role}" for role, n in sorted(roles.items()))
        # A method with one distribution for all layers knows no branch.
        known = f" ({branches})" if branches else ""
        return f"L = {self.num_branches} residual branches{known}; parameters: {counts}"


@dataclass(frozen=True)
class ConvertedBranch:
    """A residual branch of a network that ``fixup_`` has converted.

    Attributes:
        name: Path of the module that adds it to its shortcut.
        m: Its weight layers.
        factor: Of all of them but the last, which is 0.
        layers: Names of their parameters.
        gates: Names of weights in it that do not multiply it; they stay as they are.
    """

    name: str
    m: int
    factor: float
    layers: tuple[str, ...]
    gates: tuple[str, ...] = ()


@dataclass(frozen=True)
class ConversionReport:
    """What ``fixup_`` found and did.

    Attributes:
        branches: In the order of the forward pass; their number is L.
        head: Names of the output layers' weights, which are 0.
        removed: Paths of the normalisation layers that were removed.
        frozen: Those among them that stay as constants (``calibrate=True``).
        scalars: How many were added.
        kept: Names of the parameters that are as they were.
        left_out: Residual branches that no rule covers, and why; they are as they were.
        notes: What a reader should know.
        init: Every parameter that was written.
    """

    branches: tuple[ConvertedBranch, ...]
    head: tuple[str, ...]
    removed: tuple[str, ...]
    frozen: tuple[str, ...]
    scalars: int
    kept: tuple[str, ...]
    notes: tuple[str, ...]
    init: InitReport
    left_out: tuple[str, ...] = ()

    @property
    def num_branches(self) -> int:
        """L of the rules."""
        return len(self.branches)

    def __str__(self) -> str:
        """A table of the branches, then what else was done."""
        zeros = any(row.factor == 0.0 for row in self.init.rows)
        header = ("branch", "m", "factor", f"layers{' (the last is 0)' * zeros}", "gates")
        rows = [(b.name, str(b.m), f"{b.factor:.4f}", *_names(b)) for b in self.branches]
        lines = [
            *_table([header, *rows]),
            f"L = {self.num_branches} residual branches; at 0: {', '.join(self.head) or 'nothing'}",
            f"{len(self.removed)} normalisation layers removed{self._frozen()}, "
            f"{self.scalars} scalars added, {len(self.kept)} parameters kept as they were",
            *(f"left out: {branch}" for branch in self.left_out),
            *(f"note: {note}" for note in self.notes),
        ]
        return "\n".join(lines)

    def _frozen(self) -> str:
        return f" ({len(self.frozen)} are constants now)" if self.frozen else ""


def _names(branch: ConvertedBranch) -> tuple[str, str]:
    """Layers and gates, by their names within the branch."""
    prefix = f"{branch.name}." if branch.name else ""
    layers, gates = (
        ", ".join(name.removeprefix(prefix).removesuffix(".weight") for name in names)
        for names in (branch.layers, branch.gates)
    )
    return layers, gates


def _table(cells: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    padded = ("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in cells)
    return [line.rstrip() for line in padded]


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
