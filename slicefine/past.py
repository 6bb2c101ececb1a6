"""Linear layers that cannot become slices by what the code around them does.

A slice trains when its layer is called. Some models read ``self.proj.weight`` instead, in a fused
product, and some subclasses of nn.Linear compute something else; both can be known before training.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Iterator
from types import CodeType
from typing import Any

import torch
from torch import nn

# what is asked of a weight without using its values
_ABOUT = frozenset(
    [
        "dtype",
        "device",
        "shape",
        "size",
        "dim",
        "ndim",
        "numel",
        "requires_grad",
        "is_meta",
        "is_cuda",
        "is_sparse",
        "stride",
        "grad",
        "element_size",
        "is_contiguous",
        "is_floating_point",
        "itemsize",
        "nbytes",
        "layout",
        "__class__",
    ]
)
_CHECKS = ("isinstance", "hasattr", "getattr", "type", "id", "len")
_PURE = (
    ast.Expression,
    ast.Name,
    ast.Attribute,
    ast.Constant,
    ast.Compare,
    ast.BoolOp,
    ast.UnaryOp,
    ast.Load,
    ast.And,
    ast.Or,
    ast.Not,
    ast.cmpop,
)


@functools.cache
def _methods_of_forward(kind: type) -> tuple[Callable[..., Any], ...]:
    """The functions of a class that its forward may call, forward among them."""
    found: dict[str, Callable[..., Any]] = {}
    waiting = ["forward"]
    while waiting:
        name = waiting.pop()
        function = inspect.unwrap(getattr(kind, name))
        if name in found or not inspect.isfunction(function):
            continue
        found[name] = function
        for code in _codes(function.__code__):
            called = (n for n in code.co_names if callable(getattr(kind, n, None)))
            waiting += [n for n in called if not hasattr(nn.Module, n)]
    return tuple(found.values())


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


@functools.cache
def _tree(function: Callable[..., Any]) -> ast.AST | None:
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, SyntaxError, TypeError):
        # no source to read: nothing is known beforehand, and the first steps will tell
        return None


def reads_past(parent: nn.Module, child: str) -> tuple[str, bool] | None:
    """Whether a module uses the weight of a child of its own without calling the child.

    Args:
        parent: the module whose forward is read.
        child: name of a linear layer in it.

    Returns:
        (the name of the function that does, whether the child is also called); None if none does.
    """
    kind = type(parent)
    if kind.__module__.startswith("torch.nn."):
        # its fast paths are for inference, and look whether a gradient is needed
        return None
    reader, called = None, False
    for function in _methods_of_forward(kind):
        names = {name for code in _codes(function.__code__) for name in code.co_names}
        if child not in names:
            continue
        tree = _tree(function)
        for node in [] if tree is None else _live_nodes(tree, parent):
            called |= isinstance(node, ast.Call) and _is_child(node.func, child)
            if reader is None and "weight" in names and _uses_weight(node, child):
                reader = function.__qualname__
    return None if reader is None else (reader, called)


def _live_nodes(tree: ast.AST, module: nn.Module) -> Iterator[ast.AST]:
    """All nodes but those of branches that this module does not take, by its own attributes."""
    yield tree
    taken = _truth(tree.test, module) if isinstance(tree, ast.If) else None
    for name, value in ast.iter_fields(tree):
        if (name == "body" and taken is False) or (name == "orelse" and taken is True):
            continue
        for node in value if isinstance(value, list) else [value]:
            if isinstance(node, ast.AST):
                yield from _live_nodes(node, module)


def _truth(test: ast.expr, module: nn.Module) -> bool | None:
    """What a condition on ``self`` alone is for this module; None if more decides it."""
    nodes = list(ast.walk(test))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    # whether it trains or evaluates changes later
    changes = any(isinstance(n, ast.Attribute) and n.attr == "training" for n in nodes)
    if changes or names != {"self"} or not all(isinstance(node, _PURE) for node in nodes):
        return None
    try:
        value = eval(
            compile(ast.Expression(test), "<condition>", "eval"), {}, {"self": module}
        )
    except (AttributeError, TypeError, ValueError, RuntimeError):
        return None
    if isinstance(value, bool):
        return value
    return False if value is None else None


def _is_child(node: ast.AST, child: str) -> bool:
    """Whether a node is ``self.child``."""
    if not (isinstance(node, ast.Attribute) and node.attr == child):
        return False
    return isinstance(node.value, ast.Name) and node.value.id == "self"


def _is_weight(node: ast.AST, child: str) -> bool:
    return (
        isinstance(node, ast.Attribute)
        and node.attr == "weight"
        and _is_child(node.value, child)
    )


def _uses_weight(node: ast.AST, child: str) -> bool:
    """Whether a node takes the values of ``self.child.weight``."""
    if isinstance(node, ast.Attribute) and node.attr in _ABOUT:
        return False
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in _CHECKS
    ):
        return False
    if isinstance(node, ast.Compare) and any(
        isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops
    ):
        return False
    return any(_is_weight(inner, child) for inner in ast.iter_child_nodes(node))


def linear_forward(module: nn.Linear) -> bool:
    """Whether the forward of a subclass computes what nn.Linear does, found by running it.

    A small twin with random weights runs beside ``F.linear`` in float64, where a different order of
    sums differs by 1e-15 and another function by more. A subclass with parameters, buffers or
    children of its own is never taken for one.
    """
    own = module._parameters.keys() - {"weight", "bias"}
    if own or module._buffers or module._modules:
        return False
    generator = torch.Generator("cpu").manual_seed(0)
    random = functools.partial(
        torch.randn, generator=generator, dtype=torch.float64, device="cpu"
    )
    weight, bias = random(5, 7), None if module.bias is None else random(5)
    twin = type(module).__new__(type(module))
    twin.__dict__.update(module.__dict__, in_features=7, out_features=5)
    frozen = functools.partial(nn.Parameter, requires_grad=False)
    twin.__dict__["_parameters"] = {
        "weight": frozen(weight),
        "bias": None if bias is None else frozen(bias),
    }
    hooks = ("_forward_hooks", "_forward_pre_hooks")
    twin.__dict__.update({name: type(module.__dict__[name])() for name in hooks})
    inputs = [
        random(2, 7),
        random(3, 2, 7),
        1e3 * random(4, 7),
        random(7),
        torch.zeros_like(weight),
    ]
    with torch.no_grad():
        for training in (True, False):
            twin.training = training
            for x in inputs:
                expected = nn.functional.linear(x, weight, bias)
                try:
                    got = type(module).forward(twin, x)
                except Exception:
                    # whatever it needs, it is more than a linear layer
                    return False
                if not (isinstance(got, torch.Tensor) and got.dtype == expected.dtype):
                    return False
                if got.shape != expected.shape:
                    return False
                if not torch.allclose(
                    got, expected, rtol=1e-12, atol=1e-12 * float(x.abs().max())
                ):
                    return False
    return True
