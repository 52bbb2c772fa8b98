"""Every method of the registry in both Transformers and the presets: whole, or refused by name."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fixup_core import METHODS, scalars
from fixup_core.errors import UserError
from fixup_mt.model.presets import LANGUAGE_MODELS, TRANSLATION
from fixup_mt.serving.fold import fold_transformer
from tests.mt.helpers import batch, build, build_lm, trained

DEFINED = [
    name for name, m in METHODS.items() if m.only in ("", "Transformers") and not m.unit_variance
]


@pytest.mark.parametrize("name", sorted(METHODS.keys() - set(DEFINED)))
def test_methods_with_norms_or_a_batch_are_refused(name: str) -> None:
    for make in (build, build_lm):
        with pytest.raises(UserError, match=f"'{name}' is not defined for Transformers; choose"):
            make(fixup_method=name)


@pytest.mark.parametrize("name", DEFINED)
def test_a_method_builds_saves_resumes_and_folds(name: str) -> None:
    model = trained(build(fixup_method=name)).eval()
    method = METHODS[name]
    assert model.fixup_report.method == name
    assert bool(list(scalars(model))) == method.scalars
    biases = [n for n, _ in model.named_parameters() if n.endswith("fc1.bias")]
    assert bool(biases) == method.bias_vectors
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    assert bool(norms) == method.normalises
    logits, _ = model(**batch())
    assert logits.isfinite().all() and logits.abs().max() > 0
    again = build(fixup_method=name).eval()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(**batch())[0], logits)
    weights = fold_transformer(model)
    kept = [name for name in weights if "layer_norm" in name]
    assert bool(kept) == (method.norm is not None)
    assert all(value.isfinite().all() for value in weights.values())


@pytest.mark.parametrize("name", DEFINED)
def test_backward_reaches_every_parameter(name: str) -> None:
    """By the third step; in an encoder, which lies behind a decoder's branches, by the fourth."""
    tokens = batch()["prev_output_tokens"]
    for model, inputs, steps in (
        (build(fixup_method=name), batch(), 4),
        (build_lm(fixup_method=name), {"src_tokens": tokens}, 3),
    ):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(steps):
            optimizer.zero_grad()
            logits, _ = model(**inputs)
            F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
            optimizer.step()
        # A bias of the keys shifts all logits of a query alike: the softmax does not see it.
        unreached = [
            n
            for n, p in model.named_parameters()
            if (p.grad is None or not p.grad.any()) and not n.endswith("k_proj.bias")
        ]
        assert unreached == []


@pytest.mark.parametrize("preset", sorted(TRANSLATION | LANGUAGE_MODELS))
def test_presets_take_a_method(preset: str) -> None:
    """By their options alone: the large ones are not built here."""
    from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_DATACLASS_REGISTRY

    assert preset in ARCH_MODEL_REGISTRY
    assert MODEL_DATACLASS_REGISTRY[preset]().fixup_method == "fixup"
