"""The losses of single words, of several checkpoints side by side.

``python benchmarks/multi30k/losses.py DATA_BIN valid RUNS/*/checkpoint_best.pt``
prints, for each, the mean over all words of the subset, the median over words, and the 95th and
99th percentiles, in bits; the last ones show what a mean hides.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from fairseq import checkpoint_utils, utils
from torch import Tensor

import fixup_mt

PERCENTILES = (0.5, 0.95, 0.99)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data_bin", type=Path)
    parser.add_argument("subset")
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    fixup_mt.register()
    for checkpoint in args.checkpoints:
        losses = losses_of(checkpoint, args.data_bin, args.subset, args.device)
        shown = [losses.mean(), *torch.quantile(losses, torch.tensor(PERCENTILES))]
        numbers = "\t".join(f"{value:.3f}" for value in shown)
        print(f"{checkpoint.parent.name}\t{numbers}", flush=True)


@torch.no_grad()
def losses_of(checkpoint: Path, data_bin: Path, subset: str, device: str) -> Tensor:
    """Of every word of the subset, in bits."""
    utils.import_user_module(argparse.Namespace(user_dir=str(Path(__file__).parent)))
    models, _, task = checkpoint_utils.load_model_ensemble_and_task(
        [str(checkpoint)], arg_overrides={"data": str(data_bin)}
    )
    model: Any = models[0].eval().to(device)
    task.load_dataset(subset)
    found = []
    batches = task.get_batch_iterator(task.dataset(subset), max_tokens=4000)
    for sample in batches.next_epoch_itr(shuffle=False):
        sample = utils.move_to_cuda(sample) if device == "cuda" else sample
        logits = model(**sample["net_input"])[0].float()
        target = sample["target"]
        logs = logits.log_softmax(-1).gather(2, target[:, :, None])[:, :, 0]
        found.append(-logs[target.ne(task.target_dictionary.pad())] / torch.log(torch.tensor(2.0)))
    return torch.cat(found).cpu()


if __name__ == "__main__":
    main()
