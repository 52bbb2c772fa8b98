"""A run goes on under the conditions it was started with."""

from __future__ import annotations

import sys
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from fixup_core.errors import UserError
from vision.training.callbacks import AdaptiveClipping
from vision.training.schedule import rate_at

TRAINER_OPTIONS = (
    "accumulate_grad_batches",
    "gradient_clip_algorithm",
    "gradient_clip_val",
    "limit_train_batches",
    "overfit_batches",
    "precision",
)
"""Of the trainer, that decide the weights; how long it trains may change."""


class SameOptions(Callback):
    """Keeps the run's conditions in its checkpoints, and holds those of a run that goes on against
    them: Lightning would take the new batches and restore the old rates. A run may become longer;
    what that does to the learning rate is printed.

    Args:
        seed: Of the weights, as --seed_everything has it.
    """

    def __init__(self, seed: int | bool | None = None) -> None:
        self.seed = seed
        self.length: int | None = None

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["conditions"] = self._conditions(trainer)
        checkpoint["schedule_length"] = pl_module.schedule_length

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Hold the given options against the checkpoint's; older checkpoints have fewer.

        Raises:
            UserError: One differs.
        """
        if trainer.state.fn != "fit":
            return
        model = {f"--model.{name}": value for name, value in pl_module.hparams.items()}
        before = {
            f"--model.{name}": value for name, value in checkpoint["hyper_parameters"].items()
        }
        _compare(before, model)
        _compare(checkpoint.get("conditions", {}), self._conditions(trainer))
        self.length = checkpoint.get("schedule_length")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        model: Any = pl_module
        before, now = self.length, model.schedule_length
        if before in (None, now) or not trainer.is_global_zero:
            return
        rate = [
            rate_at(model.args, trainer.global_step, model.steps_per_epoch, length) * model.args.lr
            for length in (before, now)
        ]
        print(
            f"warning: the {model.args.schedule} of the learning rate was laid out over {before} "
            f"steps, now over {now}: the rate goes on at {rate[1]:.3g} in place of {rate[0]:.3g}. "
            "To keep to it, give the run's own --trainer.max_epochs and max_steps; to train its "
            "weights further, start another run by --model.weights",
            file=sys.stderr,
        )

    def _conditions(self, trainer: L.Trainer) -> dict[str, Any]:
        """Option and value, plain enough for a checkpoint."""
        describe = getattr(trainer.datamodule, "description", dict)  # type: ignore[attr-defined]
        data = {"--data" if k == "data" else f"--data.{k}": v for k, v in describe().items()}
        options = {f"--trainer.{name}": getattr(trainer, name) for name in TRAINER_OPTIONS}
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        clipping = [each.share for each in callbacks if isinstance(each, AdaptiveClipping)]
        options["AdaptiveClipping of share"] = clipping[0] if clipping else "none"
        return {"--seed_everything": self.seed} | data | options


def _compare(before: dict[str, Any], now: dict[str, Any]) -> None:
    for name, value in before.items():
        if name in now and _plain(value) != _plain(now[name]):
            raise UserError(
                f"the run was started with {name} {value}, not {now[name]}: go on with the same, "
                "or start another in another --trainer.default_root_dir"
            )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
