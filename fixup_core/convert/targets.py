"""Networks by their names on a command line: a function's, or a name that a library knows.

Weights are random: nothing is downloaded. A library is imported when a name of it is asked for.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fixup_core.convert.notation import parse_inputs
from fixup_core.errors import UserError, one_line
from fixup_core.probing import Inputs

AUTO_CLASSES = (
    "AutoModelForMaskedLM",
    "AutoModelForCausalLM",
    "AutoModelForImageClassification",
    "AutoModelForCTC",
    "AutoModelForAudioClassification",
    "AutoModel",
)
"""Of transformers, in the order in which a configuration's default is looked for."""
SEQUENCE_TO_SEQUENCE = ("AutoModelForSeq2SeqLM", "AutoModelForSpeechSeq2Seq")
"""Before them for encoders with a decoder."""
WORDS, SAMPLES, FRAMES = 16, 4000, 16
"""Lengths of the default inputs: token ids, sound, video."""


@dataclass(frozen=True)
class Target:
    """A network and what it can be called with.

    Attributes:
        net: The network.
        usual: Its library's inputs, in the notation of ``convert.notation``; empty: unknown.
        given: The inputs that its function returned.
        vocabulary: What token ids are below.
    """

    net: nn.Module
    usual: tuple[str, ...] = ()
    given: Inputs | None = None
    vocabulary: int | None = None

    def inputs(self, texts: Iterable[str], device: str) -> Inputs | None:
        """What ``texts`` describe, else its function's inputs, else the usual ones.

        Raises:
            UserError: A text cannot be read.
        """
        chosen = list(texts) or (list(self.usual) if self.given is None else [])
        return parse_inputs(chosen, self.vocabulary, device) if chosen else self.given


def find(name: str, options: Mapping[str, Any], model: str | None, *, meta: bool) -> Target:
    """Build the network that ``name`` names.

    Args:
        name: ``package.module:function``, ``timm:NAME``, ``torchvision:NAME`` or ``hf:CONFIG``.
        options: Of the builder.
        model: A class of transformers; only for ``hf:``.
        meta: Build it on the meta device.

    Raises:
        UserError: There is no such library, module, function or name; the builder fails, or what it
            returns is no network.
    """
    kind, sign, rest = name.partition(":")
    if model and kind != "hf":
        raise UserError("--model chooses a class of transformers: it is for hf:CONFIG alone")
    if not sign or not kind or not rest:
        raise UserError(
            f"there is no network {name!r}: write package.module:function, timm:NAME, "
            "torchvision:NAME or hf:CONFIG"
        )
    device = torch.device("meta") if meta else contextlib.nullcontext()
    if kind == "hf":
        return _transformers_net(rest, options, model, device)
    build = {"timm": _timm_net, "torchvision": _torchvision_net}.get(kind)
    return build(rest, options, device) if build else _own_net(name, options, device)


def _own_net(name: str, options: Mapping[str, Any], device: Any) -> Target:
    path, _, function = name.partition(":")
    module = _imported(path, f"{name}: {path} cannot be imported")
    build = getattr(module, function, None)
    if not callable(build):
        known = [own for own, value in vars(module).items() if callable(value)]
        raise UserError(f"{path} has no function {function!r}{_near(function, known)}")
    with _building(name), device:
        made = build(**options)
    pair = isinstance(made, tuple) and len(made) == 2
    net, given = made if pair else (made, None)
    if not isinstance(net, nn.Module):
        raise UserError(
            f"{name} must return a network, or a network and its inputs, not a {type(net).__name__}"
        )
    return Target(net, given=given, vocabulary=_vocabulary(net))


def _timm_net(name: str, options: Mapping[str, Any], device: Any) -> Target:
    timm = _library("timm")
    if not timm.is_model(name):
        raise UserError(f"timm has no network {name!r}{_near(name, timm.list_models())}")
    with _building(f"timm:{name}"), device:
        net = timm.create_model(name, pretrained=False, **options)
    known = getattr(net, "pretrained_cfg", None) or {}
    channels, *sides = known.get("input_size") or (3, 224, 224)
    sides = _sides(options["img_size"]) if "img_size" in options else sides
    channels = options.get("in_chans", channels)
    return Target(net, usual=(_shape(2, channels, *sides),))


def _torchvision_net(name: str, options: Mapping[str, Any], device: Any) -> Target:
    models = _library("torchvision").models
    if name not in models.list_models():
        raise UserError(f"torchvision has no network {name!r}{_near(name, models.list_models())}")
    build = models.get_model_builder(name)
    named = inspect.signature(build).parameters
    without: dict[str, Any] = {one: None for one in named if one.startswith("weights")}
    with _building(f"torchvision:{name}"), device:
        net = build(**{**without, **options})
    family = build.__module__.removeprefix("torchvision.models.").partition(".")[0]
    if family in ("detection", "optical_flow"):  # of lists, or of two images
        return Target(net)
    side = options.get("image_size", 224)
    for weights in models.get_model_weights(name):
        side = options.get("image_size", getattr(weights.transforms(), "crop_size", [side])[0])
    frames = [FRAMES] if family == "video" else []
    return Target(net, usual=(_shape(2, 3, *frames, side, side),))


def _transformers_net(
    name: str, options: Mapping[str, Any], model: str | None, device: Any
) -> Target:
    library = _library("transformers")
    config = _configuration(library, name, options)
    if hasattr(config, "use_cache"):
        config.use_cache = False  # a training step returns no cache, and none can be traced
    chosen = model or _usual_class(library, config)
    if not hasattr(library, chosen):
        known = [one for one in dir(library) if one.startswith("Auto") or "For" in one]
        raise UserError(f"transformers has no model class {chosen!r}{_near(chosen, known)}")
    with _building(f"hf:{name}"), device:
        made = getattr(library, chosen)
        net = made.from_config(config) if chosen.startswith("Auto") else made(config)
    text = config.get_text_config()
    vocabulary = getattr(text, "vocab_size", None) or _vocabulary(net)
    return Target(net, usual=_usual_inputs(net, config, text), vocabulary=vocabulary)


def _configuration(library: Any, name: str, options: Mapping[str, Any]) -> Any:
    """Of a folder, a file or a class, with ``options`` in it."""
    if Path(name).exists():
        with _building(f"hf:{name}"):
            config = library.AutoConfig.from_pretrained(name, local_files_only=True)
            own = config.to_dict()
        kind: Any = type(config)
    else:
        kind, own = getattr(library, name, None), {}
        known = [one for one in dir(library) if one.endswith("Config")]
        if not (inspect.isclass(kind) and issubclass(kind, library.PreTrainedConfig)):
            raise UserError(
                f"{name!r} is no folder or file, and transformers has no configuration of that "
                f"name{_near(name, known)}"
            )
        with _building(f"hf:{name}"):
            config = kind()
    for key in options:
        if not hasattr(config, key):
            raise UserError(f"{kind.__name__} has no option {key!r}{_near(key, dir(config))}")
    if not options:
        return config
    with _building(f"hf:{name}"):
        # Drawn up anew, so that what follows from an option follows.
        return kind.from_dict({**own, **options})


def _usual_class(library: Any, config: Any) -> str:
    """The configuration's own class, else the first that knows it."""
    own = next(iter(getattr(config, "architectures", None) or ()), "")
    if own and hasattr(library, own):
        return own
    first = SEQUENCE_TO_SEQUENCE if getattr(config, "is_encoder_decoder", False) else ()
    for name in (*first, *AUTO_CLASSES):
        if type(config) in getattr(library, name)._model_mapping:
            return name
    raise UserError(f"no usual model is known for {type(config).__name__}: name one by --model")


def _usual_inputs(net: nn.Module, config: Any, text: Any) -> tuple[str, ...]:
    """Of the main input, and of a decoder's."""
    kind = getattr(net, "main_input_name", "")
    words = f"int:2x{min(WORDS, getattr(text, 'max_position_embeddings', None) or WORDS)}"
    channels = getattr(config, "num_channels", 3)
    sides = _sides(getattr(config, "image_size", None) or 224)
    mels, positions = (getattr(config, n, 0) for n in ("num_mel_bins", "max_source_positions"))
    found = {
        "input_ids": words,
        "pixel_values": _shape(2, channels, *sides),
        "input_values": _shape(2, SAMPLES),
        "input_features": _shape(2, mels, 2 * positions) if mels and positions else "",
    }.get(kind)
    if not found:
        return ()
    decoder = (f"decoder_input_ids={words}",) if config.is_encoder_decoder else ()
    return (f"{kind}={found}", *decoder)


def _vocabulary(net: nn.Module) -> int | None:
    """The size of the largest embedding."""
    sizes = [m.num_embeddings for m in net.modules() if isinstance(m, nn.Embedding)]
    return max(sizes, default=None)


def _library(name: str) -> Any:
    return _imported(name, f"this network needs {name} (pip install {name})")


def _imported(path: str, otherwise: str) -> Any:
    try:
        return importlib.import_module(path)
    except Exception as error:  # whatever a module does when it is run
        raise UserError(f"{otherwise}: {type(error).__name__}: {one_line(str(error))}") from error


@contextlib.contextmanager
def _building(name: str) -> Iterator[None]:
    """Say of any error within which network could not be built."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        text = one_line(str(error))[:300]
        raise UserError(f"{name} cannot be built: {type(error).__name__}: {text}") from error


def _near(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {' or '.join(near)}?" if near else ""


def _sides(size: Any) -> tuple[int, int]:
    if isinstance(size, int):
        return size, size
    height, width = size
    return height, width


def _shape(*sizes: int) -> str:
    return "x".join(map(str, sizes))
