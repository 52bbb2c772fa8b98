"""The real fairseq commands with the plugin, on tiny data."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from fairseq.checkpoint_utils import load_checkpoint_to_cpu

from fixup_mt.model.model import FixupTransformerModel
from fixup_mt.scoring.average import average_checkpoints
from tests.conftest import ENVIRONMENT, ROOT, WORDS, fairseq, train_flags

GENERATE = ("--user-dir", "fixup_mt", "--cpu", "--beam", "2", "--max-len-b", "12")


def _model(checkpoint: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint, weights_only=True)["model"]


def _assert_equal(one: Path, other: Path) -> None:
    first, second = _model(one), _model(other)
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


def _hypotheses(stdout: str) -> dict[int, str]:
    return {int(n): text for n, text in re.findall(r"^H-(\d+)\t[^\t]*\t(.*)$", stdout, re.M)}


def test_training_lowers_the_loss_and_logs_to_tensorboard(trained: Path) -> None:
    meters = load_checkpoint_to_cpu(str(trained / "checkpoint_last.pt"))["extra_state"]
    first = load_checkpoint_to_cpu(str(trained / "checkpoint1.pt"))["extra_state"]
    assert meters["val_loss"] < first["val_loss"]
    assert list((trained / "tb" / "valid").glob("events*"))


def test_every_test_sentence_is_translated(data_bin: Path, trained: Path) -> None:
    done = fairseq("generate", data_bin, "--path", trained / "checkpoint_best.pt", *GENERATE)
    assert sorted(_hypotheses(done.stdout)) == list(range(41))
    off = {"FIXUP_MT_REPAIRS": "0", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    best = ("--path", trained / "checkpoint_best.pt", "--max-tokens", "400")
    without = fairseq("generate", data_bin, *best, *GENERATE, env=off)
    assert len(_hypotheses(without.stdout)) < 41


def test_validate(data_bin: Path, trained: Path) -> None:
    paths = ("--path", trained / "checkpoint_best.pt", "--task", "translation", "--max-tokens")
    done = fairseq("validate", data_bin, *paths, "400", "--user-dir", "fixup_mt", "--cpu")
    saved = load_checkpoint_to_cpu(str(trained / "checkpoint_best.pt"))["extra_state"]["val_loss"]
    printed = re.search(r"valid on 'valid' subset \| loss ([\d.]+)", done.stderr + done.stdout)
    assert printed is not None
    logged = float(printed[1])
    assert logged == pytest.approx(saved, abs=2e-3)


def test_interactive(data_bin: Path, trained: Path) -> None:
    flags = ("--path", trained / "checkpoint_best.pt", *GENERATE)
    done = fairseq("interactive", data_bin, *flags, input="w1 w2\nw3\n")
    assert sorted(_hypotheses(done.stdout)) == [0, 1]


def test_average_then_ensemble_then_score(data_bin: Path, trained: Path, tmp_path: Path) -> None:
    inputs = [trained / f"checkpoint{i}.pt" for i in (3, 4)]
    averaged = tmp_path / "averaged.pt"
    line = [sys.executable, "-m", "fixup_mt", "average", "--output", str(averaged), "--inputs"]
    subprocess.run([*line, *map(str, inputs)], check=True, env=ENVIRONMENT, cwd=ROOT)
    expected = average_checkpoints(inputs)["model"]
    assert all(torch.equal(value, expected[key]) for key, value in _model(averaged).items())
    both = f"{averaged}:{inputs[0]}"
    done = fairseq("generate", data_bin, "--path", both, *GENERATE)
    (tmp_path / "generate.txt").write_text(done.stdout)
    lines = {
        kind: re.findall(rf"^{kind}-\d+\t(?:[^\t]*\t)?(.*)$", done.stdout, re.M) for kind in "TH"
    }
    assert len(lines["T"]) == len(lines["H"]) == 41
    for kind, texts in lines.items():
        (tmp_path / kind).write_text("\n".join(texts) + "\n")
    scored = fairseq("score", "--sys", tmp_path / "H", "--ref", tmp_path / "T")
    assert "BLEU4 = " in scored.stdout


def test_translate_from_python(data_bin: Path, trained: Path) -> None:
    hub = FixupTransformerModel.from_pretrained(
        str(trained), "checkpoint_best.pt", data_name_or_path=str(data_bin)
    )
    assert set(hub.translate("w1 w2 w3").split()) <= set(WORDS)


def test_moving_averages_hold_every_parameter(trained: Path) -> None:
    state = load_checkpoint_to_cpu(str(trained / "checkpoint_last.pt"))
    ema = state["extra_state"]["ema"]
    assert ema.keys() == state["model"].keys()
    for scalar in ("encoder.layers.0.self_attn_layer_norm.weight", "decoder.layer_norm.weight"):
        assert ema[scalar] != state["model"][scalar]


RESUMED = ("--max-epoch", "3", "--save-interval-updates", "2", "--update-freq", "2")
SCALARS = ("--fixup-scalar-lr-ratio", "0.1", "--lr-scheduler", "inverse_sqrt", "--warmup-updates")


def test_kill_and_resume_equals_an_uninterrupted_run(data_bin: Path, tmp_path: Path) -> None:
    more = (*RESUMED, *SCALARS, "4", "--dropout", "0.2", "--max-tokens", "150")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    fairseq("train", *train_flags(data_bin, whole, *more))
    line = [sys.executable, "-m", "fairseq_cli.train", *train_flags(data_bin, killed, *more)]
    with subprocess.Popen(
        list(map(str, line)), stdout=subprocess.PIPE, text=True, env=ENVIRONMENT, cwd=ROOT
    ) as run:
        assert run.stdout is not None
        for text in run.stdout:
            # In the second of three epochs, past a checkpoint in its midst.
            if re.search(r'"epoch": 2, .*"num_updates": "9"', text):
                run.send_signal(signal.SIGKILL)
                break
    assert run.returncode == -signal.SIGKILL
    done = fairseq("train", *train_flags(data_bin, killed, *more))
    assert "epoch 2 @" in done.stdout + done.stderr
    _assert_equal(whole / "checkpoint_last.pt", killed / "checkpoint_last.pt")


def test_two_ranks_equal_one_rank_with_the_same_batch(data_bin: Path, tmp_path: Path) -> None:
    common = ("--dropout", "0", "--max-tokens", "150")
    one, two = tmp_path / "one", tmp_path / "two"
    fairseq("train", *train_flags(data_bin, one, *common, "--update-freq", "2"))
    ranks = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    ranks += ["--master-port", "29653", "-m", "fairseq_cli.train"]
    gloo = ("--distributed-backend", "gloo", "--ddp-backend", "legacy_ddp")
    for epochs in ("1", "2"):  # the second start resumes: rank 0 broadcasts the checkpoint
        flags = train_flags(data_bin, two, *common, *gloo, "--max-epoch", epochs)
        done = subprocess.run(
            list(map(str, [*ranks, *flags])),
            capture_output=True,
            text=True,
            env=ENVIRONMENT,
            cwd=ROOT,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    first, second = _model(one / "checkpoint_last.pt"), _model(two / "checkpoint_last.pt")
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=1e-4, atol=1e-5, msg=key)


HYDRA = {
    "task": "translation",
    "task.source_lang": "de",
    "task.target_lang": "en",
    "+model": "{_name:transformer_fixup_tiny,fixup_scalar_lr_ratio:0.1}",
    "criterion": "cross_entropy",
    "optimizer": "adam",
    "optimization.lr": "[0.002]",
    "optimization.max_update": "3",
    "dataset.max_tokens": "400",
    "dataset.num_workers": "0",
    "common.cpu": "true",
    "common.user_dir": str(ROOT / "fixup_mt"),
}


@pytest.mark.parametrize(
    "bf16",
    [pytest.param("false", id="float32"), pytest.param("true", id="bf16", marks=pytest.mark.slow)],
)
def test_hydra_train_and_the_scalars_rate(data_bin: Path, tmp_path: Path, bf16: str) -> None:
    settings = HYDRA | {
        "task.data": str(data_bin),
        "checkpoint.save_dir": str(tmp_path),
        "common.bf16": bf16,
    }
    fairseq("hydra_train", *(f"{key}={value}" for key, value in settings.items()), cwd=tmp_path)
    state = _model(tmp_path / "checkpoint_last.pt")
    assert len(state["encoder.layers.0.fc1.weight"]) == 128
    steps = {k: v for k, v in state.items() if v.numel() == 1 and k.endswith("weight")}
    assert all(state[key.replace("weight", "rate")].item() == pytest.approx(0.1) for key in steps)
    moved = [abs(value.item()) for value in steps.values()]
    # Three steps of Adam at 0.002: the stored number moves like a weight, the scalar a tenth.
    assert max(moved) <= 3 * 0.002 * 1.1 and sum(m > 1e-4 for m in moved) > len(moved) / 2
    assert {value.dtype for value in steps.values()} == {torch.float32}


def test_language_model_trains_and_is_scored(corpus: Path, tmp_path: Path) -> None:
    data = tmp_path / "lm"
    prefixes = [f"--{split}pref={corpus / split}.en" for split in ("train", "valid", "test")]
    fairseq("preprocess", "--only-source", *prefixes, "--destdir", data)
    task = ("--task", "language_modeling", "--tokens-per-sample", "32")
    arch = ("--arch", "transformer_fixup_lm_tiny", "--criterion", "cross_entropy")
    fairseq("train", *train_flags(data, tmp_path / "run", *task, *arch))
    path = ("--path", tmp_path / "run" / "checkpoint_best.pt")
    done = fairseq("eval_lm", data, *path, *task[2:], "--user-dir", "fixup_mt", "--cpu")
    printed = done.stdout + done.stderr
    tokens = re.search(r"Evaluated ([\d,]+) tokens", printed)
    perplexity = re.search(r"Perplexity: ([\d.]+)", printed)
    assert tokens is not None and perplexity is not None
    expected = sum(len(line.split()) + 1 for line in (corpus / "test.en").read_text().splitlines())
    assert int(tokens[1].replace(",", "")) == expected
    assert 1 < float(perplexity[1]) < 30


def test_adaptive_softmax_trains(data_bin: Path, tmp_path: Path) -> None:
    more = ("--adaptive-softmax-cutoff", "8,16", "--criterion", "adaptive_loss")
    ddp = ("--ddp-backend", "legacy_ddp", "--max-epoch", "1")
    fairseq("train", *train_flags(data_bin, tmp_path, *more, *ddp))
    assert (tmp_path / "checkpoint_last.pt").exists()


def test_eval_bleu_with_everything_optional_on(data_bin: Path, tmp_path: Path) -> None:
    bleu = ("--eval-bleu", "--eval-bleu-detok", "space", "--eval-bleu-args", '{"beam": 1}')
    best = ("--best-checkpoint-metric", "bleu", "--maximize-best-checkpoint-metric")
    model = ("--share-all-embeddings", "--encoder-learned-pos", "--encoder-layerdrop", "0.2")
    more = ("--checkpoint-activations", "--fixup-autocast", "bf16")
    slow = ("--optimizer", "sgd", "--fixup-scalar-lr-ratio", "0.25")
    fairseq("train", *train_flags(data_bin, tmp_path, *bleu, *best, *model, *more, *slow))
    state = load_checkpoint_to_cpu(str(tmp_path / "checkpoint_best.pt"))
    assert "best" in state["extra_state"] and state["extra_state"]["val_loss"] >= 0
    rate = state["model"]["encoder.layers.0.self_attn_layer_norm.rate"].item()
    assert rate == pytest.approx(0.25**0.5)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages as pip installs them, away from the checkout."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("fixup_core", "fixup_mt"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--target", str(target), str(source)], check=True, env=ENVIRONMENT)
    return target


@pytest.mark.parametrize(
    "where",
    [
        pytest.param("relative", marks=pytest.mark.slow),
        pytest.param("absolute", marks=pytest.mark.slow),
        "installed",
    ],
)
def test_user_dir(where: str, data_bin: Path, tmp_path: Path, request) -> None:
    """A bare checkout where nothing is installed, and an installed copy."""
    if where == "installed":
        site = request.getfixturevalue("installed")
        line = [sys.executable, "-m", "fixup_mt"]
        # -P: not the current folder, which may hold another copy.
        printed = subprocess.run(
            [sys.executable, "-P", *line[1:]],
            capture_output=True,
            text=True,
            check=True,
            env=ENVIRONMENT | {"PYTHONPATH": str(site)},
            cwd=tmp_path,
        )
        user_dir = printed.stdout.strip()
        assert user_dir == str(site / "fixup_mt")
    else:
        bare = tmp_path / "checkout"
        for name in ("fixup_core", "fixup_mt"):
            shutil.copytree(ROOT / name, bare / name)
        user_dir = "fixup_mt" if where == "relative" else str(bare / "fixup_mt")
    cwd = bare if where == "relative" else tmp_path
    flags = train_flags(data_bin, tmp_path / "run", "--max-update", "2", "--user-dir", user_dir)
    # An editable install of this project must be out of sight.
    code = (
        f"import sys; sys.path = [p for p in sys.path if p != {str(ROOT)!r}];"
        "sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f)];"
        "from fairseq_cli.train import cli_main; cli_main();"
        "import fixup_mt; print('PLUGIN', fixup_mt.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, flags)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        cwd=cwd,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    expected = site if where == "installed" else bare
    assert f"PLUGIN {expected / 'fixup_mt'}" in done.stdout
