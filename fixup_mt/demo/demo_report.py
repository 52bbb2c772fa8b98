"""What the demo found: curves and numbers read from fairseq's logs, a table, a picture, a file."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from sacrebleu.metrics import BLEU

from fixup_core.measure import figures
from fixup_mt.errors import UserError
from fixup_mt.host.jobs import STARTED
from fixup_mt.scoring.score import (
    corpus_score,
    installed_versions,
    read_generate_output,
    read_lines,
    write_json,
)

TRANSLATIONS = "translations.txt"
PICTURE = "loss_curves.png"
SHOWN = 10
# Losses are in bits, as fairseq logs them.
Curve = list[tuple[int, float]]


@dataclass(frozen=True)
class Result:
    """One model's numbers; losses in bits per piece, with label smoothing."""

    name: str
    parameters: int
    updates: int
    best_valid_loss: float
    bleu: float
    signature: str
    seconds: float
    sentences: int
    training_curve: Curve
    validation_curve: Curve
    hypotheses: list[str]


def read_result(name: str, folder: Path, reference: Path) -> Result:
    """Everything from the training log and the translations in `folder`.

    Raises:
        UserError: a sentence of the test set has no translation, or the log is not fairseq's.
    """
    log = folder / "train.log"
    text = log.read_text(encoding="utf-8")
    records = [json.loads(match) for match in re.findall(r"\{\"epoch.*\}$", text, re.MULTILINE)]
    training, validation = curve(records, ""), curve(records, "valid_")
    parameters = re.search(r"num\. shared model params: ([\d,]+)", text)
    if not training or not validation or parameters is None:
        raise UserError(f"{log} holds no training; remove {folder} and start again")
    references = read_lines(reference)
    hypotheses = read_generate_output(
        folder / TRANSLATIONS, num_sentences=len(references)
    ).hypotheses
    score = corpus_score(BLEU(), hypotheses, references)
    return Result(
        name=name,
        parameters=int(parameters[1].replace(",", "")),
        updates=training[-1][0],
        best_valid_loss=min(loss for _, loss in validation),
        bleu=score.value,
        signature=score.signature,
        seconds=sum(map(duration, text.split(STARTED))),
        sentences=len(hypotheses),
        training_curve=training,
        validation_curve=validation,
        hypotheses=hypotheses,
    )


def curve(records: Sequence[dict[str, Any]], prefix: str) -> Curve:
    """Loss by update; of an update that was made again after an interruption, the last."""
    points = {}
    for record in records:
        if f"{prefix}loss" in record:
            points[int(record[f"{prefix}num_updates"])] = float(record[f"{prefix}loss"])
    return sorted(points.items())


def duration(log: str) -> float:
    """Seconds from the first to the last line of one uninterrupted run."""
    stamps = re.findall(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d) \|", log, re.MULTILINE)
    first, last = (datetime.fromisoformat(stamps[i]) if stamps else None for i in (0, -1))
    return (last - first).total_seconds() if first and last else 0.0


def write_report(output: Path, results: Sequence[Result], settings: dict[str, object]) -> None:
    """Print the table and some translations; save the picture and ``result.json``."""
    write_picture(output / PICTURE, results)
    models = []
    for result in results:
        numbers = asdict(result)
        del numbers["hypotheses"]
        models.append(numbers)
    content = {"models": models, "settings": settings, "versions": installed_versions()}
    write_json(content, output / "result.json")
    print("\n".join(["", *translations(output / "corpus", results), "", *table(results), ""]))
    print(f"{results[0].sentences} test sentences, {results[0].signature}")
    print(f"curves: {output / PICTURE}   numbers: {output / 'result.json'}")


def table(results: Sequence[Result]) -> list[str]:
    rows = {
        "parameters": [f"{result.parameters:,}" for result in results],
        "updates": [f"{result.updates:,}" for result in results],
        "best valid loss": [f"{result.best_valid_loss:.3f}" for result in results],
        "BLEU": [f"{result.bleu:.2f}" for result in results],
        "seconds": [f"{result.seconds:.0f}" for result in results],
    }
    head = f"{'':16}" + "".join(f"{result.name:>12}" for result in results)
    lines = [f"{name:16}" + "".join(f"{cell:>12}" for cell in row) for name, row in rows.items()]
    return [head, *lines]


def translations(folder: Path, results: Sequence[Result]) -> list[str]:
    """The first test sentences: source, translations, reference."""
    sources, references = read_lines(folder / "test.de"), read_lines(folder / "test.en")
    lines = []
    for index in range(min(SHOWN, len(sources))):
        lines.append(f"{'German':10} {sources[index]}")
        lines += [f"{result.name:10} {result.hypotheses[index]}" for result in results]
        lines += [f"{'reference':10} {references[index]}", ""]
    return lines[:-1]


def write_picture(path: Path, results: Sequence[Result]) -> None:
    # fairseq's imports turn on everybody's debugging output.
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    curves = []
    for result in results:
        training, validation = result.training_curve, result.validation_curve
        curves.append(figures.Curve(f"{result.name}, training", training))
        curves.append(figures.Curve(f"{result.name}, validation", validation, dashed=True))
    title = "Built-in German-English corpus: without norms and with LayerNorm"
    loss = "label-smoothed loss (bits per piece)"
    figures.draw([figures.Panel(curves, "updates", loss, title)], path)
