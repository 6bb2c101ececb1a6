"""What fits a device, and what to do about a step that does not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

UNSEEN = (
    "not counted: the CUDA context (about 0.5 GiB), libraries' workspaces, fragmentation of the"
    " allocator"
)
UNSEEN_COMPILED = (
    UNSEEN + ", and what inductor changes by fusing operators and reusing buffers"
)


def largest_that_fits(peak: Callable[[int], int], budget: int, start: int) -> int:
    """The largest size whose peak is within the budget, in bytes; 0 if not even 1 is.

    peak: size -> bytes, growing. Peaks grow almost linearly: the secant through the largest size
    that fits and the smallest that does not says where to look, through the two largest or smallest
    while only one kind is known. The size returned has been evaluated and fits; the one after it
    does not, by the secant at least.
    """
    known: dict[int, int] = {}
    size = start
    # A handful is enough where peaks grow almost linearly; 40, so that no plan hangs.
    for _ in range(40):
        known[size] = peak(size)
        fits, beyond = (
            [s for s in sorted(known) if (known[s] <= budget) == wanted]
            for wanted in (True, False)
        )
        if not fits and 1 in known:
            return 0
        if len(known) == 1:
            size = 2 * start if fits else max(1, start // 2)
            continue
        low, high = (
            (fits[-1], beyond[0])
            if fits and beyond
            else (fits[-2:] if fits else beyond[:2])
        )
        slope = (known[high] - known[low]) / (high - low)
        size = int(low + (budget - known[low]) / slope) if slope > 0 else 2 * high
        size = max(size, 1)
        if fits and beyond:
            # rounding, or a curve that bends the other way
            size = min(size, high - 1)
            if size <= low:
                return low
        elif size in known:
            if fits:
                return fits[-1]
            size = max(1, beyond[0] - 1)
    raise RuntimeError(
        f"no size found within {budget} bytes after {len(known)} tries; peaks by size: {known}"
    )


def advice(rows: list[dict[str, Any]]) -> str:
    """What dominates the leanest trained method's peak, and what would help.

    Args:
        rows: as `slicefine.plan.estimate.Estimate.row` makes them.
    """
    trained = [row for row in rows if row["trainable"]]
    if not trained:
        return ""
    leanest = min(trained, key=lambda row: row["peak_bytes"])
    kind = max(HELP, key=lambda kind: leanest[kind])
    share = leanest[kind] / leanest["peak_bytes"]
    return (
        f"Leanest trained method: {leanest['method']}. {share:.0%} of its peak are {kind}:"
        f" {HELP[kind]}."
    )


HELP = {
    "weights": "load the weights in a smaller dtype, or shard them over devices",
    "moments": "train slices instead of whole weights, or use optim_bits=8",
    "gradients": "train slices instead of whole weights, or use optimizer_in_bwd",
    "logits": "compute the loss in chunks, or use a smaller batch or shorter sequences",
    "activations": (
        "use activation checkpointing, or a smaller batch with gradient accumulation, or shorter"
        " sequences"
    ),
    "temporaries": (
        "use a smaller batch or shorter sequences; the largest are often the loss's float32 logits"
    ),
}


@dataclass(frozen=True)
class Choice:
    """The first of several ways in which a step fits, or the leanest if none does.

    peak_bytes: of a step of the batch asked for, without any switch. chosen_bytes: of a step of
    ``batch`` with the switches of ``mode``. batch: the batch asked for, or the largest that fits; 0
    if not even 1 does.
    """

    peak_bytes: int
    mode: str
    batch: int
    chosen_bytes: int


def choose(
    peak: Callable[[str, int], int], modes: Sequence[str], batch: int, budget: int
) -> Choice:
    """Try the modes in the order of what they cost; then smaller batches in the last one.

    Args:
        peak: mode, batch -> bytes.
        modes: the plain one first.
    """
    plain = peak(modes[0], batch)
    for mode in modes:
        size = plain if mode == modes[0] else peak(mode, batch)
        if size <= budget:
            return Choice(plain, mode, batch, size)
    fits = largest_that_fits(lambda size: peak(modes[-1], size), budget, max(1, batch // 2))
    return Choice(plain, modes[-1], fits, peak(modes[-1], max(fits, 1)))
