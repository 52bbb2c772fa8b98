"""What a user can get wrong with images and their networks, each explained in one line."""

from __future__ import annotations

from fixup_core.errors import Advice

KNOWN: tuple[Advice, ...] = (
    (
        RuntimeError,
        r"Error\(s\) in loading state_dict",
        "the checkpoint is of another network: give the --model options it was trained with",
    ),
    ("MisconfigurationException", "", "{error}"),
    (ValueError, "requires a GPU accelerator", "{error}"),
    (
        ModuleNotFoundError,
        "onnx",
        "exporting wants more packages: pip install onnx onnxruntime onnxscript",
    ),
    (ModuleNotFoundError, "", "{error}: install the package, or choose something else"),
    (
        KeyError,
        r"^'?(\d+|pytorch-lightning_version|state_dict|hyper_parameters)'?$",
        "this file is not a checkpoint of python -m vision fit: check the path",
    ),
    (
        RuntimeError,
        r"to have \d+ channels, but got",
        "the images have another number of channels than --model.options.in_channels",
    ),
    (FileNotFoundError, "Checkpoint file not found", "{error}: check --ckpt_path"),
    ("URLError", "", "nothing could be downloaded: {error}"),
)
"""What to say of errors that torch and Lightning raise; classes that take long to import are
named."""
