"""Fine-tune pretrained models by training a moving slice of each weight. The public names, imported
when first used.
"""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "SliceConfig": "config",
    "SliceLayer": "layer",
    "SliceLinear": "linear",
    "SliceAdamW": "optim",
    "slice_state_dict": "optim",
    "load_slice_state_dict": "optim",
    "SliceModel": "model",
    "Delta": "deltas.delta",
    "DeltaError": "deltas.delta",
    "get_slice_model": "model",
    "parameter_groups": "groups",
    "list_targets": "dry_run",
    "track_memory": "plan.tracker",
    "available_backends": "backends.select",
    "use_backend": "backends.select",
}
__all__ = [
    "Delta",
    "DeltaError",
    "SliceAdamW",
    "SliceConfig",
    "SliceLayer",
    "SliceLinear",
    "SliceModel",
    "__version__",
    "available_backends",
    "get_slice_model",
    "lean",
    "list_targets",
    "load_slice_state_dict",
    "parameter_groups",
    "slice_state_dict",
    "track_memory",
    "use_backend",
]

if TYPE_CHECKING:
    from slicefine import lean as lean
    from slicefine.backends.select import available_backends as available_backends
    from slicefine.backends.select import use_backend as use_backend
    from slicefine.config import SliceConfig as SliceConfig
    from slicefine.deltas.delta import Delta as Delta
    from slicefine.deltas.delta import DeltaError as DeltaError
    from slicefine.dry_run import list_targets as list_targets
    from slicefine.groups import parameter_groups as parameter_groups
    from slicefine.layer import SliceLayer as SliceLayer
    from slicefine.linear import SliceLinear as SliceLinear
    from slicefine.model import SliceModel as SliceModel
    from slicefine.model import get_slice_model as get_slice_model
    from slicefine.optim import SliceAdamW as SliceAdamW
    from slicefine.optim import load_slice_state_dict as load_slice_state_dict
    from slicefine.optim import slice_state_dict as slice_state_dict
    from slicefine.plan.tracker import track_memory as track_memory


def __getattr__(name: str) -> object:
    # Lazy, so that `python -m slicefine env` can report a broken torch instead of failing on it.
    import importlib

    if name == "lean":
        # a package that can be called
        return importlib.import_module("slicefine.lean")
    if name in _HOME:
        return getattr(importlib.import_module(f"slicefine.{_HOME[name]}"), name)
    public = ", ".join(_HOME)
    raise AttributeError(
        f"module 'slicefine' has no attribute {name!r}; public names: {public}"
    )


def __dir__() -> list[str]:
    return sorted(__all__)
