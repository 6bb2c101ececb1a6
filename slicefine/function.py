"""The autograd function of SliceLinear: one linear product forward, gradients for the input, the
bias and the slice backward.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slicefine import ops


class SliceLinearFunction(torch.autograd.Function):
    """y = x W^T + b with a gradient for x, the bias and the slice; keeps X[:, cols], or X for a row
    slice, or nothing where ``source`` makes X again.

    ``layer`` is None but for the two cases in which backward does more than return gradients:
    scores for the next move, and
    `optimizer_in_bwd`.
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
        ctx.scoring = (
            layer is not None
            and layer.scores is not None
            and layer.schedule.needs_gradient_scores
        )
        kept = None
        if input.shape[-1] != weight.shape[1]:
            # raises in nn.Linear's words, before columns are taken that are not there
            return F.linear(input, cast_weight, bias)
        # [N, K] in place of [..., in]: the activations that a column slice need not keep
        whole = cols is None or ctx.scoring
        # a node before this one keeps what makes X again; this one keeps neither
        ctx.source = source if needs_slice and whole else None
        if needs_slice and ctx.source is None:
            kept = input if whole or cols is None else ops.take_columns(input, cols)
        ctx.input_dtype = input.dtype
        # the weight itself, not its cast: a bfloat16 copy of every weight would live until backward
        ctx.save_for_backward(weight if needs_input else None, kept, rows, cols)
        ctx.layer, ctx.slice_shape = layer, slice_weight.shape
        ctx.slice_edge = 2 if bias is None else 3  # tensor inputs before slice_weight
        # the same product as a frozen nn.Linear: the slice is already in the weight
        output = F.linear(input, cast_weight, bias)
        if not torch.compiler.is_compiling() and output._is_view():
            # autograd refuses in-place operations on a custom function's output that is a view; this
            # makes the same memory a tensor of its own
            output = torch.ops.aten._unsafe_view(output, output.shape)
        return output

    @staticmethod
    def backward(ctx, grad_output):
        # grad mode is on only under create_graph=True; double backward is not supported
        return (_backward_once if torch.is_grad_enabled() else _backward)(ctx, grad_output)


def _backward(ctx, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    needs_input, _, needs_bias, needs_slice, *_ = ctx.needs_input_grad
    updater = ctx.layer.updater if ctx.layer is not None and needs_slice else None
    if updater is not None:
        # torch.autograd.grad towards something else asks for no update
        needs_slice = torch._C._will_engine_execute_node(
            ctx.next_functions[ctx.slice_edge][0]
        )
        if needs_slice:
            updater.before_backward(ctx.layer)
    weight, kept, rows, cols = ctx.saved_tensors
    grad_input = grad_bias = grad_slice = None
    # once for both products: attention hands back a transposed gradient, which each of them would
    # copy
    flat = grad_output.reshape(-1, grad_output.shape[-1])
    if needs_input:
        grad_input = flat.mm(
            weight if weight.dtype == flat.dtype else weight.to(flat.dtype)
        )
        grad_input = grad_input.view(*grad_output.shape[:-1], weight.shape[1])
    # [out]: the sum over tokens
    if needs_bias:
        grad_bias = flat.sum(0)
    if needs_slice:
        if ctx.source is not None:
            kept = ctx.source._forward_cls.remake(ctx.source).to(ctx.input_dtype)
        grad_slice = _slice_gradient(
            ctx,
            flat,
            kept if kept.dim() == 2 else kept.reshape(-1, kept.shape[-1]),
            rows,
            cols,
        )
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
    # an input of another width raises as in nn.Linear, before its columns are taken
    if not trains or input.shape[-1:] != weight.shape[1:]:
        return F.linear(input, weight, bias)
    return _apply(input, weight, bias, slice_weight, rows, cols, layer, source)


_apply = SliceLinearFunction.apply


def source_of(input: Tensor) -> Any:
    """The autograd node that can make this tensor again in backward, from what it keeps; or None.

    It is the node of a function with a ``remake(ctx)`` beside its forward and backward, such as the
    norms of a lean model have.
    """
    # a compiler decides by itself what is computed again
    if torch.compiler.is_compiling() or (node := input.grad_fn) is None:
        return None
    # written to since, it is not what the node would make
    if input._version:
        return None
    return node if hasattr(getattr(node, "_forward_cls", None), "remake") else None


def in_transform() -> bool:
    """Whether one of torch.func's transforms is running."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


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
    ctx, grad_output: Tensor, kept: Tensor, rows: Tensor | None, cols: Tensor | None
) -> Tensor | None:
    """The gradient for slice_weight; None where the update has been made in place of it. Also
    collects scores.
    """
    layer = ctx.layer
    # scores are of all positions and need every column; the update only those of the slice
    if ctx.scoring:
        layer.scores.add(layer, grad_output, kept)
        if cols is not None:
            kept = kept.index_select(1, cols)
    if layer is not None and layer.updater is not None:
        layer.updater.update_in_backward(layer, grad_output, kept)
        return None
    grad = ops.slice_grad(grad_output, kept, rows)
    if grad.shape == ctx.slice_shape:
        return grad
    flat = grad.new_zeros(ctx.slice_shape)  # row_column: the slice, then an unused tail
    flat[: grad.numel()] = grad.flatten()
    return flat
