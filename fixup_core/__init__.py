"""Fixup: deep residual networks without normalisation (Zhang, Dauphin, Ma, ICLR 2019).

The rules shared by ``fixup_mt`` and ``vision``; needs torch alone.
"""

from fixup_core.branches import ResidualBranch, WeightLayer, collect_branches
from fixup_core.convert import fixup_
from fixup_core.init import fixup_init_, lsuv_init_, standard_init_
from fixup_core.param_groups import SCALAR_LR_RATIO, anchored_rate, param_groups
from fixup_core.report import ConversionReport, ConvertedBranch, FixupReport
from fixup_core.scalars import (
    Scalar,
    ScalarBias,
    ScalarMultiplier,
    anchor_scalars_,
    scalars,
)
from fixup_core.scaling import branch_scale

__all__ = [
    "SCALAR_LR_RATIO",
    "ConversionReport",
    "ConvertedBranch",
    "FixupReport",
    "ResidualBranch",
    "Scalar",
    "ScalarBias",
    "ScalarMultiplier",
    "WeightLayer",
    "anchor_scalars_",
    "anchored_rate",
    "branch_scale",
    "collect_branches",
    "fixup_",
    "fixup_init_",
    "lsuv_init_",
    "param_groups",
    "scalars",
    "standard_init_",
]
