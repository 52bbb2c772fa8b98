"""Small networks with norms, and a Transformer that is trained in seconds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fixup_core import NormRemoval
from fixup_core.probing import Inputs, arguments_of, in_evaluation_mode
from fixup_core.removal.leaving import LeavingNorm
from fixup_core.rules.standards import NORMS

WORDS, WIDTH, HEADS = 12, 32, 2
TOKENS = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def mlp(norm: nn.Module, width: int = 8) -> nn.Sequential:
    """Two linear layers around a norm, an activation in place behind it."""
    return nn.Sequential(
        nn.Linear(8, width), norm, nn.ReLU(inplace=True), nn.Linear(width, 3)
    ).train(norm.training)


def conv_net(norm: nn.Module) -> nn.Sequential:
    """A convolution to eight channels, a norm, an activation, a head."""
    conv = nn.Conv2d(3, 8, 3)
    return nn.Sequential(conv, norm, nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 3))


class Block(nn.Module):
    """Attention and a feed-forward branch, each behind a norm, causal."""

    def __init__(self, norm: Callable[[int], nn.Module], width: int = WIDTH) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(width), norm(width)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(width, width) for _ in range(4)
        )
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(self.norm1(x))
        return x + self.down(F.relu(self.up(self.norm2(x))))

    def attend(self, x: Tensor) -> Tensor:
        heads = (p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in self.projections())
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def projections(self) -> Iterator[nn.Module]:
        yield from (self.q_proj, self.k_proj, self.v_proj)


class Model(nn.Module):
    """A small pre-norm language model."""

    def __init__(self, norm: Callable[[int], nn.Module] = nn.LayerNorm, depth: int = 2) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(WORDS, WIDTH), nn.Embedding(64, WIDTH)
        self.blocks = nn.ModuleList(Block(norm) for _ in range(depth))
        self.norm, self.head = norm(WIDTH), nn.Linear(WIDTH, WORDS)

    def forward(self, words: Tensor) -> Tensor:
        x = self.embed(words) + self.place.weight[: words.size(1)]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


PATHS = [f"blocks.{i}.norm{j}" for i in (0, 1) for j in (1, 2)] + ["norm"]
"""Of the model's norms."""


class Texts:
    """A chain of second order, the same batches for the same seed."""

    def __init__(self, seed: int, size: int = 16, length: int = 24) -> None:
        chain = torch.randn(WORDS, WORDS, WORDS, generator=torch.Generator().manual_seed(7))
        self.chain = (2.5 * chain).softmax(-1)
        self.generator = torch.Generator().manual_seed(seed)
        self.size, self.length = size, length

    def batch(self) -> Tensor:
        words = torch.randint(0, WORDS, (self.size, 2), generator=self.generator)
        for _ in range(self.length):
            shares = self.chain[words[:, -2], words[:, -1]]
            new = torch.multinomial(shares, 1, generator=self.generator)
            words = torch.cat([words, new], dim=1)
        return words


def text_loss(net: nn.Module, words: Tensor) -> Tensor:
    """Cross-entropy of the next word, in nats."""
    logits = net(words[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), words[:, 1:].flatten())


def held_out(net: nn.Module) -> float:
    """The loss on text that nothing is trained on, in evaluation mode."""
    with in_evaluation_mode(net), torch.no_grad():
        return text_loss(net, Texts(99, size=128).batch()).item()


def train_(
    net: nn.Module,
    steps: int,
    removal: NormRemoval | None = None,
    *,
    rate: float = 1e-3,
    seed: int = 1,
    optimizer: Any = None,
    texts: Texts | None = None,
) -> None:
    """Adam on the chain, the norms of ``removal`` going."""
    optimizer = optimizer or torch.optim.Adam(net.parameters(), lr=rate)
    texts = texts or Texts(seed)
    net.train()
    for _ in range(steps):
        loss = text_loss(net, texts.batch())
        (loss if removal is None else loss + removal.loss()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if removal is not None:
            removal.step()


def outputs(net: nn.Module, inputs: Inputs) -> Tensor:
    """In evaluation mode: the logits."""
    args, options = arguments_of(inputs)
    with in_evaluation_mode(net), torch.no_grad():
        made = net(*args, **options)
    return getattr(made, "logits", made).clone()


def scatter_(net: nn.Module) -> nn.Module:
    """Gains, biases and running statistics as after a training."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, part in net.state_dict().items():
            if part.is_floating_point() and part.dim() <= 1:
                noise = torch.rand(part.shape, generator=generator).to(part)
                part += noise if "running" in name else 0.3 * noise
    return net


def go_through_(net: nn.Module, inputs: Inputs, removal: NormRemoval) -> None:
    """All steps of the schedule, without an optimiser."""
    net.train()
    args, options = arguments_of(inputs)
    while not removal.done:
        net(*args, **options)
        removal.step()


def norms_in(net: nn.Module) -> list[str]:
    """Paths of what normalises, by type."""
    return [path for path, m in net.named_modules() if isinstance(m, (*NORMS, LeavingNorm))]


def timm_net(name: str, **options: Any) -> nn.Module:
    """A network of timm's, for ten classes."""
    return pytest.importorskip("timm").create_model(name, num_classes=10, **options)


def language_model(name: str, **options: Any) -> tuple[nn.Module, dict[str, Tensor]]:
    """A causal language model of transformers', and a batch."""
    library = pytest.importorskip("transformers")
    kind = getattr(library, name)
    words = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    net = kind(kind.config_class(**words, **options, use_cache=False))
    generator = torch.Generator().manual_seed(0)
    return net, {"input_ids": torch.randint(3, 50, (2, 9), generator=generator)}


def gpt2() -> tuple[nn.Module, dict[str, Tensor]]:
    """GPT-2 of two layers; its head is tied."""
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32}
    return language_model("GPT2LMHeadModel", **sizes, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)


def llama(name: str = "Llama") -> tuple[nn.Module, dict[str, Tensor]]:
    """Llama, or Gemma, of two layers."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return language_model(f"{name}ForCausalLM", **sizes, **heads)
