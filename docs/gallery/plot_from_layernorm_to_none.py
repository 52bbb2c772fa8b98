"""
From LayerNorm to none
======================

A pre-norm Transformer computes a LayerNorm before every branch. This example takes the norms out
with ``fixup_``, trains both networks from scratch at three depths with one learning rate, and
checks how much a step changes each of them. At the end the norms are taken out of a network that
is trained already. It runs in under a minute on one core.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn import functional as F

from fixup_core import METHODS, NormRemoval, depth_check, fixup_, param_groups

# %%
# A task and a Transformer
# ------------------------
#
# The task is made here: a row of ten digits is to be written backwards. Every position has to
# look at the one that mirrors it, so nothing can be learnt without attention.

DIGITS, LENGTH, WIDTH = 10, 10, 32


def batch_of(size: int, generator: torch.Generator):
    digits = torch.randint(DIGITS, (size, LENGTH), generator=generator)
    return digits, digits.flip(1)


class Reverser(nn.Module):
    """A pre-norm ``nn.TransformerEncoder`` between an embedding and an output layer."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(DIGITS, WIDTH)
        self.positions = nn.Parameter(torch.randn(LENGTH, WIDTH))
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        norm = nn.LayerNorm(WIDTH)
        self.encoder = nn.TransformerEncoder(layer, layers, norm, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, DIGITS)

    def forward(self, digits):
        return self.head(self.encoder(self.embed(digits) + self.positions))


# %%
# Taking the norms out
# --------------------
#
# ``fixup_`` finds the residual branches, removes the norms, adds Fixup's scalars and draws the
# weights anew. The method ``fixup_adam`` is made for Adam: it multiplies every branch by the
# fixed number c / L, with L the number of branches and c that at which the learning rate was
# tuned. Our rate suits a network of two layers, so c is 4.

METHOD = METHODS["fixup_adam"].with_base(4)
example, _ = batch_of(8, torch.Generator().manual_seed(0))


def with_norms(layers: int) -> nn.Module:
    return Reverser(layers)


def without_norms(layers: int, method=METHOD) -> nn.Module:
    net = Reverser(layers)
    fixup_(net, example, method=method, check=False, verbose=False)
    return net


torch.manual_seed(0)
net = Reverser(2)
report = fixup_(net, example, method=METHOD, verbose=False)
print(report)

# %%
# The report names what was found: two branches in each layer, attention and feed-forward. Queries
# and keys are gates: they go through a softmax and do not multiply the branch, so m is 2. All
# five norms are gone, the last one before the output layer too. The output layer starts at 0, and
# so do the last layers of the branches.
#
# One learning rate for three depths
# ----------------------------------
#
# The rate is 0.003, for both networks and for 2, 6 and 12 layers. There is no warm-up.

DEPTHS, STEPS, RATE = (2, 6, 12), 150, 0.003


def train(net, steps=STEPS, removal=None) -> list[float]:
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(param_groups(net, lr=RATE))
    losses = []
    for _ in range(steps):
        digits, backwards = batch_of(32, generator)
        loss = F.cross_entropy(net(digits).flatten(0, 1), backwards.flatten())
        losses.append(loss.item())
        if removal is not None:
            loss = loss + removal.loss()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        if removal is not None:
            removal.step()
    return losses


def trained(make_net, layers: int) -> list[float]:
    torch.manual_seed(0)
    return train(make_net(layers))


CONTESTANTS = {"LayerNorm": with_norms, "none, fixup_adam": without_norms}
losses = {
    name: {layers: trained(make_net, layers) for layers in DEPTHS}
    for name, make_net in CONTESTANTS.items()
}

figure, axes = plt.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
for ax, (name, curves) in zip(axes, losses.items(), strict=True):
    for layers, values in curves.items():
        ax.semilogy(values, label=f"{layers} layers")
    ax.set(title=name, xlabel="step")
    ax.grid(alpha=0.3)
    ax.legend()
axes[0].set_ylabel("training loss")

# %%
# All six trainings learn the task. Without norms the loss starts at log 10 = 2.3, that of a guess,
# at every depth. It falls earlier than with norms, and less evenly at the end. The task is small,
# with one seed: what the curves show is that one rate serves all three depths without a norm.

# %%
# How much a step changes
# -----------------------
#
# Will it last at greater depth? The depth check takes three steps of Adam on the matrices of the
# encoder and measures how much the outputs change, at four depths. A flat line means that one
# learning rate serves all depths. The converted network stands beside two others: the one with
# LayerNorm, and one converted by the paper's own rule, which was made for SGD.

LAYERS = (2, 4, 8, 16)


def matrices(net: nn.Module) -> list[nn.Parameter]:
    return [weight for weight in net.encoder.layers.parameters() if weight.dim() > 1]


def check(make_net):
    return depth_check(
        make_net,
        batch=batch_of(16, torch.Generator().manual_seed(2)),
        depths=LAYERS,
        seeds=2,
        steps=3,
        moved=matrices,
        optimizer=torch.optim.Adam,
        head="head",
        progress=lambda line: None,
    )


checks = {
    "LayerNorm": check(with_norms),
    "none, fixup": check(lambda layers: without_norms(layers, "fixup")),
    "none, fixup_adam": check(without_norms),
}

figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
for name, found in checks.items():
    means = [sum(sizes) / len(sizes) for sizes in found.sizes]
    axes.loglog(LAYERS, means, "o-", label=f"{name} (slope {found.slopes[-1].value:.2f})")
axes.set_xticks(LAYERS, labels=map(str, LAYERS))
axes.set_xticks([], minor=True)
axes.set(xlabel="layers", ylabel="change of the outputs / step size", title="Three steps of Adam")
axes.grid(alpha=0.3)
axes.legend()

# %%
# With LayerNorm a step changes the outputs the more the deeper the network is. By the paper's
# rule the change grows as well, since Adam's steps do not shrink with the gradient. With the
# fixed number c / L the line is close to flat: from 2 layers to 16 the change stays within a
# quarter.

# %%
# Out of a trained network
# ------------------------
#
# So far every network was trained without norms from the start. ``NormRemoval`` takes them out of
# one that is trained already, while it trains on: each norm fades into an affine map with the
# running size of what enters it, and in the end these maps are folded into the linear layers.
# Three ways of 150 further steps: all norms little by little, one after the other, and, for
# comparison, all at once.

torch.manual_seed(0)
layernormed = Reverser(6)
train(layernormed)
start = layernormed.state_dict()


def removed(schedule: str):
    net = Reverser(6)
    net.load_state_dict(start)
    removal = NormRemoval(net, example, schedule=schedule, steps=100)
    curve = train(net, removal=removal)
    return curve, removal.finish()


removals = {schedule: removed(schedule) for schedule in ("taper", "one_by_one", "at_once")}

figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
for name, (curve, _) in removals.items():
    axes.semilogy(curve, label=name)
axes.axvline(100, color="black", linewidth=0.8, linestyle=":")
axes.set(xlabel="further step", ylabel="training loss", title="Norms out of a trained network")
axes.grid(alpha=0.3)
axes.legend()
plt.show()

print(removals["taper"][1].encoder.layers[0])

# %%
# The dotted line is where the last norm is gone. Where all go at once the loss leaps to more than
# twice what it was, and ends above the other two. The taper falls on evenly; one by one, the loss
# leaps when the last norm of all goes, and comes back within some 40 steps. What is left is an
# ``nn.TransformerEncoder`` with the identity where its norms were.
