"""The Fixup Transformer: its start, its branches, and everything fairseq does with a model."""

from __future__ import annotations

import math

import pytest
import torch
from fairseq.models import ARCH_MODEL_REGISTRY
from fairseq.sequence_generator import SequenceGenerator
from torch import nn
from torch.nn import functional as F

from fixup_core import ScalarBias, ScalarMultiplier, collect_branches, scalars
from fixup_core.rules.param_groups import anchored_rate
from fixup_mt.errors import UserError
from fixup_mt.model.linears import ScalarLinear
from fixup_mt.model.presets import LANGUAGE_MODELS, TRANSLATION
from tests.mt.helpers import WORDS, batch, build, build_lm, dictionary, task, trained

DYNAMOS_OWN = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")


def _no_dropout(**options):
    return {"dropout": 0.0, **options}


@pytest.mark.parametrize("arch", sorted(TRANSLATION))
def test_presets_build_with_their_sizes_and_no_normalisation(arch: str) -> None:
    preset = TRANSLATION[arch]
    layers = 1 if preset["encoder_embed_dim"] > 512 else preset["encoder_layers"]
    model = build(arch, encoder_layers=layers, decoder_layers=layers)
    assert len(collect_branches(model)) == 5 * layers
    assert model.encoder.layers[0].fc1.weight.shape == (
        preset["encoder_ffn_embed_dim"],
        preset["encoder_embed_dim"],
    )
    assert model.decoder.embed_tokens.weight.shape[1] == preset["encoder_embed_dim"]
    assert not [m for m in model.modules() if "Norm" in type(m).__name__]
    assert model.decoder.layers[0].self_attn.num_heads == preset["decoder_attention_heads"]


def test_the_hosts_own_transformer_would_fail_the_search_for_norms() -> None:
    model = build("transformer", encoder_layers=1, decoder_layers=1)
    assert [m for m in model.modules() if "Norm" in type(m).__name__]


def test_every_preset_is_an_architecture() -> None:
    assert set(TRANSLATION) | set(LANGUAGE_MODELS) <= set(ARCH_MODEL_REGISTRY)


@pytest.mark.parametrize(("encoder", "decoder"), [(6, 6), (3, 3), (1, 5), (12, 2)])
def test_l_is_the_true_number_of_branches(encoder: int, decoder: int) -> None:
    model = build(encoder_layers=encoder, decoder_layers=decoder)
    depth = 2 * encoder + 3 * decoder
    assert model.fixup_report.num_branches == depth
    rows = {row.name: row for row in model.fixup_report.rows}
    for name, m in (("self_attn.q_proj", 4), ("encoder_attn.v_proj", 4), ("fc1", 2)):
        row = rows[f"decoder.layers.0.{name}.weight"]
        assert (row.L, row.m) == (depth, m)
        assert row.factor == pytest.approx(depth ** (-1 / 6 if m == 4 else -1 / 2))


def test_without_cross_attention_l_counts_two_a_decoder_layer() -> None:
    model = build(encoder_layers=3, decoder_layers=3, no_cross_attention=True)
    assert model.fixup_report.num_branches == 12
    assert build_lm(decoder_layers=5).fixup_report.num_branches == 10


def test_packed_fan_of_the_authors_code() -> None:
    rows = {row.name: row for row in build(encoder_layers=6, decoder_layers=6).fixup_report.rows}
    bound = math.sqrt(6 / (4 * 64)) * 30 ** (-1 / 6)
    assert rows["encoder.layers.0.self_attn.q_proj.weight"].std == pytest.approx(
        bound / math.sqrt(3)
    )


def test_the_authors_method_scales_cross_attention_with_twelve_branches_and_nothing_else() -> None:
    sizes = {"encoder_layers": 6, "decoder_layers": 6}
    ours = {row.name: row for row in build(**sizes).fixup_report.rows}
    theirs = {
        row.name: row for row in build(**sizes, fixup_method="fixup_authors").fixup_report.rows
    }
    differing = {name for name in ours if ours[name] != theirs[name]}
    # The last layer of the branch, out_proj, is 0 under both.
    scaled = tuple(f"encoder_attn.{name}_proj.weight" for name in "qkv")
    assert differing == {name for name in ours if name.endswith(scaled)} and len(differing) == 18
    row = theirs["decoder.layers.0.encoder_attn.q_proj.weight"]
    assert row.factor == pytest.approx(12 ** (-1 / 6)) and row.L == 30


def test_logits_and_branches_start_at_zero() -> None:
    model, inputs = build().eval(), batch()
    logits, _ = model(**inputs)
    assert logits.abs().max() == 0
    loss = F.cross_entropy(logits.flatten(0, 1), inputs["prev_output_tokens"].flatten())
    assert loss.item() == pytest.approx(math.log(len(dictionary())), abs=1e-5)
    x = torch.randn(5, 2, 64)
    layer = model.encoder.layers[0]
    assert torch.equal(layer(x, None), x)


@pytest.mark.parametrize("how", ["leave", "scale", "gain"])
def test_tied_output(how: str) -> None:
    model = build(share_all_embeddings=True, fixup_tied_output=how).eval()
    logits, _ = model(**batch())
    assert model.decoder.output_projection.weight is model.encoder.embed_tokens.weight
    assert model.decoder.embed_tokens.weight.std().item() == pytest.approx(1 / 8, rel=0.1)
    assert (logits.abs().max().item() == 0) == (how == "gain")
    names = [row.name for row in model.fixup_report.rows if row.role == "tied output"]
    assert names == ["encoder.embed_tokens.weight"]
    model.train()
    logits, _ = model(**batch())
    F.cross_entropy(logits.flatten(0, 1), batch()["prev_output_tokens"].flatten()).backward()
    if how == "gain":
        assert model.decoder.output_projection.gain.weight.grad.abs().item() > 0


def test_decoder_only_sharing() -> None:
    model = build(share_decoder_input_output_embed=True, fixup_tied_output="gain").eval()
    assert model.decoder.output_projection.weight is model.decoder.embed_tokens.weight
    assert model(**batch())[0].abs().max() == 0


@pytest.mark.parametrize("options", [{}, {"share_all_embeddings": True}], ids=["untied", "tied"])
def test_backward_reaches_every_parameter_by_the_third_step(options: dict) -> None:
    torch.manual_seed(0)
    model = build(**_no_dropout(**options))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(4):
        optimizer.zero_grad()
        inputs = batch(seed=step)
        logits, _ = model(**inputs)
        F.cross_entropy(logits.flatten(0, 1), inputs["prev_output_tokens"].flatten()).backward()
        if step < 3:
            optimizer.step()
    unreached = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert unreached == []


def test_a_model_is_initialised_by_us_last() -> None:
    """An outer constructor that draws again would leave out_proj and fc2 different from 0."""
    model = build()
    for layer in [*model.encoder.layers, *model.decoder.layers]:
        assert layer.fc2.weight.abs().max() == 0
        assert layer.self_attn.out_proj.weight.abs().max() == 0
    assert model.decoder.output_projection.weight.abs().max() == 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"encoder_learned_pos": True, "decoder_learned_pos": True},
        {"no_token_positional_embeddings": True},
        {"cross_self_attention": True, "no_cross_attention": True},
        {"share_all_embeddings": True},
        {"encoder_embed_dim": 32, "decoder_embed_dim": 64},
        {"decoder_input_dim": 32, "decoder_output_dim": 48},
    ],
    ids=["plain", "learned", "no-positions", "cross-self", "tied", "two-widths", "in-out-dims"],
)
def test_step_by_step_decoding_equals_full_decoding(options: dict) -> None:
    model, inputs = trained(build(**options)), batch()
    full, _ = model(**inputs)
    encoded = model.encoder(inputs["src_tokens"], inputs["src_lengths"])
    state: dict = {}
    tokens = inputs["prev_output_tokens"]
    steps = [
        model.decoder(tokens[:, : i + 1], encoder_out=encoded, incremental_state=state)[0]
        for i in range(tokens.shape[1])
    ]
    stepwise = torch.cat(steps, dim=1)
    real = tokens.ne(1)
    torch.testing.assert_close(stepwise[real], full[real], rtol=1e-4, atol=1e-5)


def test_padding_and_the_order_of_sentences_change_nothing() -> None:
    model, inputs = trained(build()), batch()
    together, _ = model(**inputs)
    order = torch.tensor([2, 0, 1])
    shuffled, _ = model(**{key: value[order] for key, value in inputs.items()})
    torch.testing.assert_close(shuffled, together[order], rtol=1e-4, atol=1e-5)
    alone, _ = model(
        src_tokens=inputs["src_tokens"][1:2, 3:],
        src_lengths=inputs["src_lengths"][1:2],
        prev_output_tokens=inputs["prev_output_tokens"][1:2, :-2],
    )
    torch.testing.assert_close(alone[0], together[1, :-2], rtol=1e-4, atol=1e-5)


def test_the_future_is_hidden() -> None:
    model, inputs = trained(build()), batch()
    before, _ = model(**inputs)
    changed = dict(inputs, prev_output_tokens=inputs["prev_output_tokens"].clone())
    changed["prev_output_tokens"][:, -1] = 5
    after, _ = model(**changed)
    torch.testing.assert_close(after[:, :-1], before[:, :-1])
    assert (after[0, -1] - before[0, -1]).abs().max() > 1e-3


def test_asking_for_attention_weights_changes_nothing() -> None:
    attention = trained(build()).decoder.layers[0].encoder_attn
    x, memory = torch.randn(4, 3, 64), torch.randn(6, 3, 64)
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[1, :2] = True
    options = {"key_padding_mask": padding, "static_kv": True}
    plain, none = attention(x, memory, memory, need_weights=False, **options)
    weighed, weights = attention(x, memory, memory, need_head_weights=True, **options)
    torch.testing.assert_close(plain, weighed, rtol=1e-5, atol=1e-6)
    assert none is None and weights.shape == (2, 3, 4, 6)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 4))
    assert weights[:, 1, :, :2].max() == 0


def test_a_row_with_no_key_left_stays_finite() -> None:
    attention = trained(build()).encoder.layers[0].self_attn
    x, padding = torch.randn(4, 2, 64), torch.tensor([[False] * 4, [True] * 4])
    out, _ = attention(x, x, x, key_padding_mask=padding, need_weights=False)
    assert out.isfinite().all()


def test_checkpointed_activations_give_the_same_gradients() -> None:
    gradients = []
    for checkpoint in (False, True):
        torch.manual_seed(1)
        model = trained(build(**_no_dropout(checkpoint_activations=checkpoint))).train()
        model(**batch())[0].square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)


def test_layerdrop_drops_in_training_only_and_layers_can_be_kept() -> None:
    model = trained(build(**_no_dropout(encoder_layerdrop=0.5, encoder_layers=6)))
    inputs = batch()
    torch.testing.assert_close(model(**inputs)[0], model(**inputs)[0])
    model.train()
    outputs = [model(**inputs)[0] for _ in range(6)]
    assert any(not torch.equal(outputs[0], other) for other in outputs[1:])
    assert model.fixup_report.num_branches == 2 * 6 + 3 * 2
    pruned = build(encoder_layers=6, encoder_layers_to_keep="0,2,4")
    assert len(pruned.encoder.layers) == 3


def test_quantisation_noise_trains() -> None:
    model = build(quant_noise_pq=0.1, quant_noise_pq_block_size=8)
    model(**batch())[0].sum().backward()


def test_adaptive_softmax_starts_uniform_within_its_clusters() -> None:
    model = build(adaptive_softmax_cutoff=[10, 20]).eval()
    features, extra = model(**batch())
    log_probs = model.get_normalized_probs((features, extra), log_probs=True)
    head = 10 + 2
    torch.testing.assert_close(
        log_probs[..., :10], torch.full_like(log_probs[..., :10], -math.log(head))
    )
    sizes = len(dictionary()) - 20
    expected = -math.log(head) - math.log(sizes)
    torch.testing.assert_close(log_probs[..., 20:], torch.full_like(log_probs[..., 20:], expected))
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(log_probs.shape[:-1]))


def test_beam_search_and_ensembles() -> None:
    words = dictionary()
    models = [trained(build(on=task(words)), seed) for seed in (1, 2)]
    sample = {"net_input": {k: v for k, v in batch().items() if k != "prev_output_tokens"}}
    one = SequenceGenerator(models[:1], words, beam_size=4, max_len_b=8).generate(models, sample)
    both = SequenceGenerator(models, words, beam_size=4, max_len_b=8).generate(models, sample)
    twin = SequenceGenerator([models[0]] * 2, words, beam_size=4, max_len_b=8)
    assert len(one) == len(both) == 3 and len(one[0]) == 4
    for beams in (*one, *both):
        scores = [beam["score"].item() for beam in beams]
        assert scores == sorted(scores, reverse=True)
    for single, ensemble in zip(one, twin.generate(models, sample), strict=True):
        assert single[0]["tokens"].tolist() == ensemble[0]["tokens"].tolist()


def test_a_beams_score_is_the_models_own() -> None:
    words = dictionary()
    model = trained(build(on=task(words)))
    inputs = {k: v[:1] for k, v in batch().items() if k != "prev_output_tokens"}
    generator = SequenceGenerator([model], words, beam_size=3, max_len_b=8, normalize_scores=False)
    best = generator.generate([model], {"net_input": inputs})[0][0]
    tokens = best["tokens"]
    shifted = torch.cat([torch.tensor([2]), tokens[:-1]])[None]
    net = model(**inputs, prev_output_tokens=shifted)
    scores = model.get_normalized_probs(net, log_probs=True)[0].gather(1, tokens[:, None])
    assert scores.sum().item() == pytest.approx(best["score"].item(), abs=1e-3)


@pytest.mark.parametrize("autocast", ["bf16"])
def test_autocast_keeps_parameters_scalars_and_logits_in_float32(autocast: str) -> None:
    torch.manual_seed(0)
    model = trained(build(**_no_dropout(fixup_autocast=autocast)))
    exact = trained(build(**_no_dropout()))
    exact.load_state_dict(model.state_dict())
    seen = set()
    model.encoder.layers[0].fc1.register_forward_hook(lambda m, i, out: seen.add(out.dtype))
    logits, _ = model(**batch())
    expected, _ = exact(**batch())
    assert seen == {torch.bfloat16} and logits.dtype == torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert 0 < (logits - expected).abs().max() < 0.05 * expected.abs().max()
    logits.square().mean().backward()
    assert {s.weight.grad.dtype for s in scalars(model)} == {torch.float32}


def test_autocast_holds_where_activations_are_computed_again() -> None:
    gradients, seen = [], []
    for checkpoint in (False, True):
        torch.manual_seed(1)
        options = _no_dropout(fixup_autocast="bf16", checkpoint_activations=checkpoint)
        model = trained(build(**options)).train()
        model.encoder.layers[0].fc1.register_forward_hook(lambda m, i, out: seen.append(out.dtype))
        model(**batch())[0].square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert seen == [torch.bfloat16] * 3  # once plainly, then twice
    plain, recomputed = gradients
    # Ten times nearer than a recomputation in float32 comes.
    assert (plain - recomputed).norm() < 0.005 * plain.norm()


@pytest.mark.parametrize(("optimizer", "ratio"), [("adam", 0.1), ("sgd", 0.25), ("nag", 1.0)])
def test_the_scalars_rate_follows_the_optimiser(optimizer: str, ratio: float) -> None:
    model = build(optimizer=optimizer, fixup_scalar_lr_ratio=ratio)
    rates = {round(scalar.rate.item(), 6) for scalar in scalars(model)}
    assert rates == {round(anchored_rate(ratio, optimizer), 6)}


def test_language_model() -> None:
    model = build_lm(share_decoder_input_output_embed=False).eval()
    tokens = batch()["prev_output_tokens"]
    assert model(tokens)[0].abs().max() == 0
    assert not [m for m in model.modules() if "Norm" in type(m).__name__]
    trained(model)
    full = model(tokens)[0]
    state: dict = {}
    steps = [
        model.decoder(tokens[:, : i + 1], incremental_state=state)[0]
        for i in range(tokens.shape[1])
    ]
    torch.testing.assert_close(torch.cat(steps, 1)[0], full[0], rtol=1e-4, atol=1e-5)


def test_language_models_adaptive_inputs_and_characters() -> None:
    adaptive = build_lm(
        adaptive_input=True,
        adaptive_input_cutoff="10,20",
        adaptive_softmax_cutoff="10,20",
        tie_adaptive_weights=True,
        tie_adaptive_proj=True,
    )
    adaptive(batch()["prev_output_tokens"])
    roles = {row.role for row in adaptive.fixup_report.rows}
    assert {"embedding", "classifier", "branch", "scalar"} <= roles
    characters = build_lm(character_embeddings=True, character_filters="[(1, 8), (2, 8)]")
    assert "kept" in {row.role for row in characters.fixup_report.rows}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder_layers": 0}, "--encoder-layers must be at least 1"),
        ({"decoder_layers": 0}, "--decoder-layers must be at least 1"),
        ({"encoder_attention_heads": 3}, "does not divide --encoder-embed-dim 64"),
        ({"decoder_attention_heads": 0}, "does not divide"),
        ({"fixup_scalar_lr_ratio": 0.0}, "--fixup-scalar-lr-ratio"),
    ],
)
def test_impossible_sizes_are_one_clear_line(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        build(**options)
    assert "\n" not in str(error.value)


def test_sharing_embeddings_needs_one_dictionary() -> None:
    two = task(dictionary(), dictionary(WORDS, "v"))
    with pytest.raises(UserError, match="joined dictionary"):
        build(on=two, share_all_embeddings=True)


def test_another_dictionary_of_the_same_size_is_refused() -> None:
    model = build()
    same = build()
    same.load_state_dict(model.state_dict())
    permuted = dictionary()
    permuted.symbols[5], permuted.symbols[6] = permuted.symbols[6], permuted.symbols[5]
    other = build(on=task(permuted, dictionary()))
    with pytest.raises(UserError, match="source dictionary is not the one"):
        other.load_state_dict(model.state_dict())


def test_a_state_dict_without_a_digest_loads() -> None:
    state = build().state_dict()
    state = {key: value for key, value in state.items() if "vocabulary" not in key}
    build().load_state_dict(state)


def test_pretrained_embeddings_survive(tmp_path) -> None:
    vectors = tmp_path / "vectors.txt"
    vectors.write_text("1 64\nw3 " + " ".join(["0.5"] * 64) + "\n")
    model = build(encoder_embed_path=str(vectors))
    row = model.encoder.embed_tokens.weight[dictionary().index("w3")]
    assert torch.equal(row, torch.full((64,), 0.5))


def test_half_precision_keeps_scalars_in_float32() -> None:
    model = build().half()
    assert model.encoder.layers[0].fc1.weight.dtype == torch.float16
    assert {s.weight.dtype for s in scalars(model)} == {torch.float32}


def test_modules_are_called_on_every_path() -> None:
    """Stock attention reads weights past the modules in training: a hook would not be called."""
    model = trained(build())
    calls = []
    attention = model.decoder.layers[0].self_attn
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        getattr(attention, name).register_forward_hook(lambda *_, n=name: calls.append(n))
    model.train()
    model(**batch())
    assert sorted(calls) == ["k_proj", "out_proj", "q_proj", "v_proj"]
    assert isinstance(attention.out_proj, nn.Linear)


SCALARS = {
    "none": {},
    "fc1": {"after": ScalarBias},
    "out_proj": {"multiplier": ScalarMultiplier},
    "fc2": {"before": ScalarBias, "multiplier": ScalarMultiplier},
    "all": {"before": ScalarBias, "multiplier": ScalarMultiplier, "after": ScalarBias},
}


def _scalar_linear(name: str, bias: bool) -> ScalarLinear:
    """6 -> 8 in double precision, every parameter with a value of its own."""
    torch.manual_seed(0)
    made = {slot: make() for slot, make in SCALARS[name].items()}
    layer = ScalarLinear(6, 8, bias=bias, **made).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    return layer


@pytest.mark.parametrize("bias", [False, True], ids=["no-vector", "vector"])
@pytest.mark.parametrize("name", SCALARS)
def test_a_linear_layer_adds_multiplies_and_adds(name: str, bias: bool) -> None:
    """Fused, in parts, folded and kept for generation: what the formula says."""
    layer, x = _scalar_linear(name, bias), torch.randn(40, 6, dtype=torch.float64)
    values = {slot: getattr(layer, slot).value().item() for slot in SCALARS[name]}
    vector = layer.bias if bias else torch.zeros(8, dtype=torch.float64)
    inner = (x + values.get("before", 0.0)) @ layer.weight.T + vector
    expected = inner * values.get("multiplier", 1.0) + values.get("after", 0.0)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x[:1]), expected[:1])
    torch.testing.assert_close(F.linear(x, *layer.folded()), expected)
    layer.kept = layer.products()
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x[:1]), expected[:1])


@pytest.mark.parametrize("name", SCALARS)
def test_scalars_may_ride_in_weights_and_biases(name: str) -> None:
    """Many rows take one way, few rows the other; values and gradients are the same."""
    layer = _scalar_linear(name, bias=True)
    rows = torch.randn(40, 6, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(40, 8, dtype=torch.float64)
    whole = layer(rows)
    single = torch.cat([layer(row[None]) for row in rows])
    torch.testing.assert_close(whole, single)
    parameters = [rows, *layer.parameters()]
    grads = [torch.autograd.grad(out, parameters, weights) for out in (whole, single)]
    torch.testing.assert_close(*grads)


@DYNAMOS_OWN
def test_layers_are_compiled_to_train_and_eager_to_evaluate(monkeypatch) -> None:
    """By any backend; the step is the eager one's."""
    compiled = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda *a, **k: compiled(*a, backend="eager", **k))
    gradients = []
    for compiles in (False, True):
        torch.manual_seed(0)
        model = trained(build(**_no_dropout(fixup_compile=compiles))).train()
        layers = [*model.encoder.layers, *model.decoder.layers]
        assert {layer._compiled_call_impl is not None for layer in layers} == {compiles}
        for length in (7, 11):
            model(**batch(source=length))[0].square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
        model.eval()
        assert all(layer._compiled_call_impl is None for layer in layers)
    for eager, other in zip(*gradients, strict=True):
        torch.testing.assert_close(eager, other)


@pytest.mark.slow
@DYNAMOS_OWN
def test_layers_compile_with_the_real_compiler() -> None:
    outputs = []
    for compiles in (False, True):
        torch.manual_seed(0)
        model = trained(build(**_no_dropout(fixup_compile=compiles))).train()
        outputs.append(model(**batch())[0])
    torch.testing.assert_close(*outputs)
