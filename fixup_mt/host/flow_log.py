"""``--fixup-log-gradients``: the gradient norm of every layer in fairseq's logs and TensorBoard.

fairseq's trainer has one moment at which the gradients are those of the step: averaged over the
batch and the processes, not yet clipped. There they are read; nothing is changed.
"""

from __future__ import annotations

from typing import Any

import torch
from fairseq.logging import metrics
from torch import Tensor, nn

from fixup_mt.errors import UserError
from fixup_mt.host.patches import patch
from fixup_mt.model.config import FixupOptions


def layer_gradient_norms(model: nn.Module) -> dict[str, float]:
    """Norms of the gradients that the parameters of ``model`` hold, in one transfer.

    Returns:
        By ``encoder_0`` and so on, ``decoder_0``, the embeddings and the output layer, as far as
        the model has them and they have gradients.
    """
    parts: dict[str, Any] = {}
    for side in ("encoder", "decoder"):
        stack: Any = getattr(model, side, None)
        if stack is not None:
            parts |= {f"{side}_{i}": layer for i, layer in enumerate(stack.layers)}
            parts[f"{side}_embeddings"] = stack.embed_tokens
    for side, name in (("lm_head", "out_proj"), ("decoder", "output_projection")):
        if hasattr(model, side):
            parts["output"] = getattr(getattr(model, side), name)
    norms = {name: _norm(part) for name, part in parts.items() if part is not None}
    held = {name: norm for name, norm in norms.items() if norm is not None}
    values = torch.stack(list(held.values())).tolist() if held else []
    return dict(zip(held, values, strict=True))


def log_gradients(trainer: Any) -> None:
    """Log the norms of a trainer's model as ``grad_encoder_0`` and so on.

    Raises:
        UserError: ``--amp``, which holds the gradients times a scale of its own.
    """
    factor = gradient_factor(trainer, "--fixup-log-gradients")
    for name, norm in layer_gradient_norms(trainer.get_model()).items():
        metrics.log_scalar(f"grad_{name}", factor * norm, priority=500, round=6)


def gradient_factor(trainer: Any, option: str) -> float:
    """What the gradients that a trainer's model holds are still to be multiplied by.

    In half precision they are held times a scale that the optimiser takes off later.

    Raises:
        UserError: ``--amp``, which holds the gradients times a scale of its own; ``option`` is
            named, which needs to see them.
    """
    if trainer.cfg.common.amp:
        raise UserError(
            f"{option} cannot see the gradients under --amp: "
            "leave one of them out, or use --fixup-autocast bf16"
        )
    return float(getattr(trainer.optimizer, "_multiply_factor", 1.0))


@patch("fairseq.trainer:Trainer.clip_grad_norm", "self clip_norm")
def log_gradients_where_asked(original: Any) -> Any:
    """Here the gradients are those of the step; see above."""

    def clip_grad_norm(self: Any, clip_norm: float) -> Any:
        if FixupOptions.of(self.cfg.model).log_gradients:
            log_gradients(self)
        return original(self, clip_norm)

    return clip_grad_norm


def _norm(module: nn.Module) -> Tensor | None:
    norms = [p.grad.detach().float().norm() for p in module.parameters() if p.grad is not None]
    return torch.stack(norms).norm() if norms else None
