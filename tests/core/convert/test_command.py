"""``python -m fixup_core convert``: networks found by name, reported, and mistakes in one line."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fixup_core.__main__ import COMMANDS, main
from fixup_core.command_line import build_parser
from fixup_core.convert.notation import parse_inputs, parse_options
from fixup_core.convert.targets import find
from fixup_core.errors import UserError
from tests.conftest import ROOT
from tests.core.convert.nets import Encoder

HERE = "tests.core.convert.test_command"
SIZES = "n_layer=1 n_embd=16 n_head=2 vocab_size=20 bos_token_id=0 eos_token_id=0"
GPT2 = ["hf:GPT2Config", "--set", *SIZES.split()]


class Words(nn.Module):
    """Two blocks on the embeddings of 30 words."""

    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(30, 16), nn.Linear(16, 30)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.words(ids)
        return self.head(self.encoder(x if mask is None else x * mask[..., None]))


def encoder() -> nn.Module:
    return Encoder()


def encoder_and_inputs(depth: int = 2) -> tuple[nn.Module, Tensor]:
    return Encoder(depth), torch.randn(2, 3, 8, 8)


def words() -> nn.Module:
    return Words()


def no_network() -> str:
    return "text"


def broken() -> nn.Module:
    raise KeyError("depth")


def line(*words: str) -> list[str]:
    return ["convert", *words]


def test_the_report_is_printed_and_nothing_is_written(
    capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(line(f"{HERE}:encoder_and_inputs")) == 0
    out, err = capsys.readouterr()
    assert "L = 4 residual branches; at 0: head.weight" in out and not err
    assert "4 normalisation layers removed" in out
    assert not list(tmp_path.iterdir())


def test_the_function_takes_options_and_inputs_by_hand(capsys: pytest.CaptureFixture) -> None:
    options = ["--set", "depth=3", "--inputs", "3x3x8x8"]
    assert main(line(f"{HERE}:encoder_and_inputs", *options)) == 0
    assert "L = 6 residual branches" in capsys.readouterr().out


@pytest.mark.parametrize("inputs", [["int:2x5"], ["int:2x5", "ones:2x5"], ["ids=int:2x5:7"]])
def test_token_ids_stay_below_the_vocabulary(
    inputs: list[str], capsys: pytest.CaptureFixture
) -> None:
    assert main(line(f"{HERE}:words", "--inputs", *inputs)) == 0
    assert "L = 4 residual branches" in capsys.readouterr().out


def test_json_has_what_the_report_says(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "report.json"
    assert main(line(f"{HERE}:encoder_and_inputs", "--json", str(file))) == 0
    found = json.loads(file.read_text())
    assert found["num_branches"] == len(found["branches"]) == 4
    assert {branch["m"] for branch in found["branches"]} == {2}
    assert {"factor", "layers", "gates", "name"} <= found["branches"][0].keys()
    assert len(found["removed"]) == 4 and found["scalars"] and found["left_out"] == []
    capsys.readouterr()


def test_methods_heads_norms_and_batches(capsys: pytest.CaptureFixture) -> None:
    target = f"{HERE}:encoder_and_inputs"
    assert main(line(target, "--method", "fixup_adam", "--head", "none")) == 0
    assert "at 0: nothing" in (out := capsys.readouterr().out) and "fixed number" in out
    assert main(line(target, "--keep-norms")) == 0
    assert "\n0 normalisation layers removed" in capsys.readouterr().out
    assert main(line(target, "--calibrate")) == 0
    assert "random" not in capsys.readouterr().out  # the function's own batch
    assert main(line(target, "--calibrate", "--inputs", "4x3x8x8")) == 0
    assert capsys.readouterr().out.startswith("calibrated on random inputs")


def test_on_the_meta_device_nothing_is_called(capsys: pytest.CaptureFixture) -> None:
    for method in ("fixup", "fixup_adam"):
        assert main(line(f"{HERE}:words", "--inputs", "int:2x5", "--meta", "--method", method)) == 0
        out = capsys.readouterr().out
        assert "L = 4 residual branches" in out and out.startswith("on the meta device")


@pytest.mark.parametrize(
    ("target", "branches"),
    [
        (["torchvision:resnet18", "--inputs", "2x3x32x32", "--set", "num_classes=5"], 8),
        (["timm:vit_tiny_patch16_224", "--set", "depth=1", "img_size=32"], 2),
        ([*GPT2, "--inputs", "int:2x6"], 2),
        ([*GPT2, "--model", "GPT2ForSequenceClassification", "--inputs", "int:1x6"], 2),
    ],
)
def test_networks_of_libraries(
    target: list[str], branches: int, capsys: pytest.CaptureFixture
) -> None:
    pytest.importorskip({"hf": "transformers"}.get(library := target[0].split(":")[0], library))
    assert main(line(*target)) == 0, capsys.readouterr().err
    assert f"L = {branches} residual branches" in capsys.readouterr().out


def test_a_configuration_of_a_file(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.BertConfig(**small, num_hidden_layers=3, vocab_size=20)
    config.architectures = ["BertForSequenceClassification"]
    config.save_pretrained(tmp_path)
    for name in (tmp_path, tmp_path / "config.json"):
        target = find(f"hf:{name}", {"num_labels": 7}, None, meta=True)
        assert type(target.net).__name__ == "BertForSequenceClassification"
        assert len(target.net.bert.encoder.layer) == 3 and target.vocabulary == 20
        assert target.net.classifier.out_features == 7


def test_the_usual_inputs_are_those_of_the_library() -> None:
    pytest.importorskip("timm"), pytest.importorskip("torchvision")
    assert find("timm:resnet18", {}, None, meta=True).usual == ("2x3x224x224",)
    assert find("torchvision:inception_v3", {}, None, meta=True).usual == ("2x3x299x299",)
    assert find("torchvision:r3d_18", {}, None, meta=True).usual == ("2x3x16x112x112",)
    assert find("torchvision:fcn_resnet50", {}, None, meta=True).usual == ("2x3x224x224",)


@pytest.mark.parametrize(
    ("config", "usual"),
    [
        ("T5Config", ("input_ids=int:2x16", "decoder_input_ids=int:2x16")),
        ("ViTConfig", ("pixel_values=2x3x224x224",)),
        ("WhisperConfig", ("input_features=2x80x3000", "decoder_input_ids=int:2x16")),
    ],
)
def test_the_usual_inputs_of_configurations(config: str, usual: tuple[str, ...]) -> None:
    pytest.importorskip("transformers")
    assert find(f"hf:{config}", {}, None, meta=True).usual == usual


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["resnet18"], "write package.module:function"),
        (["no.such.module:net"], "cannot be imported"),
        ([f"{HERE}:encodr"], "did you mean encoder"),
        ([f"{HERE}:HERE"], "has no function 'HERE'"),
        ([f"{HERE}:no_network"], "must return a network, or a network and its inputs, not a str"),
        ([f"{HERE}:broken"], "cannot be built: KeyError: 'depth'"),
        ([f"{HERE}:encoder"], "needs inputs: give --inputs"),
        ([f"{HERE}:encoder", "--set", "width=3"], "cannot be built: TypeError"),
        ([f"{HERE}:encoder", "--set", "width"], "no KEY=VALUE"),
        ([f"{HERE}:encoder", "--inputs", "2x3xx8"], "cannot be read"),
        ([f"{HERE}:encoder", "--inputs", "2x3x2"], "cannot be called with these"),
        ([f"{HERE}:encoder", "--inputs", "int:2x3"], "give a limit, as int:2x3:200"),
        ([f"{HERE}:encoder", "--inputs", "2x3", "ids=2x3"], "name all inputs or none"),
        ([f"{HERE}:encoder_and_inputs", "--method", "fixupp"], "no method 'fixupp'"),
        ([f"{HERE}:encoder_and_inputs", "--head", "nose"], "no module 'nose'"),
        ([f"{HERE}:encoder", "--model", "AutoModel"], "for hf:CONFIG alone"),
        ([f"{HERE}:encoder", "--meta", "--calibrate"], "give one of them"),
        (["timm:resnet81"], "did you mean resnet18"),
        (["torchvision:resnet81"], "did you mean resnet18"),
        (["hf:GPT2Confg"], "did you mean GPT2Config"),
        (["hf:GPT2Config", "--set", "n_layers=2"], "did you mean n_layer"),
        (["hf:GPT2Config", "--set", "n_layer=two"], "cannot be built"),
        ([*GPT2, "--model", "AutoModelForCausalLMs"], "did you mean AutoModelForCausalLM"),
        ([*GPT2, "--model", "AutoModelForCTC"], "cannot be built: ValueError"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    library = {"hf": "transformers"}.get(words[0].split(":")[0], words[0].split(":")[0])
    if library in ("timm", "torchvision", "transformers"):
        pytest.importorskip(library)
    assert main(line(*words)) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("error: ") and err.count("\n") == 1
    assert said in err


@pytest.mark.parametrize("target", ["timm:resnet18", "torchvision:resnet18", "hf:GPT2Config"])
def test_a_missing_library_is_one_line(
    target: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    library = {"hf": "transformers"}.get(target.split(":")[0], target.split(":")[0])
    monkeypatch.setitem(sys.modules, library, None)
    assert main(line(target)) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and f"needs {library} (pip install {library})" in err


def test_help_lists_the_options(capsys: pytest.CaptureFixture) -> None:
    assert main(line("--help")) == 0
    listed = capsys.readouterr().out
    for option in ("TARGET", "--inputs", "--set", "--method", "--head", "--keep-norms"):
        assert option in listed
    for option in ("--allow", "--calibrate", "--meta", "--model", "--json"):
        assert option in listed


def test_the_lines_of_the_documentation_can_be_read() -> None:
    text = (ROOT / "docs" / "any-network.md").read_text("utf-8")
    lines = re.findall(r"^python -m fixup_core (convert .*)", text, re.MULTILINE)
    parser = build_parser("", "", COMMANDS, chosen="convert")
    for args in (parser.parse_args(line.split()) for line in lines):
        parse_options(args.set), parse_inputs(args.inputs or ["1"], vocabulary=2)
    assert len(lines) > 3


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["depth=2", "name=relu", "sizes=[1, 2]"], {"depth": 2, "name": "relu", "sizes": [1, 2]}),
        (
            ["a=False", "b=false", "c=None", "d=1e-3"],
            {"a": False, "b": False, "c": None, "d": 1e-3},
        ),
        (["text=a=b"], {"text": "a=b"}),
    ],
)
def test_options_are_read_as_python_or_json_has_them(
    texts: list[str], expected: dict[str, Any]
) -> None:
    assert parse_options(texts) == expected


def test_inputs_are_what_they_say() -> None:
    x, ids = parse_inputs(["2x3", "int:4x50"], vocabulary=3)
    assert x.shape == (2, 3) and x.is_floating_point()
    assert ids.shape == (4, 50) and set(ids.unique().tolist()) == {0, 1, 2}
    named = parse_inputs(["mask=ones:2x2", "n=int:1:1"], vocabulary=None)
    assert named["mask"].tolist() == [[1, 1], [1, 1]] and named["n"].tolist() == [0]
    for texts in (["a=2", "a=3"], ["2", "a=3"], ["half:2"], ["2:3"], ["int:2x"]):
        with pytest.raises(UserError):
            parse_inputs(texts, vocabulary=3)
