"""The metrics of a training and of an evaluation, and what a checkpoint keeps of them."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError


def mean() -> MeanMetric:
    """Lets what is no number through; its strategy "disable" would drop the weights."""
    return MeanMetric(nan_strategy=math.nan)


def training_metrics(num_classes: int) -> MetricCollection:
    """Loss and accuracy."""
    accuracy = MulticlassAccuracy(num_classes, average="micro")
    return MetricCollection({"loss": mean(), "accuracy": accuracy}, prefix="train/")


def evaluation_metrics(num_classes: int, prefix: str) -> MetricCollection:
    """Loss, accuracies and calibration error, of probabilities."""
    metrics: dict[str, Metric | MetricCollection] = {
        "loss": mean(),
        "accuracy": MulticlassAccuracy(num_classes, average="micro"),
        "calibration_error": MulticlassCalibrationError(num_classes),
    }
    if num_classes > 5:
        metrics["accuracy_top5"] = MulticlassAccuracy(num_classes, average="micro", top_k=5)
    return MetricCollection(metrics, prefix=prefix, compute_groups=False)


def total(metric: Any) -> dict[str, Tensor]:
    """The state of a metric over all processes; nothing where there is none yet."""
    if not metric.update_called:
        return {}
    with metric.sync_context():
        return {name: value.clone() for name, value in metric.metric_state.items()}


def go_on(metric: Any, before: dict[str, Tensor], rank: int) -> None:
    """From the state of all processes, which the first of them takes on; all count as begun, or
    only some would wait for the others.
    """
    metric._update_count = 1
    for name, value in before.items() if rank == 0 else ():
        setattr(metric, name, value.to(metric.device))
