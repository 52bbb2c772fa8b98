"""The networks of others that are trained here, and what they are trained on."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from vision.data import CIFAR10

sys.path.insert(0, str(Path(__file__).parents[1]))
from tests.core import foreign

RESNET = (0.0005, 0.001, 0.002, 0.004)
SMALL = (0.002, 0.004, 0.008, 0.016)
VIT = (0.0001, 0.0003, 0.001, 0.003)
LARGE_VIT = (0.00003, 0.0001, 0.0003, 0.001)
TEXT = (0.002, 0.003, 0.006, 0.012)
BLOCK = 64
"""Bytes that the language model reads at a time."""


def _gpt2() -> nn.Module:
    """4 layers of GPT-2, 128 wide, on bytes."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=256,
        n_positions=BLOCK,
        n_embd=128,
        n_layer=4,
        n_head=4,
        activation_function="gelu",
        tie_word_embeddings=False,
    )
    return Logits(GPT2LMHeadModel(config))


def _llama() -> nn.Module:
    """4 layers of Llama, 128 wide, on bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=BLOCK,
        tie_word_embeddings=False,
    )
    return Logits(LlamaForCausalLM(config))


class Logits(nn.Module):
    """A language model of ``transformers``: tokens to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens, use_cache=False).logits


def _timm(name: str, **options: Any) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=10, **options)


class ByteModel(nn.Module):
    """``nn.TransformerEncoder`` on bytes, each predicted from those before it."""

    def __init__(self, depth: int = 4, width: int = 128, norm_first: bool = False) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, width), nn.Embedding(BLOCK, width)
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.1, batch_first=True, norm_first=norm_first
        )
        norm = nn.LayerNorm(width) if norm_first else None
        self.encoder = nn.TransformerEncoder(layer, depth, norm, enable_nested_tensor=False)
        self.head = nn.Linear(width, 256)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(BLOCK))

    def forward(self, text: Tensor) -> Tensor:
        x = self.bytes(text) + self.places.weight
        return self.head(self.encoder(x, mask=self.mask, is_causal=True))


@dataclass(frozen=True)
class Network:
    """A network, the side of its images (0: text) and its learning rates."""

    make: Callable[[], nn.Module]
    side: int
    rates: tuple[float, ...]


tv = torchvision.models
NETS = {
    "torchvision resnet18": Network(lambda: tv.resnet18(num_classes=10), 32, RESNET),
    "torchvision resnet50": Network(lambda: tv.resnet50(num_classes=10), 32, RESNET),
    "timm resnet50d": Network(lambda: _timm("resnet50d"), 32, RESNET),
    "torchvision convnext_tiny": Network(lambda: tv.convnext_tiny(num_classes=10), 32, RESNET),
    "torchvision vit_b_16": Network(
        lambda: tv.vit_b_16(num_classes=10, image_size=32), 32, LARGE_VIT
    ),
    "timm vit_tiny": Network(
        lambda: _timm("vit_tiny_patch16_224", img_size=32, patch_size=8), 32, VIT
    ),
    "nn.TransformerEncoder": Network(ByteModel, 0, TEXT),
    "nn.TransformerEncoder, pre-norm": Network(lambda: ByteModel(norm_first=True), 0, TEXT),
    "PreActivation": Network(foreign.PreActivation, 32, SMALL),
    "Separable": Network(foreign.Separable, 32, SMALL),
    "GatedMlp": Network(foreign.GatedMlp, 32, SMALL),
    "timm resnet26d": Network(lambda: _timm("resnet26d"), 32, RESNET),
    "timm regnetx_002": Network(lambda: _timm("regnetx_002"), 32, RESNET),
    "timm convnext_atto": Network(lambda: _timm("convnext_atto"), 32, RESNET),
}
if find_spec("transformers"):
    NETS |= {
        "transformers GPT-2": Network(_gpt2, 0, TEXT),
        "transformers Llama": Network(_llama, 0, TEXT),
    }


class Data:
    """Batches of training data, and one set of validation data."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.batch = args.batch
        if args.images:
            images = CIFAR10(root=args.images, crop=0, flip=False, download=False).load(train=True)
            mean = torch.tensor(CIFAR10.mean).view(3, 1, 1)
            std = torch.tensor(CIFAR10.std).view(3, 1, 1)
            order = torch.randperm(len(images.labels), generator=torch.Generator().manual_seed(0))
            self.images = (images.images[order].float() / 255 - mean) / std
            self.labels = images.labels[order].long()
        if args.text:
            self.text = torch.tensor(list(args.text.read_bytes()))

    def batches(self, side: int, steps: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """The same in every run from a seed."""
        generator = torch.Generator().manual_seed(100 + seed)
        for _ in range(steps):
            yield self._drawn(side, generator, valid=False)

    def validation(self, side: int) -> list[tuple[Tensor, Tensor]]:
        """2,000 images or stretches of text."""
        generator = torch.Generator().manual_seed(2)
        return [self._drawn(side, generator, valid=True) for _ in range(2000 // self.batch)]

    def _drawn(self, side: int, generator: torch.Generator, valid: bool) -> tuple[Tensor, Tensor]:
        size = len(self.images) if side else len(self.text) - BLOCK - 1
        edge = size * 9 // 10
        low, high = (edge, size) if valid else (0, edge)
        chosen = torch.randint(low, high, (self.batch,), generator=generator)
        if side:
            images = F.interpolate(self.images[chosen], size=(side, side))
            return images.contiguous(memory_format=torch.channels_last), self.labels[chosen]
        text = self.text[chosen[:, None] + torch.arange(BLOCK + 1)]
        return text[:, :-1], text[:, 1:]
