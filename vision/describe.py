"""Networks sized up side by side: ``python -m vision describe NET NET ...``.

Layers stage by stage, parameters, multiply-adds, and the L and m of Fixup's rules. One image goes
through each network on the meta device (``vision.nets.measured``): no weight takes memory.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fixup_core.errors import UserError
from vision.nets import AS_IT_IS, family_of, image_of, is_class_path, net_options, outline
from vision.nets.measured import Description, Size, Stage, measure

DETAILS = """\
Multiply-adds are those of convolutions and linear layers for one image, counted by running it
through the network on the meta device. He et al. count the same and call them FLOPs; other tools
count two for each. "other": norms and scalars, and what belongs to no such layer. "layers" leaves
the projections on shortcuts out, as the number in a ResNet's name does. L is the number of residual
branches, m that of the weight layers in each. The stride of our bottlenecks is on their 3x3
convolution: ResNet-50 takes 4.09 G multiply-adds. With the stride on the first 1x1, as in the
paper, it would take 3.86 G.
"""
CHANNELS = 3
"""Of the images of a network of the user's own."""
LARGEST, MOST_CLASSES = 2**16, 2**24
"""Far above what anybody trains on, and low enough for all counts to fit 64 bits."""
NOTHING = "-"

Rows = list[list[str]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.epilog = DETAILS
    parser.add_argument(
        "nets",
        nargs="+",
        metavar="NET",
        help="name as --model.net takes it: imagenet_resnet50, imagenet_plain34, imagenet_vgg19, "
        "cifar_resnet110, ...; or the class path of a network of your own",
    )
    parser.add_argument(
        "--method",
        help="of the registry; fixup, or none where a network has no residual branches",
    )
    parser.add_argument(
        "--image-size", type=int, metavar="N", help="of the image; the network's own: 224 or 32"
    )
    parser.add_argument(
        "--num-classes", type=int, metavar="N", help="of the classifier; 1000 or 10"
    )
    parser.add_argument("--format", choices=("text", "markdown"), default="text")


def run(args: argparse.Namespace) -> None:
    """Measure all before anything is printed."""
    _check_range("--image-size", args.image_size, LARGEST)
    _check_range("--num-classes", args.num_classes, MOST_CLASSES)
    columns = [describe(name, args.method, args.image_size, args.num_classes) for name in args.nets]
    layout = markdown if args.format == "markdown" else text
    print("\n\n".join(layout(table) for table in tables(columns)))


def _check_range(option: str, value: int | None, most: int) -> None:
    if value is not None and not 1 <= value <= most:
        raise UserError(f"{option} is {value}: take a number from 1 to {most}")


@dataclass(frozen=True)
class Column:
    """A network, and how it was asked for; ``image`` is channels and size."""

    name: str
    method: str
    image: tuple[int, int]
    found: Description


def describe(
    name: str, method: str | None = None, size: int | None = None, classes: int | None = None
) -> Column:
    """Build a network without memory for its weights, and count.

    Args:
        name: As ``build_net`` takes it.
        method: Of the registry; ``None``: Fixup, without residual branches He's initialisation.
        size: Of the image; ``None``: what the network is made for.
        classes: Of the classifier; ``None``: those of the data that the network is made for.

    Raises:
        UserError: There is no such network or method, or it cannot be run on such an image.
    """
    if is_class_path(name):
        if size is None:
            raise UserError(f"{name} is a network of your own: give --image-size")
        method, classes, image, plain = method or AS_IT_IS, classes or 10, (CHANNELS, size), False
        options: dict[str, Any] = {}
    else:
        family = family_of(name)
        method = method or ("fixup" if family.residual else "none")
        classes, plain = classes or family.classes, not family.residual
        sized = size is not None and "image_size" in net_options(name)
        options = {"image_size": size} if sized else {}
        channels, usual = image_of(name)
        image = (channels, size or usual)
    try:
        net = outline(name, method=method, num_classes=classes, **options)
        found = measure(net, *image, plain=plain)
    except UserError as error:
        raise UserError(f"{name}: {error}" if name not in str(error) else str(error)) from error
    return Column(name, method, image, found)


def tables(columns: Sequence[Column]) -> list[Rows]:
    """What the stages are made of; what they cost; each with a header."""
    sizes = {stage.size for column in columns for stage in column.found.stages}
    ordered = sorted(sizes, key=math.prod, reverse=True)
    names = [column.name for column in columns]

    def rows(cell: Callable[[Stage], str]) -> Rows:
        return _stages(columns, ordered, cell)

    return [
        [["output", *names], *rows(lambda stage: stage.text), *_summary(columns)],
        [["parameters", *names], *rows(lambda one: short(one.parameters)), *_weights(columns)],
        [["multiply-adds", *names], *rows(lambda one: short(one.multiply_adds)), *_work(columns)],
    ]


def text(rows: Rows) -> str:
    """Aligned columns, the header underlined."""
    widths = _widths(rows)
    header, *others = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join([header, "  ".join("-" * width for width in widths), *others])


def markdown(rows: Rows) -> str:
    """A table of Markdown."""
    widths = _widths(rows)
    header, *others = (f"| {' | '.join(map(str.ljust, row, widths))} |" for row in rows)
    return "\n".join([header, f"|{'|'.join('-' * (width + 2) for width in widths)}|", *others])


def short(number: int) -> str:
    """Four significant digits at the most: 25.56 M, 4.09 G."""
    for unit, name in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= unit:
            return f"{number / unit:.2f} {name}"
    return str(number)


def _widths(rows: Rows) -> list[int]:
    return [max(map(len, cells)) for cells in zip(*rows, strict=True)]


def _stages(columns: Sequence[Column], sizes: Sequence[Size], cell: Callable[[Stage], str]) -> Rows:
    """A row for each size of output."""
    found = [{stage.size: cell(stage) for stage in column.found.stages} for column in columns]
    return [
        ["x".join(map(str, size)), *(cells.get(size) or NOTHING for cells in found)]
        for size in sizes
    ]


def _summary(columns: Sequence[Column]) -> Rows:
    found = [column.found for column in columns]
    return [
        ["layers", *(str(one.layers) for one in found)],
        ["projections", *(str(one.projections) for one in found)],
        ["residual branches L", *map(_number_of_branches, found)],
        ["layers per branch m", *map(_depths_of_branches, found)],
        ["method", *(column.method for column in columns)],
        ["image", *(f"{c.image[0]}x{c.image[1]}x{c.image[1]}" for c in columns)],
    ]


def _number_of_branches(found: Description) -> str:
    return str(len(found.branches)) if found.declared else "not declared"


def _depths_of_branches(found: Description) -> str:
    counts = sorted(Counter(found.branches).items())
    if len(counts) > 1:
        return ", ".join(f"{m} in {count}" for m, count in counts)
    return str(counts[0][0]) if counts else NOTHING


def _weights(columns: Sequence[Column]) -> Rows:
    return [
        ["other", *(short(column.found.other_parameters) for column in columns)],
        ["total", *(short(column.found.parameters) for column in columns)],
    ]


def _work(columns: Sequence[Column]) -> Rows:
    others = [column.found.other_multiply_adds for column in columns]
    rows = [["other", *map(short, others)]] if any(others) else []
    return [*rows, ["total", *(short(column.found.multiply_adds) for column in columns)]]
