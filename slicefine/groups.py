"""Learning rates that fit most tasks, and the parameters of a model in groups for an optimizer."""

from __future__ import annotations

from typing import Any

from torch import nn

from slicefine.registry import layers_of
from slicefine.state import state_of

# docs/quality.md: level with half of it on validation data, and ahead of twice as much. It is ten
# times that of full fine-tuning, as LoRA's is.
LR = 1e-3
# of what starts at random: a new head
HEAD_LR = 2e-3


def parameter_groups(
    model: nn.Module, lr: float = LR, head_lr: float = HEAD_LR, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """The parameters that train, in groups for `SliceAdamW` or any optimizer of torch.

    Slices, and the biases and norms of the base, train at ``lr``; what ``modules_to_save`` fully
    trains, at ``head_lr``. Vectors (biases, norms) get no weight decay.

    Args:
        model: with slices, also inside a wrapper.
        lr: of what the base has.
        head_lr: of what is new.
        weight_decay: of slices and matrices.

    Returns:
        A list of groups, none of them empty.
    """
    new: set[int] = set()
    for module in model.modules():
        state = state_of(module)
        if state is not None:
            new |= {id(p) for n, p in module.named_parameters() if n in state.saved}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            # a slice of row_column is flat, and no vector of the model
            decays = parameter.dim() > 1 or bool(layers_of(parameter))
            key = head_lr if id(parameter) in new else lr, weight_decay if decays else 0.0
            groups.setdefault(key, []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]
