"""``--fixup-from-layernorm`` and ``--fixup-remove-norms``: models, and fairseq's commands."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fixup_mt.__main__ import main
from fixup_mt.errors import UserError
from fixup_mt.model.removing import load_layernorm_
from fixup_mt.serving.fold import fold_transformer
from tests.conftest import fairseq, train_flags
from tests.mt.helpers import batch, build, build_lm

SIZES = {
    f"{side}_{size}": value
    for side in ("encoder", "decoder")
    for size, value in {
        "layers": 2,
        "embed_dim": 16,
        "ffn_embed_dim": 32,
        "attention_heads": 2,
    }.items()
}
METHODS = {"prenorm": True, "postnorm": False}


def _pair(method: str, **options: Any) -> tuple[Any, Any]:
    """Fairseq's own Transformer, its weights scattered, and one of ours on its way."""
    torch.manual_seed(0)
    before = {f"{side}_normalize_before": METHODS[method] for side in ("encoder", "decoder")}
    theirs = build("transformer", **SIZES, **before)
    ours = build(**SIZES, fixup_method=method, **options)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.1 * torch.rand(parameter.shape)
    load_layernorm_(ours, theirs.state_dict(), "file.pt")
    return theirs, ours


REMOVAL = {"fixup_remove_norms": "one_by_one", "fixup_removal_updates": 30}


@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")  # fairseq's
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("options", [{}, REMOVAL], ids=["with norms", "on their way"])
def test_the_start_is_fairseqs_own_network(method: str, options: Any) -> None:
    theirs, ours = _pair(method, **options)
    with torch.no_grad():
        expected, found = (net.eval()(**batch())[0] for net in (theirs, ours))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_order_of_turns() -> None:
    """Where norms stand before branches, those of self-attention go side by side."""
    turns = [str(turn) for turn in _pair("prenorm", **REMOVAL)[1].removal.schedule.turns]
    attention = [
        f"{stack}.layers.{i}.self_attn_layer_norm"
        for stack in ("encoder", "decoder")
        for i in (0, 1)
    ]
    assert turns[-9:-5] == [f"{path}, queries and keys" for path in attention]
    assert turns[-5:-1] == [f"{path}, values" for path in attention]
    assert turns[-1] == "decoder.layer_norm" and "encoder.layer_norm" in turns[:-9]
    behind = _pair("postnorm", **REMOVAL)[1].removal.schedule.turns
    assert all(turn.sides == (0, 1) for turn in behind)


def _gone(method: str, **options: Any) -> Any:
    _, ours = _pair(method, **(REMOVAL | options))
    ours.train()
    ours(**batch())
    ours.set_num_updates(30)
    assert ours.removal.done
    return ours.eval()


@pytest.mark.parametrize("method", METHODS)
def test_values_see_the_other_side(method: str) -> None:
    _, ours = _pair(method, **REMOVAL)
    ours.train()
    ours(**batch())
    norm = ours.removal.norms.get("encoder.layers.0.self_attn_layer_norm")
    if norm is None:
        norm = next(iter(ours.removal.norms.values()))
    norm.set_gates_(0.0, 1.0)
    seen: dict[str, Any] = {}
    attention = ours.encoder.layers[0].self_attn
    for name in ("q_proj", "v_proj"):
        attention.get_submodule(name).register_forward_pre_hook(
            lambda m, args, name=name: seen.update({name: args[0]})
        )
    norm.register_forward_pre_hook(lambda m, args: seen.update(x=args[0]))
    ours(**batch())
    if method == "prenorm":
        torch.testing.assert_close(seen["q_proj"], norm.plain()(seen["x"]))
        torch.testing.assert_close(seen["v_proj"], norm.norm(seen["x"]))
    else:
        assert seen["q_proj"] is seen["v_proj"]


@pytest.mark.parametrize("method", METHODS)
def test_a_model_without_norms_is_folded(method: str) -> None:
    ours = _gone(method)
    with torch.no_grad():
        for norm in ours.removal.norms.values():
            norm.statistics.size.mul_(1.3)
            norm.statistics.centre.add_(0.1)
    weights = fold_transformer(ours)
    assert not any("layer_norm" in name for name in weights)
    before = {f"{side}_normalize_before": True for side in ("encoder", "decoder")}
    plain = build("transformer", **SIZES, **before).eval()
    for module in plain.modules():
        for name in ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"):
            if hasattr(module, name):
                setattr(module, name, torch.nn.Identity())
        if hasattr(module, "layer_norm"):
            module.layer_norm = None
    bias = weights.pop("decoder.output_projection.bias")
    missing, unexpected = plain.load_state_dict(weights, strict=False)
    assert not unexpected and all("version" in n or "_float_tensor" in n for n in missing)
    sentences = {name: part[:1] for name, part in batch().items()}
    with torch.no_grad():
        expected, found = (net(**sentences)[0] for net in (ours, plain))
    torch.testing.assert_close(found + bias, expected, rtol=1e-4, atol=1e-4)


def test_a_model_is_not_folded_before_the_end() -> None:
    _, ours = _pair("prenorm", **REMOVAL)
    ours.train()
    ours(**batch())
    ours.set_num_updates(15)
    with pytest.raises(UserError, match=r"norms are not gone yet: train the model to the end of"):
        fold_transformer(ours.eval())


def test_methods_without_norms_are_refused() -> None:
    with pytest.raises(
        UserError, match=r"takes layer norms out of a model of .*prenorm or postnorm"
    ):
        build(**SIZES, **REMOVAL)
    with pytest.raises(UserError, match="3 steps are too few for the schedule"):
        build(**SIZES, **(REMOVAL | {"fixup_removal_updates": 3}), fixup_method="prenorm")


@pytest.mark.parametrize("more", [{"encoder_layers": 3}, {"decoder_ffn_embed_dim": 64}])
def test_weights_of_another_architecture_are_refused(more: Any) -> None:
    theirs = build("transformer", **(SIZES | more))
    ours = build(**SIZES, fixup_method="postnorm")
    before = {n: v.clone() for n, v in ours.state_dict().items()}
    with pytest.raises(UserError, match="another architecture, or of other dictionaries"):
        load_layernorm_(ours, theirs.state_dict(), "file.pt")
    assert all(torch.equal(v, before[n]) for n, v in ours.state_dict().items())


def test_a_language_model_loses_its_norms() -> None:
    model = build_lm(fixup_method="prenorm", **REMOVAL)
    words = batch()["prev_output_tokens"]
    model.train()(words)
    model.set_num_updates(30)
    assert model.removal.done and model.removal.anchor is not None
    assert not any("layer_norm" in name for name in fold_transformer(model.eval()))


# fairseq's commands.

TINY = (
    *("--encoder-layers", 2, "--decoder-layers", 2, "--encoder-embed-dim", 16),
    *("--decoder-embed-dim", 16, "--encoder-ffn-embed-dim", 32, "--decoder-ffn-embed-dim", 32),
    *("--encoder-attention-heads", 2, "--decoder-attention-heads", 2),
    *("--share-all-embeddings",),
)


LONGEST = 12
"""Pieces of a translation: so small a model hardly finds an end."""
SCHEDULES = {"prenorm": "one_by_one", "postnorm": "taper"}


@pytest.fixture(scope="module", params=METHODS)
def layernorm(request: Any, data_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a trained Transformer of fairseq's own."""
    folder = tmp_path_factory.mktemp("layernorm") / request.param
    norms = ("--encoder-normalize-before", "--decoder-normalize-before")
    more: tuple[object, ...] = ("--arch", "transformer", "--max-epoch", 3, "--lr", 0.01, *TINY)
    more += norms if request.param == "prenorm" else ()
    fairseq("train", *train_flags(data_bin, folder, *more))
    return folder / "checkpoint_last.pt"


@pytest.fixture
def prenorm(layernorm: Path) -> Path:
    """The same of pre-norm alone, for what is the same for both."""
    if layernorm.parent.name == "postnorm":
        pytest.skip("the same for both")
    return layernorm


def _remove(data_bin: Path, start: Path, save_dir: Path, *more: object, **options: Any) -> Any:
    flags = {
        "--arch": "transformer_fixup",
        "--fixup-from-layernorm": start,
        "--fixup-remove-norms": SCHEDULES.get(start.parent.name, "taper"),
        "--fixup-removal-updates": 16,
        "--max-update": 20,
        "--max-epoch": 50,
    }
    given = {str(flag) for flag in more}
    rest = [p for flag, value in flags.items() if flag not in given for p in (flag, value)]
    return fairseq("train", *train_flags(data_bin, save_dir, *rest, *more), **options)


@pytest.fixture(scope="module")
def without(layernorm: Path, data_bin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run in which its norms went."""
    folder = tmp_path_factory.mktemp("without") / layernorm.parent.name
    done = _remove(data_bin, layernorm, folder, "--save-interval-updates", 9)
    logged = re.findall(r'"norms_left": "([^"]+)"', done.stdout + done.stderr)
    shares = [float(share) for share in logged]
    assert shares[-1] == 0 and max(shares) > 3 and "anchor" in done.stdout + done.stderr
    return folder


def _generate(data_bin: Path, checkpoint: Path) -> list[str]:
    """The translations of the test sentences, in their order."""
    flags = ("--user-dir", "fixup_mt", "--path", checkpoint, "--cpu", "--beam", 1)
    flags += ("--max-len-a", 0, "--max-len-b", LONGEST)
    done = fairseq("generate", data_bin, *flags, "--gen-subset", "test")
    lines = re.findall(r"^H-(\d+)\t\S+\t(.*)$", done.stdout, re.MULTILINE)
    return [text for _, text in sorted(lines, key=lambda line: int(line[0]))]


def test_translations_of_an_engine_are_the_models(
    without: Path, data_bin: Path, corpus: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ctranslate2")
    checkpoint, engine = without / "checkpoint_last.pt", tmp_path / "engine"
    export = ["--checkpoint", checkpoint, "--data-bin", data_bin, "--output", engine]
    assert main(["export", *map(str, export)]) == 0
    files = ("--input", corpus / "test.de", "--output", tmp_path / "out", "--beam", 1)
    files += ("--max-length", LONGEST)
    assert main(["translate", "--model", str(engine), *map(str, files)]) == 0
    expected = _generate(data_bin, checkpoint)
    assert len(expected) == 41 and len(set(expected)) > 5
    assert (tmp_path / "out").read_text().splitlines() == expected


def test_an_onnx_file_is_held_against_the_model(
    without: Path, data_bin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    checkpoint = without / "checkpoint_last.pt"
    export = ["--checkpoint", checkpoint, "--data-bin", data_bin, "--output", tmp_path / "out"]
    assert main(["export", *map(str, export), "--format", "onnx"]) == 0
    said = capsys.readouterr().out
    assert float(said.split("differ by ")[1].split()[0]) < 2e-4


def test_a_run_that_goes_on_is_the_same_bit_for_bit(
    without: Path, layernorm: Path, data_bin: Path, tmp_path: Path
) -> None:
    """Half of the norms are left, or half of each."""
    run = tmp_path / "run"
    run.mkdir()
    middle = next(without.glob("checkpoint_*_9.pt"))
    shutil.copy(middle, run / "checkpoint_last.pt")
    _remove(data_bin, layernorm, run)
    states = [
        torch.load(folder / "checkpoint_last.pt", weights_only=False) for folder in (without, run)
    ]
    one, other = (state["model"] for state in states)
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    halfway = torch.load(middle, weights_only=False)["model"]
    gates = [value for name, value in halfway.items() if name.endswith(".gates")]
    assert 0 < torch.stack(gates).mean() < 1


def test_a_teacher_holds_the_words_of_the_model_as_it_was(
    prenorm: Path, data_bin: Path, tmp_path: Path
) -> None:
    """It is nearer to the model with norms than without a teacher; no checkpoint holds it, and a
    run that goes on has it again.
    """

    def logged(save_dir: Path, *more: object) -> list[float]:
        more = ("--fixup-remove-norms", "at_once", "--fixup-removal-anchor", 0, *more)
        done = _remove(data_bin, prenorm, save_dir, *more)
        found = re.findall(r'"divergence": "([^"]+)"', done.stdout + done.stderr)
        return [float(value) for value in found]

    hard, soft = tmp_path / "hard", tmp_path / "soft"
    weak = logged(hard, "--fixup-removal-distil", 1e-6)
    strong = logged(soft, "--fixup-removal-distil", 30, "--max-update", 12)
    strong += logged(soft, "--fixup-removal-distil", 30)
    assert strong[0] == pytest.approx(weak[0], rel=0.2)
    assert strong[-1] < 0.5 * weak[-1]
    one, other = (
        torch.load(folder / "checkpoint_last.pt", weights_only=False)["model"]
        for folder in (hard, soft)
    )
    assert one.keys() == other.keys() and not any("teacher" in name for name in one)


def test_a_task_with_a_step_of_its_own_has_the_anchor(
    prenorm: Path, data_bin: Path, tmp_path: Path
) -> None:
    done = _remove(data_bin, prenorm, tmp_path / "run", "--task", "translation_lev")
    anchors = re.findall(r'"anchor": "([^"]+)"', done.stdout + done.stderr)
    assert float(anchors[-1]) > 0


def _refused(done: Any, *words: str) -> None:
    said = done.stdout + done.stderr
    assert done.returncode and "Traceback" not in said
    assert all(word in said for word in words), said[-2000:]


def test_a_run_with_another_schedule_does_not_go_on(
    without: Path, layernorm: Path, data_bin: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(next(without.glob("checkpoint_*_9.pt")), run / "checkpoint_last.pt")
    before = (run / "checkpoint_last.pt").read_bytes()
    more = ("--fixup-removal-updates", 18)
    done = _remove(data_bin, layernorm, run, *more, check=False)
    _refused(done, "was trained with --fixup-removal-updates 16, not 18")
    assert (run / "checkpoint_last.pt").read_bytes() == before


def test_an_export_before_the_end_is_refused(
    without: Path, data_bin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    middle = next(without.glob("checkpoint_*_9.pt"))
    export = ["--checkpoint", middle, "--data-bin", data_bin, "--output", tmp_path / "out"]
    assert main(["export", *map(str, export)]) == 2
    assert "norms are not gone yet: train the model to the end" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--max-update", 10), ("--max-update 10 ends the run before the last norm is gone",)),
        (("--encoder-layers", 3), ("--encoder-layers is 3, and", "has 2")),
        (("--fixup-from-layernorm", "nowhere.pt"), ("nowhere.pt does not exist",)),
        (("--arch", "transformer_fixup_lm"),
         ("is a model of --arch transformer, which cannot become one of",)),
        (("--fixup-method", "fixup"), ("--fixup-method is fixup, and",)),
        (("--fixup-removal-distil", -1), ("--fixup-removal-distil is -1: give 0 or",)),
        (("--fixup-removal-distil", "nan"), ("--fixup-removal-distil is nan: give 0 or",)),
        (("--fixup-removal-distil", 1, "--fixup-remove-norms", "none"),
         ("--fixup-removal-distil learns from the model with norms as they go",)),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    more: tuple[object, ...],
    words: tuple[str, ...],
    data_bin: Path,
    prenorm: Path,
    tmp_path: Path,
) -> None:
    done = _remove(data_bin, prenorm, tmp_path / "run", *more, check=False)
    _refused(done, *words)


def test_other_dictionaries_are_refused(
    prenorm: Path, corpus: Path, data_bin: Path, tmp_path: Path
) -> None:
    prefixes = [f"--{split}pref={corpus / split}" for split in ("train", "valid", "test")]
    languages = ("-s", "de", "-t", "en", "--joined-dictionary", "--nwordssrc", 16)
    fairseq("preprocess", *prefixes, *languages, "--destdir", tmp_path / "bin")
    done = _remove(tmp_path / "bin", prenorm, tmp_path / "run", check=False)
    _refused(done, "another architecture, or of other dictionaries", "embed_tokens")


def test_a_method_without_norms_is_refused(data_bin: Path, tmp_path: Path) -> None:
    flags = ("--fixup-remove-norms", "taper", "--fixup-removal-updates", 4, "--max-update", 8)
    done = fairseq("train", *train_flags(data_bin, tmp_path / "run", *flags), check=False)
    _refused(done, "--fixup-remove-norms takes layer norms out of a model of")
