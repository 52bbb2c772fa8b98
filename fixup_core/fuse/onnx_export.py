"""A folded network as one ONNX file, held against the network's own outputs before it is kept.

Wants the packages onnx, onnxruntime and onnxscript.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fixup_core.errors import UserError, one_line
from fixup_core.files import whole_file
from fixup_core.fuse.exports import check_difference
from fixup_core.fuse.fold import fold
from fixup_core.fuse.onnx_file import write_onnx
from fixup_core.probing import Inputs, in_evaluation_mode, outputs_of

ENGINE, BATCH = "onnxruntime", "batch"
PACKAGES = ("onnx", ENGINE, "onnxscript")
TOLERANCE = 1e-4
"""Of an output's largest number: what the engine's other order of additions may change."""


def export_onnx(net: nn.Module, example_inputs: Inputs, file: Path | str) -> float:
    """Write ``fold(net)`` as one ONNX file, replaced where it exists.

    Inputs are named as the network's arguments, outputs as in the mapping that it returns
    (``logits``), else ``output`` or ``output_0`` and so on; only tensors are kept. The first
    dimension is free where all inputs share it and the network works at another size of it;
    otherwise, and elsewhere, sizes are those of the example.

    Args:
        net: As ``fold`` takes it; it is left as it is.
        example_inputs: A batch as the network takes it: a tensor, a tuple of arguments or a mapping
            of named ones. What is no tensor is written into the graph.
        file: To write.

    Returns:
        The largest difference between onnxruntime's outputs and the network's, relative to the
        largest number of that output.

    Raises:
        UserError: The network cannot be folded or exported, onnxruntime's outputs differ by more
            than 1e-4, or a package is missing. Nothing is written.
    """
    _check_packages()
    if any(p.dtype in (torch.float16, torch.bfloat16) for p in net.parameters()):
        raise UserError("a network in half precision cannot be compared: export net.float()")
    call = _Call.of(net, example_inputs)
    plain = _Flat(fold(net).to("cpu"), call)
    with whole_file(file) as temporary:
        off = _with_free_batch(plain, net, call, temporary) if call.shares_batch() else None
        if off is None:
            off = _write(plain, net, call, temporary, free=False)
        check_difference(ENGINE, "outputs", off, TOLERANCE)
    return off


def _check_packages() -> None:
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"exporting wants more packages: pip install {' '.join(missing)}")


def _with_free_batch(plain: _Flat, net: nn.Module, call: _Call, file: Path) -> float | None:
    """Write the file; ``None`` where the size of a batch cannot be free."""
    try:
        off = _write(plain, net, call, file, free=True)
    except UserError:
        return None
    return off if off <= TOLERANCE else None


@dataclass(frozen=True)
class _Call:
    """How a network is called.

    Attributes:
        names: Of the inputs, in order.
        tensors: Those of the example, on the CPU.
        inputs: The example.
        places: In a tuple of arguments, or the keys of a mapping, where the tensors stand.
    """

    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    inputs: tuple[Any, ...] | dict[str, Any]
    places: tuple[Any, ...]

    @classmethod
    def of(cls, net: nn.Module, inputs: Inputs) -> _Call:
        given: tuple[Any, ...] | dict[str, Any]
        if isinstance(inputs, Mapping):
            given = dict(inputs)
            items: list[tuple[Any, Any]] = list(given.items())
            names = [str(key) for key in given]
        else:
            given = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
            items = list(enumerate(given))
            names = _argument_names(net, len(given))
        for name, (_, value) in zip(names, items, strict=True):
            if not isinstance(value, Tensor | bool | int | float | str | None):
                raise UserError(
                    f"the input {name!r} is a {type(value).__name__}: an ONNX file takes tensors"
                )
        kept = [(n, k, v) for n, (k, v) in zip(names, items, strict=True) if isinstance(v, Tensor)]
        if not kept:
            raise UserError("the example inputs have no tensor")
        return cls(
            tuple(name for name, _, _ in kept),
            tuple(value.detach().cpu() for _, _, value in kept),
            given,
            tuple(key for _, key, _ in kept),
        )

    def with_tensors(self, tensors: Sequence[Tensor]) -> Inputs:
        """The example with others in place of its tensors."""
        replaced = dict(zip(self.places, tensors, strict=True))
        if isinstance(self.inputs, dict):
            return {**self.inputs, **replaced}
        return tuple(replaced.get(place, value) for place, value in enumerate(self.inputs))

    def shares_batch(self) -> bool:
        """Whether all tensors have one first dimension."""
        sizes = {tensor.shape[0] if tensor.dim() else 0 for tensor in self.tensors}
        return len(sizes) == 1 and sizes != {0}

    def doubled(self) -> tuple[Tensor, ...]:
        """The tensors, their first dimension twice as large."""
        return tuple(torch.cat([tensor, tensor]) for tensor in self.tensors)


class _Flat(nn.Module):
    """A network that takes tensors alone, and returns a tuple of them."""

    def __init__(self, net: nn.Module, call: _Call) -> None:
        super().__init__()
        self.net, self.call = net, call

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs = self.call.with_tensors(tensors)
        outputs = self.net(**inputs) if isinstance(inputs, dict) else self.net(*inputs)
        return tuple(_named_outputs(outputs).values())


def _argument_names(net: nn.Module, count: int) -> list[str]:
    """Names of the forward pass's first ``count`` arguments, if all of them have one."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(net.forward).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.kind in kinds]
    return names[:count] if len(names) >= count else [f"input_{i}" for i in range(count)]


def _named_outputs(outputs: Any) -> dict[str, Tensor]:
    """The tensors among the outputs; nested ones by the path to them."""
    return dict(_flattened(outputs, "" if _is_nested(outputs) else "output"))


def _is_nested(outputs: Any) -> bool:
    return isinstance(outputs, Mapping | tuple | list)


def _flattened(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flattened(item, f"{name}_{key}" if name else str(key))
    elif _is_nested(value):
        for place, item in enumerate(value):
            yield from _flattened(item, f"{name or 'output'}_{place}")


def _write(plain: _Flat, net: nn.Module, call: _Call, file: Path, *, free: bool) -> float:
    """Write the file; return the largest difference over batches, of two sizes where it is free."""
    sizes: list[dict[int, str]] = [{0: BATCH} if free else {} for _ in call.names]
    batches = [call.tensors, call.doubled()] if free else [call.tensors]
    try:
        expected = [_expected(net, call, batch) for batch in batches]
        write_onnx(
            plain,
            batches[-1],
            file,
            input_names=call.names,
            output_names=list(expected[0]),
            free_sizes=sizes,
            packed=True,
        )
        pairs = [
            pair
            for batch, own in zip(batches, expected, strict=True)
            for pair in zip(_run(file, call, batch), own.values(), strict=True)
        ]
    except UserError:
        raise
    except Exception as error:  # the exporter's, the engine's, the network's at another size
        reason = one_line(str(error.__cause__ or error).strip().partition("\n")[0])
        raise UserError(f"{type(net).__name__} cannot be exported: {reason}") from error
    return max(_difference(found, own) for found, own in pairs)


@torch.no_grad()
def _expected(net: nn.Module, call: _Call, batch: Sequence[Tensor]) -> dict[str, Tensor]:
    device = next((p.device for p in net.parameters()), torch.device("cpu"))
    inputs = call.with_tensors([tensor.to(device) for tensor in batch])
    with in_evaluation_mode(net):
        outputs = _named_outputs(outputs_of(net, inputs))
    if not outputs:
        raise UserError(f"{type(net).__name__} returns no tensor")
    return {name: value.cpu() for name, value in outputs.items()}


def _run(file: Path, call: _Call, batch: Sequence[Tensor]) -> list[Tensor]:
    engine = importlib.import_module(ENGINE)
    session = engine.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    feeds = dict(zip(call.names, batch, strict=True))
    # The graph has no inputs that nothing is computed from.
    used = {given.name: feeds[given.name].numpy() for given in session.get_inputs()}
    return [torch.as_tensor(output) for output in session.run(None, used)]


def _difference(found: Tensor, own: Tensor) -> float:
    """The largest, relative to the largest finite number; equal infinities do not differ."""
    if found.shape != own.shape:
        return float("inf")
    found, own = found.double(), own.double()
    off = torch.where(found == own, 0.0, (found - own).abs())
    size = own[own.isfinite()].abs()
    return (off.max() / size.max().clamp(min=1e-6)).item() if size.numel() else off.sum().item()
