"""Trainings on Multi30k side by side: a table of the scores, a figure of the validation losses.

``python benchmarks/multi30k/summary.py RAW RUNS --baseline prenorm_d3 --figure long.png``

Runs are named METHOD_sSEED and have been scored (``score.py``). Printed for each method: the lowest
validation loss, the length penalty and BLEU of each seed, with means, and the p of a paired
bootstrap against the baseline's run of the same seed (1,000 samples of the test set).
"""

from __future__ import annotations

import argparse
import json
import logging
import re
from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

from logs import valid_losses
from sacrebleu.metrics import BLEU
from sacrebleu.significance import PairedTest

from fixup_core.measure.figures import Curve, Panel, draw

NAME = re.compile(r"(.+)_s(\d+)")
Runs = dict[str, dict[int, Path]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("raw", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--baseline", required=True)
    parser.add_argument("--figure", type=Path)
    args = parser.parse_args()
    logging.getLogger("sacrebleu").setLevel(logging.ERROR)
    runs = find(args.runs)
    print("| method | valid loss | length penalty | BLEU, valid | BLEU, test | p |")
    print("|---|---|---|---|---|---|")
    for method, seeds in runs.items():
        scores = [json.loads((run / "score.json").read_text()) for run in seeds.values()]
        columns = [
            shown(scores, "valid_loss", ".3f"),
            " ".join(f"{score['lenpen']:g}" for score in scores),
            shown(scores, "valid_bleu", ".2f"),
            shown(scores, "test_bleu", ".2f"),
            " ".join(significance(args.raw, runs[args.baseline], seeds)),
        ]
        print(f"| {method} | {' | '.join(columns)} |", flush=True)
    if args.figure:
        curves = [curve(method, seeds) for method, seeds in runs.items()]
        draw([Panel(curves, "updates", "validation loss, bits")], args.figure)


def find(folder: Path) -> Runs:
    """The scored runs of each method by seed, the lowest mean loss first."""
    found: Runs = defaultdict(dict)
    for score in sorted(folder.glob("*/score.json")):
        match = NAME.fullmatch(score.parent.name)
        if match:
            found[match[1]][int(match[2])] = score.parent

    def loss(method: str) -> float:
        return mean(min(valid_losses(run).values()) for run in found[method].values())

    return {method: found[method] for method in sorted(found, key=loss)}


def shown(scores: list[dict[str, Any]], key: str, form: str) -> str:
    values = [score[key] for score in scores]
    return f"{mean(values):{form}} ({' '.join(f'{value:{form}}' for value in values)})"


def significance(raw: Path, baseline: dict[int, Path], seeds: dict[int, Path]) -> list[str]:
    """The p of each seed that the baseline has, too."""
    if seeds is baseline:
        return ["-"]
    references = [(raw / "test_2016_flickr.en").read_text().splitlines()]
    found = []
    for seed, run in seeds.items():
        if seed not in baseline:
            continue
        systems: list[Any] = [
            (path.name, (path / "test.txt").read_text().splitlines())
            for path in (baseline[seed], run)
        ]
        test: Any = PairedTest(
            systems, {"BLEU": BLEU()}, references, test_type="bs", n_samples=1000
        )
        found.append(f"{test()[1]['BLEU'][1].p_value:.3f}")
    return found


def curve(method: str, seeds: dict[int, Path]) -> Curve:
    """The means over the seeds, epoch by epoch; half precision may skip an update or two of one."""
    epochs = zip(*(valid_losses(run).items() for run in seeds.values()), strict=False)
    return Curve(method, [(rows[0][0], mean(loss for _, loss in rows)) for rows in epochs])


if __name__ == "__main__":
    main()
