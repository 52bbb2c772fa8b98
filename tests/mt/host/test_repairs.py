"""Each repair of fairseq, and that what it repairs is really broken without it."""

from __future__ import annotations

import io
import logging
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils, file_utils, options
from fairseq.data import data_utils
from fairseq.distributed import utils as distributed_utils
from fairseq.file_io import PathManager
from fairseq.nan_detector import NanDetector
from torch import nn

from fixup_mt.errors import UserError
from fixup_mt.host import checkpoints, repairs
from fixup_mt.host.patches import MARK, Patch
from tests.conftest import ENVIRONMENT, ROOT, fairseq, train_flags, zygote


def _in_a_fresh_process(code: str, switch: str = "1") -> str:
    """What ``code`` prints."""
    done = zygote().run("-c", [f"import fixup_mt\n{code}"], env={repairs.SWITCH: switch})
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _without_repairs(code: str) -> str:
    return _in_a_fresh_process(code, switch="0")


def test_the_log_says_that_they_are_on(caplog: pytest.LogCaptureFixture, monkeypatch) -> None:
    with caplog.at_level(logging.INFO):
        repairs.apply()
        monkeypatch.setenv(repairs.SWITCH, "0")
        repairs.apply()
    assert "repairs of fairseq are on" in caplog.messages[0]
    assert all(repair.name in caplog.messages[0] for repair in repairs.REPAIRS)
    assert "are off" in caplog.messages[1]


def test_a_package_that_imports_the_plugin_may_be_run_as_a_module(tmp_path: Path) -> None:
    package = tmp_path / "mine"
    package.mkdir()
    (package / "__init__.py").write_text("import fixup_mt\n")
    (package / "train.py").write_text(
        "from fairseq.models import ARCH_MODEL_REGISTRY\n"
        "print('transformer_fixup_tiny' in ARCH_MODEL_REGISTRY)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "mine.train"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        check=True,
    )
    assert done.stdout.strip() == "True"


PATCHES = repairs.REPAIRS


def _targets() -> list[Any]:
    """What stands in fairseq where the patches go."""
    return [item._find()[2] for item in PATCHES]


def _marked() -> list[bool]:
    """Whether each repair is in its place."""
    functions = (getattr(found, "__func__", found) for found in _targets())
    return [
        item.name in getattr(function, MARK, {})
        for item, function in zip(PATCHES, functions, strict=True)
    ]


HERE = "from tests.mt.host.test_repairs import PATCHES, _marked, _targets, repairs, sys, torch\n"


def test_applied_twice_is_applied_once() -> None:
    once = _targets()
    assert all(item.apply() for item in PATCHES)
    repairs.apply()
    assert all(now is before for now, before in zip(_targets(), once, strict=True))


def test_undone_and_applied_again() -> None:
    code = (
        HERE
        + "on = _targets(); repairs.undo(); off = _targets(); repairs.undo(); still = _targets()\n"
        "repairs.apply(); again = _targets()\n"
        "print([a is not b is c is not d for a, b, c, d in zip(on, off, still, again)])"
    )
    assert _in_a_fresh_process(code) == str([True] * len(PATCHES))


def test_every_patch_was_written_for_this_fairseq_and_knows_another() -> None:
    code = (
        HERE + "from dataclasses import replace\n"
        "off = _targets()\n"
        "print([replace(p, parameters=p.parameters + ' more').apply() for p in PATCHES])\n"
        "print([a is b for a, b in zip(off, _targets())])\n"
        "print([p.apply() for p in PATCHES])"
    )
    found = _without_repairs(code).splitlines()
    count = len(PATCHES)
    assert found == [str([False] * count), str([True] * count), str([True] * count)]


def test_a_changed_function_is_left_alone_with_one_line(
    tmp_path: Path, monkeypatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The host goes on working."""

    def copy(source: str, target: str, *, mode: str = "w") -> str:
        return shutil.copyfile(source, target)

    monkeypatch.setattr(PathManager, "copy", staticmethod(copy))
    assert not checkpoints.copy_checkpoints_atomically.apply()
    (message,) = caplog.messages
    assert "\n" not in message
    assert "copy_checkpoints_atomically is left out: fairseq.file_io:PathManager.copy" in message
    assert "takes (source target mode), not (src_path dst_path overwrite)" in message
    assert PathManager.copy is copy
    (tmp_path / "old").write_text("x")
    PathManager.copy(tmp_path / "old", tmp_path / "new")
    assert (tmp_path / "new").read_text() == "x"


@pytest.mark.parametrize("target", ["fairseq.nowhere:f", "fairseq.trainer:Trainer.nothing"])
def test_a_function_that_is_gone_is_told(target: str, caplog: pytest.LogCaptureFixture) -> None:
    assert not Patch("mend", target, "", lambda original: original).apply()
    assert caplog.messages == [f"mend is left out: there is no {target}"]


IMPORTED = """
import logging, sys, warnings
import fairseq.trainer, fairseq.tasks.translation, fairseq.models.transformer_lm, fairseq.options
state = lambda: (list(warnings.filters), sys.excepthook, logging.root.level,
                 list(logging.root.handlers), logging.root.manager.disable)
before = state()
import fixup_mt
assert state() == before
"""


def _parses_a_command(tail: str) -> str:
    return (
        "import sys; from fairseq import options\n"
        "sys.argv = 'train data --arch transformer_fixup_tiny --optimizer adam'.split()\n"
        "options.parse_args_and_arch(options.get_training_parser())\n" + tail
    )


def test_importing_touches_no_filters_logging_or_hooks() -> None:
    code = IMPORTED + _parses_a_command("print(state() == before)")
    here = ENVIRONMENT | {repairs.SWITCH: "1", "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, capture_output=True, text=True, env=here, check=True)
    # Only a command's line brings the hook.
    assert done.stdout.split() == ["False"]


def test_the_switch_turns_everything_off() -> None:
    code = (
        HERE + "import argparse\n"
        "print(any(_marked()),"
        " argparse.Namespace in torch.serialization.get_safe_globals(),"
        " sys.excepthook is not sys.__excepthook__)"
    )
    assert _without_repairs(_parses_a_command(code)) == "False False False"
    assert _in_a_fresh_process(_parses_a_command(code)) == "True True True"


def test_options_of_ours_need_no_repair() -> None:
    """An option that was asked for and does nothing would be worse than none."""
    code = (
        "import fixup_mt\nfrom fixup_mt.host import repairs\n"
        "from fixup_mt.host.patches import MARK\n"
        "def on(patch):\n"
        "    found = patch._find()[2]\n"
        "    return patch.name in getattr(getattr(found, '__func__', found), MARK, {})\n"
        "before = all(map(on, repairs.OPTIONS))\n"
        "repairs.undo()\n"
        "print(before, any(map(on, repairs.OPTIONS)))"
    )
    assert _without_repairs(code) == _in_a_fresh_process(code) == "True False"


def test_the_hook_is_installed_once_and_for_commands_alone(monkeypatch) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    parser = options.get_training_parser()
    options.parse_args_and_arch(parser, ["data", "--arch", "transformer_fixup_tiny"])
    assert sys.excepthook is sys.__excepthook__
    line = "train data --arch transformer_fixup_tiny --optimizer adam"
    monkeypatch.setattr(sys, "argv", line.split())
    options.parse_args_and_arch(options.get_training_parser())
    hook = sys.excepthook
    assert hook is not sys.__excepthook__
    options.parse_args_and_arch(options.get_training_parser())
    assert sys.excepthook is hook


def test_a_command_line_from_python_may_hold_none() -> None:
    line = ["data", "--arch", "transformer_fixup_tiny", "--save-dir", None]
    args = options.parse_args_and_arch(options.get_training_parser(), line)
    assert args.arch == "transformer_fixup_tiny"


@pytest.mark.parametrize("line", [None, []], ids=["of the process", "from Python"])
def test_an_empty_command_line_is_told_what_it_lacks(line, monkeypatch, capsys) -> None:
    """The line that comes from Python is not that of the process."""
    monkeypatch.setattr(sys, "argv", ["train"] if line is None else ["pytest", "--arch", "x"])
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    with pytest.raises((SystemExit, UserError)) as error:
        options.parse_args_and_arch(options.get_preprocessing_parser(), line)
    said = f"{error.value}{capsys.readouterr().err}"
    assert "the following arguments are required: data" in said
    assert isinstance(error.value, UserError) == (line is None)  # a command ends in one line


def test_no_sentence_is_dropped() -> None:
    indices = np.arange(100)
    batches = data_utils.batch_by_size(
        indices,
        num_tokens_fn=lambda i: 5,
        num_tokens_vec=np.full(100, 5),
        max_tokens=200,
        required_batch_size_multiple=8,
    )
    assert np.concatenate(batches).tolist() == indices.tolist()
    assert all(len(batch) * 5 <= 200 for batch in batches)


def test_one_small_batch_is_kept_too() -> None:
    batches = data_utils.batch_by_size(
        [0, 1, 2],
        num_tokens_fn=lambda i: 5,
        num_tokens_vec=np.full(3, 5),
        max_sentences=64,
        required_batch_size_multiple=8,
    )
    assert [batch.tolist() for batch in batches] == [[0, 1, 2]]


def test_batches_by_position_are_batches_by_name() -> None:
    """Fairseq's own callers name the arguments; others need not."""
    batches = data_utils.batch_by_size(np.arange(9), None, np.full(9, 5), 20, None, 8)
    assert np.concatenate(batches).tolist() == list(range(9))


def test_without_the_repair_sentences_are_dropped() -> None:
    code = (
        "import numpy as np; from fairseq.data import data_utils as d\n"
        "b = d.batch_by_size(np.arange(100), None, np.full(100, 5), max_tokens=200,"
        " required_batch_size_multiple=8)\nprint(sum(map(len, b)))"
    )
    assert int(_without_repairs(code)) < 100


def _die_half_way(source: str, target: str) -> None:
    Path(target).write_bytes(Path(source).read_bytes()[:10])
    raise KeyboardInterrupt


def test_a_kill_while_copying_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch) -> None:
    new, old = tmp_path / "checkpoint1.pt", tmp_path / "checkpoint_last.pt"
    new.write_bytes(b"n" * 100), old.write_bytes(b"o" * 100)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", _die_half_way)
        with pytest.raises(KeyboardInterrupt):
            PathManager.copy(str(new), str(old), overwrite=True)
    assert old.read_bytes() == b"o" * 100
    assert PathManager.copy(str(new), str(old), overwrite=True)
    assert old.read_bytes() == new.read_bytes()


def test_without_the_repair_the_old_checkpoint_is_truncated(tmp_path: Path) -> None:
    (tmp_path / "new").write_bytes(b"n" * 100), (tmp_path / "old").write_bytes(b"o" * 100)
    code = (
        "import shutil; from pathlib import Path; from fairseq.file_io import PathManager\n"
        "def die(a, b):\n    Path(b).write_bytes(b'n' * 10); raise KeyboardInterrupt\n"
        "shutil.copyfile = die\n"
        f"try: PathManager.copy(r'{tmp_path}/new', r'{tmp_path}/old', overwrite=True)\n"
        f"except KeyboardInterrupt: print(len(Path(r'{tmp_path}/old').read_bytes()))"
    )
    assert _without_repairs(code) == "10"


def _batches_of_a_run_from(epoch: int, data_bin: Path) -> str:
    return (
        "from fairseq.tasks.translation import TranslationConfig, TranslationTask\n"
        f"c = TranslationConfig(data=r'{data_bin}', source_lang='de', target_lang='en')\n"
        "c.train_subset, c.dataset_impl, c.required_seq_len_multiple = 'train', None, 1\n"
        "t = TranslationTask.setup_task(c); t.load_dataset('train')\n"
        "i = t.get_batch_iterator(t.dataset('train'), max_tokens=100, seed=7,"
        f" epoch={epoch})\n"
        f"assert i.next_epoch_idx == {epoch}\n"
        "print([b.tolist() for b in i.frozen_batches])"
    )


def test_a_run_resumed_in_another_epoch_has_the_same_batches_and_without_the_repair_others(
    data_bin: Path,
) -> None:
    first, third = (_batches_of_a_run_from(epoch, data_bin) for epoch in (1, 3))
    assert _in_a_fresh_process(first) == _in_a_fresh_process(third) == _without_repairs(first)
    assert _without_repairs(first) != _without_repairs(third)


def test_an_epoch_may_be_given_by_position(data_bin: Path) -> None:
    """It is the eleventh argument of ``get_batch_iterator``."""
    code = _batches_of_a_run_from(3, data_bin)
    by_position = code.replace(
        "max_tokens=100, seed=7, epoch=3", "100, None, None, False, 1, 7, 1, 0, 0, 3"
    )
    assert by_position != code
    assert _in_a_fresh_process(by_position) == _in_a_fresh_process(code)


class _DictOfLists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x):
        return {"out": [self.linear(x)], "empty": []}


class _Full(io.BytesIO):
    """A file on a full disk; it counts how often it was tried."""

    tried = 0

    def write(self, data: Any) -> int:
        self.tried += 1
        raise OSError(28, "No space left on device")


def test_a_full_disk_is_told_at_once_and_once(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(Exception, match=r"No space left|unexpected pos|enforce fail"):
        checkpoint_utils._torch_persistent_save({"model": {}}, _Full())
    assert not caplog.records


def test_a_checkpoint_without_a_model_is_told(trained: Path, data_bin: Path, tmp_path) -> None:
    state = torch.load(trained / "checkpoint_best.pt", weights_only=True)
    del state["model"]
    torch.save(state, tmp_path / "cut.pt")
    with pytest.raises(UserError, match=r"no model in .*cut\.pt"):
        checkpoint_utils.load_model_ensemble_and_task(
            [str(tmp_path / "cut.pt")], arg_overrides={"data": str(data_bin)}
        )


def test_the_nan_detector_survives_an_encoders_output(caplog: pytest.LogCaptureFixture) -> None:
    model = _DictOfLists()
    with caplog.at_level(logging.WARNING), NanDetector(model):
        (model(torch.ones(1, 2))["out"][0] * float("nan")).sum().backward()
    assert "2 parameters, first ['linear.weight', 'linear.bias']" in caplog.text


def test_without_the_repair_it_dies() -> None:
    code = (
        "import torch; from fairseq.nan_detector import NanDetector\n"
        "class M(torch.nn.Linear):\n"
        "    def forward(self, x): return {'empty': [], 'out': [super().forward(x)]}\n"
        "m = M(2, 2)\n"
        "try:\n"
        "    with NanDetector(m): m(torch.ones(1, 2))\n"
        "except StopIteration: print('dead')"
    )
    assert _without_repairs(code) == "dead"


TORCHRUN = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.fixture
def under_torchrun(monkeypatch) -> None:
    """The environment of the second of two ranks."""
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("under_torchrun")
def test_torchruns_ranks_find_each_other(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg = SimpleNamespace(distributed_world_size=1, distributed_init_method=None)
    distributed_utils.infer_init_method(cfg)
    assert (cfg.distributed_world_size, cfg.distributed_rank) == (2, 1)
    assert cfg.distributed_init_method == "env://" and cfg.distributed_no_spawn


@pytest.mark.usefixtures("under_torchrun")
def test_torchruns_ranks_with_one_gpu_a_node_find_each_other(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    cfg = SimpleNamespace(
        distributed_world_size=1,
        distributed_init_method=None,
        tpu=False,
        pipeline_model_parallel=False,
    )
    distributed_utils.infer_init_method(cfg)
    assert (cfg.distributed_world_size, cfg.distributed_rank, cfg.device_id) == (2, 1, 0)
    assert cfg.distributed_init_method == "env://" and cfg.distributed_no_spawn


@pytest.mark.parametrize("gpus", [0, 1])
def test_without_the_repair_each_rank_trains_alone(gpus: int) -> None:
    code = (
        "import os, torch; from types import SimpleNamespace as N\n"
        f"os.environ.update({TORCHRUN})\n"
        f"torch.cuda.is_available = lambda: bool({gpus})\n"
        f"torch.cuda.device_count = lambda: {gpus}\n"
        "from fairseq.distributed.utils import infer_init_method\n"
        "c = N(distributed_world_size=1, distributed_init_method=None, tpu=False,"
        " pipeline_model_parallel=False, distributed_port=-1)\n"
        "infer_init_method(c); print(c.distributed_init_method)"
    )
    assert _without_repairs(code) == "None"


class _Foreign:
    """A class no fairseq checkpoint holds."""


@pytest.mark.parametrize("intruder", [_Foreign(), Path("x"), SimpleNamespace(a=1)])
def test_a_checkpoint_with_any_other_class_is_refused(tmp_path: Path, intruder: object) -> None:
    state = {"model": {"w": torch.zeros(1)}, "extra_state": {"intruder": intruder}}
    torch.save(state, tmp_path / "foreign.pt")
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(tmp_path / "foreign.pt", weights_only=True)


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self):
            return Path.mkdir, (tmp_path / "exploded",)

    torch.save({"model": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(Exception, match="Weights only load failed"):
        torch.load(tmp_path / "bomb.pt", weights_only=True)
    assert not (tmp_path / "exploded").exists()


def test_fairseqs_own_checkpoints_load_and_without_the_repair_do_not(
    data_bin: Path, tmp_path: Path
) -> None:
    """A stock model's checkpoint holds a Namespace, one with BLEU in its meters numpy arrays."""
    sizes = [
        f"--{side}-{what}={size}"
        for side in ("encoder", "decoder")
        for what, size in (
            ("layers", 1),
            ("embed-dim", 16),
            ("ffn-embed-dim", 16),
            ("attention-heads", 2),
        )
    ]
    bleu = ("--eval-bleu", "--eval-bleu-detok", "space", "--eval-bleu-args", '{"beam": 1}')
    arch = ("--arch", "transformer", "--max-epoch", "1", *bleu, *sizes)
    fairseq("train", *train_flags(data_bin, tmp_path, *arch))
    generate = (data_bin, "--path", tmp_path / "checkpoint_last.pt", "--beam", "1", "--cpu")
    fairseq("generate", *generate, "--user-dir", "fixup_mt")
    refused = fairseq("generate", *generate, check=False)
    assert refused.returncode and "Weights only load failed" in refused.stderr


def _archive(file: Path, name: str) -> None:
    with tarfile.open(file, "w:gz") as archive:
        for member, data in (("model/a.txt", b"a"), (name, b"b")):
            info = tarfile.TarInfo(member)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


@pytest.mark.parametrize("name", ["../evil.txt", "model/../../evil.txt"])
def test_an_archive_stays_in_its_folder(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    _archive(tmp_path / "m.tar.gz", name)
    with pytest.raises(UserError, match=r"m\.tar\.gz is not unpacked: .*outside"):
        file_utils.load_archive_file(str(tmp_path / "m.tar.gz"))
    assert not (tmp_path / "evil.txt").exists()


def test_an_archive_of_a_model_is_unpacked(tmp_path: Path) -> None:
    _archive(tmp_path / "m.tar.gz", "model/b.txt")
    folder = Path(file_utils.load_archive_file(str(tmp_path / "m.tar.gz")))
    assert (folder / "a.txt").read_text() == "a" and (folder / "b.txt").read_text() == "b"
