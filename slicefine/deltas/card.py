"""The model card of a delta: what it changes, of which base, and how to load it."""

from __future__ import annotations

import json
import re
from typing import Any

from slicefine.deltas.delta import Delta

# of a model; a local path is no use to others
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")

_CARD = """---
library_name: slicefine
{base_line}tags:
- slicefine
- parameter-efficient-fine-tuning
---

# {title}

A [slicefine](https://arxiv.org/abs/2510.08513) delta: the values that a moving slice of each weight has reached, and those it started from. {counts}

| | |
|---|---|
| base model | {base} |
| SHA-256 of the base | `{base_hash}` |
| SHA-256 of this delta | `{own_hash}` |
| slices | {slices} |
| optimizer steps | {steps} |
| share of the sliced weights that trained | {coverage} |
{rows}
## Load

```python
from slicefine import SliceModel

model = ...  # the base model, unchanged, in {dtype}
model = SliceModel.from_pretrained(model, "this folder or its hub id")  # checks the base, applies in place
model.disable_adapter()  # a context manager: the base, bit for bit
```
"""


def model_card(delta: Delta, name: str) -> str:
    """README.md for a folder that holds a delta, in the form that the Hugging Face hub reads."""
    base = delta.base.get("model")
    config, info = delta.config, dict(delta.info)
    entries = sum(p.new.numel() for w in delta.weights.values() for p in w.patches)
    whole = (
        f" and {len(delta.whole)} tensors that were fully trained" if delta.whole else ""
    )
    steps, coverage = info.pop("steps", None), info.pop("coverage", None)
    measured = isinstance(coverage, (int, float))
    # for programs
    info.pop("model_config", None)
    dtypes = sorted({str(w.dtype).removeprefix("torch.") for w in delta.weights.values()})
    return _CARD.format(
        base_line=(
            f"base_model: {base}\n"
            if isinstance(base, str) and _HUB_ID.fullmatch(base)
            else ""
        ),
        title=_cell(name),
        counts=(
            f"{entries:,d} entries of {len(delta.weights)} weights{whole},"
            f" {delta.nbytes / 2**20:,.1f} MiB."
        ),
        base=_cell(base or delta.base.get("class", "unnamed")),
        base_hash=delta.base.get("sha256"),
        own_hash=delta.sha256,
        slices=(
            f"{config.get('slice_type')}, r = {config.get('r')}, interval"
            f" {config.get('switch_interval')}, {config.get('switch_mode')}"
            if config
            else "not recorded"
        ),
        steps=_cell(steps) if steps is not None else "not recorded",
        coverage=f"{100 * coverage:.1f} %" if measured else "not recorded",
        rows="".join(_row(key, value) for key, value in sorted(info.items())),
        dtype=" and ".join(dtypes) or "its dtype",
    )


def _cell(value: object) -> str:
    """A value as one cell of a table, whatever it has in it."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _row(key: str, value: Any) -> str:
    if (
        key == "evaluation"
        and isinstance(value, dict)
        and {"metric", "value", "rows", "data", "data_sha256"} <= value.keys()
    ):
        return (
            f"| {_cell(value['metric'])} | {value['value']:.4g} on {value['rows']:,d} rows of"
            f" {_cell(value['data'])} (SHA-256 `{_cell(value['data_sha256'][:16])}`) |\n"
        )
    if isinstance(value, dict | list):
        return f"| {_cell(key)} | `{_cell(json.dumps(value))}` |\n"
    return f"| {_cell(key)} | {_cell(value)} |\n"
