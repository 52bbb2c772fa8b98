"""Beam search without a copy of the sentence for each of its hypotheses.

Shapes: B sentences, G hypotheses of each, S source length, T target length, H heads, C width of a
head. The hypotheses of a sentence stand side by side, in rows ``i * G`` to ``i * G + G - 1``, and a
search that reorders them among themselves leaves what belongs to the sentence as it is. Everything
here is exact for any order: where the rows of a sentence part, each gets a copy.
"""

from __future__ import annotations

import torch
from torch import Tensor


def sentence_order(order: Tensor, group: int, rows: int) -> tuple[Tensor, int]:
    """The order of the sentences that belongs to an order of the hypotheses.

    Args:
        order: [N], which hypothesis goes on in each row.
        group: How many hypotheses have shared a sentence so far.
        rows: B, the sentences so far.

    Returns:
        Which sentence each new row is made from, and how many hypotheses share a new row.
    """
    shared = group if group > 1 else order.numel() // max(rows, 1)
    sentences = order // group
    if shared > 1 and order.numel() % shared == 0:
        side_by_side = sentences.view(-1, shared)
        if bool((side_by_side == side_by_side[:, :1]).all()):
            return side_by_side[:, 0], shared
    return sentences, 1


def is_identity(order: Tensor, rows: int) -> bool:
    """Whether ``order`` leaves ``rows`` rows as they are."""
    return order.numel() == rows and torch.equal(order, torch.arange(rows, device=order.device))


def group_mark(group: int) -> Tensor:
    """G as the shape of an empty tensor, which caches of tensors can hold: [G, 0]."""
    return torch.empty([group, 0])


def reorder_encoder_out(
    encoder_out: dict[str, list[Tensor]], order: Tensor, shares: bool
) -> dict[str, list[Tensor]]:
    """Encoder output of fairseq for hypotheses in a new order, with a mark under ``"group"``."""
    rows = encoder_out["encoder_out"][0].size(1)
    group = encoder_out["group"][0].size(0) if "group" in encoder_out else 1
    sentences, group = sentence_order(order, group, rows) if shares else (order, 1)
    unmoved = is_identity(sentences, rows)
    reordered: dict[str, list[Tensor]] = {}
    for name, tensors in encoder_out.items():
        if unmoved:
            reordered[name] = tensors
        elif name != "group" and name != "fc_results":
            dim = 1 if name == "encoder_out" or name == "encoder_states" else 0
            reordered[name] = [tensor.index_select(dim, sentences) for tensor in tensors]
    reordered["group"] = [group_mark(group)]
    return reordered


def together(q: Tensor, sentences: int) -> Tensor:
    """Queries of all hypotheses of a sentence in one row: [B * G, H, T, C] -> [B, H, G * T, C]."""
    if q.size(0) == sentences:
        return q
    grouped = q.unflatten(0, [sentences, q.size(0) // sentences])
    return grouped.transpose(1, 2).flatten(2, 3)


def apart(x: Tensor, rows: int) -> Tensor:
    """The inverse of ``together``: [B, H, G * T, C] -> [B * G, H, T, C], with ``rows`` = B * G."""
    if x.size(0) == rows:
        return x
    group = rows // x.size(0)
    return x.unflatten(2, [group, x.size(2) // group]).transpose(1, 2).flatten(0, 1)


def appended(before: Tensor, order: Tensor | None, now: Tensor) -> Tensor:
    """Cached keys or values in a new order, and the latest: [N, H, T, C], by one copy."""
    if order is None:
        return torch.cat([before, now], dim=2)
    if torch.is_grad_enabled():
        return torch.cat([before.index_select(0, order), now], dim=2)
    length = before.size(2)
    shape = [now.size(0), now.size(1), length + now.size(2), now.size(3)]
    joined = now.new_empty(shape)
    torch.index_select(before, 0, order, out=joined[:, :, :length])
    joined[:, :, length:] = now
    return joined
