"""A delta as a LoRA adapter, without loss: k changed columns C are B = new - old (out, k) times A =
one-hot(C) (k, in).

Changed rows are the transpose of it, blocks are either, and several patches of one weight add up.
So the rank is the number of features that changed, no decomposition is needed, and whatever serves
LoRA serves slices. A rank beyond what a server takes is truncated by singular values, and the error
is said.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from slicefine import atomic
from slicefine.deltas.delta import (
    CONFIG_FILE,
    FILE,
    Delta,
    DeltaError,
    SliceValues,
    WeightDelta,
)

# what vLLM takes as max_lora_rank
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# PeftModel holds a LoraModel as base_model, and that one the model as model
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class LoraModule:
    """One weight of an export. exact_rank: features that changed; rank: of the factors that were
    written.

    error: relative Frobenius norm of what truncation left out, 0 for an exact export.
    """

    name: str
    exact_rank: int
    rank: int
    error: float


@dataclass
class LoraAdapter:
    """A LoRA adapter in peft's format. left_out: keys of the delta that it does not hold, because
    that was asked for.
    """

    tensors: dict[str, Tensor]
    config: dict[str, Any]
    modules: list[LoraModule]
    left_out: list[str]
    metadata: dict[str, str]

    @property
    def error(self) -> float:
        """The largest relative Frobenius error of any weight."""
        return max((module.error for module in self.modules), default=0.0)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write adapter_model.safetensors and adapter_config.json, each atomically, the
        configuration last.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if _holds_a_delta(folder):
            raise DeltaError(
                f"{folder} holds a slicefine delta; export the LoRA adapter to another folder"
            )
        with atomic.replacing(folder / FILE) as temporary:
            save_file(self.tensors, temporary, {"format": "pt", **self.metadata})
        atomic.write_text(folder / CONFIG_FILE, json.dumps(self.config, indent=2) + "\n")


def to_lora(
    delta: Delta,
    *,
    server: str = "peft",
    max_rank: int | None = None,
    leave_out: bool = False,
    dtype: torch.dtype = torch.float32,
) -> LoraAdapter:
    """The delta as a LoRA adapter that peft loads on the base model: old + B A equals new within
    the rounding of ``dtype``.

    server: "peft" gives each weight its own rank; "vllm" one common rank out of `VLLM_RANKS`,
    padded with zeros. max_rank: truncate larger ranks; None: none for peft, 512 for vLLM.
    leave_out: drop what the server's LoRA cannot hold (experts, nn.MultiheadAttention; for vLLM
    biases, norms and new heads too) instead of raising. Biases and norms of the base go into peft's
    file as they are, as those of its bias="all" do: peft loads them with the adapter, and
    disable_adapter leaves them. dtype: of the factors; float32 holds the differences of
    lower precisions exactly (unless old and new are more than a factor of 8,000 apart). Raises
    DeltaError for weights that no linear layer uses, and for biases, norms and heads where vLLM is
    to serve it. Source: LoRA, arXiv 2106.09685; B A with a one-hot A is the slice itself.
    """
    if server not in ("peft", "vllm"):
        raise ValueError(f"server is {server!r}; expected 'peft' or 'vllm'")
    if max_rank is not None and max_rank < 1:
        raise ValueError(f"max_rank is {max_rank}; expected 1 or more, or None")
    whole, left_out = _whole(delta, server, leave_out)
    out_of_reach = _out_of_reach(delta)
    if out_of_reach and not leave_out:
        raise DeltaError(
            f"{len(out_of_reach)} weights, such as {out_of_reach[0]}, are used without a linear"
            " layer being called (nn.MultiheadAttention, the fast path of"
            " nn.TransformerEncoderLayer, experts), where a LoRA adapter would do nothing: export"
            " the merged model, or leave them out (leave_out=True, --leave-out), which changes the"
            " outputs"
        )
    left_out += out_of_reach
    limit = (
        max_rank if server == "peft" else min(max_rank or VLLM_RANKS[-1], VLLM_RANKS[-1])
    )
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    modules = []
    for key, weight in delta.weights.items():
        if key in out_of_reach:
            continue
        name = _module_of(key)
        B, A = _factors(weight)
        exact = B.shape[1]
        if exact == 0:
            # nothing in it has moved
            continue
        error = 0.0
        if limit is not None and exact > limit:
            B, A, error = _truncated(B, A, limit)
        factors[name] = B.to(dtype), A.to(dtype)
        modules.append(LoraModule(name, exact, B.shape[1], error))
    if not modules:
        raise DeltaError(
            "the delta changes no entry of any weight: there is nothing to export"
        )
    if server == "vllm":
        rank = next(r for r in VLLM_RANKS if r >= max(m.rank for m in modules))
        # one r for the whole adapter; columns of zeros add nothing to B A
        factors = {name: _padded(B, A, rank) for name, (B, A) in factors.items()}
    tensors = {}
    for name, (B, A) in factors.items():
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = A.contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = B.contiguous()
    for key in whole:
        name, _, last = key.rpartition(".")
        # peft wraps the layer that has factors
        place = f"{name}.base_layer.{last}" if name in factors else key
        tensors[_PREFIX + place] = delta.whole[key].new.contiguous()
    ranks = {name: A.shape[0] for name, (_, A) in factors.items()}
    metadata = {"slicefine_delta_sha256": delta.sha256} if delta.sha256 else {}
    return LoraAdapter(tensors, _config(delta, ranks, whole), modules, left_out, metadata)


# One weight


def _factors(weight: WeightDelta) -> tuple[Tensor, Tensor]:
    """(B, A), (out, k) and (k, in) in float64 with B A = new - old exactly; k is at most the
    smaller side of the weight.
    """
    out_features, in_features = weight.shape
    parts = [_of_patch(patch, D, weight.shape) for patch, D in _differences(weight.patches)]
    # [B1 B2] times [A1; A2] is B1 A1 + B2 A2: B (out, k), A (k, in)
    B = torch.cat([b for b, _ in parts], 1)
    A = torch.cat([a for _, a in parts], 0)
    smaller = min(out_features, in_features)
    # more columns in the factors than the weight has: the dense difference is smaller than they are
    if B.shape[1] > smaller:
        # one of the two is one-hot in every term, and no entry occurs twice: exact
        D = B @ A
        one = torch.eye(smaller, dtype=D.dtype)
        return (D, one) if in_features == smaller else (one, D)
    return B, A


def _differences(patches: list[SliceValues]) -> Iterable[tuple[SliceValues, Tensor]]:
    """Each patch with new - old (R, K) in float64; an entry that a later patch writes too is zero
    in the earlier one.
    """
    taken: list[SliceValues] = []
    # from the last: what it writes is what stays, as in Delta.write
    for patch in reversed(patches):
        # float64 holds the difference of two float32 or narrower values exactly, but for extreme
        # ratios
        D = patch.new.double() - patch.old.double()
        for later in taken:
            rows, cols = (
                _among(patch.rows, later.rows, D.shape[0]),
                _among(patch.cols, later.cols, D.shape[1]),
            )
            D[rows.unsqueeze(1) & cols] = 0
        taken.append(patch)
        yield patch, D


def _among(mine: Tensor | None, theirs: Tensor | None, length: int) -> Tensor:
    """(length,) bool: which features of mine are in theirs; None stands for all features."""
    if theirs is None:
        return torch.ones(length, dtype=torch.bool)
    return torch.isin(torch.arange(length) if mine is None else mine, theirs)


def _of_patch(
    patch: SliceValues, D: Tensor, shape: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """(B, A) of one patch, by its columns or its rows, whichever of those that changed are fewer."""
    out_features, in_features = shape
    rows = torch.arange(out_features) if patch.rows is None else patch.rows
    cols = torch.arange(in_features) if patch.cols is None else patch.cols
    changed_rows, changed_cols = (
        (D != 0).any(1).nonzero().flatten(),
        (D != 0).any(0).nonzero().flatten(),
    )
    if len(changed_cols) <= len(changed_rows):
        # B (out, k) holds the differences, A (k, in) is one-hot: it picks the changed inputs
        k = len(changed_cols)
        B, A = D.new_zeros(out_features, k), D.new_zeros(k, in_features)
        B[rows] = D[:, changed_cols]
        A[torch.arange(k), cols[changed_cols]] = 1
    else:
        # the transpose of that: B is one-hot, A holds the differences
        k = len(changed_rows)
        B, A = D.new_zeros(out_features, k), D.new_zeros(k, in_features)
        B[rows[changed_rows], torch.arange(k)] = 1
        A[:, cols] = D[changed_rows]
    return B, A


def _truncated(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """The best factors of a rank (Eckart and Young), and the relative Frobenius norm of what they
    leave out.
    """
    # B A = QB (RB RA') QA': only a (k, k) matrix is decomposed, not an (out, in) one
    QB, RB = torch.linalg.qr(B)
    QA, RA = torch.linalg.qr(A.t())
    U, S, V = torch.linalg.svd(RB @ RA.t(), full_matrices=False)
    error = float(S[rank:].norm() / S.norm())
    return QB @ (U[:, :rank] * S[:rank]), V[:rank] @ QA.t(), error


def _padded(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    extra = rank - A.shape[0]
    return torch.nn.functional.pad(B, (0, extra)), torch.nn.functional.pad(
        A, (0, 0, 0, extra)
    )


# The adapter


def _whole(delta: Delta, server: str, leave_out: bool) -> tuple[list[str], list[str]]:
    """Keys of what was fully trained: (those that the adapter holds, those left out)."""
    if server == "peft":
        return list(delta.whole), []
    changed = [key for key, entry in delta.whole.items() if entry.replaces]
    heads = [key for key, entry in delta.whole.items() if not entry.replaces]
    if changed and not leave_out:
        raise DeltaError(
            f"{len(changed)} biases, norms or buffers of the base have changed, such as"
            f" {changed[0]}, and vLLM's LoRA cannot hold them: serve the merged model, train with"
            ' SliceConfig(bias="none", norms="none"), or leave them out (leave_out=True,'
            " --leave-out), which changes the outputs"
        )
    if heads and not leave_out:
        raise DeltaError(
            f"the head was fully trained ({', '.join(heads[:3])}), and vLLM takes no"
            " modules_to_save: serve the merged model, or leave the head out (leave_out=True, --leave-out) and put"
            " it into the base model"
        )
    return [], changed + heads


def _out_of_reach(delta: Delta) -> list[str]:
    """Keys of weights that are multiplied with, somewhere, without calling a linear layer.

    nn.MultiheadAttention reads even its ``out_proj.weight`` itself, and nn.TransformerEncoderLayer
    ``linear1`` and ``linear2`` on its fast path, which it takes for inference.
    """
    known = {*delta.base.get("tensors", ()), *delta.weights, *delta.whole}
    packed = {
        _module_of(key)
        for key in known
        if key.endswith((".in_proj_weight", ".in_proj_bias", ".q_proj_weight"))
    }
    fast = {
        f"{_module_of(name)}.{linear}"
        for name in packed
        if name.endswith("self_attn")
        for linear in ("linear1", "linear2")
    }
    inside = {f"{name}.out_proj" for name in packed} | fast
    return [
        key
        for key in delta.weights
        if not key.endswith(".weight") or _module_of(key) in inside
    ]


def _config(delta: Delta, ranks: dict[str, int], whole: list[str]) -> dict[str, Any]:
    r = max(ranks.values())
    # ^: peft would match the end of a longer name as well
    pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != r}
    transposed = {
        _module_of(key) for key, weight in delta.weights.items() if weight.transposed
    }
    heads = sorted({_module_of(key) for key in whole if not delta.whole[key].replaces})
    in_base = [key for key in whole if delta.whole[key].replaces]
    everything = {
        _module_of(key) for key in (*delta.base.get("tensors", ()), *delta.weights)
    } - set(heads)
    if hit := sorted(
        name for name in everything if any(name.endswith(head) for head in heads)
    ):
        raise DeltaError(
            f"peft matches modules_to_save by the end of a name, so {', '.join(heads)} would"
            f" replace {', '.join(hit)} too: export the merged model"
        )
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": delta.base.get("model"),
        "task_type": None,
        "inference_mode": True,
        "r": r,
        "lora_alpha": r,
        "rank_pattern": pattern,
        # alpha = rank: the scale is 1
        "alpha_pattern": dict(pattern),
        "lora_dropout": 0.0,
        "bias": "all" if in_base else "none",
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "fan_in_fan_out": ranks.keys() <= transposed,
        # a regex of whole names: a list would match suffixes, and could hit more than what trained
        "target_modules": "(" + "|".join(re.escape(name) for name in ranks) + ")",
        "modules_to_save": heads or None,
    }


def _module_of(key: str) -> str:
    return key.rpartition(".")[0]


def _holds_a_delta(folder: Path) -> bool:
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("peft_type") == "SLICEFINE"
