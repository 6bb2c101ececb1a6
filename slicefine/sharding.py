"""What FSDP2 (`torch.distributed.fsdp.fully_shard`) does to a slice: each process holds some of the
features that the slice has whole.

A column slice has every output feature, so its master (out, r) is cut where the weight (out, in) is
cut, and write-through is local to each process. That is also so for a row slice whose weight is
sharded by input features. Everything else is refused when it is sharded, because a master whose
weight is elsewhere would silently train nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor, sharing its memory: the tensor itself unless it is a
    DTensor.
    """
    if type(tensor) is Tensor or type(tensor) is nn.Parameter or not is_sharded(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()  # type: ignore[attr-defined]


def is_sharded(tensor: Any) -> bool:
    """Whether a tensor is a DTensor; where nobody has imported DTensor, nothing is one."""
    # not imported here: most runs never need it
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def check_sharding(layer: Any) -> None:
    """Raise ValueError, naming what does not work, unless write-through is local to each process."""
    weight, master = layer._parameters["weight"], layer._parameters["slice_weight"]
    slice_type, mode = layer.spec.slice_type, layer.schedule.mode
    what = f"a {slice_type} slice of a weight of shape ({layer.out_features}, {layer.in_features})"
    if not is_sharded(weight):
        raise ValueError(
            f"{what} is sharded and its weight is not; shard both (fully_shard without"
            " ignored_params), or neither"
        )
    if mode == "gradient":
        raise ValueError(
            "switch_mode='gradient' does not work under fully_shard: each process sees its own"
            " gradients only, and the slices would drift apart. Use 'ascending', 'random' or"
            " 'magnitude'."
        )
    if layer.updater is not None:
        raise ValueError(
            "optimizer_in_bwd=True does not work under fully_shard: a gradient has not been summed"
            " over the processes when the update would happen. Shard first and build"
            " SliceAdamW(..., optimizer_in_bwd=False) afterwards."
        )
    # the features that a slice holds all of; cut along them, master and weight stay together
    whole = {"column": ["out"], "row": ["in"]}.get(slice_type, [])
    cuts = {feature for _, feature in _cuts(weight, layer.fan_in_fan_out)}
    if cuts != {feature for _, feature in _cuts(master, False)} or not cuts <= set(whole):
        advice = {
            "row": (
                "Use slice_type='column', or shard by input features: fully_shard(...,"
                " shard_placement_fn=lambda p: Shard(1) if p.dim() == 2 else None)."
            ),
            "column": "Shard both by output features.",
        }
        raise ValueError(
            f"{what}{' stored as (in, out)' if layer.fan_in_fan_out else ''} does not work with {weight.placements}, where no process "  # type: ignore[union-attr]
            "would hold the weights of its part of the slice."
            f" {advice.get(slice_type, 'Use column slices (slice_type=' + repr('column') + ').')}"
        )
    # fully_shard cuts (experts, out, in) by expert and the flat master by rows: the two may differ
    rows, held = layer.weight_matrix.shape[0], local(master).shape[0]  # type: ignore[arg-type]
    if "out" in cuts and rows != held:
        raise ValueError(
            f"a process would hold {rows} rows of the weight {tuple(layer.weight.shape)} and {held}"
            " of its slice: experts shard only where their number divides by the number of"
            " processes"
        )


def check_whole(layer: Any) -> None:
    """Raise RuntimeError before a forward pass that would not use the weight of the layer, or would
    train what it never reads.
    """
    parameters = layer._parameters
    master = parameters.get("slice_weight")
    # DeepSpeed trains a flat copy of all parameters, in an optimizer that has no slice among its own:
    # no step would be counted and no weight written. Stage 3 marks parameters by the first name, the
    # other two by the second.
    if hasattr(master, "ds_id") or hasattr(master, "_hp_mapping"):
        raise RuntimeError(
            "DeepSpeed ZeRO has taken the slice_weight of this layer into a flat copy, which the"
            " weight would never follow. Use ZeRO stage 0 with float32 weights,"
            " DistributedDataParallel, or fully_shard (FSDP2), which shards the frozen weights as"
            " ZeRO-3 does"
        )
    # FSDP1 replaces parameters by views of one flat parameter
    if type(master) is Tensor and master._is_view():
        raise RuntimeError(
            "the slice_weight of this layer is a view of a flat parameter: FullyShardedDataParallel"
            " (FSDP1) has taken it, and the weight would never follow it. Use"
            " torch.distributed.fsdp.fully_shard (FSDP2), DistributedDataParallel, or one process."
        )
    if layer.weight_sharded and not layer.sharded:
        raise RuntimeError(
            "the weight of this layer is sharded and its slice_weight is not, so neither could"
            " follow the other; shard both (fully_shard without ignored_params)"
        )
    if is_sharded(parameters.get("weight")):
        raise RuntimeError(
            f"the weight of this layer is a DTensor with {layer.weight.placements} during a forward pass: tensor parallelism does not work "  # type: ignore[union-attr]
            "with slices. Under fully_shard, call the module that was sharded, not a layer in it."
        )


def shard_originals(layer: Any) -> None:
    """Cut what the originals have recorded of the whole weight down to this process's part, as the
    master has been.
    """
    if layer.originals is None:
        return
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    master: Any = layer.slice_weight
    for _, feature in _cuts(master, False):
        dim = ("out", "in").index(feature)
        shape = (layer.out_features, layer.in_features)
        # not the even split: FSDP2 gives the last processes fewer rows, or none
        sizes, offsets = compute_local_shape_and_global_offset(
            torch.Size(shape), master.device_mesh, master.placements
        )
        for saved in layer.originals.slices:
            # the sharded extent is whole in every slice: slices are cut along the features that
            # they have all of
            saved.values = saved.values.narrow(
                dim, min(offsets[dim], shape[dim]), sizes[dim]
            ).clone()


def check_conversion(layer: Any, convert: Callable[[Tensor], Tensor]) -> None:
    """Raise RuntimeError if a sharded layer is to change its dtype or device: optimizer and FSDP2
    hold the shards as they are.
    """
    before = torch.empty(0, dtype=layer.weight.dtype, device=local(layer.weight).device)
    after = convert(before)
    if (after.dtype, after.device) != (before.dtype, before.device):
        raise RuntimeError(
            f"a sharded slice cannot go from {before.dtype} on {before.device} to {after.dtype} on"
            f" {after.device}; cast or move the model before fully_shard (its mp_policy chooses the"
            " dtype to compute in)"
        )


def shard_values(values: Tensor, like: Tensor) -> Tensor:
    """A DTensor of what the processes hold of a saved slice, cut as ``like``, a layer's
    master, is.
    """
    from torch.distributed.tensor import DTensor

    master: Any = like
    shape = list(values.shape)
    for _, feature in _cuts(master, False):
        dim = ("out", "in").index(feature)
        shape[dim] = master.shape[dim]
    stride = (shape[1], 1)
    return DTensor.from_local(
        values.to(local(like).device),
        master.device_mesh,
        master.placements,
        run_check=False,
        shape=torch.Size(shape),
        stride=stride,
    )


def sum_over_shards(values: Tensor, like: Tensor) -> Tensor:
    """The sum of ``values`` over the processes that hold the parts of ``like``; ``values`` itself
    if nothing is sharded.
    """
    if not is_sharded(like):
        return values
    sharded: Any = like
    total = values.to(local(like).device)
    for dim, _ in _cuts(like, False):
        # over the mesh dimensions that cut the tensor: others hold copies, which would count twice
        torch.distributed.all_reduce(total, group=sharded.device_mesh.get_group(dim))
    return total.to(values.device)


def _cuts(tensor: Any, transposed: bool) -> list[tuple[int, str]]:
    """(mesh dimension, "out" or "in") for every mesh dimension of more than one process along which
    the tensor is cut.
    """
    names = ("in", "out") if transposed else ("out", "in")
    return [
        (dim, names[placement.dim])
        for dim, placement in enumerate(tensor.placements)
        # a mesh dimension of one process cuts nothing, whatever its placement says
        if placement.is_shard() and tensor.device_mesh.size(dim) > 1
    ]
