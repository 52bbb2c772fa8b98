"""``python -m fixup_mt sweep``: methods by depth, learning rate and warm-up, on one data set.

Every point is one short training; its row goes into OUTPUT/points.csv when it ends, so the same
command goes on where it was stopped, or adds points. At the end OUTPUT/transfer.png shows the
validation loss against the learning rate, a line a depth, and OUTPUT/summary.md the best rates.
"""

from __future__ import annotations

import argparse
import math
import shlex
from itertools import product
from pathlib import Path

from fixup_core.errors import UserError
from fixup_core.files import hold_folder, write_text
from fixup_core.results import TABLE, Table, keep_to
from fixup_mt.host.jobs import Job, cores, run_jobs
from fixup_mt.model.config import FixupOptions
from fixup_mt.sweep.points import (
    ARCHITECTURES,
    Point,
    Recipe,
    Result,
    Results,
    clear,
    job,
    read_result,
)
from fixup_mt.sweep.summary import figure, markdown, summarise

DEPTHS, RATES, WARMUPS = (3, 12, 30), (0.002, 0.005), (0, 100)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data-bin", type=Path, required=True, help="folder that fairseq-preprocess wrote")
    add("--task", choices=ARCHITECTURES, default=Recipe.task, help="fairseq's name of it")
    add("--methods", nargs="+", metavar="NAME", required=True, help="of the registry")
    add("--depths", nargs="+", type=int, default=DEPTHS, metavar="N", help="layers of each stack")
    add("--lrs", nargs="+", type=float, default=RATES, metavar="LR", help="learning rates")
    add("--warmup", nargs="+", type=int, default=WARMUPS, metavar="N", help="updates")
    add("--seeds", nargs="+", type=int, default=(1,), metavar="N", help="one training each")
    add("--output", type=Path, default=Path("runs/sweep"), help="folder (default: runs/sweep)")
    add("--jobs", type=int, default=cores(), metavar="N", help="trainings at once, a thread each")
    for name, text in (
        ("max-update", "updates of a training"),
        ("max-tokens", "tokens of a batch"),
        ("width", "of the model"),
        ("ffn", "width inside the feed-forward branches"),
        ("heads", "of attention"),
        ("dropout", "probability"),
        ("clip-norm", "of the gradients; 0: none"),
    ):
        default = getattr(Recipe, name.replace("-", "_"))
        add(f"--{name}", type=type(default), default=default, help=f"{text} (default: {default})")
    add("--autocast", choices=("bf16", "none"), default=Recipe.autocast, help="type of products")
    add("--flags", default="", help="more flags of fairseq-train, in one text")


def run(args: argparse.Namespace) -> None:
    recipe, points = recipe_of(args), points_of(args)
    output: Path = args.output
    hold_folder(output)
    keep_to(recipe.description(), output)
    results: Results = Table(output / TABLE, Point, Result)
    todo = {point.name: point for point in points if point not in results.rows}
    print(f"{len(points)} trainings, {len(points) - len(todo)} of them done before", flush=True)

    def ended(training: Job, error: UserError | None) -> None:
        point = todo[training.name]
        result = read_result(training.log, broke_off=error is not None)
        results.add(point, result)
        clear(point, output)
        print(f"{point.name}: {result.valid_loss:.3f} (top {result.top_loss:.1f})", flush=True)

    run_jobs(
        [job(point, recipe, output) for point in todo.values()],
        threads=args.jobs,
        at_once=args.jobs,
        on_end=ended,
    )
    report(results, recipe, output)


def recipe_of(args: argparse.Namespace) -> Recipe:
    """What all points share.

    Raises:
        UserError: No data lie there.
    """
    if not (args.data_bin / "dict.txt").exists() and not list(args.data_bin.glob("dict.*.txt")):
        raise UserError(f"{args.data_bin} holds no dict.*.txt: give what fairseq-preprocess wrote")
    names = [field for field in vars(Recipe(args.data_bin)) if field not in ("data_bin", "flags")]
    chosen = {name: getattr(args, name) for name in names}
    data_bin, flags = args.data_bin.resolve(), tuple(shlex.split(args.flags))
    return Recipe(data_bin, flags=flags, **chosen)


def points_of(args: argparse.Namespace) -> list[Point]:
    """The grid, shallow nets first.

    Raises:
        UserError: A method that is not defined for Transformers, or a number that makes no sense.
    """
    for method in args.methods:
        _ = FixupOptions(method=method).record
    if min(args.depths) < 1 or min(args.lrs) <= 0 or min(args.warmup) < 0 or args.jobs < 1:
        raise UserError("depths and jobs are at least 1, rates above 0, warm-ups 0 or more")
    if max(args.warmup) >= args.max_update:
        raise UserError(f"a warm-up of {max(args.warmup)} leaves nothing of --max-update")
    grid = product(sorted(args.depths), args.lrs, args.warmup, args.seeds, args.methods)
    return [Point(method, depth, lr, warmup, seed) for depth, lr, warmup, seed, method in grid]


def report(results: Results, recipe: Recipe, output: Path) -> None:
    """Write the table and the figure, and print the table."""
    dictionary = next(iter(recipe.data_bin.glob("dict*.txt")))
    # fairseq's dictionary has four words of its own.
    words = 4 + len(dictionary.read_text(encoding="utf-8").splitlines())
    table = markdown(summarise(results, chance=math.log2(words)))
    write_text(output / "summary.md", table)
    figure(results, output / "transfer.png")
    print(table)
    print(f"table: {output / TABLE}; figure: {output / 'transfer.png'}")
