"""Folding and export of Transformers, and serving what was exported."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fixup_mt.__main__ import main
from fixup_mt.errors import UserError
from fixup_mt.serving import ctranslate2_model, export, onnx_model, state_dict, translate
from fixup_mt.serving.fold import fold_transformer, positions
from fixup_mt.serving.plain import PlainDecoderStep, PlainEncoder
from tests.mt.helpers import batch, build, build_lm, dictionary, task, trained

pytest.importorskip("ctranslate2")

MODELS = {
    "tiny": {},
    "other depths": {"encoder_layers": 1, "decoder_layers": 3},
    "learned positions": {"encoder_learned_pos": True, "decoder_learned_pos": True},
    "no positions": {"no_token_positional_embeddings": True},
    "no embedding scale": {"no_scale_embedding": True},
    "gelu": {"activation_fn": "gelu"},
    "tied, scale": {"share_decoder_input_output_embed": True, "fixup_tied_output": "scale"},
    "tied, gain": {"share_all_embeddings": True, "fixup_tied_output": "gain"},
}
SIDES = task(dictionary(30, "s"), dictionary(35, "t"))


def _arguments(output: Path, **more) -> SimpleNamespace:
    defaults = {"quantization": None, "sentencepiece": None, "format": "ctranslate2"}
    return SimpleNamespace(output=output, **(defaults | more))


def _model(name: str):
    joined = MODELS[name].get("share_all_embeddings")
    sides = task() if joined else SIDES
    torch.manual_seed(0)  # of the weights that ``trained`` adds to
    return trained(build(on=sides, **MODELS[name])), sides


ENGINES = {"ctranslate2": ctranslate2_model, "onnx": onnx_model}


WRITTEN = [("ctranslate2", name) for name in MODELS]
WRITTEN += [("onnx", name) for name in ("other depths", "learned positions", "tied, gain")]


@pytest.mark.parametrize(("engine", "name"), WRITTEN)
def test_an_engine_gives_the_models_log_probabilities(
    name: str, engine: str, tmp_path: Path
) -> None:
    if engine == "onnx":
        pytest.importorskip("onnxruntime")
    model, sides = _model(name)
    export.export(model, sides, _arguments(tmp_path / "out", format=engine))
    theirs = ENGINES[engine].log_probabilities
    assert export.difference(theirs, tmp_path / "out", model, sides) < 2e-4
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_folded_weights_are_held_against_the_models_outputs(tmp_path: Path, monkeypatch) -> None:
    model, sides = _model("tiny")
    export.export(model, sides, _arguments(tmp_path / "good.pt", format="fairseq"))
    wrong = {name: 1.01 * weight for name, weight in fold_transformer(model).items()}
    monkeypatch.setattr(state_dict, "fold_transformer", lambda _: wrong)
    with pytest.raises(UserError, match="log-probabilities of fairseq differ from the network's"):
        export.export(model, sides, _arguments(tmp_path / "bad.pt", format="fairseq"))
    assert [path.name for path in tmp_path.iterdir()] == ["good.pt"]


def test_overwriting_a_folder_spares_files_that_are_not_an_exports(tmp_path: Path) -> None:
    model, sides = _model("tiny")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "diary.txt").write_text("dear diary")
    with pytest.raises(UserError, match=r"holds other files \(diary\.txt\)"):
        export.export(model, sides, _arguments(tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["diary.txt"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_plain_decoder_goes_step_by_step_over_padded_sentences() -> None:
    model = trained(build())
    inputs = batch()
    weights = fold_transformer(model)
    encoder = PlainEncoder(model, weights, positions(model.encoder), pad=1)
    step = PlainDecoderStep(model, weights, positions(model.decoder))
    with torch.no_grad():
        expected, _ = model(**inputs)
        memory, words = encoder(inputs["src_tokens"])
        past = memory[:, :, :, :, :0]
        for place, tokens in enumerate(inputs["prev_output_tokens"].unbind(1)):
            logits, past = step(tokens, past, memory, words)
            real = tokens != 1
            torch.testing.assert_close(logits[real], expected[real, place], rtol=1e-4, atol=1e-4)


def test_a_norm_that_is_no_identity_would_be_noticed(tmp_path: Path, monkeypatch) -> None:
    model, sides = _model("tiny")
    monkeypatch.setattr(ctranslate2_model, "EPSILON", 1e-6)
    with pytest.raises(
        UserError, match="log-probabilities of ctranslate2 differ from the network's by up to"
    ):
        export.export(model, sides, _arguments(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("quantization", ["int8", "int16"])
def test_quantised_weights_are_near(quantization: str, tmp_path: Path) -> None:
    model, sides = _model("tiny")
    with torch.no_grad():
        model.decoder.output_projection.weight.mul_(0.25)  # noise makes logits of +-20
    for name, kind in (("whole", None), ("small", quantization)):
        export.export(model, sides, _arguments(tmp_path / name, quantization=kind))
    sizes = [(tmp_path / name / "model.bin").stat().st_size for name in ("whole", "small")]
    assert sizes[1] < 0.6 * sizes[0]
    theirs = ctranslate2_model.log_probabilities
    assert export.difference(theirs, tmp_path / "small", model, sides) < 0.5


@pytest.mark.parametrize("method", ["fixup", "prenorm", "postnorm"])
def test_folded_weights_are_those_of_a_plain_transformer(method: str) -> None:
    """Fairseq's own model gives the same logits; for a method without norms its are taken out."""
    sides = SIDES
    learned = {"encoder_learned_pos": True, "decoder_learned_pos": True}
    model = trained(build(on=sides, fixup_method=method, **learned))
    sizes = {
        name: getattr(getattr(model.cfg, side), size)
        for side in ("encoder", "decoder")
        for size in ("layers", "embed_dim", "ffn_embed_dim", "attention_heads")
        for name in (f"{side}_{size}",)
    }
    plain = build(
        "transformer",
        on=sides,
        encoder_normalize_before=method != "postnorm",
        decoder_normalize_before=method != "postnorm",
        **sizes,
        **learned,
    ).eval()
    for module in plain.modules() if method == "fixup" else ():
        for name in ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"):
            if hasattr(module, name):
                setattr(module, name, torch.nn.Identity())
        if hasattr(module, "layer_norm"):
            module.layer_norm = None
    output = plain.decoder.output_projection
    output.bias = torch.nn.Parameter(torch.zeros(output.out_features))
    missing, unexpected = plain.load_state_dict(fold_transformer(model), strict=False)
    assert not unexpected and all("version" in n or "_float_tensor" in n for n in missing)
    source, target = torch.randint(4, 30, (2, 6)), torch.randint(4, 30, (2, 5))
    inputs = (source, torch.full((2,), 6), target)
    with torch.no_grad():
        torch.testing.assert_close(plain(*inputs)[0], model(*inputs)[0], rtol=1e-4, atol=1e-4)


def test_folded_weights_are_copies() -> None:
    """Also those that no scalar multiplies."""
    model, _ = _model("tiny")
    before = {name: weight.clone() for name, weight in fold_transformer(model).items()}
    for weight in fold_transformer(model).values():
        weight.fill_(7.0)
    after = fold_transformer(model)
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


def test_a_slot_with_an_unknown_module_is_refused() -> None:
    model, _ = _model("tiny")
    model.decoder.layers[1].final_layer_norm = torch.nn.GroupNorm(1, 64)
    with pytest.raises(UserError, match="a GroupNorm cannot be folded"):
        fold_transformer(model)


def test_norms_in_some_branches_alone_are_refused(tmp_path: Path) -> None:
    """CTranslate2 has one kind of norm for a model."""
    model, sides = _model("tiny")
    model.decoder.layers[1].final_layer_norm = torch.nn.LayerNorm(64)
    with pytest.raises(UserError, match="one kind of norm for a model, and this one has several"):
        export.export(model, sides, _arguments(tmp_path / "out"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"adaptive_softmax_cutoff": [10, 20]}, "--adaptive-softmax-cutoff cannot be exported"),
        ({"decoder_output_dim": 8}, "--decoder-output-dim cannot be exported exactly"),
        ({"quant_noise_pq": 0.1}, "--quant-noise-pq cannot be exported exactly"),
        ({"no_cross_attention": True}, "--no-cross-attention cannot be exported exactly"),
        ({"cross_self_attention": True}, "--cross-self-attention cannot be exported exactly"),
        ({"activation_fn": "linear"}, "CTranslate2 has no activation function linear"),
        ({"decoder_attention_heads": 1}, "as many attention heads in the encoder"),
    ],
)
def test_what_cannot_be_exported_is_refused(options: dict, says: str, tmp_path: Path) -> None:
    model = build(on=SIDES, **options).eval()
    with pytest.raises(UserError, match=says):
        export.export(model, SIDES, _arguments(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_a_model_in_training_is_refused() -> None:
    with pytest.raises(UserError, match=r"call eval\(\) first"):
        fold_transformer(build())


LANGUAGE_MODELS = {
    "tiny": {},
    "untied": {"share_decoder_input_output_embed": False},
    "learned positions": {"decoder_learned_pos": True},
}


@pytest.mark.parametrize("form", ["onnx", "fairseq"])
@pytest.mark.parametrize("method", ["fixup", "prenorm"])
def test_a_language_model_is_written_as_a_decoder_alone(
    form: str, method: str, tmp_path: Path
) -> None:
    model, place = trained(build_lm(fixup_method=method)), tmp_path / "out"
    export.export(model, task(), _arguments(place, format=form))
    theirs = export.FORMATS[form].module.log_probabilities
    assert export.difference(theirs, place, model, task()) < 2e-4
    if form == "onnx":
        assert {file.name for file in place.iterdir()} == {"decoder.onnx", "target.txt"}


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_a_language_model_is_one_for_the_engines_generator(name: str, tmp_path: Path) -> None:
    import ctranslate2

    model = trained(build_lm(**LANGUAGE_MODELS[name]))
    sides, folder = task(), tmp_path / "out"
    export.export(model, sides, _arguments(folder))
    assert export.difference(ctranslate2_model.log_probabilities, folder, model, sides) < 2e-4
    generator = ctranslate2.Generator(str(folder))
    found = generator.generate_batch([["</s>"]], max_length=5, include_prompt_in_result=False)
    best, tokens = [], torch.tensor([[2]])
    with torch.no_grad():
        for _ in range(5):
            best.append(int(model(tokens)[0][0, -1].argmax()))
            tokens = torch.tensor([[2, *best]])
    expected = [sides.target_dictionary.symbols[i] for i in best]
    assert found[0].sequences[0] == expected[: len(found[0].sequences[0])] and expected


def test_what_a_language_model_cannot_be_is_said(tmp_path: Path, capsys) -> None:
    model = build_lm().eval()
    characters = build_lm(character_embeddings=True).eval()
    with pytest.raises(UserError, match="--character-embeddings cannot be exported exactly"):
        fold_transformer(characters)
    export.export(model, task(), _arguments(tmp_path / "lm"))
    assert main(["translate", "--model", str(tmp_path / "lm")]) == 2
    assert "holds a language model, which does not translate" in capsys.readouterr().err


def test_a_model_of_another_task_is_refused_by_name(data_bin: Path) -> None:
    legacy = SimpleNamespace(task="translation_multi_simple_epoch")
    with pytest.raises(UserError, match="of the task translation_multi_simple_epoch cannot be"):
        export._task(legacy, data_bin)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served") / "model"
    model, sides = _model("tiny")
    export.export(model, sides, _arguments(folder))
    return folder


def _translate(monkeypatch, capsys, text: bytes, *flags: object) -> tuple[int, list[str], str]:
    """Status, lines and errors of ``translate`` with ``text`` at standard input."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), encoding="ascii"))
    status = main(["translate", *map(str, flags)])
    said = capsys.readouterr()
    return status, said.out.split("\n")[:-1], said.err


def test_lines_come_out_as_they_went_in(served: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    lines = ["s1 s2 s3", "", "s4", "s5 unheard-of s6 s7"]
    (tmp_path / "in").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(translate, "LINES", 3)
    line = ["translate", "--model", str(served), "--max-length", "12"]
    assert main([*line, "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out")]) == 0
    found = (tmp_path / "out").read_text().splitlines()
    assert len(found) == 4 and found[1] == "" and all(found[i] for i in (0, 2, 3))
    text = "\n".join(reversed(lines)).encode()
    _, out, _ = _translate(monkeypatch, capsys, text, *line[1:])
    assert out == found[::-1]


@pytest.mark.parametrize("place", ["file", "stdin"])
def test_the_newline_alone_ends_a_line(
    place: str, served: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    text = "s1 s2\rs3 s4\u2028s5\ns6 s7\r\n".encode()
    (tmp_path / "in").write_bytes(text)
    flags = ("--model", served, *(("--input", tmp_path / "in") if place == "file" else ()))
    status, out, _ = _translate(monkeypatch, capsys, text, *flags)
    plain = _translate(monkeypatch, capsys, b"s1 s2 s3 s4 s5\ns6 s7\n", "--model", served)
    assert status == 0 and len(out) == 2 and out == plain[1]


def test_a_line_that_cannot_be_translated_is_named_and_the_others_are(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    sides = SIDES
    model = trained(build(on=sides, encoder_learned_pos=True, max_source_positions=9))
    export.export(model, sides, _arguments(tmp_path / "model"))
    flags = ("--model", tmp_path / "model", "--max-length", "7")
    capsys.readouterr()
    good = _translate(monkeypatch, capsys, b"s1 s2\n" + b"s4 " * 8 + b"\ns3\n", *flags)
    assert good[0] == 0 and all(good[1])
    text = b"s1 s2\n\xff s4\n" + b"s4 " * 8 + b"\n" + b"s4 " * 9 + b"\ns3\n"
    status, out, error = _translate(monkeypatch, capsys, text, *flags)
    assert status == 2 and out == [good[1][0], "", good[1][1], "", good[1][2]]
    says = "left empty: line 2 (no UTF-8 text), line 4 (9 pieces; the model takes 8)"
    assert says in error and "Traceback" not in error


def test_no_piece_of_a_long_line_is_dropped_without_a_word(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    """The engine takes 1,024 pieces of a line, and says nothing of the others."""
    model = trained(build(on=SIDES, max_source_positions=1400, max_target_positions=6))
    export.export(model, SIDES, _arguments(tmp_path / "model"))
    flags = ("--model", tmp_path / "model", "--beam", "1")
    long = b"s1 s2 s3 " * 400
    seen: list[dict] = []
    engine = translate.load(translate_args(tmp_path / "model"))
    whole, cut, left_out = (
        engine.score_batch([words], [["t1"]], **options)[0].log_probs
        for words, options in (
            (long.decode().split(), {"max_input_length": 0}),
            (long.decode().split()[:1023], {"max_input_length": 0}),
            (long.decode().split(), {}),
        )
    )
    assert left_out == cut != whole
    capsys.readouterr()
    monkeypatch.setattr(translate, "load", lambda args: _Watched(engine, seen))
    assert _translate(monkeypatch, capsys, long + b"\n", *flags)[0] == 0
    assert seen[0]["max_input_length"] == 0 and len(seen[0]["source"][0]) == 1200
    assert seen[0]["max_decoding_length"] == 5, "no more than the decoder has positions for"
    status, out, error = _translate(monkeypatch, capsys, long * 2 + b"\ns1\n", *flags)
    assert status == 2 and out[0] == "" and out[1]
    assert "line 1 (2400 pieces; the model takes 1399)" in error


class _Watched:
    def __init__(self, engine, seen: list[dict]) -> None:
        self.engine, self.seen = engine, seen

    def translate_batch(self, source, **options):
        self.seen.append({"source": source, **options})
        return self.engine.translate_batch(source, **options)


def translate_args(model: Path) -> SimpleNamespace:
    return SimpleNamespace(model=model, device="cpu", compute_type="default", threads=1)


def test_a_translation_that_was_stopped_is_named(served: Path, monkeypatch, capsys) -> None:
    text = b"s1 s2 s3\ns4 s5\n"
    status, out, error = _translate(monkeypatch, capsys, text, "--model", served, "--max-length", 1)
    assert status == 0 and all(len(line.split()) == 1 for line in out)
    assert "stopped at 1 pieces (see --max-length): line 1, line 2" in error


def test_a_closed_stdin_is_one_line(served: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["translate", "--model", str(served)]) == 2
    assert capsys.readouterr().err == "error: stdin is closed: give --input FILE\n"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--model", "nowhere"], "nowhere holds no exported model"),
        (["--model", __file__], "is a file: give the folder"),
        (["--input", "nothing.txt"], "nothing.txt does not exist"),
        (["--compute-type", "int3"], "CTranslate2 cannot load"),
        (["--beam", "0"], "--beam must be at least 1"),
        (["--threads", "-1"], "--threads must be at least 0"),
        (["--input", "same", "--output", "same"], "--output same would overwrite the input"),
    ],
)
def test_serving_tells_what_is_wrong(flags: list[str], says: str, served: Path, capsys) -> None:
    assert main(["translate", "--model", str(served), *flags]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def test_a_trained_checkpoint_is_exported_by_the_command(
    trained_run: tuple[Path, Path], tmp_path: Path, capsys
) -> None:
    checkpoint, data_bin = trained_run
    line = ["export", "--checkpoint", str(checkpoint), "--data-bin", str(data_bin)]
    assert main([*line, "--output", str(tmp_path / "ct2")]) == 0
    assert "the log-probabilities of ctranslate2 differ by" in capsys.readouterr().out
    assert main([*line, "--output", str(tmp_path / "ct2"), "--overwrite"]) == 0
    capsys.readouterr()
    assert main([*line, "--output", str(tmp_path / "plain.pt"), "--format", "fairseq"]) == 0
    assert "the log-probabilities of fairseq differ by" in capsys.readouterr().out
    kept = "{'encoder_layers_to_keep': '1', 'decoder_layers_to_keep': '0'}"
    pruned = ["--format", "fairseq", "--model-overrides", kept]
    assert main([*line, "--output", str(tmp_path / "one.pt"), *pruned]) == 0
    capsys.readouterr()
    state = torch.load(tmp_path / "one.pt", weights_only=True)["model"]
    assert not any(name.startswith("encoder.layers.1.") for name in state)
    state = torch.load(tmp_path / "plain.pt", weights_only=True)["model"]
    assert any(name.startswith("encoder.layers.1.") for name in state)
    assert "decoder.layers.0.encoder_attn.k_proj.bias" in state
    for flags, says in (
        (["--output", str(tmp_path / "ct2")], "exists: give another --output, or add --overwrite"),
        (["--output", "x", "--checkpoint", "no.pt"], "no.pt does not exist"),
        (["--output", "x", "--data-bin", "no"], "no does not exist"),
        (["--output", "x", "--format", "fairseq", "--quantization", "int8"], "belongs to --format"),
        (["--output", "x", "--model-overrides", "{bad"], "'{bad' is not a Python literal"),
        (["--output", "x", "--model-overrides", "3"], "'3': give a dictionary"),
        (
            ["--output", "x", "--model-overrides", "{'decoder_layers_to_keep': '0'}"],
            "has decoder_layers_to_keep alone",
        ),
    ):
        assert main([*line, *flags]) == 2
        assert says in capsys.readouterr().err


@pytest.fixture
def trained_run(request: pytest.FixtureRequest) -> tuple[Path, Path]:
    folder: Path = request.getfixturevalue("trained")
    return folder / "checkpoint_last.pt", request.getfixturevalue("data_bin")
