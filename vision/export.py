"""``python -m vision export``: a trained network as ONNX, its scalars folded away.

Its input ``images``, float [B, C, H, W], is normalised as the data module does it; its output is
``logits``, [B, classes], whose names are in the metadata ``classes``, a JSON list. ResNets take
images of any size. onnxruntime's logits are held against PyTorch's before the file gets its name.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fixup_core.files import refuse_existing, whole_file
from fixup_core.fuse.exports import (
    add_export_options,
    check_checkpoint,
    check_difference,
    describe_export,
)
from fixup_core.fuse.fold import fold
from fixup_core.fuse.onnx_file import write_onnx
from fixup_core.rules.parametrised import plain_copy
from vision.nets import image_of, net_options
from vision.training.lit_classifier import load_classifier

SOURCE = "python -m vision fit"
ENGINE, OUTPUTS = "onnxruntime", "logits"
TOLERANCE = 1e-4
"""Of the largest logit: what the engine's other order of additions may change."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    add_export_options(parser, source=SOURCE, metavar="FILE", help="file to write, as model.onnx")


def run(args: argparse.Namespace) -> None:
    """Load, export and check."""
    refuse_existing(args.output, args.overwrite)
    check_checkpoint(args.checkpoint, SOURCE)
    export(args.checkpoint, args.output)


def export(checkpoint: Path, output: Path) -> None:
    """Write a trained network as ONNX, and hold onnxruntime's outputs against PyTorch's.

    Args:
        checkpoint: Of ``python -m vision fit``.
        output: The file, replaced where it exists.

    Raises:
        UserError: The outputs differ; nothing is written.
    """
    model = load_classifier(checkpoint)
    name, options = model.args.net, model.args.options or {}
    channels, size = image_of(name, **options)
    free = {0: "batch"}
    if "image_size" not in net_options(name):
        free |= {2: "height", 3: "width"}
    images = torch.randn(2, channels, size, size)
    net = plain_network(without_norms(model))
    with whole_file(output) as temporary:
        write_onnx(
            net,
            [images],
            temporary,
            input_names=["images"],
            output_names=["logits"],
            free_sizes=[free],
        )
        name_classes(temporary, model.classes)
        off = difference(temporary, net, images)
        check_difference(ENGINE, OUTPUTS, off, TOLERANCE)
    print(describe_export(output, ENGINE, OUTPUTS, off))


def name_classes(file: Path, classes: Sequence[str]) -> None:
    """Put the names of the classes into an ONNX file's metadata: ``classes``, a JSON list."""
    import onnx

    model = onnx.load(file)
    onnx.helper.set_model_props(model, {"classes": json.dumps(list(classes))})
    onnx.save(model, file)


def without_norms(model: Any) -> nn.Module:
    """The classifier's network; where its norms were taken out, they are folded away.

    Raises:
        UserError: Some are left.
    """
    if model.removal is None:
        return model.net
    net: nn.Module = model.eval().removal.finish()
    return net


def plain_network(net: Any) -> nn.Module:
    """The network in evaluation; without scalars where they can be folded, of plain weights."""
    fusable = getattr(net, "fusable", None)
    plain = fold(net) if fusable and fusable() else plain_copy(net).eval()
    return plain.to(memory_format=torch.contiguous_format)


def difference(file: Path, net: nn.Module, images: Tensor) -> float:
    """The largest difference between onnxruntime's logits and the network's, over the largest."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        expected = net(images)
    return ((torch.from_numpy(logits) - expected).abs().max() / expected.abs().max()).item()
