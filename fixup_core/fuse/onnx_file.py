"""Writing a network as an ONNX file; wants the packages onnx and onnxscript."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fixup_core.errors import UserError


def write_onnx(
    net: nn.Module,
    inputs: Sequence[Tensor],
    file: Path,
    *,
    input_names: Sequence[str],
    output_names: Sequence[str],
    free_sizes: Sequence[dict[int, str]],
    packed: bool = False,
) -> None:
    """Write ``net`` into one file.

    Args:
        net: In evaluation mode.
        inputs: Of any sizes but 0 and 1 where a size is free.
        file: To write.
        input_names: Of the graph's inputs.
        output_names: Of its outputs.
        free_sizes: Of each input, the dimensions whose size is free, and a name for each; the same
            name is the same size.
        packed: The forward pass of ``net`` takes ``*tensors``, any number of them.

    Raises:
        UserError: A package is missing.
    """
    names = {name for sizes in free_sizes for name in sizes.values()}
    dims = {name: torch.export.Dim(name) for name in names}
    shapes: Any = tuple(
        {place: dims[name] for place, name in sizes.items()} for sizes in free_sizes
    )
    if packed:
        shapes = (shapes,)
    try:
        with _silence():
            torch.onnx.export(
                net.eval(),
                tuple(inputs),
                file,
                input_names=input_names,
                output_names=output_names,
                dynamic_shapes=shapes,
                external_data=False,
                dynamo=True,
            )
    except ModuleNotFoundError as error:
        raise UserError(
            "exporting wants more packages: pip install onnx onnxruntime onnxscript"
        ) from error


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """The exporter reports on its work in many lines."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            for redirect in (contextlib.redirect_stdout, contextlib.redirect_stderr):
                stack.enter_context(redirect(io.StringIO()))
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
