"""Run a list of trainings on Multi30k, some at a time, resumable.

``python benchmarks/multi30k/grid.py DATA_BIN RUNS_DIR SETTINGS.txt --jobs 2``

On a GPU: ``--device cuda`` (``--fp16`` in place of the CPU's bfloat16 autocast).

Each line of SETTINGS is a run: its name, a colon, and the flags that differ from the common ones;
``RUNS/`` in them stands for RUNS_DIR, where a run starts from what another has left: give such a
file with ``--jobs 1``, or its first lines first.
A run that has finished is skipped, one that was killed, or whose flags now ask for more updates,
goes on from its last checkpoint. The best validation loss of every run is appended to
RUNS_DIR/results.tsv as it comes, and printed.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from logs import valid_losses

PLUGIN = Path(__file__).resolve().parent
DEVICES = {
    "cpu": ["--cpu", "--task", "translation_bf16"],
    "cuda": ["--fp16", "--task", "translation"],
}
"""The flags of a device, with the half precision that runs fast on it."""
COMMON = [
    "-s",
    "de",
    "-t",
    "en",
    "--encoder-layers",
    "3",
    "--decoder-layers",
    "3",
    "--encoder-embed-dim",
    "256",
    "--decoder-embed-dim",
    "256",
    "--encoder-ffn-embed-dim",
    "1024",
    "--decoder-ffn-embed-dim",
    "1024",
    "--encoder-attention-heads",
    "4",
    "--decoder-attention-heads",
    "4",
    "--optimizer",
    "adam",
    "--adam-betas",
    "(0.9,0.98)",
    "--weight-decay",
    "0.0001",
    "--criterion",
    "label_smoothed_cross_entropy",
    "--label-smoothing",
    "0.1",
    "--max-tokens",
    "2048",
    "--required-batch-size-multiple",
    "1",
    "--num-workers",
    "0",
    "--log-format",
    "json",
    "--log-interval",
    "20",
    "--keep-last-epochs",
    "8",
]
SCHEDULE = ["--lr-scheduler", "inverse_sqrt", "--warmup-init-lr", "1e-07"]
"""Of a run whose flags name no other."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data_bin", type=Path)
    parser.add_argument("runs", type=Path)
    parser.add_argument("settings", type=Path)
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, a thread each")
    parser.add_argument("--device", choices=sorted(DEVICES), default="cpu")
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    lines = [line.split(":", 1) for line in args.settings.read_text().splitlines() if ":" in line]
    with ThreadPoolExecutor(args.jobs) as pool:
        for name, flags in lines:
            flags = flags.replace("RUNS/", f"{args.runs}/")
            settings = [*DEVICES[args.device], *COMMON]
            pool.submit(run, args.data_bin, args.runs, name.strip(), settings, shlex.split(flags))


def run(data_bin: Path, runs: Path, name: str, settings: list[str], flags: list[str]) -> None:
    folder, done = runs / name, runs / name / "done"
    folder.mkdir(exist_ok=True)
    if done.exists() and done.read_text() == " ".join(flags):
        return
    train = [sys.executable, "-W", "ignore", "-m", "fairseq_cli.train", str(data_bin)]
    plugin = ["--user-dir", str(PLUGIN), "--save-dir", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    schedule = [] if SCHEDULE[0] in flags else SCHEDULE
    with (folder / "train.log").open("a") as log:
        status = subprocess.run(
            [*train, *plugin, *settings, *schedule, *flags], stdout=log, stderr=log, env=environment
        ).returncode
    if status:
        print(f"{name}: failed with status {status}, see {folder / 'train.log'}", flush=True)
        return
    record(runs, name, flags)
    done.write_text(" ".join(flags))


def record(runs: Path, name: str, flags: list[str]) -> None:
    losses = list(valid_losses(runs / name).values())
    row = f"{name}\t{min(losses):.3f}\t{losses}\t{' '.join(flags)}"
    with (runs / "results.tsv").open("a") as table:
        table.write(row + "\n")
    print(row, flush=True)


if __name__ == "__main__":
    main()
