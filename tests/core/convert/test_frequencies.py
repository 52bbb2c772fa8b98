"""``start_at_frequencies_``: an output bias at the classes' frequencies, and what it spares."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fixup_core import fixup_, fixup_init_, fold, param_groups, start_at_frequencies_
from fixup_core.errors import UserError
from tests.core.convert.nets import IMAGES
from tests.core.foreign import PreActivation

WORDS, LENGTH = 40, 16
FREQUENCIES = torch.arange(1, WORDS + 1).pow(-1.5)


class Language(nn.Module):
    """A pre-norm Transformer on words, with an output layer that has no bias vector."""

    def __init__(self, depth: int = 6, width: int = 64) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, width)
        layer = nn.TransformerEncoderLayer(
            width, 2, 2 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        norm = nn.LayerNorm(width)
        self.encoder = nn.TransformerEncoder(layer, depth, norm, enable_nested_tensor=False)
        self.head = nn.Linear(width, WORDS, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        return self.head(self.encoder(self.words(text)))


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(FREQUENCIES, 32 * (LENGTH + 1), True, generator=generator)
    text = drawn.view(32, LENGTH + 1)
    return text[:, :-1], text[:, 1:]


def converted(seed: int = 0) -> Language:
    torch.manual_seed(seed)
    net = Language()
    fixup_(net, example_inputs=batch(0)[0], calibrate=True, verbose=False)
    return net


def highest_loss(net: nn.Module) -> float:
    """In 12 steps of AdamW at 0.01, clipped at 1."""
    optimizer = torch.optim.AdamW(param_groups(net, lr=0.01))
    losses = []
    for step in range(12):
        inputs, labels = batch(step)
        loss = F.cross_entropy(net(inputs).flatten(0, 1), labels.flatten())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    return max(losses)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_calibrated_language_model_does_not_leap(seed: int) -> None:
    guess = torch.tensor(WORDS).log().item()
    net = converted(seed)
    assert highest_loss(copy.deepcopy(net)) > 3 * guess
    start_at_frequencies_(net, batch(0)[1])
    assert highest_loss(net) < guess


def test_the_output_starts_at_the_frequencies_and_returns_to_them() -> None:
    net = converted()
    labels = torch.tensor([[0, 0, 1], [1, 0, -100]])
    start_at_frequencies_(net, labels)
    expected = torch.full((WORDS,), 1.0)
    expected[:2] = torch.tensor([4.0, 3.0])
    expected /= expected.sum()
    inputs = batch(1)[0]
    torch.testing.assert_close(net(inputs).softmax(-1)[0, 0], expected)
    assert any(p is net.head.bias for group in param_groups(net, lr=0.1) for p in group["params"])
    torch.testing.assert_close(fold(net)(inputs), net.eval()(inputs))
    with torch.no_grad():
        net.head.bias.zero_()
    fixup_init_(net)
    torch.testing.assert_close(net.head.bias.softmax(-1), expected)
    start_at_frequencies_(net, 2 - labels.clamp(min=0))  # a second call counts anew
    assert net.head.bias.argmax() == 2


def test_a_bias_vector_that_is_there_is_written() -> None:
    net = PreActivation()
    fixup_(net, example_inputs=IMAGES, verbose=False)
    bias, keys = net.fc.bias, list(net.state_dict())
    start_at_frequencies_(net, torch.tensor([1, 1, 1]))
    assert net.fc.bias is bias and list(net.state_dict()) == keys
    assert net.fc.bias.argmax() == 1 and net(IMAGES).softmax(-1).max() > 0.2


def test_a_method_with_such_an_output_says_so() -> None:
    for method, said in (("fixup", False), ("fixup_adam", True)):
        report = fixup_(Language(), example_inputs=batch(0)[0], method=method, verbose=False)
        assert ("fc.start_at_frequencies_(net, labels)" in str(report)) is said


def _frozen() -> nn.Module:
    net = PreActivation()
    fixup_(net, example_inputs=IMAGES, verbose=False)
    net.fc.bias.requires_grad_(False)
    return net


@pytest.mark.parametrize(
    ("make", "labels", "message"),
    [
        (Language, torch.tensor([1]), "has 0 output layers"),
        (_frozen, torch.tensor([1]), "fc.bias is frozen"),
        (converted, torch.tensor([WORDS]), "from 0 to 39 here, and the largest is 40"),
        (converted, torch.tensor([-100]), "there are none"),
        (converted, torch.tensor([0.5]), "labels are integers, got torch.float32"),
    ],
)
def test_what_has_no_frequencies_is_refused(
    make: Callable[[], nn.Module], labels: Tensor, message: str
) -> None:
    net = make()
    before: dict[str, Any] = copy.deepcopy(net.state_dict())
    with pytest.raises(UserError, match=message):
        start_at_frequencies_(net, labels)
    after = net.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
