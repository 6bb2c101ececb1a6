"""What slicefine needs of Hugging Face Accelerate: models that a device map has been laid over."""

from __future__ import annotations

from accelerate.hooks import add_hook_to_module
from torch import nn


def renew_hook(module: nn.Module) -> None:
    """Bind the device map's hook to a module that has taken over another one's attributes.

    The hook works by a ``forward`` on the instance, which would go on calling the module it was
    made for.
    """
    hook = module.__dict__.pop("_hf_hook")
    for name in ("_old_forward", "forward"):
        module.__dict__.pop(name, None)
    add_hook_to_module(module, hook)
