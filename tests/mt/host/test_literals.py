"""No code of a checkpoint runs: fairseq's ``eval`` is shadowed wherever fairseq calls it."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import warnings
from pathlib import Path
from types import SimpleNamespace

import fairseq
import pytest
import torch
from fairseq import utils

import fixup_mt
from fixup_mt.errors import UserError
from fixup_mt.host.literals import evaluate, shadow_eval, uncover_eval
from tests.conftest import fairseq as run_fairseq

fixup_mt.register()
EVIL = (
    "__import__('os').system('touch {}')",
    "[x for x in (1, 2)]",
    "().__class__.__bases__",
    "open('{}', 'w')",
    "f'{{1}}'",
    "(lambda: 1)()",
    "x",
    "[0] * 10 ** 9",
    "[[0] * 90000] * 900000",
    "'a' * 1000000000",
    "{{**{{}}}}",
    "1 if 2 else 3",
    "(" * 300 + ")" * 300,
    "",
)


def _sources() -> list[str]:
    """The modules of fairseq, examples aside, that call ``eval`` by its name."""
    root, found = Path(fairseq.__file__).parent, []
    cli = Path(importlib.util.find_spec("fairseq_cli").submodule_search_locations[0])
    for package, folder in (("fairseq", root), ("fairseq_cli", cli)):
        for file in folder.rglob("*.py"):
            parts = file.relative_to(folder).with_suffix("").parts
            if "examples" in parts:
                continue
            calls = [node for node in ast.walk(_parsed(file)) if _is_eval(node)]
            if calls:
                found.append(".".join((package, *parts)))
    return found


def _parsed(file: Path) -> ast.AST:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # escapes of fairseq's that newer Pythons warn of
        return ast.parse(file.read_text("utf-8"))


def _is_eval(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("eval", "exec")


SOURCES = _sources()


def test_there_are_such_modules() -> None:
    assert {"fairseq.utils", "fairseq.models.fconv", "fairseq_cli.validate"} <= set(SOURCES)


@pytest.mark.parametrize("name", SOURCES)
def test_every_module_that_calls_eval_calls_ours(name: str) -> None:
    try:
        module = importlib.import_module(name)
    except (ImportError, AttributeError) as error:  # wants a package or a GPU: cannot call either
        pytest.skip(str(error))
    shadow_eval()
    assert module.eval is evaluate


@pytest.mark.parametrize("text", EVIL)
def test_other_expressions_are_refused(text: str, tmp_path: Path) -> None:
    target = tmp_path / "pwned"
    for call in (evaluate, utils.eval_str_list, utils.eval_str_dict, utils.eval_bool):
        with pytest.raises(UserError, match="no code"):
            call(text.format(target))
    assert not target.exists()


@pytest.mark.parametrize(
    "text",
    [
        "[(512, 3)] * 20",
        "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512,2,2)] + [(512,2,2)]",
        "(0.9, 0.98)",
        "[1, 2.5]",
        "3",
        "-1e-8",
        "{'a': [1, (2, 'b')], 'c': None}",
        " True ",
        "not False",
        "1 / 4",
        "{1, 2}",
    ],
)
def test_what_the_options_mean_is_as_eval_has_it(text: str) -> None:
    assert evaluate(text) == eval(text.strip())


def test_fairseqs_helpers_work_as_before() -> None:
    assert utils.eval_str_list("[0.1, 0.2]") == [0.1, 0.2]
    assert utils.eval_str_list("5", type=int) == [5]
    assert utils.eval_bool("False") is False and utils.eval_bool(3, default=True) is True
    assert utils.eval_str_dict(None) is None


def test_the_twin_without_the_repair_runs_it(tmp_path: Path) -> None:
    target = tmp_path / "pwned"
    uncover_eval()
    try:
        utils.eval_str_dict(f"__import__('pathlib').Path({str(target)!r}).touch()")
    finally:
        shadow_eval()
    assert target.exists()


def _evil_settings(code: str) -> dict[str, dict]:
    return {
        "xformers": {"_name": "transformer", "encoder": {"xformers_att_config": code}},
        "characters": {"_name": "transformer_lm", "character_filters": code},
        "convolutions": {"_name": "fconv", "encoder_layers": code},
    }


@pytest.mark.parametrize("kind", ["xformers", "characters", "convolutions"])
def test_a_checkpoint_of_plain_data_runs_no_code(
    kind: str, data_bin: Path, trained: Path, tmp_path: Path
) -> None:
    target = tmp_path / "pwned"
    code = f"__import__('os').system('touch {target}')"
    state = torch.load(trained / "checkpoint_last.pt", weights_only=True)
    state["cfg"]["model"] = _evil_settings(code)[kind]
    evil = tmp_path / "evil.pt"
    torch.save(state, evil)
    common = ("--user-dir", "fixup_mt", "--cpu", "--path", evil)
    done = run_fairseq("generate", data_bin, *common, check=False)
    assert done.returncode and not target.exists()
    assert "Traceback" not in done.stderr


def test_modules_that_come_later_are_shadowed_when_a_checkpoint_is_loaded(tmp_path: Path) -> None:
    import sys

    later = SimpleNamespace()
    later.__spec__ = None
    sys.modules["fairseq.later"] = later
    try:
        from fairseq import checkpoint_utils

        torch.save({"cfg": None, "args": None}, tmp_path / "c.pt")
        with pytest.raises(Exception):  # noqa: B017 (it holds no model)
            checkpoint_utils.load_checkpoint_to_cpu(str(tmp_path / "c.pt"))
        assert later.eval is evaluate
    finally:
        del sys.modules["fairseq.later"]
