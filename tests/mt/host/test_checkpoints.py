"""Which checkpoint a run of fairseq goes on from, and whether it goes on."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fairseq import checkpoint_utils

import fixup_mt  # noqa: F401 (applies the repairs)
from fixup_mt.errors import UserError
from fixup_mt.host import checkpoints
from tests.conftest import fairseq, train_flags


@pytest.fixture
def restored(monkeypatch) -> list[SimpleNamespace]:
    """What the repaired ``load_checkpoint`` hands to fairseq's."""
    seen: list[SimpleNamespace] = []

    def load_checkpoint(cfg: Any, trainer: Any, **passthrough_args: Any) -> None:
        seen.append(cfg)

    monkeypatch.setattr(checkpoint_utils, "load_checkpoint", load_checkpoint)
    assert checkpoints.find_the_restore_file.apply()
    return seen


@pytest.mark.parametrize("name", ["/tmp/checkpoint_restore.pt", "checkpoint_last.pt", None])
def test_without_a_save_directory_fairseq_is_left_to_itself(name: str | None, restored) -> None:
    """As those who use it as a library call it."""
    cfg = SimpleNamespace(restore_file=name, save_dir=None)
    checkpoint_utils.load_checkpoint(cfg, SimpleNamespace(checkpoint_suffix=""))
    assert restored[0].restore_file == name


def test_a_restore_file_is_found_beside_the_checkpoints(tmp_path: Path, restored) -> None:
    (tmp_path / "checkpoint_best.pt").touch()
    trainer = SimpleNamespace(checkpoint_suffix="")
    cfg = SimpleNamespace(restore_file="checkpoint_best.pt", save_dir=str(tmp_path))
    checkpoint_utils.load_checkpoint(cfg, trainer)
    assert restored[0].restore_file == str(tmp_path / "checkpoint_best.pt")
    missing = SimpleNamespace(restore_file="nowhere.pt", save_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"neither nowhere\.pt nor"):
        checkpoint_utils.load_checkpoint(missing, trainer)


def test_a_folder_to_fine_tune_from_is_refused(tmp_path: Path, restored) -> None:
    """It is passed over, and fairseq trains from scratch."""
    (tmp_path / "file.pt").touch()
    trainer = SimpleNamespace(checkpoint_suffix="")
    cfg = SimpleNamespace(restore_file="checkpoint_last.pt", save_dir=str(tmp_path / "run"))
    cfg.finetune_from_model = str(tmp_path / "file.pt")
    checkpoint_utils.load_checkpoint(cfg, trainer)
    cfg.finetune_from_model = str(tmp_path)
    with pytest.raises(UserError, match=r"--finetune-from-model: .* is a folder"):
        checkpoint_utils.load_checkpoint(cfg, trainer)
    assert len(restored) == 1


def test_a_restore_file_may_have_the_suffix_of_the_run(tmp_path: Path, restored) -> None:
    (tmp_path / "checkpoint_best-shard0.pt").touch()
    cfg = SimpleNamespace(restore_file="checkpoint_best.pt", save_dir=str(tmp_path))
    checkpoint_utils.load_checkpoint(cfg, SimpleNamespace(checkpoint_suffix="-shard0"))
    assert restored[0].restore_file == str(tmp_path / "checkpoint_best.pt")


def test_a_run_that_is_done_stays_as_it_is(data_bin: Path, trained: Path, tmp_path: Path) -> None:
    """Fairseq makes one update more, each time it is started."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    before = (run / "checkpoint_last.pt").read_bytes()
    limits = ("--max-epoch", "9", "--max-update", "5", "--store-ema")
    done = fairseq("train", *train_flags(data_bin, run, *limits))
    assert "and --max-update is 5" in done.stdout + done.stderr
    assert (run / "checkpoint_last.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "was", "now"),
    [
        ("method", "fixup", "fixup_no_factor"),
        ("base_branches", 15.0, 4.0),
        ("tied_output", "leave", "gain"),
        ("output_bias", "auto", "none"),
        ("qk_norm", False, True),
        ("logit_cap", 0.0, 50.0),
    ],
)
def test_a_run_goes_on_with_the_options_it_was_begun_with(name: str, was: Any, now: Any) -> None:
    """Weights of another method may fit, and would go on without a word."""
    file, key = Path("checkpoint_last.pt"), f"fixup_{name}"
    own = SimpleNamespace(fixup_method="fixup_adam") if name != "method" else SimpleNamespace()
    saved = SimpleNamespace(**vars(own) | {key: was})
    state = {"cfg": {"model": saved}}
    checkpoints._check_method(
        file, state, SimpleNamespace(**{"fixup_method": "fixup"} | vars(saved))
    )
    asked = SimpleNamespace(**{"fixup_method": "fixup"} | vars(own) | {key: now})
    whole = {"cfg": {"model": vars(saved)}}  # as fairseq writes it for --arch transformer_fixup
    checkpoints._check_method(
        file, whole, SimpleNamespace(**{"fixup_method": "fixup"} | vars(saved))
    )
    with pytest.raises(UserError, match="was trained with"):
        checkpoints._check_method(file, whole, asked)
    flag = f"--fixup-{name.replace('_', '-')}"
    with pytest.raises(UserError, match=f"was trained with {flag} {was}, not {now}: give what"):
        checkpoints._check_method(file, state, asked)


def test_a_run_of_another_method_than_the_first_goes_on(data_bin: Path, tmp_path: Path) -> None:
    """Fairseq keeps the model's options as a dict."""

    def flags(updates: int, cap: int) -> list[object]:
        own = ("--fixup-method", "fixup_attention_m2", "--fixup-qk-norm", "--fixup-logit-cap", cap)
        return train_flags(data_bin, tmp_path, *own, "--max-update", updates)

    fairseq("train", *flags(2, 20))
    done = fairseq("train", *flags(3, 20))
    assert "Loaded checkpoint" in done.stdout + done.stderr
    refused = fairseq("train", *flags(4, 30), check=False)
    assert refused.returncode == 2
    assert "was trained with --fixup-logit-cap 20.0, not 30.0" in refused.stderr


def test_models_of_fairseqs_own_have_no_such_options() -> None:
    checkpoints._check_method(Path("x.pt"), {"cfg": {"model": SimpleNamespace()}}, object())
    checkpoints._check_method(Path("x.pt"), {}, SimpleNamespace(fixup_method="fixup"))
