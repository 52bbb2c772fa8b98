"""Fixup: deep residual networks without normalisation (Zhang, Dauphin, Ma, ICLR 2019).

The rules shared by ``fixup_mt`` and ``vision``; needs torch alone.
"""

from fixup_core.convert.convert import fixup_
from fixup_core.fuse.fold import fold
from fixup_core.fuse.onnx_export import export_onnx
from fixup_core.measure.backward_graph import backward_graph
from fixup_core.measure.bounds import activation_bounds, euler_identity, gradient_bounds
from fixup_core.measure.depth import (
    DepthCheck,
    assert_depth_stable,
    branch_weights,
    depth_check,
    plot_depth_checks,
)
from fixup_core.measure.flow import gradient_flow, plot_flows
from fixup_core.measure.homogeneous import homogeneous_sets, is_positively_homogeneous
from fixup_core.measure.paths import path_lengths, residual_split
from fixup_core.removal.removal import NormRemoval
from fixup_core.rules.branches import Place, ResidualBranch, WeightLayer, collect_branches
from fixup_core.rules.frequencies import start_at_frequencies_
from fixup_core.rules.init import fixup_init_, initialise_, lsuv_init_, standard_init_
from fixup_core.rules.method import Method
from fixup_core.rules.methods import METHODS
from fixup_core.rules.param_groups import SCALAR_LR_RATIO, anchored_rate, param_groups
from fixup_core.rules.report import ConversionReport, ConvertedBranch, InitReport
from fixup_core.rules.residual import Residual
from fixup_core.rules.scalars import (
    Scalar,
    ScalarBias,
    ScalarMultiplier,
    anchor_scalars_,
    scalars,
)
from fixup_core.rules.scaling import branch_scale

FixupReport = InitReport
"""Its older name."""

__all__ = [
    "METHODS",
    "SCALAR_LR_RATIO",
    "ConversionReport",
    "ConvertedBranch",
    "DepthCheck",
    "FixupReport",
    "InitReport",
    "Method",
    "NormRemoval",
    "Place",
    "Residual",
    "ResidualBranch",
    "Scalar",
    "ScalarBias",
    "ScalarMultiplier",
    "WeightLayer",
    "activation_bounds",
    "anchor_scalars_",
    "anchored_rate",
    "assert_depth_stable",
    "backward_graph",
    "branch_scale",
    "branch_weights",
    "collect_branches",
    "depth_check",
    "euler_identity",
    "export_onnx",
    "fixup_",
    "fixup_init_",
    "fold",
    "gradient_bounds",
    "gradient_flow",
    "homogeneous_sets",
    "initialise_",
    "is_positively_homogeneous",
    "lsuv_init_",
    "param_groups",
    "path_lengths",
    "plot_depth_checks",
    "plot_flows",
    "residual_split",
    "scalars",
    "standard_init_",
    "start_at_frequencies_",
]
