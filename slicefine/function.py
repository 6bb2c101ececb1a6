"""The autograd function of SliceLinear: one linear product forward, gradients for the input, the
bias and the slice backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from slicefine import ops


class _Use(NamedTuple):
    """What backward does beside returning gradients of the slice's shape.

    layer: the `SliceLayer` whose next move is scored, or whose slice is updated.
    edge: number of tensors among the inputs before slice_weight.
    flat: shape of the gradient where slice_weight is flat (``row_column``).
    source: the node that makes the input again, which had ``input_dtype``.
    """

    layer: Any
    scoring: bool
    edge: int
    flat: torch.Size | None
    source: Any
    input_dtype: torch.dtype


class SliceLinearFunction(torch.autograd.Function):
    """y = x W^T + b with a gradient for x, the bias and the slice; keeps X[:, cols], or X for a row
    slice, or nothing where ``source`` makes X again.

    ``layer`` is None but for the two cases in which backward does more than return gradients:
    scores for the next move, and `optimizer_in_bwd`.
    """

    @staticmethod
    def forward(ctx, input, weight, bias, slice_weight, rows, cols, layer, source):
        if weight.dtype != input.dtype and ops.autocast_enabled(input.device.type):
            cast_weight, bias = (
                weight.to(input.dtype),
                (None if bias is None else bias.to(input.dtype)),
            )
        else:
            cast_weight = weight
        needs_input, _, _, needs_slice, *_ = ctx.needs_input_grad
        scoring = (
            layer is not None
            and layer.scores is not None
            and layer.schedule.needs_gradient_scores
        )
        # the same product as a frozen nn.Linear: the slice is already in the weight. First, so that
        # an input of another width raises in nn.Linear's words
        output = F.linear(input, cast_weight, bias)
        kept = None
        # [N, K] in place of [..., in]: the activations that a column slice need not keep
        whole = cols is None or scoring
        # a node before this one keeps what makes X again; this one keeps neither
        source = source if needs_slice and whole else None
        if needs_slice and source is None:
            kept = input if whole or cols is None else ops.take_columns(input, cols)
        # the weight itself, not its cast: a bfloat16 copy of every weight would live until backward
        ctx.save_for_backward(weight if needs_input else None, kept, rows, cols)
        # one attribute: each of them takes as long as a small tensor's look-up
        if layer is None and source is None and slice_weight.dim() == 2:
            ctx.use = None
        else:
            flat = None if slice_weight.dim() == 2 else slice_weight.shape
            edge = 2 if bias is None else 3
            ctx.use = _Use(layer, scoring, edge, flat, source, input.dtype)
        # a product of two matrices is no view; more dimensions are folded into two before it
        if output.dim() != 2 and not is_compiling() and output._is_view():
            # autograd refuses in-place operations on a custom function's output that is a view; this
            # makes the same memory a tensor of its own
            output = torch.ops.aten._unsafe_view(output, output.shape)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        if torch.is_grad_enabled():
            # grad mode is on only under create_graph=True; double backward is not supported
            return _backward_once(ctx, grad_output)
        return _backward(ctx, grad_output)


def _backward(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    needs_input, _, needs_bias, needs_slice, *_ = ctx.needs_input_grad
    use: _Use | None = ctx.use
    if use is not None and needs_slice and use.layer is not None:
        updater = use.layer.updater
        if updater is not None:
            # torch.autograd.grad towards something else asks for no update
            needs_slice = torch._C._will_engine_execute_node(
                ctx.next_functions[use.edge][0]
            )
            if needs_slice:
                updater.before_backward(use.layer)
    weight, kept, rows, cols = ctx.saved_tensors
    grad_input = grad_bias = grad_slice = None
    flat = grad_output
    if grad_output.dim() != 2:
        # once for both products: attention hands back a transposed gradient, which each of them
        # would copy
        flat = grad_output.reshape(-1, grad_output.shape[-1])
    if needs_input:
        grad_input = flat.mm(
            weight if weight.dtype == flat.dtype else weight.to(flat.dtype)
        )
        if flat is not grad_output:
            grad_input = grad_input.view(*grad_output.shape[:-1], weight.shape[1])
    # [out]: the sum over tokens
    if needs_bias:
        grad_bias = flat.sum(0)
    if needs_slice:
        if use is not None and use.source is not None:
            kept = use.source._forward_cls.remake(use.source).to(use.input_dtype)
        kept = kept if kept.dim() == 2 else kept.reshape(-1, kept.shape[-1])
        if use is None:
            grad_slice = ops.gradient_of_use(flat, kept, rows)
        else:
            grad_slice = _slice_gradient(use, flat, kept, rows, cols)
    return grad_input, None, grad_bias, grad_slice, None, None, None, None


@torch.no_grad()
def _backward_once(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    """As `_backward`; what differentiates its results is an error with a name."""
    grads = _backward(ctx, grad_output)
    given = [grad for grad in grads if grad is not None]
    if grad_output.requires_grad:
        refuse = torch._C._functions.DelayedError(_NO_SECOND, len(given))  # type: ignore[attr-defined]
        # only a tensor with a gradient gets the node that raises
        marked = iter(refuse(*(grad.detach().requires_grad_() for grad in given)))
        return tuple(None if grad is None else next(marked) for grad in grads)
    return grads


_NO_SECOND = (
    b"a gradient of the gradient of a slice (gradient penalties, MAML, Hessians): its layer keeps no"
    b" more of the input than the first gradient needs. torch.func's transforms have it"
    b" (torch.func.grad, jvp, hessian), and so have layers without slices (exclude_modules)"
)


def slice_linear(
    input: Tensor,  # [..., in]
    weight: Tensor,  # [out, in], frozen
    bias: Tensor | None,  # [out]
    slice_weight: Tensor,  # [R, K], or flat for row_column
    rows: Tensor | None,  # [R] int64
    cols: Tensor | None,  # [K] int64
    layer: Any = None,
    source: Any = None,
) -> Tensor:
    """``input @ weight.T + bias`` with a gradient for slice_weight.

    Args:
        layer: the `SliceLayer` if backward does more than return gradients.
        source: what `source_of` gave for the input, before autocast.

    Returns:
        [..., out].
    """
    trains = torch.is_grad_enabled() and (
        slice_weight.requires_grad
        or input.requires_grad
        or (bias is not None and bias.requires_grad)
    )
    if in_transform():
        return _transformed(input, weight, bias, slice_weight, rows, cols)
    if not trains:
        return F.linear(input, weight, bias)
    return _apply(input, weight, bias, slice_weight, rows, cols, layer, source)


_apply = SliceLinearFunction.apply


def source_of(input: Tensor) -> Any:
    """The autograd node that can make this tensor again in backward, from what it keeps; or None.

    It is the node of a function with a ``remake(ctx)`` beside its forward and backward, such as the
    norms of a lean model have.
    """
    # a compiler decides by itself what is computed again
    if is_compiling() or (node := input.grad_fn) is None:
        return None
    # written to since, it is not what the node would make
    if input._version:
        return None
    return node if hasattr(getattr(node, "_forward_cls", None), "remake") else None


def in_transform() -> bool:
    """Whether one of torch.func's transforms is running."""
    return not is_compiling() and torch._C._are_functorch_transforms_active()


def _transformed(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    slice_weight: Tensor,
    rows: Tensor | None,
    cols: Tensor | None,
) -> Tensor:
    """The product for torch.func's transforms, which differentiate every operation of it again.

    They take no custom function with a layer's state. So the slice is put into a copy of the weight
    by operations that all of them know; the rest of the weight is frozen, here too.
    """
    trains = isinstance(slice_weight, torch.nn.Parameter)
    # a disabled slice is a plain tensor, and its weight has the original values
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor  # pyright: ignore[reportAttributeAccessIssue]
    if trains or wrapped(slice_weight):
        everything = torch.arange
        r = everything(weight.shape[0], device=weight.device) if rows is None else rows
        c = everything(weight.shape[1], device=weight.device) if cols is None else cols
        values = slice_weight.reshape(-1)[: len(r) * len(c)].reshape(len(r), len(c))
        places = (r.unsqueeze(1), c)
        weight = weight.detach().index_put(places, values.to(weight.dtype))
    return F.linear(input, weight, bias)


def _slice_gradient(
    use: _Use, grad_output: Tensor, kept: Tensor, rows: Tensor | None, cols: Tensor | None
) -> Tensor | None:
    """The gradient for slice_weight; None where the update has been made in place of it. Also
    collects scores.
    """
    layer = use.layer
    # scores are of all positions and need every column; the update only those of the slice
    if use.scoring:
        layer.scores.add(layer, grad_output, kept)
        if cols is not None:
            kept = kept.index_select(1, cols)
    if layer is not None and layer.updater is not None:
        layer.updater.update_in_backward(layer, grad_output, kept)
        return None
    grad = ops.slice_grad(grad_output, kept, rows)
    if use.flat is None:
        return grad
    flat = grad.new_zeros(use.flat)  # row_column: the slice, then an unused tail
    flat[: grad.numel()] = grad.flatten()
    return flat
