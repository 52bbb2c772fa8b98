"""Translate Multi30k with trained models and score them, the test set once.

``python benchmarks/multi30k/score.py DATA_BIN RAW RUNS/NAME... --average 5 --device cuda``

RAW holds ``val.en`` and ``test_2016_flickr.en``. What translates is the mean of the N neighbouring
checkpoints of a run that are best on the validation set, or its last one. The length penalty is
the one that is best on the validation set, of those given. Each run's folder gets ``valid.txt``,
``test.txt`` and ``score.json``; one that has them, by these settings and since its last update,
is skipped.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import sacrebleu
import torch
from logs import valid_losses
from trained import batches, load

from fixup_mt.scoring.average import average_checkpoints, best_window, save_atomically

REFERENCES = {"valid": "val.en", "test": "test_2016_flickr.en"}
WORDS_A_BATCH = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data_bin", type=Path)
    parser.add_argument("raw", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--average", type=int, default=0, help="checkpoints; 0: the last one alone")
    parser.add_argument("--lenpens", type=float, nargs="+", default=[1.0, 1.5, 2.0])
    parser.add_argument("--beam", type=int, default=5)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    for run in args.runs:
        if not scored(run, settings_of(args)):
            score(run, args)
        print(run.name, (run / "score.json").read_text(), flush=True)


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in ("average", "lenpens", "beam")}


def scored(run: Path, settings: dict[str, Any]) -> bool:
    """Whether it was, by these settings, and has not been trained since."""
    file, log = run / "score.json", run / "train.log"
    if not file.exists() or file.stat().st_mtime < log.stat().st_mtime:
        return False
    return json.loads(file.read_text()).get("settings") == settings


def score(run: Path, args: argparse.Namespace) -> None:
    path = checkpoint_of(run, args.average)
    model, task = load(path, args.data_bin, args.device)
    if args.device == "cuda":
        model.half()
    found = {}
    for lenpen in args.lenpens:
        lines = translate(model, task, "valid", lenpen, args)
        found[lenpen] = (bleu(lines, args.raw, "valid"), lines)
    lenpen = max(found, key=lambda lenpen: found[lenpen][0])
    valid, lines = found[lenpen]
    (run / "valid.txt").write_text("".join(f"{line}\n" for line in lines))
    lines = translate(model, task, "test", lenpen, args)
    (run / "test.txt").write_text("".join(f"{line}\n" for line in lines))
    numbers = {
        "valid_loss": min(valid_losses(run).values()),
        "settings": settings_of(args),
        "lenpen": lenpen,
        "valid_bleu": valid,
        "test_bleu": bleu(lines, args.raw, "test"),
    }
    (run / "score.json").write_text(json.dumps(numbers))


def checkpoint_of(run: Path, average: int) -> Path:
    if not average:
        return run / "checkpoint_last.pt"
    path = run / "averaged.pt"
    save_atomically(average_checkpoints(best_window(run, average)), path)
    return path


@torch.no_grad()
def translate(
    model: Any, task: Any, subset: str, lenpen: float, args: argparse.Namespace
) -> list[str]:
    """The sentences of a subset, in its order."""
    settings = argparse.Namespace(beam=args.beam, lenpen=lenpen)
    generator = task.build_generator([model], settings)
    found = {}
    for sample in batches(task, subset, WORDS_A_BATCH, args.device):
        hypotheses = task.inference_step(generator, [model], sample)
        for number, best in zip(sample["id"].tolist(), hypotheses, strict=True):
            tokens = best[0]["tokens"].int().cpu()
            found[number] = task.target_dictionary.string(tokens, "sentencepiece")
    return [found[number] for number in range(len(found))]


def bleu(lines: list[str], raw: Path, subset: str) -> float:
    references = (raw / REFERENCES[subset]).read_text().splitlines()
    return sacrebleu.corpus_bleu(lines, [references]).score


if __name__ == "__main__":
    main()
