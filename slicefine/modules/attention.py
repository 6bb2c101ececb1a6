"""nn.MultiheadAttention with sliced projections: its in_proj_weight is used without a layer to
call, so the forward is ours.

After the projections it is PyTorch's own sequence of operations, so the outputs are equal.
PyTorch's inference fast paths read the weights of attention and of nn.TransformerEncoderLayer
without calling any layer and look only at ``requires_grad`` of those weights, which slices leave
frozen; so while gradients are on, ``in_proj_weight`` answers with an alias that asks for one.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slicefine.modules.parameters import SlicedModule

PACKED, SEPARATE = ("in_proj_weight",), ("q_proj_weight", "k_proj_weight", "v_proj_weight")


def projections(attention: nn.Module) -> tuple[str, ...]:
    """Names of the parameters that project queries, keys and values."""
    return PACKED if attention._qkv_same_embed_dim else SEPARATE


def is_attention(module: nn.Module) -> bool:
    """Whether a module is nn.MultiheadAttention itself; a subclass may compute something else."""
    return type(module) is nn.MultiheadAttention


class SliceMultiheadAttention(SlicedModule):
    """The forward of nn.MultiheadAttention through `SliceParameter` and `SliceLinear` children;
    same arguments, same results.

    Mixed in front of nn.MultiheadAttention by `slicefine.get_slice_model`; the state dict keeps its
    keys.
    """

    embed_dim: int
    num_heads: int
    head_dim: int
    dropout: float
    batch_first: bool
    add_zero_attn: bool
    in_proj_bias: Tensor | None
    bias_k: Tensor | None
    bias_v: Tensor | None
    out_proj: nn.Linear

    @property
    def in_proj_weight(self) -> Tensor | None:
        """(3 * embed_dim, embed_dim), the current weight."""
        child, weight = self.slice_of("in_proj_weight"), self.parameter("in_proj_weight")
        if weight is None or weight.requires_grad:
            return weight
        # whoever reads the weight past the slice must find its last values
        if child is not None:
            child.sync()
        return weight.detach().requires_grad_(torch.is_grad_enabled())

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention. query: (L, N, E), (N, L, E) if batch_first, or (L, E); key and
        value with S for L.

        out: attention output as query, and weights (N, L, S), (N, heads, L, S) unless averaged, or
            None.
        """
        shapes = query, key, value, key_padding_mask, attn_mask, self.num_heads
        batched = F._mha_shape_check(*shapes)  # pyright: ignore[reportAttributeAccessIssue]
        # 0 and -inf in place of booleans: masks then add up, and add to the logits
        key_padding_mask = _additive(
            key_padding_mask, "key_padding_mask", query.dtype, attn_mask
        )
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal=True is a hint about attn_mask and needs one")
        if is_causal and key_padding_mask is None and not need_weights:
            # the hint is enough
            attn_mask = None
        else:
            attn_mask = _additive(attn_mask, "attn_mask", query.dtype, None)
            is_causal = is_causal and key_padding_mask is None
        arrange = lambda x: (
            x.unsqueeze(1) if not batched else x.transpose(0, 1) if self.batch_first else x
        )
        # one tensor that is given twice stays one, which spares a projection
        q = arrange(query)
        k = q if key is query else arrange(key)
        v = k if value is key else arrange(value)
        if not batched:
            key_padding_mask = (
                None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
            )
        q, k, v = self._project(q, k, v)
        output, weights = self._attend(
            q, k, v, attn_mask, key_padding_mask, need_weights, is_causal
        )
        if weights is not None and average_attn_weights:
            weights = weights.mean(dim=1)
        if not batched:
            return output.squeeze(1), None if weights is None else weights.squeeze(0)
        return output.transpose(0, 1) if self.batch_first else output, weights

    def _project(
        self, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        E, bias = self.embed_dim, self.in_proj_bias
        part = lambda start, stop: None if bias is None else bias[start * E : stop * E]
        if not self._qkv_same_embed_dim:
            names, inputs = SEPARATE, (query, key, value)
            q, k, v = (
                self._product(n, x, part(i, i + 1))
                for i, (n, x) in enumerate(zip(names, inputs, strict=True))
            )
            return q, k, v
        # self-attention: one product of width 3 E in place of three
        if query is key and key is value:
            q, k, v = self._product("in_proj_weight", query, bias).chunk(3, dim=-1)
            return q, k, v
        q = self._product("in_proj_weight", query, part(0, 1), 0, E)
        if key is value:
            k, v = self._product("in_proj_weight", key, part(1, 3), E, 3 * E).chunk(
                2, dim=-1
            )
            return q, k, v
        k = self._product("in_proj_weight", key, part(1, 2), E, 2 * E)
        return q, k, self._product("in_proj_weight", value, part(2, 3), 2 * E, 3 * E)

    def _product(
        self,
        name: str,
        input: Tensor,
        bias: Tensor | None,
        start: int = 0,
        stop: int | None = None,
    ) -> Tensor:
        child = self.slice_of(name)
        if child is not None:
            return child(input, bias, start, stop)
        weight = self._parameters[name]
        assert weight is not None
        return F.linear(input, weight[start:stop], bias)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        padding: Tensor | None,
        need_weights: bool,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """q: (L, N, E), k and v: (S, N, E). mask: (L, S) or (N * heads, L, S), padding: (N, S),
        both added to the logits.
        """
        (L, N, E), heads, width = q.shape, self.num_heads, self.head_dim
        if mask is not None and mask.dim() == 2:
            mask = mask.unsqueeze(0)
        extra = 0
        if self.bias_k is not None and self.bias_v is not None:
            k, v = (
                torch.cat([k, self.bias_k.repeat(1, N, 1)]),
                torch.cat([v, self.bias_v.repeat(1, N, 1)]),
            )
            extra += 1
        # (N * heads, L or S, width)
        q, k, v = (
            x.reshape(x.shape[0], N * heads, width).transpose(0, 1) for x in (q, k, v)
        )
        if self.add_zero_attn:
            k, v = (torch.cat([x, x.new_zeros(N * heads, 1, width)], dim=1) for x in (k, v))
            extra += 1
        S = k.shape[1]
        # the keys added above (bias_k, zeros) are visible to every query
        mask, padding = (
            None if m is None else F.pad(m, (0, extra)) for m in (mask, padding)
        )
        if padding is not None:
            padding = (
                padding.view(N, 1, 1, S).expand(-1, heads, -1, -1).reshape(N * heads, 1, S)
            )
            mask = padding if mask is None else mask + padding
        dropout = self.dropout if self.training else 0.0
        # the fused kernel below returns no weights, so they are computed the long way
        if need_weights:
            scaled = q * math.sqrt(1.0 / width)
            logits = (
                torch.bmm(scaled, k.transpose(1, 2))
                if mask is None
                else torch.baddbmm(mask, scaled, k.transpose(1, 2))
            )
            weights = F.dropout(logits.softmax(dim=-1), dropout, training=dropout > 0)
            output = torch.bmm(weights, v).transpose(0, 1)
            weights = weights.view(N, heads, L, S)
        else:
            if mask is not None:
                mask = (
                    mask.unsqueeze(0)
                    if mask.shape[0] == 1 and mask.dim() == 3
                    else mask.view(N, heads, -1, S)
                )
            # (N, heads, L or S, width)
            q, k, v = (x.view(N, heads, -1, width) for x in (q, k, v))
            output = F.scaled_dot_product_attention(
                q, k, v, mask, dropout, is_causal
            ).permute(2, 0, 1, 3)
            weights = None
        # called and not read: out_proj may be a slice
        flat = self.out_proj(output.reshape(L * N, E))
        return flat.view(L, N, -1), weights

    def free_biases(self) -> None:
        if self.in_proj_bias is not None and any(
            self.slice_of(name) is not None for name in (*PACKED, *SEPARATE)
        ):
            self.in_proj_bias.requires_grad_(True)


def _additive(
    mask: Tensor | None, name: str, dtype: torch.dtype, other: Tensor | None
) -> Tensor | None:
    """A boolean mask as one of 0 and -inf; another mask of a different dtype warns as in PyTorch."""
    check = name == "key_padding_mask"
    return F._canonical_mask(
        mask=mask,
        mask_name=name,
        other_type=F._none_or_dtype(other) if check else None,
        other_name="attn_mask" if check else "",
        target_type=dtype,
        check_other=check,
    )
