"""A loss that never holds all logits: they stay a promise until somebody asks for their values.

In a training step the head gives `LazyLogits`. Casting, reshaping, scaling and capping them is
noted; `cross_entropy` computes loss and gradient in chunks of tokens. Every other operation makes
the logits and goes on with them, so whatever the model or the trainer does with logits still works
and costs what it costs without lean.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map

# most elements of logits in a chunk: 130 tokens of a vocabulary of 128,256
CHUNK = 2**24
# and fewer for little data, so that a chunk is not what decides the peak
CHUNK_OF_HIDDEN = 8
CHUNK_AT_LEAST = 2**21

Step = Callable[[Tensor], Tensor]


class LazyLogits(Tensor):
    """head(hidden), not computed yet. shape (..., V); dtype as the head would give."""

    hidden: Tensor
    head: nn.Module
    steps: tuple[Step, ...]
    made: Tensor | None

    @staticmethod
    def __new__(
        cls,
        hidden: Tensor,
        head: Any,
        shape: Any,
        dtype: torch.dtype,
        steps: tuple[Step, ...],
    ) -> LazyLogits:
        self = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            shape,
            dtype=dtype,
            device=hidden.device,
            requires_grad=hidden.requires_grad,
        )
        self.hidden, self.head, self.steps, self.made = hidden, head, steps, None
        return self

    def __repr__(self) -> str:  # type: ignore[override]
        return f"LazyLogits(shape={tuple(self.shape)}, dtype={self.dtype})"

    def then(
        self, step: Step | None, shape: Any = None, dtype: torch.dtype | None = None
    ) -> Any:
        """The same logits after one more step, elementwise, or in another shape or dtype."""
        steps = self.steps if step is None else (*self.steps, step)
        shape = self.shape if shape is None else shape
        return LazyLogits(self.hidden, self.head, shape, dtype or self.dtype, steps)

    def values(self) -> Tensor:
        """The logits. Made once; again if a gradient is wanted of those made without one."""
        wanted = torch.is_grad_enabled() and self.hidden.requires_grad
        if self.made is None or (wanted and not self.made.requires_grad):
            self.made = _logits(self.hidden, self.head, self.steps).view(self.shape)
        return self.made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        # shape and dtype are known without a product
        if func in _ASKED:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is F.cross_entropy and isinstance(args[0] if args else None, LazyLogits):
            loss = _cross_entropy(*args, **kwargs)
            if loss is not None:
                return loss
        lazy = args[0] if args else None
        if func in _STEPS and isinstance(lazy, LazyLogits) and lazy.made is None:
            found = _STEPS[func](lazy, *args[1:], **kwargs)
            if found is not None:
                return found
        # anything else gets the logits, and goes on as if they had been there all the time
        real = lambda value: value.values() if isinstance(value, LazyLogits) else value
        return func(*tree_map(real, args), **tree_map(real, kwargs))

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # what is called from C++ does not pass by __torch_function__
        real = lambda value: value.values() if isinstance(value, LazyLogits) else value
        return func(*tree_map(real, args), **tree_map(real, kwargs or {}))


def lazy_logits(hidden: Tensor, head: nn.Module) -> LazyLogits:
    """What the head's forward returns in a lean step."""
    weight: Any = head.weight
    # what F.linear would return here
    dtype = _autocast_dtype(hidden) or hidden.dtype
    shape = (*hidden.shape[:-1], weight.shape[0])
    return LazyLogits(hidden.to(dtype), head, shape, dtype, ())


def _autocast_dtype(hidden: Tensor) -> torch.dtype | None:
    kind = hidden.device.type
    if not torch.is_autocast_enabled(kind) or hidden.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(kind)


def _logits(hidden: Tensor, head: Any, steps: tuple[Step, ...]) -> Tensor:
    weight, bias = _operands(hidden, head)
    logits = F.linear(hidden, weight, bias)
    for step in steps:
        logits = step(logits)
    return logits


def _operands(hidden: Tensor, head: Any) -> tuple[Tensor, Tensor | None]:
    bias = None if head.bias is None else head.bias.to(hidden.dtype)
    return head.weight.to(hidden.dtype), bias


# What is noted instead of done


def _cast(
    lazy: LazyLogits, dtype: Any = None, *rest: Any, **kwargs: Any
) -> LazyLogits | None:
    if rest or kwargs or not isinstance(dtype, torch.dtype):
        return None
    return lazy.then(lambda logits: logits.to(dtype), dtype=dtype)


def _float(lazy: LazyLogits) -> LazyLogits:
    return lazy.then(lambda logits: logits.float(), dtype=torch.float32)


def _reshape(lazy: LazyLogits, *shape: Any) -> LazyLogits | None:
    sizes = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
    if not all(isinstance(size, int) for size in sizes):
        return None
    new = list(sizes)
    if -1 in new:
        known = 1
        for size in new:
            known *= 1 if size == -1 else size
        new[new.index(-1)] = lazy.numel() // max(known, 1)
    # tokens may be regrouped, but a row must stay the logits of one token
    return lazy.then(None, shape=tuple(new)) if new[-1] == lazy.shape[-1] else None


def _scale(lazy: LazyLogits, factor: Any) -> LazyLogits | None:
    if not isinstance(factor, int | float):
        return None
    return lazy.then(lambda logits: logits * factor)


def _divide(lazy: LazyLogits, divisor: Any) -> LazyLogits | None:
    if not isinstance(divisor, int | float):
        return None
    return lazy.then(lambda logits: logits / divisor)


def _same(lazy: LazyLogits) -> LazyLogits:
    return lazy


def _tanh(lazy: LazyLogits) -> LazyLogits:
    return lazy.then(torch.tanh)


def _shift(lazy: LazyLogits, index: Any) -> LazyLogits | None:
    """``logits[..., :-1, :]`` and its like: whole tokens, chosen by slices."""
    index = index if isinstance(index, tuple) else (index,)
    plain = all(part is Ellipsis or isinstance(part, slice) for part in index)
    covers = len(index) < lazy.dim() and Ellipsis not in index
    if Ellipsis in index or len(index) == lazy.dim():
        covers = index[-1] in (Ellipsis, slice(None))
    if not plain or not covers or lazy.hidden.shape[:-1] != lazy.shape[:-1]:
        return None
    # a token dropped here has no logits made for it
    hidden = lazy.hidden[index]
    shape = (*hidden.shape[:-1], lazy.shape[-1])
    return LazyLogits(hidden, lazy.head, shape, lazy.dtype, lazy.steps)


_STEPS: dict[Any, Callable[..., LazyLogits | None]] = {
    Tensor.float: _float,
    Tensor.to: _cast,
    Tensor.view: _reshape,
    Tensor.reshape: _reshape,
    Tensor.contiguous: _same,
    Tensor.mul: _scale,
    Tensor.__mul__: _scale,
    Tensor.__rmul__: _scale,
    Tensor.div: _divide,
    Tensor.__truediv__: _divide,
    Tensor.tanh: _tanh,
    torch.tanh: _tanh,
    Tensor.__getitem__: _shift,
}
# answered without the values
_ASKED = {
    getattr(Tensor, name).__get__
    for name in ("shape", "dtype", "device", "requires_grad", "ndim", "layout", "is_leaf")
} | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__len__}
_ASKED |= {Tensor.ndimension, Tensor.is_complex, Tensor.element_size}


# The loss


def _cross_entropy(
    logits: LazyLogits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """F.cross_entropy of lazy logits (n, V) in chunks; None if it must be done otherwise."""
    plain = weight is None and size_average is None and reduce is None
    if not plain or logits.dim() != 2 or target.is_floating_point() or reduction == "none":
        return None
    # the values are there already: chunks would save nothing
    if logits.made is not None:
        return None
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    hidden = logits.hidden.reshape(-1, logits.hidden.shape[-1])
    head_weight, bias = _operands(hidden, logits.head)
    elements = min(CHUNK, max(CHUNK_AT_LEAST, CHUNK_OF_HIDDEN * hidden.numel()))
    # [rows, V] is all of the logits that exists at a time
    rows = max(1, min(hidden.shape[0], elements // logits.shape[-1]))
    # torch's own has no label smoothing in chunks, and rounds the loss to 16 bits where hidden is
    wide = hidden.dtype in (torch.float32, torch.float64)
    plain = wide and label_smoothing == 0 and _keep_values(logits)
    if plain and hasattr(F, "linear_cross_entropy"):
        chunks = nn.LinearCrossEntropyOptions(batch_chunk_size=rows, chunking_method=None)
        loss = F.linear_cross_entropy(
            hidden,
            head_weight,
            target,
            linear_bias=bias,
            reduction=reduction,
            ignore_index=ignore_index,
            options=chunks,
        )
        return loss.to(logits.dtype)
    total: Any = ChunkedCrossEntropy.apply(
        hidden, head_weight, bias, target, logits.steps, rows, options
    )
    if reduction == "sum":
        return total
    return total / (target != ignore_index).sum()


def _keep_values(logits: LazyLogits) -> bool:
    """Whether the steps are casts that change no value, tried on a few numbers."""
    with torch.no_grad(), unset_fake_temporarily():
        # 40: a cap by tanh would change it
        tried = torch.tensor([-3.0, 0.5, 40.0], dtype=logits.hidden.dtype)
        found = tried
        for step in logits.steps:
            found = step(found)
        return torch.equal(found.double(), tried.double())


class ChunkedCrossEntropy(Function):
    """The sum of cross entropies of ``steps(hidden W^T + b)``; the gradient is made in forward.

    For what torch's linear_cross_entropy does not do: 16 bits with a loss of 32, label smoothing,
    logits that are scaled or capped, torch before 2.13.
    """

    @staticmethod
    def forward(
        ctx,
        hidden,
        weight,
        bias,
        target,
        steps,
        rows,
        options,
    ):
        needs = ctx.needs_input_grad[:3]
        trained = [t for t, need in zip((hidden, weight, bias), needs, strict=True) if need]
        grads = [torch.zeros_like(t) for t in trained]
        total = None
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            # the gradient now, while the chunk's logits exist: backward would make them again
            with torch.enable_grad():
                inputs: Any = [
                    t.detach().requires_grad_(n) if t is not None else None
                    for t, n in zip((hidden[part], weight, bias), needs, strict=True)
                ]
                logits = F.linear(*inputs)
                for step in steps:
                    logits = step(logits)
                loss = F.cross_entropy(logits, target[part], reduction="sum", **options)
                # backward needs their softmax, not them
                del logits
                asked = [t for t, n in zip(inputs, needs, strict=True) if n]
                found: Any = torch.autograd.grad(loss, asked) if asked else ()
            if needs[0]:
                grads[0][part] = found[0]
            # every chunk adds to weight and bias; needs[0] is 1 where hidden stands before them
            for grad, more in zip(grads[needs[0] :], found[needs[0] :], strict=True):
                grad += more
            total = loss.detach() if total is None else total + loss.detach()
        ctx.save_for_backward(*grads)
        ctx.needs = needs
        return total if total is not None else hidden.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        saved = iter(ctx.saved_tensors)
        # the loss is a number, so its incoming gradient is a factor
        results = [next(saved) * grad if need else None for need in ctx.needs]
        return *results, None, None, None, None
