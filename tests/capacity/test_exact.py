"""Exact side networks and their bounds: every promise of theorems 4.1 and 5.1, checked on the ReLU
network that they speak of.
"""

from __future__ import annotations

import math

import pytest
import torch

from slicefine.capacity.bounds import ftc_bounds, three_layers_pay
from slicefine.capacity.exact import Bumps, Zigzags
from slicefine.capacity.side import exact_side


def problem(N, K, outputs=1, d=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(K, d, generator=generator, dtype=torch.float64)
    index = torch.randperm(K, generator=generator)[:N]
    z = torch.rand(N, outputs, generator=generator, dtype=torch.float64) * 2 - 1
    wanted = torch.zeros(K, outputs, dtype=torch.float64)
    wanted[index] = z
    return x, {int(i): value for i, value in zip(index, z, strict=True)}, wanted


def slope(x, y):
    x, y = ([math.log(v) for v in values] for values in (x, y))
    mx, my = sum(x) / len(x), sum(y) / len(y)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / sum(
        (a - mx) ** 2 for a in x
    )


@pytest.mark.parametrize("slack", [0.0, 0.5])
@pytest.mark.parametrize(("layers", "low", "high"), [(2, 0.93, 1.05), (3, 0.42, 0.52)])
def test_it_memorizes_within_the_theorems_neurons(layers, low, high, slack):
    sizes, neurons = (4, 16, 64, 256), []
    for N in sizes:
        x, edits, wanted = problem(N, 4000)
        side = exact_side(x, edits, layers=layers, slack=slack)
        relu = side.network.relu_network()
        assert (
            sum(m.out_features for m in relu if isinstance(m, torch.nn.Linear)) - 1
            == side.neurons
        )
        assert (relu(x) - wanted).abs().max() < 1e-6
        assert (side(x) - wanted).abs().max() < 1e-9
        untouched = torch.ones(4000, dtype=torch.bool)
        untouched[list(edits)] = False
        assert bool((side(x)[untouched] == 0).all())  # exactly, not nearly
        assert side.neurons <= (3 * N if layers == 2 else 6 * math.sqrt(3 * N + 2) + 1)
        neurons.append(side.neurons)
    assert low <= slope(sizes, neurons) <= high


@pytest.mark.parametrize("N", [4, 16, 64])
@pytest.mark.parametrize("slack", [0.0, 0.5])
def test_the_worst_case_needs_three_neurons_an_edit(N, slack):
    """x_i = i u with every third sample edited: the lower bound of theorem 4.1, reached."""
    K = 3 * N + 2
    x = torch.arange(1.0, K + 1, dtype=torch.float64)[:, None] * torch.tensor(
        [[0.6, -0.8]], dtype=torch.float64
    )
    z = torch.rand(N, 1, dtype=torch.float64) + 0.1
    side = exact_side(x, {3 * i + 2: z[i] for i in range(N)}, slack=slack, tries=1)
    assert side.neurons == 3 * N == ftc_bounds(N, K).neurons[0]
    assert (side.network.relu_network()(x)[2::3][:N] - z).abs().max() < 1e-9


def test_one_run_of_equal_edits_needs_four_knots():
    x = torch.arange(100, dtype=torch.float64)[:, None]
    edits = {i: torch.ones(1, dtype=torch.float64) for i in range(40, 60)}
    side = exact_side(x, edits)
    assert side.neurons == 4
    expected = ((torch.arange(100) >= 40) & (torch.arange(100) < 60)).double()[:, None]
    assert torch.equal(side(x), expected)


@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("edges", [[0], [19], [0, 1, 19], list(range(20))])
def test_edits_at_the_ends_and_everywhere(layers, edges):
    x = torch.arange(20, dtype=torch.float64)[:, None]
    edits = {i: torch.tensor([0.5 + i / 40, -0.25]).double() for i in edges}
    side = exact_side(x, edits, layers=layers)
    expected = torch.zeros(20, 2, dtype=torch.float64)
    for i, value in edits.items():
        expected[i] = value
    assert (side(x) - expected).abs().max() < 1e-9
    assert (side.network.relu_network()(x) - expected).abs().max() < 1e-9


def test_many_outputs_cost_no_neurons_with_two_layers():
    x, edits, wanted = problem(32, 2000, outputs=5)
    side = exact_side(x, edits)
    assert side.neurons <= 96 and (side(x) - wanted).abs().max() < 1e-9
    three = exact_side(x, edits, layers=3)
    assert (three.network.relu_network()(x) - wanted).abs().max() < 1e-6
    assert (
        three.neurons <= 4 * math.sqrt(2 * 5 * 32) + 2 * 4 * 5
    )  # and a rounding per output


def test_classes_win_by_the_margin_and_nothing_else_moves():
    x, _, _ = problem(1, 500)
    logits = torch.randn(500, 4, generator=torch.Generator().manual_seed(1))
    wanted = {i: int((logits[i].argmax() + 1) % 4) for i in range(0, 100, 10)}
    for layers in (2, 3):
        total = logits.double() + exact_side(
            x, wanted, logits=logits, margin=0.7, layers=layers
        )(x)
        for i, label in wanted.items():
            others = torch.cat([total[i, :label], total[i, label + 1 :]])
            assert abs(float(total[i, label] - others.max()) - 0.7) < 1e-9
        rest = [i for i in range(500) if i not in wanted]
        assert torch.equal(total[rest], logits.double()[rest])


def test_slack_holds_answers_of_features_that_vary():
    x, edits, _ = problem(16, 1000)
    rest = [i for i in range(1000) if i not in edits]
    noisy = x + 1e-9 * torch.randn(
        x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    assert bool((exact_side(x, edits, slack=0.5)(noisy)[rest] == 0).all())
    assert not bool((exact_side(x, edits, slack=0.0)(noisy)[rest] == 0).all())


def test_float32_keeps_its_bound_and_half_precision_is_refused():
    x, edits, wanted = problem(16, 1000)
    side = exact_side(x, edits)
    bound = side.network.error_bound(x, torch.float32)
    error = float((side.float()(x.float()).double() - wanted).abs().max())
    assert 1e-6 < error < bound < 1000 * error
    with pytest.raises(
        TypeError,
        match="cannot run in torch.bfloat16.*knots lie between neighboring samples",
    ):
        exact_side(x, edits).to(torch.bfloat16)
    with pytest.raises(TypeError, match="cannot run in torch.float16"):
        exact_side(x.half(), edits)
    with pytest.raises(TypeError, match="cannot run in torch.bfloat16"):
        exact_side(x, edits)(x.bfloat16())
    with pytest.raises(TypeError, match="float64 only"):
        exact_side(x, edits, layers=3).float()


def test_samples_that_cannot_be_told_apart_are_named():
    x, edits, _ = problem(2, 50)
    twin = torch.cat([x, x[next(iter(edits))][None]])
    with pytest.raises(
        ValueError, match=f"samples {next(iter(edits))} and 50 have the same features"
    ):
        exact_side(twin, edits)
    same = {
        **edits,
        50: edits[next(iter(edits))],
    }  # a twin that wants the same is no conflict
    assert exact_side(twin, same).neurons <= 6
    with pytest.raises(ValueError, match="all samples have the same features"):
        exact_side(torch.ones(5, 3), {0: torch.ones(1)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 4}, "layers is 4"),
        ({"slack": 1.0}, "slack 1.0"),
        ({"projection": "pca"}, "projection is 'pca'"),
        ({"edits": {}}, "no edits"),
        ({"edits": {99: torch.ones(1)}}, "edits name row 99; there are rows 0 to 9"),
        ({"edits": {0: 1}}, "need logits="),
        ({"features": torch.randn(10)}, "expected \\(samples, width\\)"),
        ({"edits": {0: torch.tensor([math.nan])}}, "NaN"),
    ],
)
def test_bad_input_is_named(options, message):
    arguments = {"features": torch.randn(10, 2), "edits": {0: torch.ones(1)}, **options}
    with pytest.raises(ValueError, match=message):
        exact_side(arguments.pop("features"), arguments.pop("edits"), **arguments)


def test_the_discriminant_needs_fewer_neurons_for_a_cluster():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1000, 10, generator=generator, dtype=torch.float64)
    x[:50] = 0.15 * x[:50] + 2.0
    z = torch.rand(50, 1, generator=generator, dtype=torch.float64) + 0.5
    edits = {i: z[i] for i in range(50)}
    lda = exact_side(x, edits, projection="lda", prefer="neurons", tries=1)
    random = exact_side(x, edits, projection="random", prefer="neurons", tries=1)
    assert 51 <= lda.neurons < random.neurons <= 150
    many = exact_side(x, edits, projection="random", prefer="neurons", tries=40)
    assert many.neurons < random.neurons


# Bounds


def test_bounds_are_the_papers():
    """Theorem 4.1 and 5.1 with numbers worked out by hand."""
    two = ftc_bounds(16, 1000)
    assert two.neurons == (48, 49) and two.applies
    assert two.parameters == (16, 1 + 49 * 2 + 1) and two.bytes == (128, 800)
    assert ftc_bounds(400, 1000).neurons == (998, 999)  # 3 N > K
    three = ftc_bounds(16, 10**6, 3)
    assert three.neurons == (
        math.ceil(math.sqrt(96.25) - 0.5),
        math.ceil(6 * math.sqrt(50)),
    )
    assert ftc_bounds(500, 100_000, 4).neurons == (
        None,
        3 * math.ceil(4 * math.sqrt(1505) + 2),
    )
    assert "from N = 13 on" in two.note


def test_when_three_layers_pay():
    assert three_layers_pay(1) == 13
    for outputs in (2, 10, 1000):
        N = three_layers_pay(outputs)
        assert 10.6 < N / outputs <= 11
        fewer = lambda n, c=outputs: ftc_bounds(n, 10**9, 3, c).neurons[1] < 3 * n
        assert fewer(N + 1) and not fewer(N - 1)


def test_parameters_grow_with_the_edits_at_any_depth():
    """What neurons hide: sqrt(N) neurons of three layers are still about N parameters."""
    high = [ftc_bounds(N, 10**6, 3).parameters[1] for N in (64, 256, 1024)]
    assert 0.9 < slope((64, 256, 1024), high) < 1.1
    measured = []
    for N in (16, 64, 256):
        x, edits, _ = problem(N, 4000)
        side = exact_side(x, edits, layers=3)
        assert side.stored >= N
        measured.append(side.stored)
    assert measured[2] / measured[0] > 4


@pytest.mark.parametrize(
    "arguments", [(0, 10), (11, 10), (2, 10, 1), (2, 10, 2, 0), (2.0, 10)]
)
def test_bad_bounds_are_refused(arguments):
    with pytest.raises(ValueError, match="expected"):
        ftc_bounds(*arguments)


def test_the_networks_are_what_they_say():
    x, edits, _ = problem(8, 100)
    assert isinstance(exact_side(x, edits).network, Bumps) and isinstance(
        exact_side(x, edits, layers=3).network, Zigzags
    )
