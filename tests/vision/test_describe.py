"""``python -m vision describe``: the published sizes, torchvision's counts, and what is refused."""

from __future__ import annotations

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vision.__main__ import main
from vision.describe import describe, short
from vision.nets import outline
from vision.nets.measured import measure

GIGA, MEGA = 1e9, 1e6

# He et al. 2015, table 1 and figure 3; of the bottleneck networks as torchvision's documentation
# has them (GFLOPS), whose stride is on the 3x3 convolution as ours is.
PUBLISHED = {
    "imagenet_resnet18": (18, 8, 2, 1.8, 11.69),
    "imagenet_resnet34": (34, 16, 2, 3.6, 21.80),
    "imagenet_resnet50": (50, 16, 3, 4.1, 25.56),
    "imagenet_resnet101": (101, 33, 3, 7.8, 44.55),
    "imagenet_resnet152": (152, 50, 3, 11.5, 60.19),
}
STRIDE_ON_1X1 = {"imagenet_resnet50": 3.8, "imagenet_resnet101": 7.6, "imagenet_resnet152": 11.3}
"""The paper's own numbers of the bottleneck networks."""
SAME = {
    **{name: (name.removeprefix("imagenet_"), "batchnorm") for name in PUBLISHED},
    **{f"imagenet_vgg{n}": (f"vgg{n}", "none") for n in (11, 13, 16, 19)},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_residual_networks_have_their_published_sizes(name: str) -> None:
    layers, L, m, work, parameters = PUBLISHED[name]
    found = describe(name, "batchnorm").found
    assert (found.layers, found.branches) == (layers, (m,) * L)
    # The paper cuts digits off: 3.66 is its 3.6.
    assert found.multiply_adds / GIGA == pytest.approx(work, abs=0.07)
    assert round(found.parameters / MEGA, 2) == parameters
    sizes = [stage.size[0] for stage in found.stages]
    assert sizes == [112, 56, 28, 14, 7, 1]


@pytest.mark.parametrize("name", STRIDE_ON_1X1)
def test_the_papers_stride_explains_the_difference_to_the_paper(name: str) -> None:
    found = describe(name, "batchnorm").found
    # The first 1x1 of three stages, as large as the stage before instead of a quarter of it.
    first = sum(
        next(one for one in stage.layers if one.branch is not None).multiply_adds
        for stage in found.stages[2:5]
    )
    paper = (found.multiply_adds - 3 / 4 * first) / GIGA
    assert paper == pytest.approx(STRIDE_ON_1X1[name], abs=0.07)
    assert found.multiply_adds / GIGA > STRIDE_ON_1X1[name] + 0.15


def test_figure_3_of_he_et_al_lies_side_by_side(capsys: pytest.CaptureFixture) -> None:
    nets = ("imagenet_vgg19", "imagenet_plain34", "imagenet_resnet34")
    work = [describe(name).found.multiply_adds / GIGA for name in nets]
    assert work == pytest.approx([19.6, 3.6, 3.6], abs=0.07)
    assert main(["describe", *nets]) == 0
    said = capsys.readouterr().out
    lines = {line.split("  ")[0]: line.split() for line in said.splitlines() if line}
    assert lines["layers"] == ["layers", "19", "34", "34"]
    assert lines["residual branches L"][-3:] == ["0", "0", "16"]
    assert lines["method"][1:] == ["none", "none", "fixup"]
    assert "6 x 3x3 64        3 x [3x3 64, 3x3 64]" in said
    assert "19.63 G         3.64 G            3.66 G" in said


@pytest.mark.parametrize("name", SAME)
def test_parameters_and_multiply_adds_are_torchvisions(name: str) -> None:
    theirs_name, method = SAME[name]
    with torch.device("meta"):
        theirs = getattr(torchvision.models, theirs_name)().eval()
        with FlopCounterMode(display=False) as counter:
            theirs(torch.empty(1, 3, 224, 224))
    found = describe(name, method).found
    assert found.parameters == sum(p.numel() for p in theirs.parameters())
    assert 2 * found.multiply_adds == counter.get_total_flops()
    assert found.other_multiply_adds == 0


@pytest.mark.parametrize("method", ["fixup", "nf", "dyt", "groupnorm", "fixup_adam"])
def test_no_method_changes_the_multiply_adds(method: str) -> None:
    usual, found = (describe("imagenet_resnet18", m).found for m in ("batchnorm", method))
    assert found.multiply_adds == usual.multiply_adds
    assert [stage.text for stage in found.stages] == [stage.text for stage in usual.stages]


def test_what_is_counted_is_what_the_network_has() -> None:
    found = describe("imagenet_resnet18").found
    net = outline("imagenet_resnet18", num_classes=1000)
    assert found.parameters == sum(p.numel() for p in net.parameters())
    assert found.other_parameters == 1 + 8 * 5 + 1  # the stem's, the blocks', the head's scalars
    assert found.projections == 3


def test_options_reach_the_network() -> None:
    small = describe("imagenet_resnet18", size=112, classes=10).found
    assert [stage.size[0] for stage in small.stages] == [56, 28, 14, 7, 4, 1]
    assert small.stages[-1].text == "fc 10"
    assert describe("highway50", size=16).found.parameters < describe("highway50").found.parameters


def test_shared_weights_count_once_and_calls_twice() -> None:
    layer = nn.Conv2d(3, 3, 3, padding=1, device="meta")
    once, twice = (measure(nn.Sequential(*[layer] * n), 3, 8) for n in (1, 2))
    assert once.parameters == twice.parameters == sum(s.parameters for s in twice.stages)
    assert 2 * once.multiply_adds == twice.multiply_adds
    assert (once.layers, twice.layers) == (1, 2)


class Grouped(nn.Module):
    """A grouped convolution, and a product of matrices in no layer."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, groups=3, bias=False)
        self.matrix = nn.Parameter(torch.ones(6, num_classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).mean(dim=(2, 3)) @ self.matrix


def test_a_network_of_ones_own_is_described_by_its_class_path() -> None:
    column = describe(f"{__name__}.Grouped", size=5, classes=4)
    assert column.method == "as_it_is" and not column.found.declared
    assert column.found.stages[0].text == "3x3 6 in 3 groups"
    assert column.found.stages[0].multiply_adds == 9 * 6 * 9
    assert (column.found.other_multiply_adds, column.found.other_parameters) == (24, 24)


def test_markdown(capsys: pytest.CaptureFixture) -> None:
    assert main(["describe", "cifar_resnet20", "cifar_wrn16_4", "--format", "markdown"]) == 0
    for table in capsys.readouterr().out.strip().split("\n\n"):
        header, rule, *rows = table.splitlines()
        assert "cifar_resnet20" in header and set(rule) == {"|", "-"}
        assert all(row.count("|") == 4 for row in (header, rule, *rows))


def test_numbers_are_short() -> None:
    numbers = (0, 82, 1_000, 999_999, 25_557_032, 4_089_184_256, 3 * 10**12)
    said = ["0", "82", "1.00 k", "1000.00 k", "25.56 M", "4.09 G", "3.00 T"]
    assert [short(number) for number in numbers] == said


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", "required: NET"),
        ("imagenet_resnt50", "nearest family: imagenet_resnet50"),
        ("imagenet_vgg17", "the depths are 11, 13, 16, 19"),
        ("imagenet_plain50", "the depths are 18, 34"),
        ("imagenet_resnet18 --method fixpu", "did you mean 'fixup'"),
        ("imagenet_vgg19 --method fixup", "imagenet_vgg19: the method 'fixup' is not defined"),
        ("imagenet_plain34 --method nf", "plain networks, which have no residual branches"),
        ("imagenet_resnet18 --image-size 0", "--image-size is 0: take a number from 1"),
        ("imagenet_resnet18 --image-size 1000000000000", "take a number from 1 to 65536"),
        ("imagenet_resnet18 --image-size x", "invalid int value"),
        ("imagenet_vgg19 --image-size 16", "imagenet_vgg19: it cannot be run on an image of 3x16"),
        ("imagenet_resnet18 --num-classes 0", "--num-classes is 0"),
        ("imagenet_resnet18 --format html", "invalid choice: 'html'"),
        ("tests.vision.test_describe.Grouped", "give --image-size"),
        ("tests.vision.test_describe.Grouped --image-size 2", "it cannot be run on an image of"),
        ("tests.vision.test_describe.Nope --image-size 8", "cannot be imported"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_printed(
    line: str, says: str, capsys: pytest.CaptureFixture
) -> None:
    assert main(["describe", *(["imagenet_resnet18"] if line else []), *line.split()]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert printed.err.startswith("error: ") and says in printed.err
