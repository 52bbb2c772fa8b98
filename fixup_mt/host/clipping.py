"""``--fixup-agc``: adaptive gradient clipping in fairseq's trainer."""

from __future__ import annotations

from typing import Any

from fixup_core.clipping import clip_adaptively_
from fixup_mt.host.flow_log import gradient_factor
from fixup_mt.host.patches import patch
from fixup_mt.model.config import FixupOptions


@patch("fairseq.trainer:Trainer.clip_grad_norm", "self clip_norm")
def clip_adaptively_where_asked(original: Any) -> Any:
    """Before ``--clip-norm``, which sees what is left."""

    def clip_grad_norm(self: Any, clip_norm: float) -> Any:
        share = FixupOptions.of(self.cfg.model).agc
        if share:
            scale = gradient_factor(self, "--fixup-agc")
            clip_adaptively_(self.get_model(), share, scale=scale)
        return original(self, clip_norm)

    return clip_grad_norm
