"""Launch configurations: pure functions of shape, element size and architecture, so that a test can
list and compile them all.

`tuned.GRAD` holds what `python -m benchmarks.tune` measured on a GPU; where it has no entry the
figures come from
ahead-of-time compilation (registers, spills, shared memory: `python -m benchmarks.aot`) and from
the arithmetic in
kernels/README.md. There is no autotuning at run time.
"""

from __future__ import annotations

from dataclasses import dataclass

from slicefine_kernels import tuned

# A tile's partial sum: the largest product of block sizes that any configuration may have.
MAX_TILE = 128 * 64


@dataclass(frozen=True)
class GradConfig:
    """Tiles of `slice_grad` and `slice_grad_adamw`: BLOCK_T tokens by BLOCK_R output by BLOCK_K
    input features.
    """

    BLOCK_R: int
    BLOCK_K: int
    BLOCK_T: int
    num_warps: int
    num_stages: int
    maxnreg: int | None = None  # registers a thread; NVIDIA only


@dataclass(frozen=True)
class AdamWConfig:
    """Elements per program of `slice_adamw`."""

    BLOCK: int
    num_warps: int


def tile_class(R: int, K: int, element_size: int) -> tuple[str, int, int]:
    """What a configuration depends on: which operand is wide, the padded width of the thin one,
    bytes per element.
    """
    return ("rows" if R >= K else "cols", _padded(min(R, K), 64), element_size)


def _padded(features: int, largest: int) -> int:
    """Smallest power of two that holds the features, between 16 (the least `tl.dot` takes) and the
    largest.
    """
    return min(largest, max(16, 1 << (features - 1).bit_length())) if features > 0 else 16


def grad_config(R: int, K: int, element_size: int, architecture: str) -> GradConfig:
    """R output by K input features; element_size: bytes of dY's and X's type; architecture:
    "sm_90", "gfx942", ...
    """
    # what was measured on this GPU wins over the defaults
    chosen = tuned.GRAD.get((architecture, *tile_class(R, K, element_size)))
    if chosen is not None:
        return GradConfig(*chosen)
    return default_config(R, K, element_size)


def default_config(R: int, K: int, element_size: int) -> GradConfig:
    """Where nothing has been measured."""
    side, thin, _ = tile_class(R, K, element_size)
    if element_size > 2:
        # float32 without TF32 multiplies outside the tensor cores, from registers. Left alone,
        # ptxas aims at a higher occupancy
        # and spills a register or two for it (sm_80, sm_100, sm_120)
        wide, warps, block_t, registers = (64 if thin <= 32 else 32), 4, 32, 168
    elif thin == 16:
        # 256 bytes of each token's dY; three stages keep 48 KiB of a program in flight
        wide, warps, block_t, registers = 128, 4, 64, None
    else:
        # AdamW needs the registers: four warps hold 64 x 32 tiles of p, m, v and g, eight 64 x 64
        wide, warps, block_t, registers = (
            (64, 4, 64, None) if thin == 32 else (64, 8, 32, None)
        )
    # a tile wider than the operand would multiply masked zeros
    wide = _padded(max(R, K), wide)
    # the larger block lies along the wide operand, so that the thin one is read again less often
    blocks = (wide, thin) if side == "rows" else (thin, wide)
    return GradConfig(
        *blocks, BLOCK_T=block_t, num_warps=warps, num_stages=3, maxnreg=registers
    )


def token_splits(tokens: int, tiles: int, processors: int, block_t: int) -> tuple[int, int]:
    """(programs that share the tokens of one tile, tokens of each): two programs per processor
    where tiles are too few, but
    at least four blocks of tokens each, and never so many that some processors get a third."""
    # four blocks of tokens at least: a shorter loop would not fill the pipeline of loads
    wanted = max(1, min(2 * processors // max(tiles, 1), tokens // (4 * block_t)))
    # whole blocks of tokens: only the last split of a tile has a masked tail
    tokens_per_split = max(1, -(-tokens // (wanted * block_t))) * block_t
    # rounding up can leave fewer splits than wanted; an empty one would still cost a program
    return max(1, -(-tokens // tokens_per_split)), tokens_per_split


def workspace_floats(processors: int) -> int:
    """Partial sums that `token_splits` can ask for at once: at most two programs per processor
    split a tile.
    """
    return 2 * processors * MAX_TILE


def workspace_tickets(processors: int) -> int:
    """Tiles are split only where there are at most as many as processors."""
    return processors


def adamw_config() -> AdamWConfig:
    return AdamWConfig(BLOCK=1024, num_warps=4)


@dataclass(frozen=True)
class RowConfig:
    """Elements of a token that a program has at a time."""

    BLOCK: int
    num_warps: int


def norm_config(features: int) -> RowConfig:
    """A token whole where it fits 4,096 elements, so that most norms read it once from memory."""
    block = min(4096, max(128, 1 << (features - 1).bit_length()))
    return RowConfig(BLOCK=block, num_warps=4 if block <= 2048 else 8)


def gate_config() -> RowConfig:
    return RowConfig(BLOCK=1024, num_warps=4)
