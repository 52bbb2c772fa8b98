"""What a training says when it begins and ends."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from fixup_core.rules.scalars import scalars


class Report(Callback):
    """One line at the beginning: the network. Three at the end: where the run lies, what was best,
    and what to do next.
    """

    def __init__(self) -> None:
        self.trained = False

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        bar: Any = trainer.progress_bar_callback
        if bar is not None:
            _without_version(bar)
        args: Any = pl_module.hparams
        sizes = [p.numel() for p in pl_module.parameters()]
        learned = [p.numel() for p in pl_module.parameters() if p.requires_grad]
        frozen = f", {sum(learned):,} of them trained" if sum(learned) < sum(sizes) else ""
        count = sum(1 for _ in scalars(pl_module))
        self._say(
            trainer,
            f"{args.net}, {args.method}: {sum(sizes):,} parameters{frozen}, {count} scalars",
        )

    def on_train_batch_end(self, *_: Any) -> None:
        self.trained = True

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        if trainer.progress_bar_callback is not None and self.trained:
            print(file=sys.stderr)  # the bar's line is not ended

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        root = Path(trainer.default_root_dir)
        if not self.trained:
            self._say(
                trainer,
                f"nothing was trained: the run had come to its end ({trainer.current_epoch} "
                "epochs). Raise --trainer.max_epochs to go on",
            )
        callbacks: list[Any] = trainer.checkpoint_callbacks
        best = [c for c in callbacks if c.monitor and c.best_model_score is not None]
        if (root / "config.yaml").exists() and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            score = f", best {best[0].monitor} {best[0].best_model_score:.4f}" if best else ""
            self._say(trainer, f"run: {root}{score}")
        if best:
            self._say(trainer, f"next: python -m vision test --config {root / 'config.yaml'}")

    def _say(self, trainer: L.Trainer, line: str) -> None:
        if trainer.is_global_zero:
            print(line, flush=True)


def _without_version(bar: Any) -> None:
    """Lightning shows the end of the loggers' names as a number: ``v_num=rd_0``."""
    usual = bar.get_metrics

    def get_metrics(*given: Any) -> dict[str, Any]:
        return {name: value for name, value in usual(*given).items() if name != "v_num"}

    bar.get_metrics = get_metrics
