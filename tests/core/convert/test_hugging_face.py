"""Networks of transformers the whole way: converted, trained, saved and loaded, folded."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fixup_core import ConversionReport, collect_branches, fixup_, fold, param_groups, scalars
from tests.core.convert.hugging_face import NETS

pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


class Trained:
    """A network that was converted and has taken three steps.

    Attributes:
        net: In evaluation mode.
        batch: What it was traced with.
        report: Of the conversion.
        losses: Before each step.
        still: Weights of branches that the steps have not moved.
    """

    def __init__(self, name: str) -> None:
        self.net, self.batch = NETS[name].make()
        self.report: ConversionReport = fixup_(self.net, self.batch, verbose=False)
        inner = {w: self.net.get_parameter(w) for b in self.report.branches for w in b.layers}
        start = {w: parameter.detach().clone() for w, parameter in inner.items()}
        optimizer = torch.optim.AdamW(param_groups(self.net, lr=0.01, weight_decay=0.1))
        self.losses = [self._step(optimizer) for _ in range(3)]
        self.still = [w for w, parameter in inner.items() if torch.equal(parameter, start[w])]
        self.net.eval()

    def _step(self, optimizer: torch.optim.Optimizer) -> float:
        loss = (self.net(**self.batch).logits - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()


trained = functools.cache(Trained)


@torch.no_grad()
def logits(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return net.eval()(**batch).logits


@pytest.mark.parametrize("name", NETS)
def test_the_branches_are_those_a_reader_would_find(name: str) -> None:
    report, expected = trained(name).report, NETS[name]
    assert tuple(branch.m for branch in report.branches) == expected.m
    assert bool(report.head) == expected.head and not report.left_out
    assert len(collect_branches(trained(name).net)) == len(expected.m)


@pytest.mark.parametrize("name", NETS)
def test_three_steps_move_every_layer_of_the_branches(name: str) -> None:
    run = trained(name)
    assert not run.still and all(map(torch.isfinite, map(torch.tensor, run.losses)))
    assert run.losses[2] < run.losses[0]


@pytest.mark.parametrize("name", NETS)
def test_save_pretrained_and_a_network_converted_the_same_way(name: str, tmp_path: Path) -> None:
    from safetensors.torch import load_model

    net, batch = trained(name).net, trained(name).batch
    # With its own names: transformers writes some networks under those of older versions.
    net.save_pretrained(tmp_path, save_original_format=False)
    again = type(net)(type(net.config).from_pretrained(tmp_path))
    fixup_(again, batch, check=False, verbose=False)
    load_model(again, tmp_path / "model.safetensors")
    assert torch.equal(logits(again, batch), logits(net, batch))


@pytest.mark.parametrize("name", ["gpt2", "vit", "t5"])
def test_from_pretrained_loads_a_class_that_converts_itself(name: str, tmp_path: Path) -> None:
    net, batch = trained(name).net, trained(name).batch
    net.save_pretrained(tmp_path)

    class Converted(type(net)):  # type: ignore[misc]
        def __init__(self, config: object) -> None:
            super().__init__(config)
            there = {name: value.to(self.device) for name, value in batch.items()}
            fixup_(self, there, verbose=False)

    again, found = Converted.from_pretrained(tmp_path, output_loading_info=True)
    assert not found["missing_keys"] and not found["unexpected_keys"]
    assert torch.equal(logits(again, batch), logits(net, batch))


@pytest.mark.parametrize("name", NETS)
def test_the_folded_network_gives_the_same_outputs(name: str) -> None:
    net, batch = trained(name).net, trained(name).batch
    plain = fold(net)
    assert not any(scalars(plain))
    torch.testing.assert_close(logits(plain, batch), logits(net, batch), atol=1e-5, rtol=1e-5)


def test_generation_is_the_same_with_a_cache() -> None:
    net, batch = trained("gpt2").net, trained("gpt2").batch
    options = {"attention_mask": torch.ones_like(batch["input_ids"]), "do_sample": False}
    words = [
        net.generate(**batch, **options, max_new_tokens=5, min_new_tokens=5, use_cache=cached)
        for cached in (False, True)
    ]
    assert torch.equal(*words) and words[0].shape == (2, 11)
