"""A short run of the cuda backend for compute-sanitizer: data made and compared on the host, so few
kernels but ours are launched.

python -m benchmarks.gpu.sanitized FOLDER, the folder of what `benchmarks.gpu.build` built. Exit
status 1 if a result is wrong.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from benchmarks.gpu.worker import use_modules

SHAPES = ((1, 1, 1), (63, 129, 1), (70, 33, 16), (300, 130, 64), (0, 16, 4))
OPTIONS = {
    "lr": 1e-2,
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.1,
    "seed": 5,
}


def differences(device: str, backend: str) -> float:
    """Largest difference of any result from the reference on the host, relative to the largest
    entry.
    """
    from slicefine import ops
    from slicefine.backends import reference
    from slicefine.backends.operands import AdamWOptions, AdamWSlice

    options = AdamWOptions(**OPTIONS)
    active = lambda state, grad, place: AdamWSlice(state[0], grad, *state[1:], *place)
    worst = 0.0
    for dtype in (torch.bfloat16, torch.float32, torch.float16):
        for n, out, width in SHAPES:
            for rows in (None, torch.randperm(out)[: max(1, out // 3)]):
                R = out if rows is None else len(rows)
                dy, x, weight = (
                    torch.randn(n, out).to(dtype),
                    torch.randn(n, width).to(dtype),
                    torch.randn(out, width + 3),
                )
                cols, step = torch.randperm(width + 3)[:width], torch.tensor(2.0)
                state = [
                    torch.randn(R, width),
                    0.1 * torch.randn(R, width),
                    0.1 * torch.rand(R, width),
                ]
                there = lambda t: None if t is None else t.to(device, copy=True)
                mine = [[there(t) for t in (*state, weight.to(dtype))] for _ in range(2)]
                theirs = [t.clone() for t in (*state, weight.to(dtype))]
                with ops.use_backend(backend):
                    grad = ops.slice_grad(there(dy), there(x), there(rows))
                    place = (there(rows), there(cols), there(step))
                    ops.slice_grad_adamw(
                        there(dy), there(x), active(mine[0], None, place), options
                    )
                    ops.slice_adamw([active(mine[1], grad, place)], options)
                expected = active(theirs, None, (rows, cols, step))
                reference.slice_grad_adamw(dy, x, expected, options)
                pairs = [(grad, reference.slice_grad(dy, x, rows))]
                pairs += [
                    (a, b)
                    for found in mine
                    for a, b in zip(found[:3], theirs[:3], strict=True)
                ]
                for a, b in pairs:
                    worst = max(
                        worst,
                        float((a.cpu() - b).abs().max() / b.abs().max().clamp_min(1.0)),
                    )
    return worst


def main() -> int:
    use_modules(Path(sys.argv[1]))
    torch.manual_seed(0)
    worst = differences("cuda", "cuda")
    print(f"largest relative difference {worst:.2e}")
    return 0 if worst < 1e-4 else 1


if __name__ == "__main__":
    sys.exit(main())
