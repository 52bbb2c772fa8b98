"""Options of fairseq that are Python expressions, evaluated without running code.

fairseq gives strings to ``eval``, those of a checkpoint's own settings among them: a checkpoint of
plain data could run any code. What the options mean is literals, with sums and repetitions of
lists, as in ``[(512, 3)] * 20``. That much is evaluated here, and nothing else.
"""

from __future__ import annotations

import ast
import operator
import sys
from collections.abc import Callable, Iterator
from typing import Any

from fixup_mt.errors import UserError

LONGEST = 100_000
"""Items of a list, or characters of a string, that an expression may make."""

BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
UNARY: dict[type, Callable[[Any], Any]] = {
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
    ast.Not: operator.not_,
}


def evaluate(text: Any, *scopes: Any) -> Any:
    """What ``eval`` gives for an option: literals, and sums, products and repetitions of them.

    Args:
        text: The option.
        scopes: As ``eval`` takes them; there are no names to look up.

    Raises:
        TypeError: ``text`` is not a string, as of ``eval`` (fairseq's ``eval_bool`` wants it).
        UserError: It is another expression, or makes something very long.
    """
    if not isinstance(text, str):
        raise TypeError(f"an option must be a string, got {type(text).__name__}")
    try:
        return _value(ast.parse(text.strip(), mode="eval").body)
    except (SyntaxError, ValueError, TypeError, ArithmeticError, RecursionError) as error:
        raise UserError(
            f"{text[:80]!r} is not a Python literal, and nothing else is evaluated: no code of a "
            "checkpoint or option is run"
        ) from error


def shadow_eval() -> None:
    """Give every module of fairseq that is imported a global ``eval`` of its own: ``evaluate``."""
    for module in _modules():
        vars(module).setdefault("eval", evaluate)


def uncover_eval() -> None:
    """Take it away again."""
    for module in _modules():
        if vars(module).get("eval") is evaluate:
            del module.eval


def _modules() -> Iterator[Any]:
    for name, module in list(sys.modules.items()):
        spec = getattr(module, "__spec__", None)
        # A command that was started by `python -m` is called __main__.
        own = name if name != "__main__" else getattr(spec, "name", "")
        if own.partition(".")[0] in ("fairseq", "fairseq_cli") and hasattr(module, "__dict__"):
            yield module


def _value(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Tuple | ast.List | ast.Set):
        kind = {ast.Tuple: tuple, ast.List: list, ast.Set: set}[type(node)]
        return kind(_value(item) for item in node.elts)
    if isinstance(node, ast.Dict):
        if None in node.keys:
            raise ValueError("a dictionary within a dictionary")
        keys = [_value(key) for key in node.keys if key is not None]
        return dict(zip(keys, map(_value, node.values), strict=True))
    if isinstance(node, ast.UnaryOp) and type(node.op) in UNARY:
        return UNARY[type(node.op)](_value(node.operand))
    if isinstance(node, ast.BinOp) and type(node.op) in BINARY:
        left, right = _value(node.left), _value(node.right)
        _check_length(node.op, left, right)
        return BINARY[type(node.op)](left, right)
    raise ValueError(f"a {type(node).__name__}")


def _check_length(op: ast.operator, left: Any, right: Any) -> None:
    """Raise before something very long is made."""
    sizes = [len(side) for side in (left, right) if isinstance(side, list | tuple | str | bytes)]
    numbers = [side for side in (left, right) if isinstance(side, int)]
    times = max(numbers, default=1) if isinstance(op, ast.Mult) else 1
    if sizes and sum(sizes) * times > LONGEST:
        raise ValueError("too long")
