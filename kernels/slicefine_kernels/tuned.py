"""Written by `python -m benchmarks.tune` on a machine with a GPU; do not edit by hand.

GRAD: (architecture, wide operand, padded thin width, bytes per element) -> (BLOCK_R, BLOCK_K,
    BLOCK_T, num_warps, num_stages).
No GPU has been measured yet: every configuration is `configs.default_config`'s.
"""

GRAD: dict[tuple[str, str, int, int], tuple[int, int, int, int, int]] = {}
