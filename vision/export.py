"""``python -m vision export``: a trained network as ONNX, its scalars folded away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fixup_core.errors import UserError
from fixup_core.fuse.fold import fold
from fixup_core.fuse.onnx_file import write_onnx
from vision.nets import image_of, net_options
from vision.training.lit_classifier import load_classifier

TOLERANCE = 1e-4
"""Of the largest logit: what the engine's other order of additions may change."""


def export(checkpoint: Path, output: Path = Path("model.onnx")) -> None:
    """Write a trained network as ONNX, and hold onnxruntime's outputs against PyTorch's.

    Its input ``images``, float [B, C, H, W], is normalised as the data module does it; its output
    is ``logits``, [B, classes]. Fixup's scalars are folded into weights and biases. ResNets take
    images of any size.

    Args:
        checkpoint: Of ``python -m vision fit``.
        output: The file.
    """
    model = load_classifier(checkpoint)
    name, options = model.args.net, model.args.options or {}
    channels, size = image_of(name, **options)
    free = {0: "batch"}
    if "image_size" not in net_options(name):
        free |= {2: "height", 3: "width"}
    images = torch.randn(2, channels, size, size)
    net = plain_network(model.net)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f"{output.name}.tmp")
    write_onnx(
        net,
        [images],
        temporary,
        input_names=["images"],
        output_names=["logits"],
        free_sizes=[free],
    )
    off = difference(temporary, net, images)
    if not off <= TOLERANCE:
        raise UserError(
            f"onnxruntime's logits differ from PyTorch's by {off:.1e} of the largest: {temporary} "
            "is kept for inspection"
        )
    temporary.replace(output)
    print(f"{output}: {output.stat().st_size / 1e6:.1f} MB; onnxruntime differs by {off:.1e}")


def plain_network(net: Any) -> nn.Module:
    """The network in evaluation; without scalars where they can be folded."""
    fusable = getattr(net, "fusable", None)
    plain = fold(net) if fusable and fusable() else net.eval()
    return plain.to(memory_format=torch.contiguous_format)


def difference(file: Path, net: nn.Module, images: Tensor) -> float:
    """The largest difference between onnxruntime's logits and the network's, over the largest."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        expected = net(images)
    return ((torch.from_numpy(logits) - expected).abs().max() / expected.abs().max()).item()
