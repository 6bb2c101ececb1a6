"""How many neurons, parameters and bytes it takes to correct N of K answers with a side network, by
theorem.

Source: Sohn et al., Fine-Tuning Capacity, UAI 2024, arXiv 2408.00359.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

CONSTRUCTED = (
    "of a network constructed by the theorem; a trained one may need fewer or more, and more with"
    " every answer it must keep"
)


@dataclass(frozen=True)
class Bounds:
    """Bounds (low, high) for correcting any N of any K answers. low is None where the paper proves
    none.

    neurons: hidden ReLUs. parameters: numbers that describe the network. bytes: of those in
    float64, which exactness needs. applies: whether the theorem's conditions hold. note: what to
    know about these numbers.
    """

    layers: int
    neurons: tuple[int | None, int]
    parameters: tuple[int, int]
    bytes: tuple[int, int]
    applies: bool
    note: str


def ftc_bounds(
    N: int, K: int, layers: int = 2, outputs: int = 1, features: int = 1
) -> Bounds:
    """Neurons, parameters and bytes that correct N of K answers.

    layers: 2 (theorem 4.1), 3 (theorem 5.1) or more (proposition 6.1). outputs: classes. features:
    width of what g reads. Two layers need the same neurons for any number of outputs; the second
    layer of three grows with it. Raises ValueError unless 1 <= N <= K, layers >= 2.
    """
    for name, value, least in (
        ("N", N, 1),
        ("K", K, 1),
        ("layers", layers, 2),
        ("outputs", outputs, 1),
        ("features", features, 1),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(
                f"{name} is {value!r}; expected a whole number, {least} or more"
            )
    if N > K:
        raise ValueError(f"N is {N} and K is {K}; expected N of K answers, so N <= K")
    low, high = {2: _two, 3: _three}.get(layers, _deep)(N, K, layers, outputs)
    parameters = N * outputs, _parameters(high, layers, outputs, features, N)
    crossing = three_layers_pay(outputs)
    note = (
        f"Neuron counts are {CONSTRUCTED}. Parameters grow with N at any depth, because N answers"
        f" are N times the outputs in free numbers. With {outputs} output{'s' * (outputs > 1)}"
        f" three layers have fewer neurons than two from N = {crossing} on."
    )
    if layers >= 3:
        note += " Three layers and more: for values in [-1, 1]; larger ones are scaled."
    return Bounds(
        layers,
        (low, high),
        parameters,
        (8 * parameters[0], 8 * parameters[1]),
        K >= 3 or layers != 2,
        note,
    )


def _two(
    N: int,
    K: int,
    layers: int,
    outputs: int,
) -> tuple[int, int]:
    return max(0, min(3 * N, K - 2)), max(1, min(3 * N + 1, K - 1))


def _three(
    N: int,
    K: int,
    layers: int,
    outputs: int,
) -> tuple[int, int]:
    low = math.sqrt(2 * max(0, min(3 * N, K - 2)) + 0.25) - 0.5
    if outputs == 1:
        high = min(
            2 * math.sqrt(K) + min(2 * math.sqrt(K), 3 * N), 6 * math.sqrt(3 * N + 2)
        )
    else:
        # p groups of q: 2p + 4qC with pq = 3N + 2 is least at p = sqrt(2C(3N + 2))
        high = 4 * math.sqrt(2 * outputs * min(3 * N + 2, K))
    return math.ceil(low), math.ceil(high)


def _deep(
    N: int,
    K: int,
    layers: int,
    outputs: int,
) -> tuple[None, int]:
    width = 4 * min(math.sqrt(3 * N / ((layers - 1) // 2) + 5), math.sqrt(K)) + 2
    # one network per output, side by side
    return None, math.ceil(width) * outputs * (layers - 1)


def _parameters(
    neurons: int,
    layers: int,
    outputs: int,
    features: int,
    N: int,
) -> int:
    """Of the construction, whose first layer is one direction."""
    if layers == 2:
        return features + neurons * (1 + outputs) + outputs
    # sqrt(n) groups of sqrt(n): 2 sqrt(n) and 4 sqrt(n) neurons, fully connected
    if layers == 3:
        first = max(1, neurons // 3)
        return (
            features
            + 2 * first
            + first * (neurons - first)
            + (neurons - first) * (1 + outputs)
            + outputs
        )
    width = max(1, neurons // (layers - 1))
    return (
        features
        + 2 * width
        + (layers - 2) * width * (width + 1)
        + width * outputs
        + outputs
    )


def three_layers_pay(outputs: int) -> int:
    """The least N from which on three layers have fewer neurons than two, for very many answers:
    about 10.7 x outputs.
    """
    # 3 N > c sqrt(3 N + 2), with c = 6 by the theorem for one output and 4 sqrt(2 C) for C
    square = 36 if outputs == 1 else 32 * outputs
    return math.floor((3 * square + math.sqrt(9 * square**2 + 72 * square)) / 18) + 1
