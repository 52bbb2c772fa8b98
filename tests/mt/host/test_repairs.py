"""Each repair of fairseq, and that what it repairs is really broken without it."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fairseq import checkpoint_utils
from fairseq.data import data_utils
from fairseq.distributed import utils as distributed_utils
from fairseq.file_io import PathManager
from fairseq.nan_detector import NanDetector
from torch import nn

from fixup_mt.errors import UserError
from fixup_mt.host import repairs
from tests.conftest import ENVIRONMENT, ROOT, fairseq, train_flags


def _in_a_fresh_process(code: str, switch: str = "1") -> str:
    """What ``code`` prints."""
    environment = ENVIRONMENT | {repairs.SWITCH: switch, "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-c", f"import fixup_mt\n{code}"]
    return subprocess.run(
        line, capture_output=True, text=True, env=environment, check=True
    ).stdout.strip()


def _without_repairs(code: str) -> str:
    return _in_a_fresh_process(code, switch="0")


def test_the_log_says_that_they_are_on(caplog: pytest.LogCaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr(repairs, "REPAIRS", ())
    with caplog.at_level(logging.INFO):
        repairs.apply()
        monkeypatch.setenv(repairs.SWITCH, "0")
        repairs.apply()
    assert "repairs of fairseq are on" in caplog.messages[0]
    assert "are off" in caplog.messages[1]


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


class _DictOfLists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)

    def forward(self, x):
        return {"out": [self.linear(x)], "empty": []}


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


@pytest.fixture
def restored(monkeypatch) -> list[SimpleNamespace]:
    """What the repaired ``load_checkpoint`` hands to fairseq's."""
    seen: list[SimpleNamespace] = []
    monkeypatch.setattr(checkpoint_utils, "load_checkpoint", lambda cfg, trainer: seen.append(cfg))
    repairs.find_the_restore_file()
    return seen


def test_a_restore_file_is_found_beside_the_checkpoints(tmp_path: Path, restored) -> None:
    (tmp_path / "checkpoint_best.pt").touch()
    trainer = SimpleNamespace(checkpoint_suffix="")
    cfg = SimpleNamespace(restore_file="checkpoint_best.pt", save_dir=str(tmp_path))
    checkpoint_utils.load_checkpoint(cfg, trainer)
    assert restored[0].restore_file == str(tmp_path / "checkpoint_best.pt")
    missing = SimpleNamespace(restore_file="nowhere.pt", save_dir=str(tmp_path))
    with pytest.raises(UserError, match=r"neither nowhere\.pt nor"):
        checkpoint_utils.load_checkpoint(missing, trainer)


def test_a_restore_file_may_have_the_suffix_of_the_run(tmp_path: Path, restored) -> None:
    (tmp_path / "checkpoint_best-shard0.pt").touch()
    cfg = SimpleNamespace(restore_file="checkpoint_best.pt", save_dir=str(tmp_path))
    checkpoint_utils.load_checkpoint(cfg, SimpleNamespace(checkpoint_suffix="-shard0"))
    assert restored[0].restore_file == str(tmp_path / "checkpoint_best.pt")


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
