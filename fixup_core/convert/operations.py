"""ATen operations by their names, sorted by what they do to a signal."""

from __future__ import annotations

PRODUCTS = frozenset(
    """linear conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d conv_transpose3d
    matmul mm bmm addmm baddbmm einsum grouped_mm _grouped_mm grouped_mm_fallback""".split()
)
"""Make a weight layer of a parameter."""
VIEWS = frozenset(
    """t transpose permute view reshape select slice split split_with_sizes chunk getitem unbind
    contiguous clone squeeze unsqueeze expand flatten unflatten alias detach movedim
    _to_copy to type_as expand_as view_as reshape_as roll repeat
    repeat_interleave tile swapaxes swapdims lift_fresh_copy _unsafe_view _reshape_alias""".split()
)
"""Give the same numbers another place, shape or dtype."""
DROPPING = frozenset({"dropout", "native_dropout", "feature_dropout", "alpha_dropout"})
UNLEARNT = frozenset(
    """new_empty empty_like rand_like randn_like new_zeros new_ones zeros_like ones_like new_full
    full_like bernoulli lt gt le ge eq ne logical_not logical_and logical_or argmax sign""".split()
)
"""Pass no gradient on, as those that make masks: their outputs are constants."""

JOINING = frozenset({"add", "sub"})
"""Can end a residual branch."""
NEARLY_JOINING = JOINING | {"lerp", "addcmul", "stack", "maximum"}
"""Can put a path together with the path it left, otherwise than a residual branch ends."""
ADDING = frozenset({"add", "cat", "stack", "where", "sub", "addcmul", "slice_scatter"})
"""Put several signals side by side or together: the output is as large as its largest part."""
POOLING = frozenset(
    """avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
    max_pool1d max_pool2d max_pool3d max_pool2d_with_indices mean amax""".split()
)
MULTIPLYING = frozenset({"mul", "pow", "matmul", "bmm", "mm", "einsum", "baddbmm"})
ATTENTION = "scaled_dot_product_attention"

BOUNDED = frozenset({"softmax", "_softmax", "_safe_softmax", "sigmoid", "hardsigmoid"})
SATURATING = BOUNDED | {"tanh", "erf", "hardtanh", "clamp", "relu6", "exp", "softplus"}
"""A factor made by one of these is a gate where the other factor is made by none of them, as in an
activation that is written out: ``0.5 * x * (1 + tanh(...))``."""
SELECTING = frozenset({"topk", "sort", "gather", "index", "index_select", "take_along_dim"})
"""Give some of the numbers."""
KEEPING_BOUNDS = SELECTING | {"add", "mul", "div", "rsub", "masked_fill", "nan_to_num"}
"""By constants alone they leave a bounded signal bounded."""
RECTIFYING = frozenset({"relu", "relu6", "threshold", "hardtanh", "clamp", "clamp_min"})
"""Pass no gradient on where their input is 0."""
ACTIVATIONS = frozenset(
    """relu gelu silu mish elu selu celu leaky_relu prelu rrelu tanh hardtanh hardswish softplus
    relu6 softsign log_sigmoid threshold sigmoid hardsigmoid""".split()
)
NORMALISING = frozenset(
    """batch_norm layer_norm group_norm instance_norm rms_norm native_batch_norm native_layer_norm
    native_group_norm _native_batch_norm_legit_functional _native_batch_norm_legit
    _fused_rms_norm""".split()
)

REDUCING = frozenset("mean var std var_mean std_mean linalg_vector_norm norm".split())
"""Take a mean, a variance or a length."""
MEASURING = frozenset("var std var_mean std_mean linalg_vector_norm norm rsqrt".split())
"""Where a norm is written out, it has one of these."""

PASSING = (
    VIEWS
    | DROPPING
    | NORMALISING
    | frozenset(
        """relu add mul div cat pad constant_pad_nd avg_pool1d avg_pool2d avg_pool3d max_pool2d
        adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d max_pool1d max_pool2d max_pool3d
        max_pool2d_with_indices amax mean zeros_like index index_select gather conv1d conv2d conv3d
        linear convolution upsample_nearest2d upsample_bilinear2d _upsample_bilinear2d_aa
        upsample_nearest1d upsample_linear1d upsample_bicubic2d""".split()
    )
)
"""May lie on a shortcut."""
LEFT_ALONE = ADDING | {ATTENTION, "embedding", "prelu", "_prelu_kernel", "index", "masked_fill"}
"""Need no rule for a parameter that they use in a branch."""
