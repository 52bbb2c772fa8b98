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

import lightning as L
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    EMAWeightAveraging,
    LearningRateFinder,
    LearningRateMonitor,
)
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from fixup_core.errors import UserError
from fixup_core.files import hold_folder
from vision import RUNS
from vision.choices import choose_checkpoint, take_options
from vision.data import VisionData
from vision.parser import Parser
from vision.training.averaging import MovingAverage
from vision.training.callbacks import AugmentedImages
from vision.training.checkpoints import checkpoint_callbacks, save_whole_files
from vision.training.image_size import ImageSize
from vision.training.lit_classifier import LitClassifier
from vision.training.predictions import PredictionTable
from vision.training.reporting import Report
from vision.training.resuming import SameOptions

NEEDLESS = (
    # A run that goes on writes into the folder it has.
    "Checkpoint directory .* exists and is not empty",
    # Scores of a run's checkpoint in another folder.
    "The dirpath has changed from",
    # Of a checkpoint that holds the average in the place of the weights.
    "You're using the WeightAveraging callback, but loading",
    # What --model.freeze asks for.
    r"Found .* module\(s\) in eval mode",
    # Nothing a user could mend.
    ".*is not supported by the model summary",
    ".*LeafSpec.* is deprecated",
    ".*is_fx_tracing",
    # Nothing is logged by step, but for callbacks with an interval of their own.
    "The number of training batches .* is smaller than the logging interval",
    # torchmetrics has summed over the processes already.
    "It is recommended to use .*sync_dist=True",
    "LightningCLI's args parameter is intended",
)
"""Warnings that no command shows."""

MORE_HELP = (
    "Options of a data set: --data.help CIFAR10 (or Digits, ImageFolderData, ...); of a callback: "
    "--trainer.callbacks.help EarlyStopping; of a network, --model.options: docs/classify.md."
)
"""At the end of a command's help, where it is seen."""


def run_lightning(line: list[str]) -> None:
    """Run ``fit``, ``validate``, ``test`` or ``predict`` with its options."""
    silence_needless()
    VisionCLI(line)


def silence_needless() -> None:
    """For the commands' process: what libraries say that helps nobody."""
    for text in NEEDLESS:
        warnings.filterwarnings("ignore", text)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    return "💡" not in record.getMessage()


class VisionCLI(LightningCLI):
    """Adds the run's folder and what is kept in it to every subcommand."""

    def __init__(self, args: list[str] | None = None) -> None:
        super().__init__(
            LitClassifier,
            L.LightningDataModule,
            subclass_mode_data=True,
            parser_class=Parser,
            parser_kwargs={"prog": "python -m vision"}
            | {command: {"epilog": MORE_HELP} for command in self.subcommands()},
            auto_configure_optimizers=False,
            seed_everything_default=1,
            save_config_callback=SavedConfig,
            trainer_defaults={
                "use_distributed_sampler": False,
                "deterministic": True,
                "enable_model_summary": False,  # of one module, and without any FLOPs
            },
            args=args,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Two options of our own."""
        parser.add_argument(
            "--checkpoint_every",
            type=int,
            default=0,
            help="also save last.ckpt after every N steps (0: after every epoch alone)",
        )
        parser.add_argument(
            "--threads",
            type=int,
            default=0,
            help="CPU threads of each process (0: as PyTorch finds best); small networks want one",
        )

    def before_instantiate_classes(self) -> None:
        """Name the run's folder; without it, loggers and checkpoints would number their own."""
        options = self._options()
        if options.threads > 0:
            torch.set_num_threads(options.threads)
        trainer = options.trainer
        if trainer.default_root_dir is None:
            trainer.default_root_dir = str(RUNS / self._name())
        self._check_numbers(trainer)
        choose_checkpoint(options, str(self.subcommand))
        self.classes = take_options(options) if self._scores() else ()

    def _check_numbers(self, trainer: Any) -> None:
        if trainer.accumulate_grad_batches < 1:
            raise UserError("--trainer.accumulate_grad_batches is below 1: take 1 or more")

    def _scores(self) -> bool:
        return self.subcommand != "fit"

    def _parse_ckpt_path(self) -> None:
        """``take_options`` does it, for all but fit."""

    def _set_seed(self) -> None:
        seed = self._options().seed_everything
        if type(seed) is int and not 0 <= seed < 2**32:
            raise UserError(f"--seed_everything is {seed}: take a number from 0 to {2**32 - 1}")
        super()._set_seed()

    def instantiate_trainer(self, **options: Any) -> Any:
        """The trainer, with the loggers and callbacks that every run has."""
        chosen = self._options()
        root = Path(chosen.trainer.default_root_dir)
        if chosen.trainer.logger in (None, True):
            options["logger"] = self._loggers(root, chosen.ckpt_path)
        if isinstance(self.datamodule, VisionData):
            self.datamodule.classes = self.classes
        else:  # which shares its batches as Lightning does
            options["use_distributed_sampler"] = True
        self.trainer_defaults["callbacks"] = _callbacks(root / "checkpoints", chosen)
        trainer = super().instantiate_trainer(**options)
        mend_callbacks(trainer)
        save_whole_files(trainer)
        return trainer

    def _loggers(self, root: Path, checkpoint: str | None) -> list[Logger]:
        """Of a training, or of the scores of the run's own checkpoints; of no others."""
        if self.subcommand == "fit":
            board = TensorBoardLogger(root, name="", version="tensorboard")
            return [board, CSVLogger(root, name="metrics")]
        own = Path(checkpoint or "").resolve().is_relative_to(root.resolve())
        return [CSVLogger(root, name=self.subcommand)] if own else []

    def _options(self) -> Any:
        return self.config[self.subcommand] if self.subcommand else self.config

    def _name(self) -> str:
        options = self._options()
        data = options.data.class_path.rsplit(".", 1)[-1].lower()
        model = options.model
        return f"{data}-{model.net}-{model.method}-seed{options.seed_everything}"


class SavedConfig(SaveConfigCallback):
    """Writes a training's resolved options to ``config.yaml`` in the run's folder."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Keep other runs out of the folder. Nothing is written yet: the options have not been
        compared with the checkpoint's.
        """
        if stage == "fit" and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            hold_folder(Path(trainer.default_root_dir))

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Without the checkpoint, which a run goes on from once."""
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            file = Path(trainer.default_root_dir) / "config.yaml"
            file.parent.mkdir(parents=True, exist_ok=True)
            config = self.config.clone()
            config.ckpt_path = None
            self.parser.save(config, file, overwrite=True, multifile=False)


def _callbacks(folder: Path, options: Any) -> list[Any]:
    """Those of every run, but for what the user has switched off."""
    found: list[Any] = [AugmentedImages(), PredictionTable(), Report(), ImageSize()]
    found.append(SameOptions(options.seed_everything))
    if options.trainer.logger is not False:
        found.append(LearningRateMonitor("epoch"))
    if options.trainer.enable_checkpointing is not False:
        validates = options.trainer.limit_val_batches != 0
        every = options.get("checkpoint_every", 0)
        found += checkpoint_callbacks(folder, every, validates=validates)
    return found


def mend_callbacks(trainer: L.Trainer) -> None:
    """Put right what the user's callbacks of Lightning do wrong here.

    Raises:
        UserError: One that changes the rate or the batches behind the run's back.
    """
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    for place, callback in enumerate(callbacks):
        if isinstance(callback, LearningRateFinder | BatchSizeFinder):
            raise UserError(
                f"{type(callback).__name__} cannot be used here: its result lasts for one step, "
                "and the run could not go on. Draw the loss against the rate by python -m vision "
                "sweep lr"
            )
        if type(callback) is EMAWeightAveraging:
            callbacks[place] = MovingAverage.of(callback)
