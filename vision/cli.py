"""``python -m vision fit|validate|test|predict``: LightningCLI with this project's defaults.

A run leaves one folder (``--trainer.default_root_dir``, by default named after data, network,
method and seed in ``runs/vision``): ``config.yaml``, ``metrics/``, ``tensorboard/``,
``checkpoints/best.ckpt`` and ``last.ckpt``, ``augmented.png``.
"""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from fixup_core.errors import UserError
from vision.callbacks import AugmentedImages, PredictionTable
from vision.data import VisionData
from vision.errors import Parser
from vision.lit_classifier import LitClassifier

RUNS = Path("runs/vision")
HELP = (
    "Fixup ResNets and their rivals. Besides the commands below: sweep (the paper's figures), "
    "compare (finished runs side by side), demo; each has a --help of its own."
)

# A run that goes on writes into the folder it has.
warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
    lambda record: "💡" not in record.getMessage()  # advertisements
)


class VisionCLI(LightningCLI):
    """Adds the run's folder and what is kept in it to every subcommand."""

    def __init__(self, args: list[str] | None = None) -> None:
        super().__init__(
            LitClassifier,
            VisionData,
            subclass_mode_data=True,
            parser_class=Parser,
            parser_kwargs={"prog": "python -m vision", "description": HELP},
            auto_configure_optimizers=False,
            seed_everything_default=1,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"use_distributed_sampler": False, "deterministic": True},
            args=args,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Two options of our own."""
        parser.add_argument(
            "--checkpoint_every",
            type=int,
            default=0,
            help="also save last.ckpt after every so many steps (0: after every epoch alone)",
        )
        parser.add_argument(
            "--threads",
            type=int,
            default=0,
            help="CPU threads of each process (0: as PyTorch finds best); small networks want one",
        )

    def before_instantiate_classes(self) -> None:
        """Name the run's folder; without it, loggers and checkpoints would number their own.

        ``best`` and ``last`` are the checkpoints of that folder, for every subcommand.
        """
        options = self._options()
        if options.threads > 0:
            torch.set_num_threads(options.threads)
        trainer = options.trainer
        if trainer.default_root_dir is None:
            trainer.default_root_dir = str(RUNS / self._name())
        if options.get("ckpt_path") in ("best", "last"):
            file = Path(trainer.default_root_dir, "checkpoints", f"{options.ckpt_path}.ckpt")
            if not file.exists():
                raise UserError(f"{file} does not exist: check --trainer.default_root_dir")
            options.ckpt_path = str(file)

    def instantiate_trainer(self, **options: Any) -> Any:
        """The trainer, with the loggers and callbacks that every run has."""
        chosen = self._options()
        root = Path(chosen.trainer.default_root_dir)
        if chosen.trainer.logger in (None, True):
            options["logger"] = [
                TensorBoardLogger(root, name="", version="tensorboard"),
                CSVLogger(root, name="metrics"),
            ]
        every = chosen.get("checkpoint_every", 0)
        self.trainer_defaults["callbacks"] = _callbacks(root / "checkpoints", every)
        return super().instantiate_trainer(**options)

    def _options(self) -> Any:
        return self.config[self.subcommand] if self.subcommand else self.config

    def _name(self) -> str:
        options = self._options()
        data = options.data.class_path.rsplit(".", 1)[-1].lower()
        model = options.model
        return f"{data}-{model.net}-{model.method}-seed{options.seed_everything}"


def _callbacks(folder: Path, every: int) -> list[Any]:
    def last(**when: Any) -> ModelCheckpoint:
        return ModelCheckpoint(folder, "last", enable_version_counter=False, **when)

    best = ModelCheckpoint(
        folder, "best", monitor="val/accuracy", mode="max", enable_version_counter=False
    )
    during = [last(every_n_train_steps=every)] if every else []
    pictures = [LearningRateMonitor("epoch"), AugmentedImages(), PredictionTable()]
    return [*pictures, best, last(every_n_epochs=1), *during]
