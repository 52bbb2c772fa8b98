"""``make demo``: models with and without norms side by side on the built-in German-English corpus.

Small Transformers of the same sizes see the same sentences for the same number of updates.
Everything lands in one folder; a step that is finished is not done again, and a training that was
cut off goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from fixup_core.files import once, write_text
from fixup_mt.demo import corpus
from fixup_mt.demo.demo_report import TRANSLATIONS, Result, read_result, write_report
from fixup_mt.errors import UserError
from fixup_mt.host.jobs import Job, cores, run_jobs

PLUGIN = Path(__file__).resolve().parents[1]
# The sizes of all models, as fairseq's flags say them.
SIZES = {
    "encoder-layers": 2,
    "encoder-embed-dim": 128,
    "encoder-ffn-embed-dim": 256,
    "encoder-attention-heads": 4,
    "decoder-layers": 2,
    "decoder-embed-dim": 128,
    "decoder-ffn-embed-dim": 256,
    "decoder-attention-heads": 4,
}
PIECES = 2000
MAX_TOKENS = 1024
UPDATES = 1500
WARMUP = 100
CHECKPOINTS = 10
BEAM = 5


@dataclass(frozen=True)
class Contender:
    """A model and the settings that are its own."""

    folder: str
    name: str
    arch: str
    lr: float
    flags: tuple[tuple[str, str], ...] = ()


FREQUENCIES = ("fixup-output-bias", "frequencies")
# Rates chosen on the validation sentences of seed 1.
CONTENDERS = (
    Contender("fixup", "Fixup", "transformer_fixup_tiny", lr=0.003, flags=(FREQUENCIES,)),
    Contender(
        "t_fixup",
        "T-Fixup",
        "transformer_fixup_tiny",
        lr=0.003,
        flags=(("fixup-method", "t_fixup"), FREQUENCIES),
    ),
    Contender("layernorm", "LayerNorm", "transformer", lr=0.003),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--output", type=Path, default=Path("runs/demo"), help="folder (default: runs/demo)")
    add("--seed", type=int, default=1, help="of the corpus and of the models")
    add("--max-update", type=int, default=UPDATES, metavar="N", help="updates of each model")
    add("--threads", type=int, default=min(cores(), 8), metavar="N", help="CPU threads in all")
    add("--train-pairs", type=int, default=corpus.TRAIN, metavar="N", help="training sentences")
    add("--test-pairs", type=int, default=corpus.TEST, metavar="N", help="test (and valid) ones")


def run(args: argparse.Namespace) -> None:
    if args.threads < 1 or args.max_update < 1:
        raise UserError("--threads and --max-update must be at least 1")
    output: Path = args.output
    output.mkdir(parents=True, exist_ok=True)
    try:
        with locked(output):
            keep_settings(output, args)
            prepare(output, args)
            train(output, args)
            translate(output, args)
            write_report(output, [result(output, one) for one in CONTENDERS], settings_of(args))
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt("the same command goes on from here") from error


@contextmanager
def locked(output: Path) -> Iterator[None]:
    with (output / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another demo is at work in {output}; wait for its end") from error
        yield


def settings_of(args: argparse.Namespace) -> dict[str, object]:
    """What a finished step depends on."""
    return {
        "seed": args.seed,
        "train_pairs": args.train_pairs,
        "test_pairs": args.test_pairs,
        "max_update": args.max_update,
        "sizes": SIZES,
        "pieces": PIECES,
        "max_tokens": MAX_TOKENS,
        "warmup_updates": WARMUP,
        "beam": BEAM,
        "contenders": {one.name: [one.arch, one.lr, *one.flags] for one in CONTENDERS},
    }


def keep_settings(output: Path, args: argparse.Namespace) -> None:
    """Refuse to mix two demos in one folder."""
    path, text = output / "settings.json", json.dumps(settings_of(args), indent=2) + "\n"
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise UserError(
            f"{output} holds a demo with other settings (see {path}): remove it, or give another "
            "--output"
        )
    write_text(path, text)


def step(target: Path, title: str, build: Callable[[Path], None]) -> None:
    """Build the folder `target` once, and say so."""
    print(f"{title}: {'done' if once(target, build) else 'done before'}")


def prepare(output: Path, args: argparse.Namespace) -> None:
    """Sentences, their pieces, and fairseq's binary form of them."""
    test = args.test_pairs

    def sentences(folder: Path) -> None:
        corpus.write_corpus(folder, seed=args.seed, train=args.train_pairs, valid=test, test=test)

    step(output / "corpus", f"corpus of {args.train_pairs:,} sentence pairs", sentences)
    step(output / "pieces", "subword pieces", lambda folder: cut(output / "corpus", folder))
    step(output / "data", "data for fairseq", lambda folder: binarise(output, folder))


def cut(source: Path, folder: Path) -> None:
    """A joint BPE over both languages, and every file cut by it."""
    import sentencepiece

    folder.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        input=[str(source / "train.de"), str(source / "train.en")],
        model_prefix=str(folder / "sentencepiece"),
        model_type="bpe",
        vocab_size=PIECES,
        hard_vocab_limit=False,
        character_coverage=1.0,
        num_threads=1,
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "sentencepiece.model"))
    for path in sorted(source.iterdir()):
        lines = path.read_text(encoding="utf-8").splitlines()
        pieces = (" ".join(model.encode(line, out_type=str)) for line in lines)
        (folder / path.name).write_text("".join(f"{line}\n" for line in pieces), encoding="utf-8")


def binarise(output: Path, folder: Path) -> None:
    splits = [f"--{split}pref={output / 'pieces' / split}" for split in corpus.SPLITS]
    arguments = ["--source-lang=de", "--target-lang=en", *splits, f"--destdir={folder}"]
    job = Job(
        "data for fairseq",
        "fairseq_cli.preprocess",
        [*arguments, "--joined-dictionary", "--workers=1", f"--user-dir={PLUGIN}"],
        log=output / "preprocess.log",
    )
    run_jobs([job], threads=1)


def train(output: Path, args: argparse.Namespace) -> None:
    def job(one: Contender) -> Job:
        return Job(
            one.name,
            "fairseq_cli.train",
            training_arguments(output, one, args),
            log=output / one.folder / "train.log",
            on_line=show_update,
            total=args.max_update,
            unit="updates",
        )

    todo = [one for one in CONTENDERS if not finished(output, one).exists()]
    run_jobs([job(one) for one in todo], threads=args.threads, at_once=args.threads)
    for one in todo:
        finished(output, one).touch()


def finished(output: Path, one: Contender) -> Path:
    return output / one.folder / "train.done"


def training_arguments(output: Path, one: Contender, args: argparse.Namespace) -> list[str]:
    """Everything but the architecture, its own flags and the learning rate is the same for all."""
    interval = max(1, args.max_update // CHECKPOINTS)
    options = {
        **SIZES,
        "user-dir": PLUGIN,
        "save-dir": output / one.folder,
        "arch": one.arch,
        "lr": one.lr,
        **dict(one.flags),
        "task": "translation",
        "source-lang": "de",
        "target-lang": "en",
        "seed": args.seed,
        "dropout": 0.0,
        "criterion": "label_smoothed_cross_entropy",
        "label-smoothing": 0.1,
        "optimizer": "adam",
        "adam-betas": "(0.9, 0.98)",
        "clip-norm": 1.0,
        "lr-scheduler": "polynomial_decay",
        "warmup-updates": min(WARMUP, max(1, args.max_update // 4)),
        "total-num-update": args.max_update,
        "max-update": args.max_update,
        "max-tokens": MAX_TOKENS,
        "required-batch-size-multiple": 1,
        "num-workers": 0,
        "validate-interval-updates": interval,
        "save-interval-updates": interval,
        "keep-interval-updates": 1,
        "log-format": "json",
        "log-interval": min(10, interval),
    }
    flags = [f"--{name}={value}" for name, value in options.items()]
    return [str(output / "data"), "--cpu", "--no-epoch-checkpoints", *flags]


def show_update(line: str, bar: tqdm) -> None:
    """Move the bar by fairseq's JSON lines: "Fixup 350/800 updates, loss 2.31"."""
    found = re.search(r'"loss": "([\d.]+)".*"num_updates": "(\d+)"', line)
    if found:
        bar.set_postfix_str(f"loss {float(found[1]):.2f}", refresh=False)
        bar.update(int(found[2]) - bar.n)


def translate(output: Path, args: argparse.Namespace) -> None:
    def job(one: Contender) -> Job:
        folder = output / one.folder
        return Job(
            f"{one.name}, test set",
            "fairseq_cli.generate",
            generation_arguments(output, folder),
            log=folder / "generate.log",
            on_line=lambda line, bar: bar.update(line.startswith("D-")),
            total=args.test_pairs,
            unit="sentences",
            output=folder / TRANSLATIONS,
        )

    todo = [one for one in CONTENDERS if not (output / one.folder / TRANSLATIONS).exists()]
    run_jobs([job(one) for one in todo], threads=args.threads, at_once=args.threads)


def generation_arguments(output: Path, folder: Path) -> list[str]:
    options = {
        "user-dir": PLUGIN,
        "path": folder / "checkpoint_best.pt",
        "source-lang": "de",
        "target-lang": "en",
        "task": "translation",
        "beam": BEAM,
        "remove-bpe": "sentencepiece",
        "max-tokens": 4 * MAX_TOKENS,
        "required-batch-size-multiple": 1,
        "num-workers": 0,
    }
    return [
        str(output / "data"),
        "--cpu",
        *(f"--{name}={value}" for name, value in options.items()),
    ]


def result(output: Path, one: Contender) -> Result:
    return read_result(one.name, output / one.folder, output / "corpus" / "test.en")
