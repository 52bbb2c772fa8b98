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
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from fixup_core.errors import UserError
from fixup_core.files import hold_folder
from vision import RUNS
from vision.data import VisionData
from vision.parser import Parser
from vision.training.callbacks import AugmentedImages, PredictionTable, SameOptions
from vision.training.checkpoints import checkpoint_callbacks, save_whole_files
from vision.training.lit_classifier import LitClassifier

NEEDLESS = (
    # A run that goes on writes into the folder it has.
    "Checkpoint directory .* exists and is not empty",
    # Nothing a user could mend.
    ".*is not supported by the model summary",
    ".*LeafSpec.* is deprecated",
    "LightningCLI's args parameter is intended",
)
"""Warnings that no command shows."""


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
            VisionData,
            subclass_mode_data=True,
            parser_class=Parser,
            parser_kwargs={"prog": "python -m vision"},
            auto_configure_optimizers=False,
            seed_everything_default=1,
            save_config_callback=SavedConfig,
            trainer_defaults={"use_distributed_sampler": False, "deterministic": True},
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
        self._find_checkpoint()

    def _find_checkpoint(self) -> None:
        """``best`` and ``last`` are those of the run's folder, for every subcommand; all but fit
        take ``best`` where none is named.

        Raises:
            UserError: No such checkpoint, or a new run in the folder of another.
        """
        options = self._options()
        trainer = options.trainer
        checkpoints = Path(trainer.default_root_dir, "checkpoints")
        chosen = options.ckpt_path or ("" if self.subcommand == "fit" else "best")
        if "://" in str(chosen):
            raise UserError(
                f"--ckpt_path {chosen} is an address: fetch the file first, and give its path. "
                "Lightning would load it without the check that it runs no code"
            )
        if chosen in ("best", "last"):
            options.ckpt_path = str(checkpoints / f"{chosen}.ckpt")
            if not Path(options.ckpt_path).exists():
                raise UserError(
                    f"{options.ckpt_path} does not exist: check --trainer.default_root_dir, or "
                    "name a file in --ckpt_path"
                )
        if not chosen and (checkpoints / "last.ckpt").exists():
            raise UserError(
                f"{trainer.default_root_dir} holds a run: go on with it by --ckpt_path last, or "
                "give another --trainer.default_root_dir"
            )

    def _parse_ckpt_path(self) -> None:
        """Lightning would let the checkpoint's options silently overrule those that are given."""

    def instantiate_trainer(self, **options: Any) -> Any:
        """The trainer, with the loggers and callbacks that every run has."""
        chosen = self._options()
        root = Path(chosen.trainer.default_root_dir)
        if chosen.trainer.logger in (None, True):
            options["logger"] = self._loggers(root, chosen.ckpt_path)
        every = chosen.get("checkpoint_every", 0)
        self.trainer_defaults["callbacks"] = _callbacks(root / "checkpoints", every)
        trainer = super().instantiate_trainer(**options)
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
        if trainer.is_global_zero:
            file = Path(trainer.default_root_dir) / "config.yaml"
            file.parent.mkdir(parents=True, exist_ok=True)
            self.parser.save(self.config, file, overwrite=True, multifile=False)


def _callbacks(folder: Path, every: int) -> list[Any]:
    pictures = [LearningRateMonitor("epoch"), AugmentedImages(), PredictionTable(), SameOptions()]
    return [*pictures, *checkpoint_callbacks(folder, every)]
