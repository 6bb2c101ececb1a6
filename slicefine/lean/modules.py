"""Norms, gated MLPs and activations that keep less, recognized by what they compute.

No table of classes: a module's own ``forward`` is run on a few random numbers, with weights of a
few features in place of its own, and compared with the formula. A module becomes lean by its class
(a subclass of its own, `type(module)`), so that copies of it stay lean, and stops being so by
getting its class back.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from slicefine.backends import lean_reference as reference
from slicefine.lean.functions import (
    ActivationFunction,
    LayerNormFunction,
    RMSNormFunction,
    gated_activation,
)

# features of the weights that stand in while a forward is tried
_TRIED = 6
_HIDDEN = 10


class LeanModule:
    """Mixed into the class of a module that has become lean."""

    _lean_from: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> tuple:
        # the mixed class cannot be found by name
        mixin = type(self).__mro__[1]
        state: Any = self.__getstate__()  # type: ignore[attr-defined]
        return _rebuild, (mixin, self._lean_from), state


class LeanRMSNorm(LeanModule):
    """RMSNorm; its own forward where its weight trains or no gradient is recorded."""

    def forward(self, x: Tensor) -> Tensor:
        weight, how = self.weight, self._lean  # type: ignore[attr-defined]
        # our backward has no gradient for the weight
        if weight.requires_grad or not torch.is_grad_enabled():
            return super().forward(x)  # type: ignore[misc]
        offset, late_cast, internal, eps = how
        dtype = x.dtype if internal is None else internal
        return RMSNormFunction.apply(x, weight, eps, offset, late_cast, dtype)  # type: ignore[return-value]


class LeanLayerNorm(LeanModule):
    """LayerNorm whose result a row slice behind it makes again instead of keeping it."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias  # type: ignore[attr-defined]
        trains = any(t is not None and t.requires_grad for t in (weight, bias))
        # autocast has a dtype of its own for this operator, on every device another
        if trains or not x.requires_grad or torch.is_autocast_enabled(x.device.type):
            return super().forward(x)  # type: ignore[misc]
        shape = self.normalized_shape  # type: ignore[attr-defined]
        return LayerNormFunction.apply(x, shape, weight, bias, self.eps)  # type: ignore


class LeanGatedMLP(LeanModule):
    """down(activation(gate(x)) * up(x)); two products, or one that holds both."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x)  # type: ignore[misc]
        names, kind, gate_first = self._lean  # type: ignore[attr-defined]
        modules: Any = [getattr(self, name) for name in names]
        if len(names) == 3:
            gate, up, down = modules
            return down(gated_activation(gate(x), up(x), kind))
        both, down = modules
        halves = both(x).chunk(2, dim=-1)
        gate, up = halves if gate_first else halves[::-1]
        return down(gated_activation(gate, up, kind))


class LeanActivation(LeanModule):
    """One operator in place of the many of which the activation is written, which a row slice
    behind it makes again instead of keeping its result.
    """

    def forward(self, x: Tensor) -> Tensor:
        kind: str = self._lean  # type: ignore[attr-defined]
        if not torch.is_grad_enabled():
            return reference.activation(x, kind)
        return ActivationFunction.apply(x, kind)  # type: ignore[return-value]


@functools.cache
def _mixed(mixin: type, kind: type) -> type:
    body = {
        "_lean_from": kind,
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
    }
    return type(kind.__name__, (mixin, kind), body)


def _rebuild(mixin: type, kind: type) -> Any:
    mixed: Any = _mixed(mixin, kind)
    return mixed.__new__(mixed)


def become(module: nn.Module, mixin: type, how: Any) -> None:
    module.__dict__["_lean"] = how
    module.__class__ = _mixed(mixin, type(module))


def give_back(module: nn.Module) -> None:
    """Undo `become`."""
    if isinstance(module, LeanModule):
        module.__class__ = module._lean_from  # pyright: ignore[reportAttributeAccessIssue]
        module.__dict__.pop("_lean", None)


# Recognition


def recognize_norm(
    module: nn.Module,
) -> tuple[float, bool, torch.dtype | None, float] | None:
    """(offset, late_cast, internal dtype or None for the input's, eps) of an RMSNorm."""
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 1 or len(module._parameters) > 1:
        return None
    if module._buffers or module._modules:
        return None
    eps = next((e for e in map(vars(module).get, _EPSILONS) if isinstance(e, float)), None)
    if eps is None:
        if not isinstance(module, nn.RMSNorm):
            return None
        # what nn.RMSNorm takes where its eps is None
        eps = torch.finfo(weight.dtype).eps
    found = _try_norm(module, torch.float64, eps, weight.dtype)
    return found


_EPSILONS = ("variance_epsilon", "eps", "epsilon", "layer_norm_eps", "rms_norm_eps")


@torch.no_grad()
def _try_norm(
    module: nn.Module, dtype: torch.dtype, eps: float, weight_dtype: torch.dtype
) -> tuple[float, bool, torch.dtype | None, float] | None:
    # real numbers, also where the model is of fake or meta tensors
    with unset_fake_temporarily(), torch.device("cpu"):
        generator = torch.Generator().manual_seed(0)
        features = module._parameters["weight"].shape[0]  # type: ignore[union-attr]
        shell = _shell(module)
        scale = torch.rand(features, generator=generator, dtype=dtype) + 0.5
        x = torch.randn(64, features, generator=generator, dtype=dtype)
        for offset, internal in itertools.product((0.0, 1.0), (None, torch.float32)):
            formula = lambda x, w, late, offset=offset, internal=internal: (
                reference.rms_norm(x, w, eps, offset, late, internal or x.dtype)[0]
            )
            wide = _run(shell, {"weight": scale}, x)
            tolerance = 1e-12 if internal is None else 1e-6
            if not _equal(wide, formula(x, scale, False), tolerance):
                continue
            # which of the two is rounded: decided in a dtype in which it shows
            low = [t.to(torch.bfloat16) for t in (x, scale)]
            narrow = _run(shell, {"weight": low[1]}, low[0])
            internals = [torch.float32] if internal else [None, torch.float32]
            for late, low_internal in itertools.product((False, True), internals):
                trial = reference.rms_norm(
                    low[0], low[1], eps, offset, late, low_internal or torch.bfloat16
                )[0]
                if narrow is not None and torch.equal(narrow, trial):
                    kept = (
                        internal
                        if internal or weight_dtype == torch.float64
                        else low_internal
                    )
                    return offset, late, kept, eps
    return None


def recognize_mlp(module: nn.Module) -> tuple[tuple[str, ...], str, bool] | None:
    """(names of its layers, activation, whether the gate is the first half) of a gated MLP."""
    linear = {n: m for n, m in module._modules.items() if isinstance(m, nn.Linear)}
    others = [m for n, m in module._modules.items() if n not in linear and m is not None]
    if (
        len(linear) not in (2, 3)
        or any(_holds_tensors(m) for m in others)
        or module._parameters
    ):
        return None
    # which layer is the gate cannot be told from names; the result tells
    for names in itertools.permutations(linear):
        for kind, gate_first in itertools.product(reference.ACTIVATIONS, (True, False)):
            # the permutations swap gate and up already
            if len(names) == 3 and not gate_first:
                continue
            if _shapes_fit(linear, names) and _computes_gated(
                module, names, kind, gate_first
            ):
                return names, kind, gate_first
    return None


def _shapes_fit(linear: dict[str, nn.Linear], names: tuple[str, ...]) -> bool:
    *into, down = (linear[name] for name in names)
    wide = sum(layer.out_features for layer in into)
    return wide == 2 * down.in_features and down.out_features == into[0].in_features


@torch.no_grad()
def _computes_gated(
    module: nn.Module, names: tuple[str, ...], kind: str, gate_first: bool
) -> bool:
    with unset_fake_temporarily(), torch.device("cpu"):
        generator = torch.Generator().manual_seed(0)
        shell = _shell(module)
        layers = []
        for name in names:
            last = name == names[-1]
            out = _TRIED if last else _HIDDEN * (4 - len(names))
            # small layers stand in: the module's own may be large, or on a GPU
            layer = nn.Linear(_HIDDEN if last else _TRIED, out, dtype=torch.float64)
            for parameter in layer.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
            shell._modules[name] = layer
            layers.append(layer)
        x = torch.randn(5, _TRIED, generator=generator, dtype=torch.float64)
        *into, down = layers
        halves = (
            [layer(x) for layer in into] if len(into) == 2 else into[0](x).chunk(2, dim=-1)
        )
        gate, up = halves if gate_first else halves[::-1]
        wanted = down(reference.gated_activation(gate, up, kind))
        return _equal(_run(shell, {}, x), wanted, 1e-12)


def recognize_layer_norm(module: nn.Module) -> bool | None:
    """Whether a module computes what nn.LayerNorm does, and has what it computes it from."""
    if getattr(type(module), "forward", None) is not nn.LayerNorm.forward:
        return None
    return module._parameters.get("weight") is not None or None


def recognize_activation(module: nn.Module) -> str | None:
    """The operator that computes what a module without tensors computes; else None."""
    if _holds_tensors(module) or list(module.children()):
        return None
    with torch.no_grad(), unset_fake_temporarily(), torch.device("cpu"):
        # covers where the forms of gelu differ, by far more than the tolerance
        x = torch.linspace(-6, 6, 101, dtype=torch.float64)
        found = _run(_shell(module), {}, x)
        for kind in reference.ACTIVATIONS:
            if _equal(found, reference.activation(x, kind), 1e-12):
                return kind
    return None


def operators(module: nn.Module) -> int:
    """Of how many operators an activation is written."""
    with torch.enable_grad(), unset_fake_temporarily(), torch.device("cpu"):
        node: Any = _shell(module)(torch.ones(2).requires_grad_()).grad_fn
    # nodes of the autograd graph: each may keep a tensor as large as x
    count = 0
    while node is not None and "Accumulate" not in type(node).__name__:
        count += 1
        node = next((n for n, _ in node.next_functions if n is not None), None)
    return count


def _holds_tensors(module: nn.Module) -> bool:
    return any(True for _ in itertools.chain(module.parameters(), module.buffers()))


def _shell(module: nn.Module) -> Any:
    """The module with registries of its own and no hooks, whose tensors may be replaced."""
    shell = copy.copy(module)
    for registry in ("_parameters", "_buffers", "_modules"):
        shell.__dict__[registry] = dict(module.__dict__[registry])
    for hooks in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
        shell.__dict__[hooks] = {}
    return shell


def _run(shell: Any, parameters: dict[str, Tensor], x: Tensor) -> Tensor | None:
    """What the module's own forward gives; None if it cannot be called like this."""
    for name, value in parameters.items():
        shell._parameters[name] = nn.Parameter(value, requires_grad=False)
    try:
        return shell.forward(x)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError):
        return None


def _equal(found: Any, wanted: Tensor, tolerance: float) -> bool:
    if (
        not isinstance(found, Tensor)
        or found.shape != wanted.shape
        or found.dtype != wanted.dtype
    ):
        return False
    return bool((found - wanted).abs().max() <= tolerance * wanted.abs().max())


def candidates(model: nn.Module, recognize: Callable[[nn.Module], Any]) -> Iterator[tuple]:
    """(name, module, what was recognized) of each module once."""
    # a lean MLP computes its activation itself
    inside = {
        child
        for module in model.modules()
        if isinstance(module, LeanGatedMLP)
        for child in module.children()
    }
    for name, module in model.named_modules():
        if isinstance(module, LeanModule) or module in inside:
            continue
        how = recognize(module)
        if how is not None:
            yield name, module, how


# What was not recognized


def unknown_norms(model: nn.Module) -> dict[str, str]:
    """name -> why, of norms that stay as they are."""
    known = (LeanRMSNorm, nn.LayerNorm, nn.modules.batchnorm._NormBase, nn.GroupNorm)
    return {
        name: f"a {type(module).__name__} that computes something else than RMSNorm"
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        and module._parameters.get("weight") is not None
        and not isinstance(module, known)
    }


def unknown_mlps(model: nn.Module) -> dict[str, str]:
    """name -> why, of modules that look like gated MLPs and stay as they are."""
    left = {}
    for name, module in model.named_modules():
        linear = [m for m in module.children() if isinstance(m, nn.Linear)]
        widths = sorted(layer.out_features for layer in linear)
        # two layers that widen alike and one that narrows
        looks = len(linear) == 3 and widths[1] == widths[2] > widths[0]
        if looks and not isinstance(module, LeanGatedMLP):
            kind = type(module).__name__
            left[name] = f"a {kind} that computes something else than SwiGLU or GeGLU"
    return left
