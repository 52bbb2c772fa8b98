"""The losses of single words, of several checkpoints side by side.

``python benchmarks/multi30k/losses.py DATA_BIN valid RUNS/*/checkpoint_best.pt``
prints, for each, the mean over all words of the subset, the median over words, and the 95th and
99th percentiles, in bits; the last ones show what a mean hides.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from trained import batches, load

PERCENTILES = (0.5, 0.95, 0.99)
WORDS_A_BATCH = 4000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data_bin", type=Path)
    parser.add_argument("subset")
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    for checkpoint in args.checkpoints:
        losses = losses_of(checkpoint, args.data_bin, args.subset, args.device)
        shown = [losses.mean(), *torch.quantile(losses, torch.tensor(PERCENTILES))]
        numbers = "\t".join(f"{value:.3f}" for value in shown)
        print(f"{checkpoint.parent.name}\t{numbers}", flush=True)


@torch.no_grad()
def losses_of(checkpoint: Path, data_bin: Path, subset: str, device: str) -> Tensor:
    """Of every word of the subset, in bits."""
    model, task = load(checkpoint, data_bin, device)
    found = []
    for sample in batches(task, subset, WORDS_A_BATCH, device):
        logits = model(**sample["net_input"])[0].float()
        target = sample["target"]
        logs = logits.log_softmax(-1).gather(2, target[:, :, None])[:, :, 0]
        found.append(-logs[target.ne(task.target_dictionary.pad())] / torch.log(torch.tensor(2.0)))
    return torch.cat(found).cpu()


if __name__ == "__main__":
    main()
