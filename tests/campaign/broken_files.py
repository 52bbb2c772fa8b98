"""Broken checkpoints of ten kinds through every command that loads one: one line, and no code runs.

``--count`` is the number of kinds.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from tests.campaign.common import FIT, Ended, campaign, halves, run

Break = Callable[[Path, bytes, Path], None]
"""Writes a broken file: its name, what a whole one holds, and what code in it would make."""


class _Code:
    """Unpickled, it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


def _state(file: Path, whole: bytes) -> dict[str, Any]:
    file.write_bytes(whole)
    return torch.load(file, map_location="cpu", weights_only=True)


def _without_model(file: Path, whole: bytes, mark: Path) -> None:
    state = _state(file, whole)
    state.pop("model", None), state.pop("state_dict", None)
    torch.save(state, file)


def _code_in_a_pickle(file: Path, whole: bytes, mark: Path) -> None:
    torch.save(_state(file, whole) | {"extra_state": _Code(mark), "loops": _Code(mark)}, file)


def _code_in_a_setting(file: Path, whole: bytes, mark: Path) -> None:
    state = _state(file, whole)
    code = f"__import__('pathlib').Path({str(mark)!r}).touch()"
    if "cfg" in state:
        model = {"_name": "transformer", "encoder": {"xformers_att_config": code}}
        state["cfg"]["model"] = model
    else:
        state["hyper_parameters"] = {"_class_path": "os.system", "net": code}
    torch.save(state, file)


def _no_numbers(file: Path, whole: bytes, mark: Path) -> None:
    state = _state(file, whole)
    for weight in (state.get("model") or state["state_dict"]).values():
        if isinstance(weight, torch.Tensor) and weight.is_floating_point():
            weight.fill_(math.nan)
    torch.save(state, file)


KINDS: dict[str, Break] = {
    "empty": lambda file, whole, mark: file.touch(),
    "a folder": lambda file, whole, mark: file.mkdir(),
    "cut": lambda file, whole, mark: _write(file, whole[: len(whole) // 2]),
    "zeros": lambda file, whole, mark: _write(file, bytes(len(whole))),
    "garbage": lambda file, whole, mark: _write(file, b"\x80\x02 garbage \xff: [ {" * 40),
    "text": lambda file, whole, mark: _write(file, b"this is text\n"),
    "without a model": _without_model,
    "code in a pickle": _code_in_a_pickle,
    "code in a setting": _code_in_a_setting,
    "not a number": _no_numbers,
}
HARMLESS = ("code in a setting", "not a number")
"""Kinds that some commands may take: those that neither build the model nor look at its weights."""


def _write(file: Path, content: bytes) -> None:
    file.write_bytes(content)


def _translation(file: Path, data: Path, new: Path) -> Iterator[list[object]]:
    """Every command that loads a checkpoint of the translation."""
    path = ("--path", file, "--cpu")
    flags = ("--arch", "transformer_fixup_tiny", "--optimizer", "adam", "--max-tokens", "400")
    train = ["train", data, *flags, "--cpu", "--max-epoch", "1", "--num-workers", "0"]
    train += ["--lr", "0.001", "--criterion", "label_smoothed_cross_entropy"]
    train += ["--save-dir", new / "run"]
    yield ["generate", data, *path]
    yield ["validate", data, *path, "--task", "translation", "--max-tokens", "400"]
    yield ["interactive", data, *path]
    yield [*train, "--restore-file", file]
    yield [*train, "--finetune-from-model", file]
    yield ["fixup_mt", "average", "--inputs", file, "--output", new / "a.pt"]
    yield ["fixup_mt", "export", "--checkpoint", file, "--data-bin", data, "--output", new / "ct2"]


def _images(file: Path, data: Path, new: Path) -> Iterator[list[object]]:
    """The same for images."""
    root = ("--trainer.default_root_dir", new / "run", "--ckpt_path", file)
    yield ["vision", *FIT, *root]
    for command in ("validate", "test", "predict"):
        yield ["vision", command, *FIT[1:], *root]
    yield ["vision", "export", "--checkpoint", file, "--output", new / "x.onnx"]
    lesion = ("lesion", "--data", "Digits", "--output", new / "lesion")
    yield ["vision", "sweep", *lesion, "--checkpoint", file]


def attack(count: int, seed: int, folder: Path) -> tuple[int, int]:
    """Send ``count`` kinds of files through the commands."""
    held = total = 0
    for half in halves(folder / "bin"):
        assert run(half.line(folder / half.name)).status == 0
        whole = (folder / half.name / half.last).read_bytes()
        commands = _translation if half.name == "translation" else _images
        for kind in list(KINDS)[:count]:
            file, mark = folder / f"broken{Path(half.last).suffix}", folder / "PWNED"
            KINDS[kind](file, whole, mark)
            for line in commands(file, folder / "bin", folder / "new"):
                ended = run(line)
                good = not mark.exists() and _good(ended, kind)
                held, total = held + good, total + 1
                if not good:
                    said = (ended.error or ended.output)[-400:]
                    print(f"{kind}, {line[:3]}: status {ended.status}, {mark.exists()=}, {said}")
                mark.unlink(missing_ok=True)
                shutil.rmtree(folder / "new", ignore_errors=True)
            shutil.rmtree(file) if file.is_dir() else file.unlink()
    return held, total


def _good(ended: Ended, kind: str) -> bool:
    return ended.refused or (kind in HARMLESS and ended.status == 0)


if __name__ == "__main__":
    campaign(attack, count=len(KINDS), closes="broken files answered by one line, no code run")
