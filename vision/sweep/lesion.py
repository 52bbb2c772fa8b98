"""A trained network with one block left out: what each block is worth."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import lightning as L

from fixup_core.errors import UserError
from fixup_core.files import write_text
from fixup_core.measure.figures import Curve, Panel, check_figure_file
from vision import RUNS
from vision.data import VisionData
from vision.sweep.figures import show
from vision.training.lit_classifier import load_classifier


def lesion(
    checkpoint: Path,
    data: VisionData,
    output: Path = RUNS / "lesion",
    accelerator: str = "auto",
) -> None:
    """Test accuracy of a trained network with one block left out (Veit et al. 2016, section 4.1).

    A residual block is left out by passing its shortcut alone. A plain one by passing its input
    on, and blocks that change the shape of their input are kept.

    Args:
        checkpoint: Of ``python -m vision fit``.
        data: The images.
        output: Folder of ``lesion.csv`` and ``lesion.png``.
        accelerator: cpu, gpu or auto.
    """
    check_figure_file(output / "lesion.png")
    model = load_classifier(checkpoint)
    blocks = getattr(model.net, "blocks", None)
    if blocks is None:
        raise UserError(f"{model.args.net} is not made of blocks that could be left out")
    data.classes = model.classes
    trainer = L.Trainer(
        accelerator=accelerator,
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,  # it would be one a block
    )

    def accuracy() -> float:
        return trainer.test(model, datamodule=data, verbose=False)[0]["test/accuracy"]

    rows = [(-1, accuracy())]
    print(f"whole network: {rows[0][1]:.2%}", flush=True)
    for number, block in enumerate(blocks()):
        if block.left_out_is_defined():
            with block.left_out():
                rows.append((number, accuracy()))
                print(f"without block {number}: {rows[-1][1]:.2%}", flush=True)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([("block left out (-1: none)", "test accuracy"), *rows])
    write_text(output / "lesion.csv", text.getvalue())
    whole = [(float(number), rows[0][1]) for number, _ in rows[1:]]
    curves = [Curve("whole network", whole), Curve("without the block", rows[1:])]
    title = f"{model.args.net}, {model.args.method}"
    panel = Panel(curves, "block left out", "test accuracy", title)
    show(panel, output / "lesion.png")
