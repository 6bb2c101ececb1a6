"""What a step of one of timm's models feeds it."""

from __future__ import annotations

from typing import Any

import timm as _timm
import torch
from torch import Tensor, nn

from slicefine.plan.estimate import DTYPES, Workload

# its names are attached at import, where no type checker sees them
timm: Any = _timm


def workload(model: str, dtype: torch.dtype) -> Workload:
    """A `slicefine.plan.estimate.Workload` of an image model by its name in timm; no weights are
    read.

    Raises ValueError naming models like it if timm knows none of that name.
    """
    if not timm.is_model(model):
        like = timm.list_models(f"*{model.split('_')[0]}*")[:5]
        raise ValueError(
            f"timm has no model {model!r}"
            + (f"; some like it: {', '.join(like)}" if like else "")
        )

    def build() -> Any:
        with torch.device("meta"):
            return timm.create_model(model, pretrained=False).to(dtype)

    # channels, height, width
    size = build().pretrained_cfg["input_size"]

    def inputs(batch: int, length: int) -> dict[str, Any]:
        return {"x": torch.zeros(batch, *size, dtype=dtype)}

    def loss(output: Tensor, inputs: dict[str, Any]) -> Tensor:
        # class 0 for all: the memory of a loss does not depend on what the labels are
        labels = torch.zeros(output.shape[0], dtype=torch.int64)
        return nn.functional.cross_entropy(output.float(), labels)

    first = lambda net: next(
        m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)
    )
    return Workload(model, build, inputs, loss, first, base=DTYPES[dtype])
