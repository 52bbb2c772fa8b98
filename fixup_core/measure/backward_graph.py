"""The backward graph of a small computation, every edge with its factor: backpropagation drawn.

The vertices are values, the edges lead from a value to those it was made of, and the factor of an
edge is the local derivative. The gradient by a value is the sum over all paths to it of the
product of the factors on the way, and autograd's own functions give the factors.
"""

from __future__ import annotations

import math
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from fixup_core.errors import UserError

LARGEST = 64
"""Numbers in a value: the factors are whole Jacobians."""

SYMBOLS = {
    **{"Add": "+", "Sub": "-", "Mul": "\u00d7", "Div": "/", "Neg": "-", "Pow": "power"},
    **{"Relu": "ReLU", "Addmm": "matmul", "Mm": "matmul", "Mv": "matmul", "T": "transpose"},
}
"""How autograd's functions are written in a vertex; others under their own names."""

COLOURS = {"shrinks": "#2b6cb0", "keeps": "#4a5568", "grows": "#c53030"}


@dataclass(frozen=True)
class Vertex:
    """A value.

    Attributes:
        label: Its name, or the operation that made it.
        gradient: Of the output by it, a vector [numbers in the value].
        named: Whether the label is a name that was given.
    """

    label: str
    gradient: Tensor
    named: bool


@dataclass(frozen=True)
class Edge:
    """From a value to one it was made of.

    Attributes:
        start: Number of the vertex nearer to the output.
        end: Number of the other.
        jacobian: [numbers in start, numbers in end].
    """

    start: int
    end: int
    jacobian: Tensor

    @property
    def factor(self) -> float:
        """The derivative between single numbers; else the most by which the gradient can grow on
        the way, the Jacobian's largest singular value.
        """
        if self.jacobian.numel() == 1:
            return self.jacobian.item()
        return torch.linalg.matrix_norm(self.jacobian, ord=2).item()


@dataclass(frozen=True)
class BackwardGraph:
    """Vertices, the output first, each before those it was made of; and edges."""

    vertices: tuple[Vertex, ...]
    edges: tuple[Edge, ...]

    def paths(self, name: str) -> Iterator[tuple[Edge, ...]]:
        """All paths from the output to the value of that name.

        Raises:
            UserError: There is no such value.
        """
        ends = [i for i, v in enumerate(self.vertices) if v.named and v.label == name]
        if not ends:
            names = ", ".join(vertex.label for vertex in self.vertices if vertex.named)
            raise UserError(f"the graph has no value {name!r}; it has {names}")
        waiting: list[tuple[int, tuple[Edge, ...]]] = [(0, ())]
        while waiting:
            place, path = waiting.pop()
            if place == ends[0]:
                yield path
                continue
            onward = [edge for edge in self.edges if edge.start == place]
            waiting += [(edge.end, (*path, edge)) for edge in reversed(onward)]

    def along(self, path: tuple[Edge, ...]) -> Tensor:
        """The product of the factors on a path: a vector [numbers in its end]."""
        gradient = torch.ones_like(self.vertices[0].gradient)
        for edge in path:
            gradient = gradient @ edge.jacobian
        return gradient

    def to_dot(self) -> str:
        """The graph in graphviz's language, from the output on the left to the inputs.

        An edge is as thick as the gradient that runs along it; its colour says whether the factor
        shrinks it, keeps it or lets it grow.
        """
        lines = [
            "digraph backward {",
            '  rankdir=LR; bgcolor="white"; nodesep=0.2; ranksep=0.05; margin=0.1;',
            '  node [fontname="Helvetica", fontsize=14, margin=0.05];',
            '  node [style=filled, color="#4a5568"];',
            '  edge [fontname="Helvetica", fontsize=14, arrowsize=0.7];',
        ]
        largest = max((self._flow(edge) for edge in self.edges), default=0.0) or 1.0
        lines += [_vertex_line(i, vertex) for i, vertex in enumerate(self.vertices)]
        lines += [_edge_line(edge, self._flow(edge) / largest) for edge in self.edges]
        return "\n".join([*lines, "}", ""])

    def save(self, file: Path) -> None:
        """Write the picture, and its description beside it, ending in ``.dot``.

        Args:
            file: Ending in ``.dot`` for the description alone, else in a format of graphviz: svg,
                png, pdf.

        Raises:
            UserError: graphviz is missing, or does not know the format; the description stays.
        """
        text = file.with_suffix(".dot")
        file.parent.mkdir(parents=True, exist_ok=True)
        text.write_text(self.to_dot(), encoding="utf-8")
        if file.suffix == ".dot":
            return
        program = shutil.which("dot")
        if program is None:
            raise UserError(f"{file} needs graphviz (apt install graphviz); its text is in {text}")
        line = [program, f"-T{file.suffix[1:]}", str(text), "-o", str(file)]
        run = subprocess.run(line, capture_output=True, text=True)
        if run.returncode:
            raise UserError(
                f"graphviz wrote no {file}: {run.stderr.strip()}; its text is in {text}"
            )

    def _flow(self, edge: Edge) -> float:
        return (self.vertices[edge.start].gradient @ edge.jacobian).norm().item()


def backward_graph(
    output: Tensor, inputs: Mapping[str, Tensor], *, names: Mapping[str, Tensor] | None = None
) -> BackwardGraph:
    """The part of autograd's graph that lies between an output and some inputs.

    Args:
        output: One number.
        inputs: Where the graph ends, by name: leaves or values on the way.
        names: More values on the way, for the picture.

    Raises:
        UserError: The output is no single number, it does not depend on an input, or a value is too
            large for a picture.
    """
    if output.numel() != 1 or not output.requires_grad:
        raise UserError("the graph is that of one number which has a gradient")
    ends = {_place(tensor): name for name, tensor in inputs.items()}
    labels = {_place(tensor): name for name, tensor in (names or {}).items()} | ends
    builder = _Builder(_place(output), set(ends))
    for place, name in ends.items():
        if place not in builder.order:
            raise UserError(f"the output does not depend on {name}")
    return builder.graph(labels, torch.ones(1, dtype=output.dtype, device=output.device))


Place = tuple[Any, int]
"""A value: the function that made it and the number of the result."""


class _Builder:
    def __init__(self, output: Place, ends: set[Place]) -> None:
        self.ends = ends
        self.leads: dict[Place, bool] = {}
        self.order: list[Place] = []
        self._visit(output)
        self.order.reverse()

    def _visit(self, place: Place) -> bool:
        """Whether the value depends on an end; those that do are listed, the output last."""
        if place in self.leads:
            return self.leads[place]
        following = [] if place in self.ends else _operands(place)
        leads = [self._visit(each) for each in following if each[0] is not None]
        self.leads[place] = place in self.ends or any(leads)
        if self.leads[place]:
            self.order.append(place)
        return self.leads[place]

    def graph(self, labels: Mapping[Place, str], one: Tensor) -> BackwardGraph:
        numbers = {place: i for i, place in enumerate(self.order)}
        gradients = {self.order[0]: one}
        edges = []
        for place in self.order:
            wanted = [] if place in self.ends else _operands(place)
            kept = [i for i, each in enumerate(wanted) if self.leads.get(each)]
            jacobians = _jacobians(place, kept) if kept else {}
            for i, jacobian in jacobians.items():
                end, part = wanted[i], gradients[place] @ jacobian
                gradients[end] = gradients[end] + part if end in gradients else part
                edges.append(Edge(numbers[place], numbers[end], jacobian))
        vertices = [
            Vertex(labels.get(p) or _symbol(p[0]), gradients[p], p in labels) for p in self.order
        ]
        return BackwardGraph(tuple(vertices), tuple(edges))


def _place(tensor: Tensor) -> Place:
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def _operands(place: Place) -> list[Place]:
    return list(place[0].next_functions)


@torch.no_grad()
def _jacobians(place: Place, operands: list[int]) -> dict[int, Tensor]:
    """By the number of the operand: the function's backward, called with each unit vector."""
    node, number = place
    results = node._input_metadata
    shape, dtype, device = (getattr(results[number], a) for a in ("shape", "dtype", "device"))
    size = math.prod(shape)
    if size > LARGEST:
        raise UserError(f"a value of {size} numbers is too large: draw networks of up to {LARGEST}")
    rows: dict[int, list[Tensor]] = {i: [] for i in operands}
    for unit in torch.eye(size, dtype=dtype, device=device):
        given = [unit.reshape(shape) if i == number else None for i in range(len(results))]
        gradients = node(*given)
        gradients = gradients if isinstance(gradients, tuple) else (gradients,)
        for i in operands:
            rows[i].append(gradients[i].flatten())
    return {i: torch.stack(found) for i, found in rows.items()}


def _symbol(node: Any) -> str:
    name = re.sub(r"Backward\d*$", "", node.name())
    return SYMBOLS.get(name, "leaf" if name.endswith("AccumulateGrad") else name.lower())


def _vertex_line(number: int, vertex: Vertex) -> str:
    fill, shape = ("#fefcbf", "box") if vertex.named else ("#edf2f7", "ellipse")
    gradient = vertex.gradient
    size = gradient.item() if gradient.numel() == 1 else gradient.norm().item()
    label = f"{vertex.label}\\ngrad {size:.3g}" if vertex.named else vertex.label
    return f'  v{number} [label="{label}", shape={shape}, fillcolor="{fill}", width=0.4];'


def _edge_line(edge: Edge, flow: float) -> str:
    factor = edge.factor
    size = abs(factor)
    kind = "keeps" if math.isclose(size, 1.0, rel_tol=1e-6) else "grows" if size > 1 else "shrinks"
    look = f'color="{COLOURS[kind]}", fontcolor="{COLOURS[kind]}", penwidth={0.6 + 2.9 * flow:.2f}'
    return f'  v{edge.start} -> v{edge.end} [label=" {factor:.3g} ", {look}];'
