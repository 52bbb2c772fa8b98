"""What the Python blocks of the documents take as given: a reader's own networks, data and files.

``GIVENS[page][snippet]`` makes the names that stand before the block which contains the snippet.
The current folder is an empty one, or what ``FILES[page]`` has put into it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sentencepiece
import timm
import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM, GPT2Config

import fixup_core as fc
from fixup_core.measure.chains import build_chain
from fixup_mt.__main__ import main
from fixup_mt.serving import export
from tests.core.nets import Mlp
from tests.mt.helpers import build_lm, dictionary, task
from vision.nets import build_net

Names = dict[str, Any]


def resnet() -> Names:
    """A network with norms, and a batch of images."""
    return {"net": SmallNet(nn.BatchNorm2d), "images": torch.randn(8, 3, 32, 32)}


def language_model() -> Names:
    """Tokens in, a vocabulary out."""
    encoder = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    net = nn.Sequential(
        nn.Embedding(20, 16),
        nn.TransformerEncoder(encoder, 2, enable_nested_tensor=False),
        nn.Linear(16, 20),
    )
    tokens = torch.randint(0, 20, (4, 8))
    return {"net": net, "tokens": tokens, "labels": tokens}


class SmallNet(nn.Module):
    """One residual branch of two convolutions."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.block1 = nn.Module()
        self.block1.conv1 = nn.Conv2d(3, 3, 3, padding=1)
        self.block1.norm = norm(3)
        self.block1.conv2 = nn.Conv2d(3, 3, 3, padding=1)
        self.fc = nn.Linear(3, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        block: Any = self.block1
        x = x + block.conv2(block.norm(block.conv1(x)).relu())
        return self.fc(x.mean((2, 3)))


def small_net() -> Names:
    """A network whose branch can be named."""
    return {"net": SmallNet(nn.BatchNorm2d)}


def converted() -> Names:
    """Images, and a network that ``fixup_`` has converted."""
    names = resnet()
    fc.fixup_(names["net"], names["images"], verbose=False)
    return names


def gpt2() -> Names:
    """With norms, small."""
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    sizes = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 50, "n_positions": 32}
    config = GPT2Config(**sizes, **ends)
    config.use_cache = False
    return {"net": AutoModelForCausalLM.from_config(config)}


def converted_gpt2() -> Names:
    """A GPT-2 without norms, its batch and the places where it is saved."""
    net = gpt2()["net"]
    batch = {"input_ids": torch.randint(0, 50, (2, 16))}
    fc.fixup_(net, batch, verbose=False)
    torch.save(net.state_dict(), "net.pt")
    return {"net": net, "batch": batch, "folder": "folder"}


def unconverted_gpt2() -> Names:
    """One with norms, and the state dict of a converted one."""
    return converted_gpt2() | gpt2()


def one_process() -> Names:
    """A group of one, and a GPT-2 to shard."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return converted_gpt2()


def timm_script() -> Names:
    """The names of timm's ``train.py``."""
    args = SimpleNamespace(img_size=64, lr=0.1, weight_decay=1e-4, opt="sgd", momentum=0.9)
    return {"model": timm.create_model("resnet18", num_classes=10), "args": args}


def vectors() -> Names:
    """``make_net(depth)`` and a batch."""
    batch = {"inputs": torch.randn(8, 8), "targets": torch.randint(0, 5, (8,))}
    return batch | {"make_net": lambda depth: _initialised(Mlp(depth))}


def _initialised(net: nn.Module) -> nn.Module:
    fc.fixup_init_(net)
    return net


class NormedMlp(nn.Module):
    """With norms: what ``fixup_`` is for."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
            for _ in range(depth)
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def plain_resnet() -> Names:
    """Without norms, by He, as the page on bounds measures it."""
    images, labels = torch.randn(8, 3, 8, 8), torch.randint(0, 10, (8,))
    return {
        "net": build_net("cifar_resnet8", method="none", num_classes=10),
        "images": images,
        "labels": labels,
    }


def chains() -> Names:
    """A chain and its batch, under the names of the page on gradients."""
    x, y = torch.randn(8, 64), torch.randint(0, 10, (8,))
    net = build_chain("fixup", depth=4, zero_head=False)
    other = fc.gradient_flow(build_chain("relu", depth=4), x, y)
    return {"net": net, "x": x, "images": x, "y": y, "labels": y, "other": other}


def numbers() -> Names:
    """Of two scalar blocks."""
    names = ("x0", "v1", "w1", "v2", "w2")
    return {name: torch.tensor(0.5, requires_grad=True) for name in names}


def private() -> Names:
    """A network with norms and its loader."""
    data = TensorDataset(torch.randn(32, 3, 32, 32), torch.randint(0, 10, (32,)))
    return {"net": SmallNet(nn.BatchNorm2d), "loader": DataLoader(data, batch_size=8)}


def trained() -> Names:
    """A network with norms that goes on training, its data and its optimiser."""
    names = resnet() | {"labels": torch.randint(0, 10, (8,)), "F": F}
    optimizer = torch.optim.SGD(names["net"].parameters(), lr=0.01)
    data = [(names["images"], names["labels"])] * 10
    return names | {"data": data, "optimizer": optimizer}


GIVENS: dict[str, dict[str, Callable[[], Names]]] = {
    "README.md": {"fc.NormRemoval(": trained},
    "docs/any-network.md": {
        "# 64 images that": resnet,
        "example_inputs=tokens": language_model,
        "def tripled": resnet,
        "branches={": small_net,
        "fc.export_onnx(": converted,
        "create_optimizer_v2(": timm_script,
        "fully_shard(block": one_process,
        'torch.load("net.pt")': unconverted_gpt2,
        "net.save_pretrained(": converted_gpt2,
        "def make_net(depth)": lambda: vectors() | {"MyNet": NormedMlp},
    },
    "docs/depth-check.md": {"print(check)": vectors},
    "docs/gradient-flow.md": {"plot_flows(": chains, "backward_graph(x2": numbers},
    "docs/remove-norms.md": {"fc.NormRemoval(": trained},
    "docs/privacy.md": {"make_private_with_epsilon": private},
    "docs/theory.md": {"is_positively_homogeneous": plain_resnet},
}


def pieces(request: pytest.FixtureRequest, file: Path) -> None:
    """A sentencepiece model of the tests' corpus."""
    corpus: Path = request.getfixturevalue("corpus")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus / "train.de"),
        model_prefix=str(file.with_suffix("")),
        vocab_size=24,
        minloglevel=2,
    )


def translation_files(request: pytest.FixtureRequest) -> None:
    """A checkpoint, its data and its pieces, where the recipe puts them."""
    data, folder = Path("runs/multi30k/data"), Path("runs/fixup")
    for made in (data / "pieces", folder):
        made.mkdir(parents=True)
    (data / "bin").symlink_to(request.getfixturevalue("data_bin"))
    trained: Path = request.getfixturevalue("trained")
    (folder / "averaged.pt").symlink_to(trained / "checkpoint_best.pt")
    pieces(request, data / "pieces" / "sentencepiece.model")


def serving_files(request: pytest.FixtureRequest) -> None:
    """Exported models: CTranslate2's, ONNX, and a language model."""
    translation_files(request)
    line = ["export", "--checkpoint", "runs/fixup/averaged.pt", "--data-bin"]
    line += ["runs/multi30k/data/bin", "--output"]
    model = ["--sentencepiece", "runs/multi30k/data/pieces/sentencepiece.model"]
    assert main([*line, "runs/model", *model]) == 0
    assert main([*line, "runs/model_onnx", "--format", "onnx"]) == 0
    words = dictionary()
    for word in ("a", "piece"):
        words.add_symbol(word)
    side = task(words)
    options = {"quantization": None, "sentencepiece": None, "format": "ctranslate2"}
    args = SimpleNamespace(output=Path("runs/lm"), **options)
    export.export(build_lm(on=side).eval(), side, args)


FILES: dict[str, Callable[[pytest.FixtureRequest], None]] = {
    "docs/translate.md": translation_files,
    "docs/serving.md": serving_files,
}
