"""Every method of the registry is exported with equal translations, or refused with the reason."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fairseq.sequence_generator import SequenceGenerator

from fixup_core import METHODS
from fixup_core.rules.norms import POINTWISE
from fixup_core.rules.placed import ChannelMultiplier
from fixup_mt.errors import UserError
from fixup_mt.serving import export, onnx_model
from tests.mt.helpers import build, dictionary, task, trained

ctranslate2 = pytest.importorskip("ctranslate2")
pytest.importorskip("onnxruntime")
SIDES = task(dictionary(30, "s"), dictionary(35, "t"))
SHORTEST, LONGEST = 2, 12
SENTENCES = [["s1", "s7", "s3"], ["s20"], ["s4", "s4", "s9", "s11", "s2"]]


def _export(model: Any, place: Path, form: str) -> None:
    arguments = {"output": place, "format": form, "quantization": None, "sentencepiece": None}
    export.export(model, SIDES, SimpleNamespace(**arguments))


def _by_fairseq(model: Any) -> list[list[str]]:
    """What fairseq-generate gives, the likeliest piece at every step."""
    words = SIDES.target_dictionary
    generator = SequenceGenerator(
        [model], words, beam_size=1, min_len=SHORTEST, max_len_a=0, max_len_b=LONGEST
    )
    found = []
    for sentence in SENTENCES:
        numbers = [SIDES.source_dictionary.index(word) for word in sentence]
        tokens = torch.tensor([[*numbers, SIDES.source_dictionary.eos()]])
        net_input = {"src_tokens": tokens, "src_lengths": torch.tensor([tokens.size(1)])}
        best = generator.generate([model], {"net_input": net_input})[0][0]["tokens"].tolist()
        found.append([words.symbols[i] for i in best[:-1]])
    return found


def _by_ctranslate2(place: Path) -> list[list[str]]:
    translator = ctranslate2.Translator(str(place), compute_type="float32")
    options = {
        "beam_size": 1,
        "min_decoding_length": SHORTEST,
        "max_decoding_length": LONGEST,
    }
    never = {"suppress_sequences": [["<blank>"]]}  # fairseq never gives padding
    found = translator.translate_batch(SENTENCES, **options, **never)
    return [result.hypotheses[0] for result in found]


def _by_onnx(place: Path) -> list[list[str]]:
    encoder, decoder = (onnx_model._session(place, stack) for stack in ("encoder", "decoder"))
    words = (place / "target.txt").read_text("utf-8").split("\n")
    found = []
    for sentence in SENTENCES:
        tokens = onnx_model._numbers(place, "encoder", [sentence]).numpy()
        memory, mask = encoder.run(None, {"tokens": tokens})
        newest, past, pieces = torch.tensor([2]).numpy(), memory[..., :0, :], []
        while len(pieces) < LONGEST:
            inputs = {"tokens": newest, "past": past, "memory": memory, "words": mask}
            logits, past = decoder.run(None, inputs)
            logits[:, 1] = -1e9
            if len(pieces) < SHORTEST:
                logits[:, 2] = -1e9
            newest = logits.argmax(axis=1)
            if newest[0] == 2:
                break
            pieces.append(words[newest[0]])
        found.append(pieces)
    return found


BY = {"ctranslate2": _by_ctranslate2, "onnx": _by_onnx}


@pytest.mark.parametrize("form", ["ctranslate2", pytest.param("onnx", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_exported_with_equal_translations_or_refused(
    name: str, form: str, tmp_path: Path
) -> None:
    method, place = METHODS[name], tmp_path / "out"
    if method.only == "ResNets" or method.unit_variance:
        with pytest.raises(UserError, match=f"{name!r} is not defined for Transformers"):
            build(on=SIDES, fixup_method=name)
        return
    torch.manual_seed(0)
    # Larger ones add up to logits of thousands where a method multiplies branches by c / L > 1.
    model = trained(build(on=SIDES, fixup_method=name), size=0.03)
    if form == "ctranslate2" and method.norm in POINTWISE:
        with pytest.raises(UserError, match=f"{name} has .* has not: give --format onnx"):
            _export(model, place, form)
        assert not list(tmp_path.iterdir())
        return
    if name == "none":
        # He's start without norms: logits of thousands, of which float32 has too few digits.
        with pytest.raises(UserError, match=f"log-probabilities of {form} differ"):
            _export(model, place, form)
        return
    _export(model, place, form)
    expected = _by_fairseq(model)
    assert BY[form](place) == expected
    assert all(pieces for pieces in expected)


def test_what_ctranslate2_lacks_is_exported_as_onnx(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = trained(build(on=SIDES, fixup_method="dyt"))
    _export(model, tmp_path / "out", "onnx")
    assert _by_onnx(tmp_path / "out") == _by_fairseq(model)


@pytest.mark.parametrize("name", ["deepnorm", "admin", "dyt", "derf"])
def test_what_fairseqs_transformer_has_no_weights_for_is_refused(name: str, tmp_path: Path) -> None:
    model = build(on=SIDES, fixup_method=name).eval()
    with pytest.raises(UserError, match=f"{name} has .* has no weights: give --format onnx"):
        _export(model, tmp_path / "out.pt", "fairseq")
    assert not list(tmp_path.iterdir())


def test_a_shortcut_that_is_off_is_refused(tmp_path: Path) -> None:
    """The stream would have to be divided by 0."""
    model = trained(build(on=SIDES, fixup_method="admin"))
    vectors = [m for m in model.modules() if isinstance(m, ChannelMultiplier)]
    with torch.no_grad():
        vectors[3].weight[5] = 0.0
    with pytest.raises(UserError, match="a factor on a shortcut is exactly 0"):
        _export(model, tmp_path / "out", "onnx")
