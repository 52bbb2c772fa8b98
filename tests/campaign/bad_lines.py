"""A hundred bad command lines, from the table ``bad_lines.txt``: each is one line and status 2.

``--count`` is the number of lines, drawn at random.
"""

from __future__ import annotations

import random
import shutil
from pathlib import Path

from tests.campaign.common import campaign, halves, run
from tests.conftest import train_flags

TABLE = Path(__file__).with_name("bad_lines.txt")


def attack(count: int, seed: int, folder: Path) -> tuple[int, int]:
    """Drive ``count`` lines."""
    translation, images = halves(folder / "bin")
    trained, text = folder / "trained", folder / "plain.txt"
    assert run(translation.line(trained)).status == 0
    text.write_text("this is text\n")
    train = ["train", *map(str, train_flags(folder / "bin", folder / "run", "--user-dir", ""))]
    words = {
        "TRAIN": train,
        "FIT": [str(word) for word in images.line(folder / "run")],
        "CK": [str(trained / translation.last)],
        "DATA": [str(folder / "bin")],
        "NEW": [str(folder / "new")],
        "TEXT": [str(text)],
    }
    lines = [line for line in TABLE.read_text().splitlines() if not line.startswith("#")]
    chosen = random.Random(seed).sample(lines, min(count, len(lines)))
    return sum(_refused(line, words, folder) for line in chosen), len(chosen)


def _refused(line: str, words: dict[str, list[str]], folder: Path) -> bool:
    parts: list[str] = []
    for word in line.split():
        head, _, tail = word.partition("/")
        if head == "TEXT" and tail:
            parts.append(f"{words[head][0]}/{tail}")
        else:
            parts += words.get(word, [word])
    ended = run(parts)
    for name in ("run", "new"):
        shutil.rmtree(folder / name, ignore_errors=True)
    if not ended.refused:
        print(f"{line}: status {ended.status}, {ended.error[-300:]}")
    return ended.refused


if __name__ == "__main__":
    campaign(attack, count=100, closes="bad command lines answered by one line")
