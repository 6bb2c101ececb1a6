"""Below the frozen baseline: a model that keeps less for its backward pass.
`slicefine.lean(model)` is how it is called.

The package can be called, so that the function is there whichever of the two names was imported
first.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from slicefine.lean.apply import LeanReport as LeanReport
from slicefine.lean.apply import lean as make_lean
from slicefine.lean.apply import undo as undo


class _Callable(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return make_lean(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
