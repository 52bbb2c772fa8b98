"""
Why a network without normalisation explodes
============================================

Backpropagation multiplies the gradient by one local derivative after the other. Fifty factors
below 1 leave nothing. Fifty factors above 1 explode. This example follows the gradient through
small networks at their initialisation, and shows what shortcuts change, what they do not, and what
Fixup does about it. It runs in some seconds on one core.
"""

from math import comb

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn import functional as F

from fixup_core import gradient_bounds, gradient_flow, param_groups, path_lengths, residual_split
from fixup_core.measure.chains import build_chain

# %%
# Fifty factors
# -------------
#
# A *chain* is the smallest deep network: a first layer, some links, a classifier. All links are
# 64 wide. Inputs and labels are random, since nothing is learnt yet.
#
# ``gradient_flow`` makes one forward and one backward pass, and writes down the gradient at the
# output of every link.

generator = torch.Generator().manual_seed(0)
inputs = torch.randn(128, 64, generator=generator, dtype=torch.float64)
labels = torch.randint(10, (128,), generator=generator)


def chain(variant: str, depth: int = 50, zero_head: bool = False) -> nn.Module:
    torch.manual_seed(0)
    return build_chain(variant, depth=depth, zero_head=zero_head).double()


def flow_of(variant: str, depth: int = 50):
    net = chain(variant, depth)
    return gradient_flow(net, inputs, labels, layers=net.links)


def draw_flows(axes, names: dict[str, str]) -> None:
    """One line for each chain: the gradient at every link, over that at the last link."""
    for variant, label in names.items():
        rows = flow_of(variant).rows
        sizes = [row.gradient_rms / rows[-1].gradient_rms for row in rows]
        axes.semilogy(range(1, len(sizes) + 1), sizes, label=label)
    axes.set(xlabel="link, from the input", ylabel="gradient, over the last link's")
    axes.grid(alpha=0.3)
    axes.legend()


figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
draw_flows(axes, {"sigmoid": "sigmoid, Xavier", "tanh": "tanh, Xavier", "relu": "ReLU, He"})
axes.set_title("Plain chains of 50 layers: read it from right to left")

# %%
# The gradient enters on the right and runs to the left. The derivative of a sigmoid is at most
# 1/4. So each link takes most of the gradient away, and a straight line on this logarithmic axis
# means the same factor at every link. Tanh and ReLU lose far less, if their weights have the
# right size: Xavier's and He's rules were made for this.
#
# The first link's gradient over the last one's, at four depths:

DEPTHS = (5, 10, 20, 50)
decays = {
    variant: [flow_of(variant, depth).decay for depth in DEPTHS]
    for variant in ("sigmoid", "tanh", "relu", "residual", "batchnorm", "fixup")
}
print("links     " + "".join(f"{depth:>10}" for depth in DEPTHS))
for variant, values in decays.items():
    print(f"{variant:10}" + "".join(f"{value:>10.2g}" for value in values))

# %%
# What a shortcut changes
# -----------------------
#
# A residual link computes ``x + F(x)``. Its derivative is 1 plus that of the branch ``F``. The
# gradient no longer vanishes. But now it can grow, and without normalisation it does.

figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
draw_flows(
    axes,
    {"residual": "residual, He, no norm", "batchnorm": "residual, BatchNorm", "fixup": "Fixup"},
)
axes.set_title("Residual chains of 50 blocks")

# %%
# ``residual_split`` takes the gradient at a block's input apart: what came by the shortcut, and
# what came through the branch.

splits = {
    variant: residual_split(net, inputs, labels, blocks=net.links)
    for variant in ("residual", "batchnorm", "fixup")
    for net in [chain(variant)]
}
growth = {variant: [row.total / row.shortcut for row in rows] for variant, rows in splits.items()}

figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
for variant, factors in growth.items():
    axes.plot(range(1, 51), factors, label=variant)
axes.axhline(3**0.5, color="grey", ls="--", label="sqrt(3)")
axes.set(
    xlabel="block, from the input",
    ylabel="gradient at the input / at the output",
    title="What one block makes of the gradient",
)
axes.grid(alpha=0.3)
axes.legend()

# %%
# He's branch has twice the variance of its shortcut, since no ReLU stands behind its second layer
# to halve it. The two parts are nearly orthogonal, so their squares add: 1 + 2 = 3, and each
# block multiplies the gradient by about the square root of 3. Over fifty blocks that makes 3 to
# the power of 25, or 8e11.
#
# BatchNorm divides each branch by its size, while the shortcut grows. The later the block, the
# less its branch counts, and the factor tends to 1.
#
# Counting paths
# --------------
#
# With L blocks there are 2 to the power of L ways from the loss to the input: at every block the
# gradient takes the shortcut or the branch. Most of these paths go through about half of the
# branches. Which of them carry the gradient? ``path_lengths`` answers exactly, without
# enumerating: it follows all paths of one length at once.

lengths = {
    variant: path_lengths(net, inputs, labels, blocks=net.links)
    for variant in ("residual", "batchnorm")
    for net in [chain(variant)]
}


def mean_length(paths) -> float:
    return sum(one.length * one.norm for one in paths) / sum(one.norm for one in paths)


figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
axes.fill_between(
    range(51), [comb(50, k) / 2**50 for k in range(51)], color="0.85", label="share of the paths"
)
for variant, paths in lengths.items():
    label = f"share of the gradient, {variant} (mean length {mean_length(paths):.1f})"
    axes.plot([one.length for one in paths], [one.share for one in paths], label=label)
axes.set(xlabel="branches on the path", ylabel="share", title="Paths through 50 blocks")
axes.grid(alpha=0.3)
axes.legend()

# %%
# Where BatchNorm stands, the gradient runs along a few short paths, as Veit et al. (2016) found.
# The long ones carry almost nothing. In He's chain it is the other way round: every branch makes
# the gradient larger, so long paths carry most of it, and they explode.
#
# Why it has to be so
# -------------------
#
# Growing outputs force large gradients. Doubling the weights of the first layer doubles the
# logits (ReLU passes the factor on). From this alone follows a lower bound on the gradient: it is
# large wherever the loss is much larger than the entropy of the predictions. ``gradient_bounds``
# computes the bound and the gradient. Only the depth changes here:

SHALLOW = (2, 5, 10, 15, 20)
bounds = {
    variant: [
        gradient_bounds(chain(variant, depth, zero_head=True), inputs, labels) for depth in SHALLOW
    ]
    for variant in ("residual", "fixup")
}

figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
for variant, colour in (("residual", "C0"), ("fixup", "C1")):
    rows = [table["classifier"] for table in bounds[variant]]
    measured = [row.measured for row in rows]
    axes.semilogy(SHALLOW, measured, "o-", color=colour, label=f"{variant}, measured")
below = [table["classifier"].bound for table in bounds["residual"]]
axes.semilogy(SHALLOW, below, "o--", color="C0", label="residual, lower bound")
axes.set(
    xlabel="blocks",
    ylabel="gradient of the classifier's weights",
    title="Growing logits force large gradients",
    xticks=SHALLOW,
)
axes.grid(alpha=0.3)
axes.legend()

# %%
# Fixup's bound is missing from the figure because it is 0: the logits are 0, so the loss is log
# 10, which is the entropy.
#
# What Fixup does
# ---------------
#
# Three rules (Zhang, Dauphin and Ma 2019):
#
# 1. The last layer of every branch and the classifier start at 0. Every block starts as the
#    identity, and the gradient reaches the first layer as it left the last.
# 2. The other layers of a branch are drawn smaller, by ``L ** (-1 / (2 * m - 2))`` with m layers
#    in a branch. One step of SGD then changes the network's function by as much at any depth.
# 3. Scalar biases and one scalar multiplier for each branch do what the norms' parameters did.
#
# Does it train? Fifty blocks, the same rate for all, and one batch of noise to be learnt by heart:


def train(variant: str, steps: int = 60, lr: float = 0.05) -> list[float]:
    net = chain(variant, zero_head=True)
    optimizer = torch.optim.SGD(param_groups(net, lr=lr), momentum=0.9)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(net(inputs), labels)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


losses = {variant: train(variant) for variant in ("residual", "batchnorm", "fixup")}

figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
for variant, values in losses.items():
    axes.semilogy(values, "o-", ms=3, label=variant)
axes.set(xlabel="step", ylabel="loss", title="50 blocks, SGD with momentum, rate 0.05")
axes.grid(alpha=0.3)
axes.legend()
plt.show()

# %%
# He's chain starts at a loss of more than 1e11 and is not a number after its first step: its line
# is one point. Fixup starts at log 10 = 2.3 and learns without a norm. BatchNorm learns this one
# batch faster.
