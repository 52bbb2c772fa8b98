"""``FixupOptions``: one place for the options ``--fixup-*``."""

from __future__ import annotations

import argparse
import dataclasses

import pytest
import torch
from fairseq.models.transformer import TransformerConfig
from omegaconf import OmegaConf

from fixup_mt.model.config import FixupOptions, FixupTransformerConfig, nested
from fixup_mt.model.model import FixupLanguageModel, FixupTransformerModel
from tests.mt.helpers import build

GIVEN = {
    "fixup_method": "fixup_adam",
    "fixup_base_branches": 4.0,
    "fixup_scalar_lr_ratio": 0.25,
    "fixup_tied_output": "gain",
    "fixup_output_bias": "frequencies",
    "fixup_qk_norm": True,
    "fixup_logit_cap": 30.0,
    "fixup_autocast": "bf16",
    "fixup_compile": True,
    "fixup_agc": 0.5,
    "fixup_from_layernorm": "layernorm.pt",
    "fixup_remove_norms": "taper",
    "fixup_removal_updates": 300,
    "fixup_removal_anchor": 0.5,
    "fixup_removal_distil": 0.25,
    "fixup_log_gradients": True,
}
OTHER = FixupOptions(**{name.removeprefix("fixup_"): value for name, value in GIVEN.items()})


def test_every_option_is_read_from_any_configuration() -> None:
    flat = OmegaConf.structured(FixupTransformerConfig(**GIVEN))
    namespace = argparse.Namespace(**GIVEN)
    for cfg in (flat, namespace, TransformerConfig.from_namespace(namespace), dict(GIVEN)):
        assert FixupOptions.of(cfg) == OTHER
    assert all(
        getattr(OTHER, field.name) != field.default for field in dataclasses.fields(FixupOptions)
    )


def test_another_models_configuration_has_the_defaults() -> None:
    for cfg in (argparse.Namespace(), OmegaConf.create({"_name": "lstm"}), TransformerConfig()):
        assert FixupOptions.of(cfg) == FixupOptions()


@pytest.mark.parametrize("model", [FixupTransformerModel, FixupLanguageModel])
def test_the_command_line_has_them_with_their_texts(model: type) -> None:
    parser = argparse.ArgumentParser()
    model.add_args(parser)
    line = ["--fixup-compile", "--fixup-scalar-lr-ratio", "0.1", "--fixup-tied-output", "scale"]
    assert FixupOptions.of(parser.parse_args(line)) == FixupOptions(
        scalar_lr_ratio=0.1, tied_output="scale", compile=True
    )
    text = " ".join(parser.format_help().split())
    for field in dataclasses.fields(FixupOptions):
        assert field.metadata["help"] in text


def test_a_choice_is_checked(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    FixupTransformerModel.add_args(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(["--fixup-autocast", "fp8"])
    assert "invalid choice: 'fp8'" in capsys.readouterr().err


def test_a_built_model_carries_them() -> None:
    # A method without norms has none to take out.
    other = {"compile": False, "remove_norms": "none", "removal_distil": 0.0}
    model = build(**GIVEN | {f"fixup_{name}": value for name, value in other.items()})
    assert model.cfg.fixup == dataclasses.replace(OTHER, **other)
    assert model.encoder.autocast is model.decoder.autocast is torch.bfloat16
    assert nested(OmegaConf.structured(FixupTransformerConfig())).fixup == FixupOptions()
