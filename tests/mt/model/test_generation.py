"""Beam search that copies no sentence, and products that are kept while nothing changes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from fairseq.models.transformer import TransformerEncoderBase
from fairseq.sequence_generator import SequenceGenerator
from omegaconf import OmegaConf
from torch import nn

from fixup_mt.model.attention import FixupAttention, KeyValueCache
from fixup_mt.model.beams import apart, appended, sentence_order, together
from fixup_mt.model.linears import KEPT
from tests.mt.helpers import WORDS, batch, build, dictionary, trained


def _search(model: Any, **options: Any) -> list[list[dict[str, torch.Tensor]]]:
    inputs = {name: value for name, value in batch(5).items() if name != "prev_output_tokens"}
    search: Any = SequenceGenerator([model], dictionary(), max_len_b=25, **options)
    return search.generate([model], {"net_input": inputs})


def _copying(model: Any) -> Any:
    """The same model with fairseq's own reordering, a copy of the sentence for every hypothesis."""
    model = copy.deepcopy(model)
    encoder = model.encoder
    encoder.reorder_encoder_out = lambda out, order: TransformerEncoderBase.reorder_encoder_out(
        encoder, out, order
    )
    return model


def _ready(model: Any, print_alignment: str | bool = False) -> Any:
    """As ``fairseq-generate`` prepares it."""
    model = copy.deepcopy(model)
    options = {"generation": {"print_alignment": print_alignment}}
    model.prepare_for_inference_(OmegaConf.create(options))
    return model


@pytest.mark.parametrize("beam", [1, 3, 6])
@pytest.mark.parametrize("options", [{}, {"len_penalty": 2.0, "unk_penalty": 1.0}])
def test_sharing_a_sentence_finds_what_copying_it_finds(beam: int, options: dict) -> None:
    torch.manual_seed(0)
    model = trained(build()).double()
    for one in (model, _ready(model), _ready(model, "hard")):
        shared, copied = (_search(m, beam_size=beam, **options) for m in (one, _copying(one)))
        assert len({len(hypos[0]["tokens"]) for hypos in shared}) > 1, "sentences end at once"
        for ours, theirs in zip(shared, copied, strict=True):
            for mine, other in zip(ours, theirs, strict=True):
                assert torch.equal(mine["tokens"], other["tokens"])
                torch.testing.assert_close(mine["positional_scores"], other["positional_scores"])
                torch.testing.assert_close(mine["attention"], other["attention"])


def test_cross_self_attention_copies_sentences_as_fairseq_does() -> None:
    torch.manual_seed(0)
    model = trained(build(cross_self_attention=True, no_cross_attention=True))
    for ours, theirs in zip(
        _search(model, beam_size=3), _search(_copying(model), beam_size=3), strict=True
    ):
        assert torch.equal(ours[0]["tokens"], theirs[0]["tokens"])


def test_the_search_does_share_sentences() -> None:
    model, seen = trained(build()), []
    attention = model.decoder.layers[0].encoder_attn
    attention.k_proj.register_forward_hook(lambda _, inputs, out: seen.append(inputs[0].shape[1]))
    _search(model, beam_size=4)
    _search(_copying(model), beam_size=4)
    assert seen == [5, 20]


def test_ensembles_share_and_copy_side_by_side() -> None:
    one, two = trained(build(), 1), trained(build(), 2)
    inputs = {name: value for name, value in batch(5).items() if name != "prev_output_tokens"}
    found = []
    for models in ([one, two], [_copying(one), two]):
        search: Any = SequenceGenerator(models, dictionary(), beam_size=3, max_len_b=9)
        found.append(search.generate(models, {"net_input": inputs}))
    for ours, theirs in zip(*found, strict=True):
        assert torch.equal(ours[0]["tokens"], theirs[0]["tokens"])


ORDERS = [
    pytest.param([0, 0, 1, 1, 2, 2], [1, 0, 3, 3, 4, 5], id="among themselves"),
    pytest.param([0, 0, 1, 1, 2, 2], [1, 1, 5, 4], id="a sentence has ended"),
    pytest.param([0, 0, 1, 1, 2, 2], [4, 0, 1, 2, 3, 5], id="rows of a sentence part"),
    pytest.param([0, 0, 1, 1, 2, 2], [0, 2, 4], id="one of each"),
    pytest.param([2, 0], [1, 0], id="one a sentence"),
    pytest.param([0, 1, 2, 0, 1, 2], [3, 4, 5, 0, 1, 2], id="not side by side"),
]


@pytest.mark.parametrize(("first", "second"), ORDERS)
@torch.no_grad()
def test_any_order_is_exact(first: list[int], second: list[int]) -> None:
    model = trained(build()).double()
    inputs, orders = batch(3), [torch.tensor(first), torch.tensor(second)]
    logits = [_decoded(m, inputs, orders) for m in (model, _copying(model))]
    torch.testing.assert_close(*logits)


def _decoded(model: Any, inputs: dict[str, torch.Tensor], orders: list[torch.Tensor]) -> Any:
    """Logits of a third piece, the hypotheses reordered after the first and after the second."""
    out = model.encoder(inputs["src_tokens"], inputs["src_lengths"])
    state: dict[str, Any] = {}
    generator, tokens = torch.Generator().manual_seed(0), inputs["prev_output_tokens"][:, :1]
    for number, order in enumerate(orders):
        out = model.encoder.reorder_encoder_out(out, order)
        if number:
            model.decoder.reorder_incremental_state_scripting(state, order)
        tokens = tokens[order]
        model.decoder(tokens, encoder_out=out, incremental_state=state)
        latest = torch.randint(4, WORDS + 4, (len(order), 1), generator=generator)
        tokens = torch.cat([tokens, latest], dim=1)
    return model.decoder(tokens, encoder_out=out, incremental_state=state)[0]


def test_an_order_of_hypotheses_is_one_of_sentences() -> None:
    order, group = sentence_order(torch.tensor([0, 0, 0, 1, 1, 1]), 1, 2)
    assert (order.tolist(), group) == ([0, 1], 3)
    order, group = sentence_order(torch.tensor([4, 3, 5]), 3, 2)
    assert (order.tolist(), group) == ([1], 3)
    order, group = sentence_order(torch.tensor([4, 0, 5]), 3, 2)
    assert (order.tolist(), group) == ([1, 0, 1], 1)


def test_together_and_apart_are_inverse() -> None:
    q = torch.randn(6, 4, 2, 8)
    assert together(q, 2).shape == (2, 4, 6, 8)
    assert torch.equal(apart(together(q, 2), 6), q)
    # Row 1 of the second sentence, its last position.
    assert torch.equal(together(q, 2)[1, :, 3], q[4, :, 1])


@pytest.mark.parametrize("grad", [True, False])
def test_appending_is_selecting_and_joining(grad: bool) -> None:
    before, now = torch.randn(4, 2, 3, 8), torch.randn(5, 2, 1, 8)
    order = torch.tensor([3, 3, 0, 1, 2])
    with torch.set_grad_enabled(grad):
        joined = appended(before, order, now)
    assert torch.equal(joined, torch.cat([before[order], now], dim=2))


def _cache(rows: int, hidden: int | None = None, **more: Any) -> KeyValueCache:
    keys = torch.randn(rows, 2, 3, 4)
    padding = None if hidden is None else torch.arange(3).lt(hidden).expand(rows, 3)
    return KeyValueCache(keys, keys + 1, padding, **more)


def test_a_cache_is_what_fairseqs_buffer_holds() -> None:
    cache = _cache(4, hidden=1, order=torch.tensor([1, 0, 2, 3]), group=2)
    again = KeyValueCache.of(cache.buffer())
    assert again is not None and vars(again).keys() == vars(cache).keys()
    assert all(value is vars(cache)[name] for name, value in vars(again).items())
    # A decoder layer of fairseq writes the keys and values it is given, and nothing else.
    given = KeyValueCache.of({"prev_key": cache.keys, "prev_value": cache.values})
    assert given is not None and given.padding is None and given.order is None and given.group == 1
    assert KeyValueCache.of({}) is None


def test_hypotheses_are_moved_by_the_next_append() -> None:
    cache, more = _cache(3, hidden=1), torch.randn(2, 2, 1, 4)
    moved = cache.reorder_hypotheses(torch.tensor([2, 1, 0])).reorder_hypotheses(
        torch.tensor([0, 0])
    )
    assert moved.keys is cache.keys
    appended = moved.append(more, more, None)
    assert appended.order is None
    assert torch.equal(appended.keys[:, :, :3], cache.keys[[2, 2]])
    assert torch.equal(appended.values[:, :, 3:], more)
    assert appended.padding is not None
    assert appended.padding.tolist() == [[True, False, False, False]] * 2


def test_sentences_stay_while_their_hypotheses_change_places() -> None:
    cache = _cache(2, hidden=1, group=2)
    same = cache.reorder_sentences(torch.tensor([1, 0, 3, 3]))
    assert same.keys is cache.keys and same.group == 2
    swapped = cache.reorder_sentences(torch.tensor([3, 2, 0, 0]))
    assert torch.equal(swapped.keys, cache.keys[[1, 0]]) and swapped.group == 2
    parted = cache.reorder_sentences(torch.tensor([0, 2, 0, 0]))
    assert torch.equal(parted.values, cache.values[[0, 1, 0, 0]]) and parted.group == 1


def _steps(model: Any, tokens: torch.Tensor, encoder_out: Any) -> tuple[torch.Tensor, dict]:
    """Logits of every step of one decoding, and its state."""
    state: dict[str, Any] = {}
    with torch.no_grad():
        steps = [
            model.decoder(tokens[:, :end], encoder_out=encoder_out, incremental_state=state)[0]
            for end in range(1, tokens.size(1) + 1)
        ]
    return torch.cat(steps, dim=1), state


def test_products_are_kept_while_a_batch_is_decoded_and_no_longer() -> None:
    model, inputs = trained(build()).double(), batch()
    for layer in model.decoder.layers:
        layer.need_attn = False  # weights that are asked for have a softmax in float32
    tokens = inputs.pop("prev_output_tokens")
    with torch.no_grad():
        encoder_out = model.encoder(**inputs)
        whole, _ = model.decoder(tokens, encoder_out=encoder_out)
    logits, state = _steps(model, tokens, encoder_out)
    real = tokens.ne(1)
    torch.testing.assert_close(logits[real], whole[real])
    # Self-attention's packed weight; the last layer of each branch; the first of the ffn.
    products = [products for _, products in state[KEPT] if products is not None]
    assert len(products) == 5 * len(model.decoder.layers)
    assert all(layer.kept is None for layer, _ in state[KEPT])


@pytest.mark.parametrize("through", ["data", "no_grad"])
def test_weights_that_are_changed_in_place_count_at_once(through: str) -> None:
    """Pruning, quantising and averages write into the weights of a model that is in use."""
    model, inputs = _ready(trained(build()).double()), batch()
    tokens = inputs.pop("prev_output_tokens")
    before, _ = _steps(model, tokens, model.encoder(**inputs))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "out_proj.weight" in name or "fc2.weight" in name or "multiplier" in name:
                place = parameter.data if through == "data" else parameter
                place.zero_()
    new = copy.deepcopy(model)
    after, _ = _steps(model, tokens, model.encoder(**inputs))
    expected, _ = new.decoder(tokens, encoder_out=new.encoder(**inputs))
    real = tokens.ne(1)
    torch.testing.assert_close(after[real], expected[real], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(after[real], before[real], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bias", [False, True], ids=["no-vectors", "vectors"])
@pytest.mark.parametrize("rows", [2, 300])
def test_one_product_for_queries_keys_and_values(rows: int, bias: bool) -> None:
    torch.manual_seed(0)
    attention = FixupAttention(64, 2, self_attention=True, bias=bias).double()
    for name, parameter in attention.named_parameters():
        nn.init.normal_(parameter, std=0.1)
        assert bias or "bias" not in name
    x = torch.randn(4, rows, 64, dtype=torch.double, requires_grad=True)
    assert attention._packs(x, x, x) is (rows == 300)
    assert not attention._packs(x, x.clone(), x)
    packed, _ = attention(x, x, x, need_weights=False)
    copied = x.clone()
    plain, _ = attention(x, copied, copied, need_weights=False)
    torch.testing.assert_close(packed, plain)
    for one, two in zip(*(_gradients(attention, x, out) for out in (packed, plain)), strict=True):
        torch.testing.assert_close(one, two)
    attention.kept = attention.products()
    kept, _ = attention(x, x, x, need_weights=False)
    torch.testing.assert_close(kept, plain)


def _gradients(attention: nn.Module, x: torch.Tensor, out: torch.Tensor) -> Any:
    return torch.autograd.grad(out.square().sum(), [x, *attention.parameters()])


def test_a_projection_that_was_replaced_or_is_watched_is_called() -> None:
    attention, x = trained(build()).encoder.layers[0].self_attn, torch.randn(40, 40, 64)
    assert attention._packs(x, x, x)
    handle = attention.v_proj.register_forward_hook(lambda *_: None)
    assert not attention._packs(x, x, x)
    handle.remove()
    attention.q_proj = nn.Sequential(attention.q_proj)
    assert not attention._packs(x, x, x)
    attention(x, x, x, need_weights=False)
