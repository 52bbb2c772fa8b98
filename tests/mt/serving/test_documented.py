"""What docs/serving.md shows, run on a small model."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fixup_mt.__main__ import main
from fixup_mt.serving import export
from tests.conftest import ROOT
from tests.mt.helpers import build, dictionary, task, trained

pytest.importorskip("onnxruntime")

LENGTH = 8


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    sides = task(dictionary(30, "s"), dictionary(35, "t"))
    torch.manual_seed(0)
    model = trained(build(on=sides))
    folder = tmp_path_factory.mktemp("exported") / "onnx"
    options = {"quantization": None, "sentencepiece": None, "format": "onnx"}
    export.export(model, sides, SimpleNamespace(output=folder, **options))
    return folder, model, sides


def _greedy(model: Any, source: list[int], end: int) -> list[int]:
    tokens, found = torch.tensor([[*source, end]]), [end]
    with torch.no_grad():
        while len(found) <= LENGTH and (len(found) == 1 or found[-1] != end):
            logits, _ = model(tokens, torch.tensor([tokens.size(1)]), torch.tensor([found]))
            found.append(int(logits[0, -1].argmax()))
    return [piece for piece in found[1:] if piece != end]


def test_the_documented_loop_decodes_greedily(exported: tuple[Path, Any, Any]) -> None:
    folder, model, sides = exported
    text = (ROOT / "docs" / "serving.md").read_text("utf-8")
    code = next(c for c in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "onnx" in c)
    names: dict[str, Any] = {}
    exec(code.replace("runs/model_onnx", str(folder)), names)
    for line in ("s1 s2 s3", "s4 s5 unheard-of s7", "s9"):
        source = [sides.source_dictionary.index(piece) for piece in line.split()]
        expected = _greedy(model, source, sides.target_dictionary.eos())
        found = names["translate"](line.split(), LENGTH)
        assert found == [sides.target_dictionary.symbols[i] for i in expected]
        assert found


def test_translate_names_an_onnx_export(exported: tuple[Path, Any, Any], capsys) -> None:
    assert main(["translate", "--model", str(exported[0])]) == 2
    error = capsys.readouterr().err
    assert "holds an ONNX export, and translate takes CTranslate2's" in error
