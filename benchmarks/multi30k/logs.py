"""What fairseq has logged of a run."""

from __future__ import annotations

import json
import re
from pathlib import Path

VALID = re.compile(r"\| valid \| (\{.*\})")


def valid_losses(run: Path) -> dict[int, float]:
    """Validation losses in bits by the number of updates, in their order."""
    rows = [json.loads(line) for line in VALID.findall((run / "train.log").read_text())]
    found = {int(row["valid_num_updates"]): float(row["valid_loss"]) for row in rows}
    return dict(sorted(found.items()))
