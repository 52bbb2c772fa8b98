"""The norms that a network has, each by one path, in the order in which they are called."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from fixup_core.convert.norms import all_norm_paths, norm_paths
from fixup_core.convert.tracing import Trace
from fixup_core.errors import UserError
from fixup_core.probing import Inputs
from fixup_core.removal.sides import Seen


def norms_to_go(
    net: nn.Module,
    inputs: Inputs | None,
    norm_types: tuple[type[nn.Module], ...],
    keep: Sequence[str],
) -> dict[str, nn.Module]:
    """The norms by path; a shared one goes by its first.

    Args:
        net: A network.
        inputs: A batch, by which norms of other libraries are found too.
        norm_types: Types of norms.
        keep: Paths of those that stay.

    Raises:
        UserError: There are none, ``keep`` names something else, or the network is one itself.
    """
    if inputs is None:
        paths = norm_paths(net, norm_types)
    else:
        paths = all_norm_paths(net, Trace(net, inputs), norm_types)
    unknown = [path for path in keep if path not in paths]
    if unknown:
        raise UserError(f"keep names {unknown[0]!r}, which is no norm of the network")
    if "" in paths:
        raise UserError(f"the network is a norm itself, a {type(net).__name__}: nothing would stay")
    first: dict[nn.Module, str] = {}
    for path in paths:
        first.setdefault(net.get_submodule(path), path)
    kept = {net.get_submodule(path) for path in keep}
    norms = {path: norm for norm, path in first.items() if norm not in kept}
    if not norms:
        raise UserError(
            f"{type(net).__name__} has no norms to take out"
            + ("" if inputs is not None else "; other libraries' are found with example_inputs=")
        )
    return norms


def check_called(norms: Mapping[str, nn.Module], seen: Seen) -> None:
    """Raise ``UserError`` where the size of what enters a norm would never be known."""
    for path, norm in norms.items():
        if path not in seen.made and getattr(norm, "running_mean", None) is None:
            raise UserError(
                f"the network has not called {path} with a tensor, in evaluation and with this "
                f"batch, so its size would not be known: keep=[{path!r}] leaves it"
            )


def in_call_order(norms: Mapping[str, nn.Module], seen: Seen) -> list[str]:
    """As they are called; one that the call has not met comes where its module stands."""
    called = [path for path in seen.order if path in norms]
    return [*called, *(path for path in norms if path not in called)]
