"""Mixture of experts whose weights are parameters of shape (experts, out, in), as in transformers
5: slices of all experts at once.

A module of experts computes with its parameters itself, by one of several implementations that each
make a gradient as large as all
experts. Here the tokens are sorted by expert, products are grouped, and backward makes the slice's
gradient only, (experts * out, r).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from slicefine import ops
from slicefine.modules.parameters import SlicedModule, SliceParameter


def is_experts(module: nn.Module) -> bool:
    """True if the module follows transformers' ``use_experts_implementation`` interface."""
    return all(
        hasattr(module, name)
        for name in ("has_gate", "has_bias", "is_transposed", "num_experts", "_apply_gate")
    )


def why_not_experts(module: Any, parameter: Tensor, slice_type: str) -> str | None:
    """Why a parameter of a module of experts cannot be sliced; None if it can."""
    if module.is_transposed:
        return "its experts store their weights transposed, (experts, in, out), which is not supported"
    if slice_type != "column":
        return f"slice_type is {slice_type!r}; experts take column slices only"
    if not parameter.is_contiguous():
        return "its memory is not contiguous"
    return None


class SliceExperts(SlicedModule):
    """The forward of transformers' modules of experts, through `SliceParameter` children.

    Mixed in front of the module's own class by `slicefine.get_slice_model` (``target_parameters``);
    state-dict keys stay. The host waits for the number of tokens of each expert, so torch.compile
    breaks its graph here.
    """

    num_experts: int
    has_gate: bool
    has_bias: bool

    @torch.compiler.disable
    def forward(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        """hidden_states: (n, hidden). top_k_index, top_k_weights: (n, k), experts of each token.
        out: (n, hidden).
        """
        this: Any = self
        if getattr(this, "_is_expert_parallel", False):
            raise RuntimeError(
                "experts spread over processes (expert parallelism) cannot hold slices; load them"
                " whole"
            )
        tokens, k = top_k_index.shape
        # sorted, each expert's tokens are one block of rows; stable, so that runs repeat to the bit
        expert, order = torch.sort(top_k_index.flatten(), stable=True)
        counts = torch.bincount(expert, minlength=self.num_experts)
        if len(counts) > self.num_experts:
            raise RuntimeError(
                f"a token asks for expert {len(counts) - 1}; there are experts 0 to"
                f" {self.num_experts - 1}"
            )
        offsets = counts.cumsum(0)
        # entry i of the flattened (n, k) choices belongs to token i // k
        hidden = self._project(
            "gate_up_proj" if self.has_gate else "up_proj",
            hidden_states[order // k],
            expert,
            offsets,
        )
        hidden = this._apply_gate(hidden) if self.has_gate else this.act_fn(hidden)
        output = self._project("down_proj", hidden, expert, offsets)
        if getattr(this, "has_post_expert_norm", False):
            output = this.post_expert_norm(output)
        output = output * top_k_weights.flatten()[order].unsqueeze(-1)
        # the inverse permutation brings the k outputs of a token side by side again
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return output[back].view(tokens, k, -1).sum(dim=1).to(hidden_states.dtype)

    def _project(self, name: str, input: Tensor, expert: Tensor, offsets: Tensor) -> Tensor:
        """input: (n, in), sorted by ``expert`` (n,); offsets: (experts,), where each expert's
        tokens end. out: (n, out).
        """
        weight, layer = self.parameter(name), self.slice_of(name)
        assert weight is not None
        bias = self.parameter(f"{name}_bias") if self.has_bias else None
        input = input.to(weight.dtype)
        if layer is None:
            output = _grouped_product(input, weight.transpose(1, 2), offsets)
        else:
            output = _sliced_product(layer, input, offsets)
        return output if bias is None else output + bias[expert]


def _sliced_product(layer: SliceParameter, input: Tensor, offsets: Tensor) -> Tensor:
    if layer.updater is not None and not layer.disabled:
        raise RuntimeError(
            "optimizer_in_bwd=True does not work with target_parameters: the gradients of all"
            " experts make one update. Use SliceAdamW(..., optimizer_in_bwd=False), the default."
        )
    layer.sync()
    scoring = layer.scores is not None and torch.is_grad_enabled() and not layer.disabled
    scoring = scoring and layer.schedule.needs_gradient_scores
    return _ExpertsFunction.apply(
        input, layer.weight, layer.master, layer.cols, offsets, layer if scoring else None
    )


class _ExpertsFunction(torch.autograd.Function):
    """y[i] = W[expert of i] x[i] with a gradient for x and for the slice; keeps x[:, cols]."""

    @staticmethod
    def forward(ctx, input, weight, slice_weight, cols, offsets, scored):
        needs_input, _, needs_slice, *_ = ctx.needs_input_grad
        kept = None
        # [n, r] in place of [n, in]; scores alone need every column
        if needs_slice:
            kept = input if scored is not None else input.index_select(1, cols)
        ctx.save_for_backward(weight if needs_input else None, kept, cols, offsets)
        ctx.scored, ctx.slice_shape = scored, slice_weight.shape
        return _grouped_product(input, weight.transpose(1, 2), offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        weight, kept, cols, offsets = ctx.saved_tensors
        grad_input = (
            None if weight is None else _grouped_product(grad_output, weight, offsets)
        )
        if kept is None:
            return grad_input, None, None, None, None, None
        # the host waits here: how many tokens each expert got decides the shapes
        ends, start = offsets.tolist(), 0
        grad, rows = None, ctx.slice_shape[0] // len(ends)
        for i, end in enumerate(ends):
            # an expert without tokens has a gradient of zero and no product
            if start < end:
                dy, x = grad_output[start:end], kept[start:end]
                if ctx.scored is not None:
                    ctx.scored.scores.add(ctx.scored, dy, x)
                    x = x.index_select(1, cols)
                part = ops.slice_grad(dy, x)
                if grad is None:
                    grad = part.new_zeros(ctx.slice_shape)
                grad[i * rows : (i + 1) * rows] = part
            start = end
        return grad_input, None, grad, None, None, None


def _grouped_product(input: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """input[start:end] @ weight[i] for every i. input: (n, in), weight: (experts, in, out),
    offsets: (experts,) the ends.
    """
    # one kernel for all experts, where there is one for the dtype and the device
    if input.dtype != torch.float64 and input.device.type in ("cpu", "cuda"):
        return F.grouped_mm(input, weight, offs=offsets.to(torch.int32))
    ends = offsets.tolist()
    starts = [0, *ends[:-1]]
    return torch.cat(
        [input[a:b] @ weight[i] for i, (a, b) in enumerate(zip(starts, ends, strict=True))]
    )
