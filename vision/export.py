"""``python -m vision export``: a trained network as ONNX, its scalars folded away."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from fixup_core.errors import UserError
from fixup_core.fold import fold
from fixup_core.onnx_file import write_onnx
from vision.lit_classifier import LitClassifier, load_classifier
from vision.nets import METHODS, image_of

TOLERANCE = 1e-4
"""Of the largest logit: what the engine's other order of additions may change."""


def export(checkpoint: Path, output: Path = Path("model.onnx"), image_size: int = 0) -> None:
    """Write a trained network as ONNX, and hold onnxruntime's outputs against PyTorch's.

    Its input ``images``, float [B, C, H, W], is normalised as the data module does it; its output
    is ``logits``, [B, classes]. Fixup's scalars are folded into weights and biases.

    Args:
        checkpoint: Of ``python -m vision fit``.
        output: The file.
        image_size: Side of the images; 0: as the network's family has it.
    """
    model = load_classifier(checkpoint)
    channels, size = image_of(model.args.net, **(model.args.options or {}))
    images = torch.randn(2, channels, image_size or size, image_size or size)
    net = plain_network(model)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f"{output.name}.tmp")
    write_onnx(
        net,
        [images],
        temporary,
        input_names=["images"],
        output_names=["logits"],
        free_sizes=[{0: "batch"}],
    )
    off = difference(temporary, net, images)
    if not off <= TOLERANCE:
        raise UserError(
            f"onnxruntime's logits differ from PyTorch's by {off:.1e} of the largest: {temporary} "
            "is kept for inspection"
        )
    temporary.replace(output)
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB; onnxruntime differs by {off:.1e}")


def plain_network(model: LitClassifier) -> nn.Module:
    """The network in evaluation, without scalars, in the usual memory layout."""
    scalars = METHODS[model.args.method].scalars
    net = fold(model.net) if scalars else model.net.eval()
    return net.to(memory_format=torch.contiguous_format)


def difference(file: Path, net: nn.Module, images: Tensor) -> float:
    """The largest difference between onnxruntime's logits and the network's, over the largest."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        expected = net(images)
    return ((torch.from_numpy(logits) - expected).abs().max() / expected.abs().max()).item()
