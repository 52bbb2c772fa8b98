"""What tips a norm-free model over in its first steps of Adam, and what cures it.

``python benchmarks/first_steps.py TEXT [--cases plain agc ...] [--lrs 0.002 0.008] [--prior]``

Trains a deep, narrow byte-level language model (``transformer_fixup_lm``) on windows of TEXT, once
for each case, and prints a line each: the loss at the end on bytes it has not seen, the highest
training loss on the way, the largest gradient norm, and the largest root mean square of the stream.
A case changes one thing; with ``--prior`` the output layer's bias starts at the frequencies of the
bytes in every case.
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from fairseq import models
from fairseq.data import Dictionary
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.nn import functional as F

from fixup_core.clipping import clip_adaptively_
from fixup_mt.model.model import FixupLanguageModel

WINDOW, BATCH, HELD_OUT = 64, 8, 64 * 256


@dataclass(frozen=True)
class Case:
    """One way to train.

    Attributes:
        method: Of the registry.
        base: c of ``(c / L)``; 0: the method's own.
        warmup: Updates over which the rate rises.
        eps: Adam's.
        betas: Adam's.
        clip: Of the gradient norm; 0: none.
        agc: Share of adaptive clipping; 0: none.
        prepare: Changes the built model; called with the text too.
        rates: Factor of the learning rate for a parameter's name.
    """

    method: str = "fixup_adam"
    base: float = 0.0
    warmup: int = 0
    eps: float = 1e-8
    betas: tuple[float, float] = (0.9, 0.98)
    clip: float = 1.0
    agc: float = 0.0
    optimizer: Any = torch.optim.Adam
    prepare: Callable[[Any, Tensor], object] = lambda model, text: None
    rates: Callable[[str], float] = lambda name: 1.0


def add_head_bias(model: Any, text: Tensor) -> None:
    """A bias vector of the output layer, at 0."""
    head = model.decoder.output_projection
    head.bias = nn.Parameter(torch.zeros(head.out_features))


def add_unigram_bias(model: Any, text: Tensor) -> None:
    """A bias vector of the output layer that starts at the bytes' frequencies in the text."""
    add_head_bias(model, text)
    head = model.decoder.output_projection
    counts = torch.bincount(text, minlength=head.out_features) + 1.0
    head.bias.data.copy_((counts / counts.sum()).log())


def draw_last_layers(model: Any, text: Tensor) -> None:
    """Xavier in place of 0: the branches do not start at 0, the head does."""
    for name, parameter in model.named_parameters():
        if name.endswith(("fc2.weight", "out_proj.weight")):
            nn.init.xavier_uniform_(parameter)


def last_layers(factor: float) -> Callable[[str], float]:
    return lambda name: factor if name.endswith(("fc2.weight", "out_proj.weight")) else 1.0


def only(ending: str, factor: float) -> Callable[[str], float]:
    return lambda name: factor if name.endswith(ending) else 1.0


FIXUP_ADAM = Case(base=16.0)
CASES: dict[str, Case] = {
    "plain": FIXUP_ADAM,
    "base 2": replace(FIXUP_ADAM, base=2.0),
    "base 4": replace(FIXUP_ADAM, base=4.0),
    "base 8": replace(FIXUP_ADAM, base=8.0),
    "base 32": replace(FIXUP_ADAM, base=32.0),
    "base 64": replace(FIXUP_ADAM, base=64.0),
    "warm-up 20": replace(FIXUP_ADAM, warmup=20),
    "warm-up 60": replace(FIXUP_ADAM, warmup=60),
    "no clipping": replace(FIXUP_ADAM, clip=0.0),
    "clip 0.1": replace(FIXUP_ADAM, clip=0.1),
    "eps 1e-5": replace(FIXUP_ADAM, eps=1e-5),
    "eps 1e-3": replace(FIXUP_ADAM, eps=1e-3),
    "beta2 0.999": replace(FIXUP_ADAM, betas=(0.9, 0.999)),
    "beta1 0": replace(FIXUP_ADAM, betas=(0.0, 0.98)),
    "radam": replace(FIXUP_ADAM, optimizer=torch.optim.RAdam),
    "agc": replace(FIXUP_ADAM, agc=0.01),
    "head bias": replace(FIXUP_ADAM, prepare=add_head_bias),
    "unigram bias": replace(FIXUP_ADAM, prepare=add_unigram_bias),
    "unigram bias, warm-up 20": replace(FIXUP_ADAM, prepare=add_unigram_bias, warmup=20),
    "last drawn": replace(FIXUP_ADAM, prepare=draw_last_layers),
    "last at 1/8 rate": replace(FIXUP_ADAM, rates=last_layers(1 / 8)),
    "queries at 1/8 rate": replace(
        FIXUP_ADAM, rates=lambda n: 1 / 8 if ".q_proj" in n or ".k_proj" in n else 1.0
    ),
    "head at 1/8 rate": replace(FIXUP_ADAM, rates=only("output_projection.weight", 1 / 8)),
    "t_fixup": Case("t_fixup"),
    "t_fixup_adam": Case("t_fixup_adam"),
    "t_fixup, warm-up 20": Case("t_fixup", warmup=20),
    "prenorm": Case("prenorm"),
    "rezero": Case("rezero"),
    "skipinit": Case("skipinit"),
    "fixup": Case("fixup"),
}


def main() -> None:
    args = _parse()
    torch.set_num_threads(args.threads)
    logging.disable(logging.INFO)
    text = _bytes(args.text)
    print(f"{'case':22} {'rate':>6}  loss at the end  top loss  top gradient  top stream")
    for name in args.cases or CASES:
        for lr in args.lrs:
            runs = [_train(CASES[name], lr, seed, text, args) for seed in args.seeds]
            _show(name, lr, runs)
            if args.json:
                with args.json.open("a") as file:
                    file.write(json.dumps({"case": name, "lr": lr, "runs": runs}) + "\n")


def _show(name: str, lr: float, runs: list[dict[str, Any]]) -> None:
    ends = " ".join(f"{run['loss']:.3f}" for run in runs)
    tops = [max(run[key] for run in runs) for key in ("top_loss", "top_gnorm", "top_stream")]
    mean = statistics.fmean(run["loss"] for run in runs)
    print(f"{name:22} {lr:6g}  {mean:.3f} ({ends})  {tops[0]:.1f}  {tops[1]:.1f}  {tops[2]:.1f}")


def _train(case: Case, lr: float, seed: int, text: Tensor, args: Any) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = _model(case, args)
    case.prepare(model, text)
    if args.prior:
        add_unigram_bias(model, text)
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        groups.setdefault(case.rates(name), []).append(parameter)
    optimizer = case.optimizer(
        [{"params": own, "lr": lr * factor} for factor, own in groups.items()],
        lr=lr,
        betas=case.betas,
        eps=case.eps,
    )
    factors = [lambda k: (k + 1) / case.warmup if k < case.warmup else 1 - k / args.updates]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factors * len(optimizer.param_groups))
    stream = _watch_stream(model)
    generator = torch.Generator().manual_seed(seed)
    tops = {"top_loss": 0.0, "top_gnorm": 0.0, "top_stream": 0.0}
    for _ in range(args.updates):
        loss = _loss(model, *_windows(text[:-HELD_OUT], generator))
        optimizer.zero_grad()
        loss.backward()
        if case.agc:
            clip_adaptively_(model, case.agc)
        norm = nn.utils.clip_grad_norm_(model.parameters(), case.clip or math.inf)
        optimizer.step()
        schedule.step()
        seen = {"top_loss": loss.item(), "top_gnorm": norm.item(), "top_stream": stream[0]}
        tops = {key: max(tops[key], value) for key, value in seen.items()}
    model.eval()
    with torch.no_grad():
        unseen = torch.Generator().manual_seed(0)
        found = [_loss(model, *_windows(text[-HELD_OUT:], unseen)).item() for _ in range(8)]
    return {"loss": statistics.fmean(found), "seed": seed, **tops}


def _model(case: Case, args: Any) -> Any:
    dictionary = Dictionary()
    for byte in range(256):
        dictionary.add_symbol(f"<{byte}>")
    task = SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)
    cfg = {
        "_name": "transformer_fixup_lm",
        "fixup_method": case.method,
        "fixup_output_bias": "none",
        **({"fixup_base_branches": case.base} if case.base else {}),
        "decoder_layers": args.branches // 2,
        "decoder_embed_dim": args.width,
        "decoder_ffn_embed_dim": 4 * args.width,
        "decoder_attention_heads": 4,
        "dropout": 0.0,
        "tokens_per_sample": WINDOW,
        "max_target_positions": WINDOW,
        "add_bos_token": False,
        "tpu": False,
    }
    model = models.build_model(OmegaConf.create(cfg), task)
    assert isinstance(model, FixupLanguageModel)
    return model


def _watch_stream(model: Any) -> list[float]:
    """The root mean square of the last layer's output, at every forward pass."""
    seen = [0.0]

    def see(module: nn.Module, args: Any, output: Any) -> None:
        seen[0] = output[0].detach().square().mean().sqrt().item()

    model.decoder.layers[-1].register_forward_hook(see)
    return seen


def _bytes(file: Path) -> Tensor:
    raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    # fairseq's dictionary begins with four words of its own.
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).long() + 4


def _windows(text: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    starts = torch.randint(len(text) - WINDOW - 1, (BATCH,), generator=generator)
    rows = torch.stack([text[start : start + WINDOW + 1] for start in starts])
    return rows[:, :-1], rows[:, 1:]


def _loss(model: Any, tokens: Tensor, targets: Tensor) -> Tensor:
    logits, _ = model(tokens)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("text", type=Path, help="plain or gzip")
    add("--cases", nargs="+", choices=CASES, help="default: all")
    add("--lrs", nargs="+", type=float, default=[0.002, 0.008])
    add("--seeds", nargs="+", type=int, default=[1, 2])
    add("--branches", type=int, default=64, help="L")
    add("--width", type=int, default=64)
    add("--updates", type=int, default=150)
    add("--threads", type=int, default=1)
    add("--prior", action="store_true", help="the output's bias starts at the bytes' frequencies")
    add("--json", type=Path, help="a line of JSON for each line is added to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
