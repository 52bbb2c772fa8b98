"""The LightningModule: a network, its loss, its optimiser and its metrics."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MetricCollection

from fixup_core import METHODS, SCALAR_LR_RATIO, param_groups
from fixup_core.errors import UserError
from fixup_core.removal.anchor import ANCHOR
from vision.data import VisionData
from vision.data.batches import Batch, as_batch, mix
from vision.nets import AS_IT_IS, build_net, is_class_path, write_weights_
from vision.training import metrics
from vision.training.checkpoints import read_checkpoint
from vision.training.fine_tuning import freeze_, load_weights_
from vision.training.mixing import blend
from vision.training.optimizers import make_optimizer
from vision.training.removing import check_length, measures_of, removal_of
from vision.training.schedule import length_of, rate_at, run_length, steps_per_epoch

RANGES = (
    ("num_classes", 2, math.inf),
    ("lr", 0, math.inf),
    ("momentum", 0, 1),
    ("weight_decay", 0, math.inf),
    ("warmup_epochs", 0, math.inf),
    ("label_smoothing", 0, 1),
)
"""Of the options that are numbers: name, lowest and highest value."""


class DivergedError(UserError):
    """The loss is no longer finite; the run has been stopped before the weights were touched."""


class LitClassifier(L.LightningModule):
    """Image classification by SGD with momentum, as the paper trains its ResNets.

    Attributes:
        classes: The names of the classes, once data or a checkpoint have said them.

    Args:
        net: Name of the network, as ``vision.nets.build_net`` takes it, or the class path of one
            of your own, called with num_classes and the options.
        method: batchnorm, groupnorm, zeroinit, none, xavier, lsuv, dyt, derf, skipinit, rezero, nf,
            fixup_adam, fixup or an ablation of it; ``as_it_is`` leaves the weights of a network of
            your own.
        num_classes: Must be the data's.
        options: More options of the network: shortcut, order, activation, in_channels, ...
        weights: File to start from: a checkpoint of ours, or torchvision's or the authors' state
            dict. A classifier of another number of classes starts anew.
        freeze: Modules of the network that are not trained, as ``[stem, stages.0]``.
        optimizer: SGD, another one of torch.optim, or a class path.
        optimizer_options: More arguments of the optimiser.
        lr: Learning rate at its peak.
        momentum: Of SGD.
        nesterov: Nesterov's momentum.
        weight_decay: Of the weights.
        scalar_lr_ratio: Learning rate of the scalars divided by that of the weights. Differs: in
            the authors' code the classifier's bias learns at the scalars' rate, too.
        scalar_weight_decay: Of the scalars; none: as of the weights.
        schedule: ``step``: a tenth at every milestone. ``cosine``: to 0. ``constant``.
        milestones: Epochs at which the rate falls to a tenth.
        warmup_epochs: Over which the rate rises from 0.
        label_smoothing: In 0..1.
        mixup: Alpha of mixup; 0: none. The paper: 0.2 BatchNorm, 0.1 GroupNorm, 0.7 Fixup.
        cutmix: Alpha of cutmix; 0: none.
        channels_last: Memory layout of the images; faster where convolutions run in bfloat16.
        base_branches: Of ``fixup_adam``: the residual branches of the network at which the learning
            rate was tuned; by default the method's own.
        remove_norms: Take the norms out of the network of ``weights`` as it trains on: ``taper``,
            ``one_by_one``, ``at_once`` (of BatchNorm: its statistics are frozen); ``none``.
        removal_steps: Until the last norm is gone; the run must be as long.
        removal_anchor: Weight of what holds the size of the logits meanwhile.
        removal_distil: Weight of the divergence from the network as it was, in the loss.
    """

    def __init__(
        self,
        net: str = "cifar_resnet20",
        method: str = "fixup",
        num_classes: int = 10,
        options: dict[str, Any] | None = None,
        weights: str | None = None,
        freeze: Sequence[str] = (),
        optimizer: str = "SGD",
        optimizer_options: dict[str, Any] | None = None,
        lr: float = 0.1,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 1e-4,
        scalar_lr_ratio: float = SCALAR_LR_RATIO,
        scalar_weight_decay: float | None = None,
        schedule: Literal["step", "cosine", "constant"] = "step",
        milestones: Sequence[float] = (100, 150),
        warmup_epochs: float = 0.0,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        channels_last: bool = True,
        base_branches: float | None = None,
        remove_norms: Literal["none", "taper", "one_by_one", "at_once"] = "none",
        removal_steps: int = 2000,
        removal_anchor: float = ANCHOR,
        removal_distil: float = 0.0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        _check_ranges(self.args)
        self.net = self._network()
        self.removal = removal_of(self.net, self.args)
        self.frozen = freeze_(self.net, freeze) if freeze else []
        self.classes: tuple[str, ...] = ()
        self.train_metrics = metrics.training_metrics(num_classes)
        self.val_metrics = metrics.evaluation_metrics(num_classes, "val/")
        self.test_metrics = metrics.evaluation_metrics(num_classes, "test/")

    @property
    def args(self) -> Any:
        """The arguments, as a checkpoint keeps them."""
        return self.hparams

    @property
    def data(self) -> VisionData:
        """What the trainer feeds the network with; a data module of the user's own has less."""
        return cast(Any, self.trainer).datamodule

    def _network(self) -> Any:
        """As the arguments ask for it, weights drawn."""
        args = self.args
        net = build_net(
            args.net,
            method=args.method,
            num_classes=args.num_classes,
            base_branches=args.base_branches,
            **(args.options or {}),
        )
        return net.to(memory_format=torch.channels_last) if args.channels_last else net

    def setup(self, stage: str) -> None:
        """Hold the data's classes against the network's; look at data where the initialisation
        does; start from other weights where they are given.

        Raises:
            UserError: They differ.
        """
        found = getattr(self.data, "num_classes", 0)
        if found == 1:
            raise UserError(
                "the training images have one class alone: there is nothing to tell apart"
            )
        if found and found != self.args.num_classes:
            raise UserError(
                f"the data have {found} classes, --model.num_classes is "
                f"{self.args.num_classes}: make them equal"
            )
        self._name_classes(getattr(self.data, "classes", ()))
        if stage == "fit" and not self.trainer.ckpt_path:
            method = METHODS.get(self.args.method)
            if method and method.unit_variance:
                self._initialise_on_data()
            if self.args.weights:
                self._start_from(Path(self.args.weights))

    def _start_from(self, file: Path) -> None:
        """Take the weights of a file; where norms go, they go from what it holds."""
        if self.removal is None:
            load_weights_(self.net, file)
            return
        net = self._network()
        load_weights_(net, file)
        self.net, self.removal = net, removal_of(net, self.args)
        self.frozen = freeze_(net, self.args.freeze) if self.args.freeze else []

    def _name_classes(self, names: Sequence[str]) -> None:
        """Keep the names of the classes.

        Raises:
            UserError: They had others.
        """
        if names and self.classes and tuple(names) != self.classes:
            raise UserError(
                f"the network was trained on the classes {', '.join(self.classes[:5])}, ...: the "
                f"data have {', '.join(names[:5])}, ..."
            )
        self.classes = tuple(names) or self.classes

    def train(self, mode: bool = True) -> LitClassifier:
        """Frozen parts stay in evaluation mode: batch statistics would go on changing them."""
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    def _initialise_on_data(self) -> None:
        """The same on every process: they all look at the whole first batch."""
        batch = next(iter(self.data.loader("train", alone=True)))
        images = self.data.on_after_batch_transfer(batch, 0).images
        write_weights_(self.net, METHODS[self.args.method], images)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [B, classes] of images [B, C, H, W]."""
        if self.args.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return self.net(images.to(self.dtype))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        batch = as_batch(batch, mix(self.current_epoch, batch_idx))
        # Dropout follows the batch: a run that goes on draws what an uninterrupted one does.
        torch.manual_seed(mix(batch.seed, 2, self.global_rank))
        mixed = blend(batch, mixup=self.args.mixup, cutmix=self.args.cutmix)
        logits = self(mixed.images).float()
        loss = mixed.loss(logits, self.args.label_smoothing)
        if self.removal is not None:
            loss = loss + self.removal.loss(logits, mixed.images)
        self._stop_unless_finite(loss, "the loss")
        # With mixup the accuracy counts the label of the larger share.
        target = mixed.labels if mixed.share >= 0.5 else mixed.others
        self.train_metrics["loss"].update(loss.detach(), weight=len(logits))
        self.train_metrics["accuracy"].update(logits.detach(), target)
        self.log("loss", loss.detach(), prog_bar=True, logger=False)
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """And the next one of the norms that go, before any checkpoint is saved."""
        super().optimizer_step(*args, **kwargs)
        if self.removal is not None:
            self.removal.at(self.global_step + 1)

    def _stop_unless_finite(self, value: Tensor, name: str) -> None:
        """On all processes, where one of them finds something else.

        Raises:
            DivergedError: It is not finite.
        """
        finite = bool(torch.isfinite(value).all())
        if not self.trainer.strategy.reduce_boolean_decision(finite):
            raise DivergedError(
                f"training diverged at step {self.global_step}: {name} is not finite. Lower "
                "--model.lr, raise --model.warmup_epochs or set --trainer.gradient_clip_val; the "
                "checkpoints written before are kept"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Nothing that has diverged is saved."""
        norms = [parameter.detach().norm() for parameter in self.parameters()]
        self._stop_unless_finite(torch.stack(norms), "a weight")
        checkpoint["classes"] = list(self.classes)
        if self.removal is not None:
            checkpoint["removal"] = self.removal.state_dict()
        checkpoint["train_metrics"] = {
            name: metrics.total(metric) for name, metric in self.train_metrics.items()
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The metrics of an epoch cover the batches before a kill too.

        Raises:
            UserError: The checkpoint has other classes than the data.
        """
        self._name_classes(checkpoint.get("classes", ()))
        if self.removal is not None and "removal" in checkpoint:
            self.removal.load_state_dict(checkpoint["removal"])
        fits = self._trainer is not None and self.trainer.state.fn == "fit"
        for name, total in checkpoint.get("train_metrics", {}).items() if fits else ():
            if total:
                metrics.go_on(self.train_metrics[name], total, self.global_rank)

    def on_train_epoch_end(self) -> None:
        if not self.train_metrics["loss"].update_called:  # the run went on at the epoch's end
            return
        self.log_dict(self.train_metrics.compute())
        self.train_metrics.reset()
        if self.removal is not None:
            self.log_dict(measures_of(self.removal))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, self.val_metrics)

    def on_validation_epoch_end(self) -> None:
        values = self.val_metrics.compute()
        if self.trainer.state.fn == "fit":  # before it could count as the best
            self._stop_unless_finite(values["val/loss"], "the validation loss")
        for name, value in values.items():
            self.log(name, value, prog_bar=name == "val/accuracy")
        self.val_metrics.reset()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch, self.test_metrics)

    def on_test_epoch_end(self) -> None:
        self.log_dict(self.test_metrics.compute())
        self.test_metrics.reset()

    def predict_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Probabilities [B, classes]."""
        images = as_batch(batch).images
        if not len(images):  # all were left out
            return torch.empty(0, self.args.num_classes)
        return self(images).float().softmax(dim=1)

    def _evaluate(self, batch: Batch, scores: MetricCollection) -> None:
        batch = as_batch(batch)
        if not len(batch.labels):  # an incomplete last batch, shared by several processes
            return
        logits = self(batch.images).float()
        # Given logits, the calibration error would take those in 0..1 for probabilities.
        probabilities = logits.softmax(dim=1)
        for name, metric in scores.items(keep_base=True):
            if name == "loss":
                metric.update(F.cross_entropy(logits, batch.labels), weight=len(logits))
            else:
                metric.update(probabilities, batch.labels)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The scalars in a group of their own; the rates are set before every step."""
        args, method = self.args, METHODS.get(self.args.method)
        groups = param_groups(
            self.net,
            lr=args.lr,
            scalar_lr_ratio=args.scalar_lr_ratio,
            weight_decay=args.weight_decay,
            scalar_weight_decay=args.scalar_weight_decay,
            decay_vectors=method is None or method.decays_vectors,
        )
        own = {"momentum": args.momentum, "nesterov": args.nesterov}
        plain = args.optimizer.removeprefix("torch.optim.") == "SGD"
        options = (own if plain else {}) | (args.optimizer_options or {})
        optimizer = make_optimizer(args.optimizer, groups, options)
        self.steps_per_epoch = steps_per_epoch(self.trainer, self.data)
        if self.removal is not None:
            check_length(self.removal, run_length(self.steps_per_epoch, self.trainer))
        scheduler = LambdaLR(optimizer, self.rate)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "lr"},
        }

    def rate(self, step: int) -> float:
        """The learning rate of a step over the peak rate, in 0..1."""
        return rate_at(self.args, step, self.steps_per_epoch, self.schedule_length)

    @property
    def schedule_length(self) -> int | None:
        """The steps that the schedule is laid out over, if its shape depends on them."""
        return length_of(self.args, self.steps_per_epoch, self.trainer)


def load_classifier(checkpoint: Path) -> LitClassifier:
    """The classifier of a checkpoint, on the CPU.

    Raises:
        UserError: There is no such file, or its network is one of the user's own, whose code a
            checkpoint must not choose.
    """
    saved = read_checkpoint(checkpoint)
    known = inspect.signature(LitClassifier).parameters
    given = {name: value for name, value in saved["hyper_parameters"].items() if name in known}
    if is_class_path(str(given.get("net"))):
        raise UserError(
            f"{checkpoint} is of {given['net']}, a network of your own, and a checkpoint must not "
            "choose what code is run: load it in Python, by LitClassifier.load_from_checkpoint"
        )
    model = LitClassifier(**given)
    model.load_state_dict(saved["state_dict"])
    if model.removal is not None:
        model.removal.load_state_dict(saved["removal"])
    model.classes = tuple(saved.get("classes", ()))
    return model


def _check_ranges(args: Any) -> None:
    if any(milestone < 0 for milestone in args.milestones):
        raise UserError(f"--model.milestones are {list(args.milestones)}: take epochs from 0 on")
    if args.method == AS_IT_IS and not is_class_path(args.net):
        raise UserError(f"--model.method {AS_IT_IS} is for a network of your own, by class path")
    for name, low, high in RANGES:
        value = getattr(args, name)
        if not low <= value <= high:
            end = "upwards" if high == math.inf else f"to {high:g}"
            raise UserError(f"--model.{name} is {value}: take a number from {low:g} {end}")
