"""The encoder alone: its heads, its start, and fairseq's tasks that train it."""

from __future__ import annotations

import argparse
import json
import logging
import random
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fixup_core import METHODS, collect_branches, scalars
from fixup_core.errors import UserError
from fixup_mt.host.flow_log import layer_gradient_norms
from fixup_mt.model.config import FixupOptions
from fixup_mt.model.encoder_model import FixupEncoderModel
from fixup_mt.model.linears import TiedProjection
from fixup_mt.serving.export import load
from tests.conftest import WORDS, fairseq, train_flags
from tests.mt.helpers import batch, build, dictionary, trained
from tests.mt.model.test_registry import DEFINED

HEAD = "sentence_classification_head"
"""fairseq's default."""
NO_DROPOUT = {"dropout": 0.0, "attention_dropout": 0.0}


def build_encoder(arch: str = "transformer_fixup_encoder_tiny", **options: Any) -> Any:
    return build(arch, **{"max_positions": 32, **options})


def masked(seed: int = 0) -> dict[str, torch.Tensor]:
    """A batch padded on the right, and where its masked words are; 7 of them."""
    tokens = batch(source=9, seed=seed)["src_tokens"].flip(1)
    where = torch.zeros_like(tokens, dtype=torch.bool)
    where[0, 1:4], where[1, 2:4], where[2, 4:6] = True, True, True
    return {"src_tokens": tokens, "src_lengths": tokens.ne(1).sum(1), "masked_tokens": where}


def test_it_has_the_sizes_of_roberta_base_and_no_normalisation() -> None:
    model = build_encoder("transformer_fixup_encoder", encoder_layers=1)
    assert model.encoder.layers[0].fc1.weight.shape == (3072, 768)
    assert model.encoder.layers[0].self_attn.num_heads == 12
    assert not [m for m in model.modules() if "Norm" in type(m).__name__]
    assert build_encoder("transformer_fixup_encoder", encoder_embed_dim=12).encoder.num_layers == 12


@pytest.mark.parametrize("layers", [1, 3, 7])
def test_l_is_twice_the_layers_and_every_weight_is_covered(layers: int) -> None:
    model = build_encoder(encoder_layers=layers)
    model.register_classification_head(HEAD, 3)
    report = model.fixup_report
    assert report.num_branches == len(collect_branches(model)) == 2 * layers
    assert [row.name for row in report.rows] == [name for name, _ in model.named_parameters()]
    rows = {row.name: row for row in report.rows}
    assert rows["encoder.layers.0.fc1.weight"].factor == pytest.approx((2 * layers) ** -0.5)
    assert rows["lm_head.out_proj.weight"].role == "classifier"
    assert rows[f"classification_heads.{HEAD}.out_proj.weight"].role == "classifier"
    assert "kept" not in {row.role for row in report.rows}


def test_logits_of_both_heads_start_at_zero() -> None:
    model, inputs = build_encoder().eval(), masked()
    model.register_classification_head(HEAD, 3)
    logits, _ = model(**inputs)
    assert logits.shape == (7, len(dictionary())) and not logits.any()
    logits, _ = model(**inputs, features_only=True, classification_head_name=HEAD)
    assert logits.shape == (3, 3) and not logits.any()
    features, extra = model(**inputs, features_only=True, return_all_hiddens=True)
    assert features.shape == (3, 9, 64) and features.any()
    assert torch.equal(extra["inner_states"][0], extra["inner_states"][-1])


def test_masked_words_alone_have_the_logits_that_they_have_among_all() -> None:
    model, inputs = trained(build_encoder()), masked()
    some, _ = model(**inputs)
    where = inputs.pop("masked_tokens")
    every, extra = model(**inputs)
    torch.testing.assert_close(some, every[where])
    probabilities = model.get_normalized_probs((every, extra), log_probs=False)
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(3, 9))
    logs = model.get_normalized_probs((every, extra), log_probs=True)
    torch.testing.assert_close(logs.exp(), probabilities)


def test_padding_changes_nothing_and_both_sides_of_a_word_are_seen() -> None:
    model, inputs = trained(build_encoder()), masked()
    together, _ = model(inputs["src_tokens"])
    length = int(inputs["src_lengths"][1])
    alone, _ = model(inputs["src_tokens"][1:2, :length])
    torch.testing.assert_close(alone[0], together[1, :length], rtol=1e-4, atol=1e-5)
    for changed in (0, 8):
        tokens = inputs["src_tokens"].clone()
        tokens[0, changed] = 5
        assert (model(tokens)[0][0, 4] - together[0, 4]).abs().max() > 1e-3


@pytest.mark.parametrize("how", ["leave", "scale", "gain"])
def test_a_tied_output_is_that_of_the_other_models(how: str) -> None:
    model = build_encoder(share_encoder_input_output_embed=True, fixup_tied_output=how).eval()
    assert isinstance(model.lm_head.out_proj, TiedProjection)
    assert model.lm_head.out_proj.weight is model.encoder.embed_tokens.weight
    assert [r.name for r in model.fixup_report.rows if r.role == "tied output"] == [
        "encoder.embed_tokens.weight"
    ]
    assert bool(model(**masked())[0].any()) == (how != "gain")


@pytest.mark.parametrize("name", sorted(METHODS.keys() - set(DEFINED)))
def test_methods_of_other_networks_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"'{name}' is not defined for Transformers; choose"):
        build_encoder(fixup_method=name)


@pytest.mark.parametrize("name", DEFINED)
def test_a_method_builds_trains_and_loads(name: str) -> None:
    """Its start and its norms are the method's; the third step reaches every parameter."""
    method = METHODS[name]
    model, inputs = build_encoder(fixup_method=name, dropout=0.0), masked()
    model.register_classification_head(HEAD, 3)
    assert bool(list(scalars(model))) == method.scalars
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    assert bool(norms) == method.normalises
    for head in (model.lm_head, model.classification_heads[HEAD]):
        assert bool(head.out_proj.weight.any()) != method.zero_head
    assert _unreached(model, inputs) == []
    again = build_encoder(fixup_method=name).eval()
    again.register_classification_head(HEAD, 3)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(**inputs)[0], model.eval()(**inputs)[0])


def _unreached(model: nn.Module, inputs: dict[str, torch.Tensor]) -> list[str]:
    """The parameters that none of three steps gives a gradient."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    targets = inputs["src_tokens"][inputs["masked_tokens"]]
    # A bias of the keys shifts all logits of a query alike: the softmax does not see it.
    left = {n: p for n, p in model.named_parameters() if not n.endswith("k_proj.bias")}
    for _ in range(3):
        optimizer.zero_grad()
        classes, _ = model(**inputs, classification_head_name=HEAD)
        loss = F.cross_entropy(model(**inputs)[0], targets)
        (loss + F.cross_entropy(classes, torch.arange(3))).backward()
        # By any step: without norms and Fixup the network diverges, and softmaxes saturate.
        left = {n: p for n, p in left.items() if p.grad is None or not p.grad.any()}
        optimizer.step()
    return list(left)


def test_the_output_starts_at_the_frequencies_of_the_words() -> None:
    model = build_encoder(fixup_method="fixup_adam", fixup_output_bias="auto").eval()
    logits, _ = model(**masked())
    bias = model.lm_head.out_proj.bias
    torch.testing.assert_close(logits, bias.expand_as(logits))
    assert bias.exp().sum().item() == pytest.approx(1.0)
    assert build_encoder(fixup_method="fixup").lm_head.out_proj.bias is None


def test_a_new_head_leaves_all_else_as_it_is() -> None:
    model = build_encoder(fixup_scalar_lr_ratio=0.25)
    before = {name: value.clone() for name, value in trained(model).state_dict().items()}
    model.register_classification_head("one", 3)
    model.register_classification_head("two", 2, inner_dim=16)
    rates = {scalar.rate.item() for scalar in scalars(model)}
    assert rates == {0.25}
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert model.classification_heads["two"].dense.weight.shape == (16, 64)


def test_heads_of_checkpoints(caplog: pytest.LogCaptureFixture) -> None:
    """Those that are missing stay, those that do not fit are left out, or made where asked."""
    caplog.set_level(logging.INFO)
    saved = build_encoder()
    saved.register_classification_head("kept", 3)
    saved.register_classification_head("other", 2)
    state = trained(saved).state_dict()

    model = build_encoder()
    for name, classes in (("kept", 3), ("other", 4), ("new", 5)):
        model.register_classification_head(name, classes)
    own = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(dict(state))
    for name, value in model.state_dict().items():
        source = own if re.search(r"\.(other|new)\.", name) else state
        assert torch.equal(value, source[name]), name
    assert "head other, 64 -> 2, is left out: there is one of another size" in caplog.text
    for name in ("new", "other"):
        assert f"classification head {name} is not in the checkpoint" in caplog.text
    assert "head kept is not" not in caplog.text

    model = build_encoder()
    model.load_state_dict(dict(state))
    assert not model.classification_heads
    assert "head kept, 64 -> 3, is left out: there is none of this name" in caplog.text

    model = build_encoder(load_checkpoint_heads=True)
    model.load_state_dict(dict(state))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_autocast_gives_float32_logits_and_checkpointed_layers_the_same_gradients() -> None:
    inputs = masked()
    model, half = trained(build_encoder()), build_encoder(fixup_autocast="bf16").eval()
    half.load_state_dict(model.state_dict())
    exact, rounded = model(**inputs)[0], half(**inputs)[0]
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, exact)
    torch.testing.assert_close(rounded, exact, rtol=0.1, atol=0.1 * exact.abs().max().item())
    gradients = []
    for checkpoint in (False, True):
        torch.manual_seed(0)
        model = trained(build_encoder(checkpoint_activations=checkpoint, **NO_DROPOUT)).train()
        model(**inputs)[0].square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
        assert {"encoder_1", "encoder_embeddings", "output"} < layer_gradient_norms(model).keys()
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder_layers": 0}, "--encoder-layers must be at least 1"),
        ({"encoder_attention_heads": 3}, "does not divide --encoder-embed-dim 64"),
        ({"fixup_scalar_lr_ratio": 0.0}, "--fixup-scalar-lr-ratio"),
    ],
)
def test_impossible_sizes_are_one_clear_line(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_encoder(**options)


def test_its_options_are_those_of_an_encoder() -> None:
    parser = argparse.ArgumentParser()
    FixupEncoderModel.add_args(parser)
    flags = set(parser._option_string_actions)
    ours = {"--" + name.replace("_", "-") for name in get_type_hints(FixupOptions)}
    ours = {flag.replace("--", "--fixup-", 1) for flag in ours}
    of_removal = {"--fixup-from-layernorm", "--fixup-remove-norms"}
    of_removal |= {f"--fixup-removal-{part}" for part in ("updates", "anchor", "distil")}
    assert ours - flags == of_removal
    assert not [f for f in flags if re.search("decoder|adaptive|cross|target|normalize", f)]
    assert {"--encoder-layers", "--max-positions", "--pooler-dropout", "--dropout"} < flags
    assert build_encoder().removal is None


def test_pruned_layers_and_pretrained_embeddings(tmp_path: Path) -> None:
    pruned = build_encoder(encoder_layers=6, encoder_layers_to_keep="0,2,4")
    assert len(pruned.encoder.layers) == 3
    vectors = tmp_path / "vectors.txt"
    vectors.write_text("1 64\nw3 " + " ".join(["0.5"] * 64) + "\n")
    model = build_encoder(encoder_embed_path=str(vectors))
    model.register_classification_head(HEAD, 2)
    assert torch.equal(
        model.encoder.embed_tokens.weight[dictionary().index("w3")], torch.full((64,), 0.5)
    )
    kept = [row.name for row in model.fixup_report.rows if row.role == "kept"]
    assert kept == ["encoder.embed_tokens.weight"]


# Through fairseq's own commands.


def _write(folder: Path, splits: dict[str, int]) -> Iterator[tuple[Path, Path]]:
    """Sentences of pairs, a word and the next one: a masked word can be told from its neighbour.

    The label says which half of the words a sentence begins with.
    """
    rng = random.Random(1)
    for split, size in splits.items():
        starts = [[rng.randrange(0, len(WORDS), 2) for _ in range(4)] for _ in range(size)]
        sentences = (" ".join(f"{WORDS[i]} {WORDS[i + 1]}" for i in row) for row in starts)
        (folder / split).write_text("".join(f"{sentence}\n" for sentence in sentences))
        labels = (f"{int(row[0] < len(WORDS) // 2)}\n" for row in starts)
        (folder / f"{split}.label").write_text("".join(labels))
        yield folder / split, folder / f"{split}.label"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``words`` for masked_lm; ``sentences`` with input0 and label for sentence_prediction."""
    folder = tmp_path_factory.mktemp("encoder")
    train, valid = _write(folder, {"train": 200, "valid": 40})
    one = ("--only-source", "--workers", "1", "--destdir")
    texts = ("--trainpref", train[0], "--validpref", valid[0])
    labels = ("--trainpref", train[1], "--validpref", valid[1])
    fairseq("preprocess", *texts, *one, folder / "words")
    known = ("--srcdict", folder / "words" / "dict.txt")
    fairseq("preprocess", *texts, *known, *one, folder / "sentences" / "input0")
    fairseq("preprocess", *labels, *one, folder / "sentences" / "label")
    return folder


def _masked_lm(data: Path, save_dir: Path, *more: object) -> list[object]:
    flags = ("--arch", "transformer_fixup_encoder_tiny", "--dropout", "0", "--max-tokens", "400")
    task = ("--task", "masked_lm", "--criterion", "masked_lm", "--tokens-per-sample", "16")
    return train_flags(data / "words", save_dir, *task, "--sample-break-mode", "eos", *flags, *more)


LEARN = ("--max-epoch", "8", "--lr", "0.01")


@pytest.fixture(scope="module")
def pretrained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 8 epochs on masked words."""
    folder = tmp_path_factory.mktemp("pretrained")
    done = fairseq("train", *_masked_lm(data, folder, *LEARN))
    (folder / "log").write_text(done.stdout + done.stderr)
    return folder


def _logged(text: str, key: str) -> list[float]:
    rows = map(json.loads, re.findall(r"\{\".*\}", text))
    return [float(row[key]) for row in rows if key in row]


def _weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint, weights_only=True)["model"]


def test_masked_words_are_learnt(pretrained: Path) -> None:
    losses = _logged((pretrained / "log").read_text(), "valid_loss")
    assert losses[-1] < losses[0] - 0.5


def test_a_run_goes_on_bit_for_bit(data: Path, pretrained: Path, tmp_path: Path) -> None:
    """From the middle of the run."""
    shutil.copy(pretrained / "checkpoint5.pt", tmp_path / "checkpoint_last.pt")
    fairseq("train", *_masked_lm(data, tmp_path, *LEARN))
    ours, theirs = (_weights(f / "checkpoint_last.pt") for f in (tmp_path, pretrained))
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    early = _weights(pretrained / "checkpoint5.pt")
    assert not torch.equal(early["lm_head.dense.weight"], ours["lm_head.dense.weight"])


def _fine_tune(data: Path, save_dir: Path, *more: object) -> list[object]:
    """As fairseq's documents fine-tune RoBERTa on GLUE."""
    arch = ("--arch", "transformer_fixup_encoder_tiny", "--dropout", "0")
    task = ("--task", "sentence_prediction", "--criterion", "sentence_prediction")
    classes = ("--num-classes", "2", "--init-token", "0", "--max-positions", "16")
    best = ("--best-checkpoint-metric", "accuracy", "--maximize-best-checkpoint-metric")
    flags = (*task, *arch, *classes, *best, "--max-tokens", "400", "--lr", "0.002", *more)
    return train_flags(data / "sentences", save_dir, *flags)


RESET = ("--reset-optimizer", "--reset-dataloader", "--reset-meters")


def test_sentences_are_learnt_from_its_checkpoint(
    data: Path, pretrained: Path, tmp_path: Path
) -> None:
    checkpoint = ("--restore-file", pretrained / "checkpoint_last.pt", *RESET)
    done = fairseq("train", *_fine_tune(data, tmp_path, "--max-epoch", "10", *checkpoint))
    log = done.stdout + done.stderr
    assert _logged(log, "train_loss")[0] == pytest.approx(1, abs=0.1)  # in bits, of two classes
    assert _logged(log, "valid_accuracy")[-1] > 80
    assert f"head {HEAD} is not in the checkpoint" in log
    weights, before = (_weights(f / "checkpoint_last.pt") for f in (tmp_path, pretrained))
    new = {key for key in weights if key not in before}
    assert new and all(key.startswith(f"classification_heads.{HEAD}.") for key in new)
    # What is not trained is what was loaded: the weights are the checkpoint's.
    assert torch.equal(weights["lm_head.dense.weight"], before["lm_head.dense.weight"])


def test_it_is_not_exported(data: Path, pretrained: Path) -> None:
    with pytest.raises(UserError, match="of the task masked_lm cannot be exported: only") as error:
        load(pretrained / "checkpoint_last.pt", data / "words")
    assert "\n" not in str(error.value)
