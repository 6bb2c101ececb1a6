"""The offline tuner of the gradient kernels' tiles: measures on the GPU that is here and writes
slicefine_kernels/tuned.py.

python -m benchmarks.tune [--minutes 4] [--write] [--device cpu]

For each class of `configs.tile_class` it starts at the default configuration and tries those that
differ from the best so far in one or two values, until none is faster or the class's share of the
minutes is over. What does not compile, does not fit or is wrong against float64 is discarded. An
entry is written where it beats the default by more than 3 %; those of other architectures stay.
Without --write the table is printed. --device cpu tries a few configurations through Triton's
interpreter.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any

# of the default's time; less is noise
GAIN = 0.03
# of a Hopper multiprocessor; what does not fit elsewhere fails to compile there and is discarded
SHARED_BYTES = 227 * 1024
VALUES = {
    "BLOCK_R": (16, 32, 64, 128, 256),
    "BLOCK_K": (16, 32, 64, 128, 256),
    "BLOCK_T": (16, 32, 64, 128, 256),
    "num_warps": (2, 4, 8),
    "num_stages": (2, 3, 4, 5, 6),
}
TARGET = Path(__file__).parents[1] / "kernels" / "slicefine_kernels" / "tuned.py"

# architecture, wide side, padded thin width, bytes per element
Key = tuple[str, str, int, int]


@dataclass(frozen=True)
class Entry:
    """A configuration that beats the default, with its evidence."""

    # of GradConfig's fields
    values: tuple[int | None, ...]
    # device, date, milliseconds
    comment: str


# Candidates and the file: pure functions


def classes() -> list[tuple[str, int, int]]:
    """(wide side, padded thin width, bytes per element), the common ones first."""
    return [
        (side, thin, size)
        for size in (2, 4)
        for thin in (16, 32, 64)
        for side in ("rows", "cols")
    ]


def fits(config: Any, thin: int, side: str, element_size: int) -> bool:
    """Within MAX_TILE and shared memory, and no block of the thin side wider than it is padded to."""
    from slicefine_kernels.configs import MAX_TILE

    narrow = config.BLOCK_K if side == "rows" else config.BLOCK_R
    operands = (config.BLOCK_R + config.BLOCK_K) * config.BLOCK_T * element_size
    return (
        config.BLOCK_R * config.BLOCK_K <= MAX_TILE
        and narrow <= thin
        and operands * config.num_stages <= SHARED_BYTES
        and 32 * config.num_warps
        # an accumulator for every thread
        <= config.BLOCK_R * config.BLOCK_K
    )


def neighbors(config: Any, side: str, thin: int, element_size: int) -> Iterator[Any]:
    """Configurations one step away in one value, then two of those at once (more tokens a block,
    fewer stages: the same memory).
    """

    def stepped(start: Any, name: str) -> Iterator[Any]:
        values = VALUES[name]
        i = values.index(getattr(start, name))
        for j in (i + 1, i - 1):
            if 0 <= j < len(values):
                yield replace(start, **{name: values[j]})

    seen = {config}
    ones = [
        c
        for name in ("num_stages", "BLOCK_T", "num_warps", "BLOCK_R", "BLOCK_K")
        for c in stepped(config, name)
    ]
    wide = "BLOCK_R" if side == "rows" else "BLOCK_K"
    twos = [
        c
        for one in stepped(config, "BLOCK_T")
        for name in ("num_stages", wide)
        for c in stepped(one, name)
    ]
    twos += [c for one in stepped(config, wide) for c in stepped(one, "num_warps")]
    for candidate in (*ones, *twos):
        if candidate not in seen and fits(candidate, thin, side, element_size):
            seen.add(candidate)
            yield candidate


def search(
    start: Any,
    near: Callable[[Any], Iterator[Any]],
    measure: Callable[[Any], float | None],
    in_time: Callable[[], bool],
) -> tuple[Any, float, float]:
    """(best configuration, its time, the start's time): steps downhill. measure: None for what
    cannot run or is wrong.

    Raises RuntimeError if the start itself cannot be measured.
    """
    first = measure(start)
    if first is None:
        raise RuntimeError(f"the default configuration {start} does not run or is wrong")
    best, least, tried, moved = start, first, {start}, True
    while moved and in_time():
        moved = False
        for candidate in near(best):
            if candidate in tried:
                continue
            if not in_time():
                break
            tried.add(candidate)
            found = measure(candidate)
            if found is not None and found < least * 0.99:
                best, least, moved = candidate, found, True
                break
    return best, least, first


def merged(
    old: dict[Key, Entry], new: dict[Key, Entry], measured: set[Key]
) -> dict[Key, Entry]:
    """What was measured anew replaces what was there, also where the default won; the rest stays."""
    return dict(
        sorted({**{k: e for k, e in old.items() if k not in measured}, **new}.items())
    )


def rendered(entries: dict[Key, Entry], names: tuple[str, ...]) -> str:
    """The text of tuned.py. names: GradConfig's fields."""
    head = (
        '"""Written by `python -m benchmarks.tune` on a machine with a GPU; do not edit by'
        " hand.\n\n"
    )
    head += (
        "GRAD: (architecture, wide operand, padded thin width, bytes per element) ->"
        f" ({', '.join(names)}).\n"
    )
    if not entries:
        head += "No GPU has been measured yet: every configuration is `configs.default_config`'s.\n"
    kind = ", ".join(["int | None" if name == "maxnreg" else "int" for name in names])
    lines = [head + '"""\n']
    if not entries:
        return "\n".join(
            [*lines, f"GRAD: dict[tuple[str, str, int, int], tuple[{kind}]] = {{}}", ""]
        )
    lines.append(f"GRAD: dict[tuple[str, str, int, int], tuple[{kind}]] = {{")
    for (arch, side, thin, size), entry in sorted(entries.items()):
        lines += [
            f"    # {entry.comment}",
            f'    ("{arch}", "{side}", {thin}, {size}): {entry.values},',
        ]
    return "\n".join([*lines, "}", ""])


def parsed(text: str) -> dict[Key, Entry]:
    """Entries of a rendered file, with their comments."""
    pattern = re.compile(
        r'^    # (.*)\n    \("(\w+)", "(\w+)", (\d+), (\d+)\): \(([^)]*)\),$', re.MULTILINE
    )
    found = {}
    for comment, arch, side, thin, size, values in pattern.findall(text):
        numbers = tuple(None if v.strip() == "None" else int(v) for v in values.split(","))
        found[arch, side, int(thin), int(size)] = Entry(numbers, comment)
    return found


# Measuring


def shapes(side: str, thin: int, small: bool) -> list[tuple[int, int, int]]:
    """Representative (n, R, K) of a class; 64 stands for all that is as wide or wider."""
    tokens, wides = (40, (48,)) if small else (8192, (4096, 14336))
    found = [(tokens, wide, thin) for wide in wides]
    if thin == 64 and not small:
        found.append((tokens, 4096, 256))
    return [(n, R, K) if side == "rows" else (n, K, R) for n, R, K in found]


class Bench:
    """Operands of a class, their exact gradients, and the time of a configuration over all of them."""

    def __init__(self, side: str, thin: int, element_size: int, device: str) -> None:
        import torch
        from slicefine_kernels.launch import architecture

        from slicefine.backends import reference

        self.device, self.small = device, device == "cpu"
        self.key: Key = (
            architecture(
                torch.device(device, 0) if device == "cuda" else torch.device(device)
            ),
            side,
            thin,
            element_size,
        )
        dtype = torch.bfloat16 if element_size == 2 else torch.float32
        self.operands = []
        for n, R, K in shapes(side, thin, self.small):
            copies = (
                1 if self.small else max(2, -(-(2**29) // (element_size * n * (R + K))))
            )
            new = lambda width, n=n: torch.randn(n, width, device=device).to(dtype)
            sets = [(new(R), new(K)) for _ in range(copies)]
            dy, x = sets[0]
            exact = reference.slice_grad(dy.double(), x.double())
            plain = (dy.t().float() @ x.float()).double()
            slack = (
                2.0**-22 * reference.slice_grad(dy.double().abs(), x.double().abs()).amax()
            )
            bound = float(2 * (plain - exact).abs().amax() + slack)
            self.operands.append((sets, exact, bound))

    def __call__(self, config: Any) -> float | None:
        """Sum of the milliseconds of one call per shape; None if it does not compile, does not fit,
        or is wrong.
        """
        import torch
        from slicefine_kernels import tuned

        from benchmarks.gpu.graphs import captured
        from benchmarks.gpu.kernels import milliseconds
        from slicefine import ops

        before, total = tuned.GRAD.get(self.key), 0.0
        tuned.GRAD[self.key] = astuple(config)
        try:
            with ops.use_backend("triton"):
                for sets, exact, bound in self.operands:
                    found = ops.slice_grad(*sets[0])
                    if not bool((found.double() - exact).abs().amax() <= bound):
                        return None
                    if not self.updates_too(*sets[0]):
                        return None
                    calls = 1 if self.small else max(8, len(sets))
                    every = lambda sets=sets, calls=calls: [
                        ops.slice_grad(*sets[i % len(sets)]) for i in range(calls)
                    ][-1]
                    total += milliseconds(
                        captured(every, self.device),
                        self.device,
                        calls,
                        1 if self.small else 15,
                    )
        except Exception as error:
            if self.device == "cuda":
                # a lost device ends the run; a configuration that does not compile does not
                torch.cuda.synchronize()
            print(
                f"    {astuple(config)}: {type(error).__name__}:"
                f" {str(error).splitlines()[0][:100] if str(error) else ''}"
            )
            return None
        finally:
            if before is None:
                tuned.GRAD.pop(self.key, None)
            else:
                tuned.GRAD[self.key] = before
        return total

    def updates_too(self, dy: Any, x: Any) -> bool:
        """Whether `slice_grad_adamw`, which takes the same configuration and more registers,
        compiles and runs.
        """
        import torch

        from slicefine import ops
        from slicefine.backends.operands import AdamWOptions, AdamWSlice

        state = [torch.zeros(dy.shape[1], x.shape[1], device=self.device) for _ in range(3)]
        weight, step = state[0].to(dy.dtype), torch.ones((), device=self.device)
        active = AdamWSlice(state[0], None, *state[1:], weight, None, None, step)
        ops.slice_grad_adamw(dy, x, active, AdamWOptions(1e-3, 0.9, 0.999, 1e-8, 0.0))
        return bool(state[0].isfinite().all()) and bool((state[1] != 0).any())


def tune(
    device: str, minutes: float, wanted: list[tuple[str, int, int]]
) -> tuple[dict[Key, Entry], set[Key]]:
    """(entries that beat the default, keys that were measured)."""
    from slicefine_kernels.configs import default_config

    from benchmarks.record import device_name

    end, entries, measured = time.time() + 60 * minutes, {}, set()
    for i, (side, thin, size) in enumerate(wanted):
        until = time.time() + (end - time.time()) / (len(wanted) - i)
        if end - time.time() < 5 and device != "cpu":
            print(f"{side} {thin} {size}: no time left")
            continue
        bench = Bench(side, thin, size, device)
        _, R, K = shapes(side, thin, bench.small)[0]
        start = default_config(R, K, size)
        near = lambda c, side=side, thin=thin, size=size: neighbors(c, side, thin, size)
        count = [0]

        def in_time(until: float = until, count: list[int] = count) -> bool:
            count[0] += 1
            return time.time() < until and (device != "cpu" or count[0] < 4)

        best, ms, default_ms = search(start, near, bench, in_time)
        measured.add(bench.key)
        print(
            f"{bench.key}: default {astuple(start)} {default_ms:.4f} ms, best {astuple(best)}"
            f" {ms:.4f} ms",
            flush=True,
        )
        if ms < (1 - GAIN) * default_ms:
            comment = (
                f"{device_name(device)}, {time.strftime('%Y-%m-%d')}: {ms:.4f} ms, default"
                f" {default_ms:.4f} ms"
            )
            entries[bench.key] = Entry(astuple(best), comment)
    return entries, measured


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument(
        "--write", action="store_true", help=f"write {TARGET.name}; otherwise it is printed"
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--output", type=Path, default=TARGET, help="where to write")
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
        if options.output == TARGET:
            # the interpreter's times say nothing
            options.write = False
    import torch
    from slicefine_kernels.configs import GradConfig

    if options.device == "cuda" and not torch.cuda.is_available():
        print(
            "no GPU here: the tuner needs one (torch.cuda.is_available() is False)",
            file=sys.stderr,
        )
        return 2
    torch.manual_seed(0)
    wanted = classes()[:1] if options.device == "cpu" else classes()
    entries, measured = tune(options.device, options.minutes, wanted)
    old = (
        parsed(options.output.read_text(encoding="utf-8"))
        if options.output.exists()
        else {}
    )
    text = rendered(
        merged(old, entries, measured), tuple(field.name for field in fields(GradConfig))
    )
    if options.write:
        options.output.write_text(text, encoding="utf-8")
        print(f"written: {options.output}")
    else:
        print(text)
    if os.environ.get("OUT"):
        (Path(os.environ["OUT"]) / "tuned.py").write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
