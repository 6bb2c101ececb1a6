"""Spectral balance and task energy: independent references, planted faults, nulls that pass, and
the digits' figures.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from slicefine.diagnose import capture
from slicefine.diagnose.energy import task_energy
from slicefine.diagnose.spectra import gaussian_null, group_bounds, spectral_balance


@pytest.fixture(scope="module")
def digits():
    """(trained 64-256-256-10 MLP, 600 standardized images, their labels)."""
    sklearn = pytest.importorskip("sklearn.datasets")
    data = sklearn.load_digits()
    order = np.random.RandomState(0).permutation(len(data.target))
    x = torch.tensor(data.data[order] / 16, dtype=torch.float32)
    y = torch.tensor(data.target[order])
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for epoch in range(30):
        for rows in torch.randperm(
            1200, generator=torch.Generator().manual_seed(epoch)
        ).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    assert (model(x[1200:]).argmax(1) == y[1200:]).float().mean() > 0.93
    return model, x[:600], y[:600]


def by_numpy(weight, groups):
    """energies, effective ranks and profile ratio of groups of rows, by a singular value
    decomposition of each.
    """
    spectra = [
        np.linalg.svd(part, compute_uv=False) ** 2
        for part in np.array_split(weight, groups)
    ]
    shares = [s / s.sum() for s in spectra]
    half = min(map(len, shares)) // 2
    top = np.array([s[:half] for s in shares])
    return (
        [s.mean() for s in spectra],
        [math.exp(-(s[s > 0] * np.log(s[s > 0])).sum()) for s in shares],
        (top.max(0) / top.min(0)).max(),
    )


@pytest.mark.parametrize("axis", ["row", "column"])
def test_statistics_equal_a_singular_value_decomposition(axis):
    weight = torch.randn(
        40, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(3)
    )
    weight *= torch.linspace(1, 3, 40 if axis == "row" else 24).view(
        (-1, 1) if axis == "row" else (1, -1)
    )
    found = spectral_balance(weight, axis, groups=4, draws=20)
    energies, ranks, profile = by_numpy(
        (weight if axis == "row" else weight.t()).numpy(), 4
    )
    np.testing.assert_allclose(found.energies, energies, rtol=1e-10)
    np.testing.assert_allclose(found.effective_ranks, ranks, rtol=1e-8)
    assert found.profile_ratio == pytest.approx(profile, rel=1e-8)
    assert found.energy_ratio == pytest.approx(max(energies) / min(energies), rel=1e-10)
    assert found.energy_cv == pytest.approx(np.std(energies) / np.mean(energies), rel=1e-10)


def test_z_is_exact_under_a_shuffle():
    """Mean 0 (of the six groups of one draw, exactly) and variance 1, over 700 shuffles."""
    weight = torch.randn(48, 16, dtype=torch.float64) * torch.linspace(
        0.5, 2, 48, dtype=torch.float64
    ).unsqueeze(1)
    drawn = [
        spectral_balance(
            weight[torch.randperm(48)], groups=6, draws=1, gaussian=NULL
        ).energy_z
        for _ in range(700)
    ]
    z = torch.tensor(drawn, dtype=torch.float64)
    assert float(z.mean(1).abs().max()) < 1e-12
    assert float(z.square().mean()) == pytest.approx(1.0, abs=0.08)


NULL = gaussian_null((48, 16), "row", 6, draws=2)


def test_a_gaussian_matrix_passes_with_the_measured_figures():
    """1.06, 0.018, 1.13 and 29.9 to 30.3 were measured for a Gaussian 256 x 256 with 8 groups of
    rows.
    """
    found = spectral_balance(torch.randn(256, 256), groups=8, draws=20)
    assert found.flagged == []
    assert 1.02 < found.energy_ratio < 1.12 and 0.008 < found.energy_cv < 0.03
    assert 1.05 < found.profile_ratio < 1.25
    assert min(found.effective_ranks) > 29.5 and max(found.effective_ranks) < 30.7
    assert found.profile_ratio < 1.2 * found.gaussian["profile_ratio"].largest


def test_a_planted_outlier_block_is_flagged_by_its_energy():
    weight = torch.randn(256, 256)
    weight[64:96] *= 4
    found = spectral_balance(weight, groups=8, draws=20)
    assert [(g, start, stop) for g, start, stop, _ in found.flagged] == [(2, 64, 96)]
    assert found.flagged[0][3].startswith("energy")
    assert 14 < found.energy_ratio < 19  # 16.4 was measured
    assert found.energy_ratio > 3 * found.permutation["energy_ratio"].largest


def test_a_planted_low_rank_block_of_equal_energy_is_seen_by_the_profile_alone():
    weight = torch.randn(256, 256, dtype=torch.float64)
    low = torch.randn(32, 8, dtype=torch.float64) @ torch.randn(8, 256, dtype=torch.float64)
    weight[160:192] = low * (weight[160:192].norm() / low.norm())
    found = spectral_balance(weight, groups=8, draws=20)
    assert [(g, start, stop) for g, start, stop, _ in found.flagged] == [(5, 160, 192)]
    assert found.flagged[0][3].startswith("profile")
    assert found.energy_ratio < 1.12 and found.profile_ratio > 1e12
    assert 6.0 < min(found.effective_ranks) < 8.0  # 7.1 was measured


def test_memory_is_that_of_a_group():
    from slicefine import track_memory

    weight = torch.randn(512, 2048)
    with track_memory([weight]) as report:
        spectral_balance(weight, groups=8, draws=2)
    groups = 8 * 64 * 2048  # one group in float64
    gaussian = 4 * weight.numel()  # the null's matrix of the same shape
    assert report.peak_bytes - report.bytes_before < gaussian + 2 * groups


def test_a_trained_matrix_is_less_balanced_than_a_random_one(digits):
    weight = digits[0][2].weight
    found = spectral_balance(weight, groups=8, draws=20)
    assert found.energy_ratio > found.gaussian["energy_ratio"].largest
    assert found.profile_ratio > found.gaussian["profile_ratio"].largest
    assert min(found.effective_ranks) < found.gaussian["effective_rank_min"].mean - 3


def test_errors_of_spectral_balance():
    with pytest.raises(ValueError, match="axis is 'rows'; expected one of row, column"):
        spectral_balance(torch.ones(4, 4), "rows")
    with pytest.raises(ValueError, match="the weight is zero"):
        spectral_balance(torch.zeros(4, 4))
    with pytest.raises(ValueError, match="values that are not finite"):
        spectral_balance(torch.full((4, 4), math.nan))
    with pytest.raises(ValueError, match="groups is 9; expected 2 to 4"):
        group_bounds(4, 9)
    assert group_bounds(576)[0] == (0, 64) and len(group_bounds(576)) == 9
    assert [b - a for a, b in group_bounds(10, 4)] == [2, 3, 2, 3]


# Task energy


@pytest.mark.parametrize(("n", "d"), [(60, 20), (20, 60)])
def test_the_curve_equals_principal_components_by_numpy(n, d):
    features = (
        torch.randn(n, d, dtype=torch.float64)
        * torch.linspace(3, 0.1, d, dtype=torch.float64)
        + 5
    )
    found = task_energy(features)
    x = features.numpy() - features.numpy().mean(0)
    energy = np.linalg.svd(x, compute_uv=False) ** 2
    curve = np.cumsum(energy) / energy.sum()
    np.testing.assert_allclose(found.curve, curve, rtol=1e-9)
    assert found.k == {
        tau: int(np.argmax(curve >= tau - 1e-12)) + 1 for tau in (0.9, 0.95, 0.99)
    }


def test_label_alignment_equals_a_regression():
    """||U_k^T Y||^2 / ||Y||^2 is the R^2 of regressing the labels on the first k principal
    components.
    """
    linear = pytest.importorskip("sklearn.linear_model")
    decomposition = pytest.importorskip("sklearn.decomposition")
    features, labels = torch.randn(80, 12, dtype=torch.float64), torch.randint(3, (80,))
    features[:, :3] += nn.functional.one_hot(labels, 3) * 2
    found = task_energy(features, labels=labels)
    scores = decomposition.PCA(12).fit_transform(features.numpy())
    targets = nn.functional.one_hot(labels).double().numpy()
    targets = targets - targets.mean(0)
    for k in (1, 4, 12):
        fitted = (
            linear.LinearRegression().fit(scores[:, :k], targets).predict(scores[:, :k])
        )
        assert found.aligned[k - 1] == pytest.approx(
            (fitted**2).sum() / (targets**2).sum(), rel=1e-9
        )


def test_trained_digits_features_are_narrow_against_random_ones(digits):
    """k(0.9) of the second hidden layer was measured as 6 against 32 at random initialization, of
    256.
    """
    model, x, y = digits
    layers = capture.linear_layers(nn.Sequential(model))
    assert [layer.name for layer in layers] == ["0.0", "0.2", "0.4"]
    batches = [{"input": part} for part in x.split(200)]
    trained = capture.input_features(nn.Sequential(model), layers, batches, 600)["0.4"]
    with capture.random_weights(model):
        random = capture.input_features(nn.Sequential(model), layers, batches, 600)["0.4"]
    with torch.no_grad():
        expected = model[:4](x)
    torch.testing.assert_close(trained.means, expected)
    assert sorted(map(tuple, trained.rows.tolist())) == sorted(
        map(tuple, expected.tolist())
    )
    own = task_energy(trained.rows, labels=y, label_features=trained.means)
    null = task_energy(random.rows, labels=y, label_features=random.means)
    assert 4 <= own.k[0.9] <= 9 and 10 <= own.k[0.99] <= 24
    assert 20 <= null.k[0.9] <= 45 and 3 * own.k[0.9] < null.k[0.9]
    assert own.aligned[own.k[0.9] - 1] > null.aligned[own.k[0.9] - 1] + 0.1
    assert own.dead == int((expected.std(0) < 1e-6).sum())


def test_errors_of_task_energy():
    with pytest.raises(ValueError, match="do not vary"):
        task_energy(torch.ones(5, 3))
    with pytest.raises(ValueError, match="expected \\(n, d\\) with at least two rows"):
        task_energy(torch.ones(1, 3))
    with pytest.raises(ValueError, match="4 labels for 5 rows"):
        task_energy(torch.randn(5, 3), labels=torch.tensor([0, 1, 0, 1]))
    with pytest.raises(ValueError, match="all labels are the same"):
        task_energy(torch.randn(5, 3), labels=torch.zeros(5, dtype=torch.long))


# Capture


class Tokens(nn.Module):
    """Two linear layers on one input, a convolution, a parameter of its own: what real models are
    made of.
    """

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((6,), 2.0))
        self.first, self.second, self.unused = (
            nn.Linear(6, 5),
            nn.Linear(6, 5),
            nn.Linear(6, 5),
        )
        self.norm = nn.LayerNorm(5)

    def forward(self, x, attention_mask=None):
        x = x * self.scale
        return self.norm(self.first(x) + self.second(x))


def test_hidden_positions_are_left_out_and_shared_inputs_taken_once():
    model, x = Tokens(), torch.randn(4, 7, 6)
    mask = torch.ones(4, 7, dtype=torch.long)
    mask[1, 3:] = 0
    found = capture.input_features(
        model, capture.linear_layers(model), [{"x": x, "attention_mask": mask}], 100
    )
    assert set(found) == {"first", "second"}
    assert found["first"] is found["second"]
    visible = (2 * x)[mask.bool()]
    assert sorted(map(tuple, found["first"].rows.tolist())) == sorted(
        map(tuple, visible.tolist())
    )
    torch.testing.assert_close(found["first"].means[1], 2 * x[1, :3].mean(0))


def test_random_weights_leave_the_model_as_it_was_and_need_one_module_at_a_time():
    from slicefine import track_memory

    model, x = nn.Sequential(*[nn.Linear(200, 200) for _ in range(8)]), torch.randn(2, 200)
    before, output = {k: v.clone() for k, v in model.state_dict().items()}, model(x)
    parameters = [id(p) for p in model.parameters()]
    with (
        torch.no_grad(),
        track_memory(model=model) as report,
        capture.random_weights(model),
    ):
        first, second = model(x), model(x)
    assert torch.equal(first, second) and not torch.equal(first, output)
    assert report.peak_bytes - report.bytes_before < 1.1 * 4 * 200 * 201
    assert [id(p) for p in model.parameters()] == parameters and torch.equal(
        model(x), output
    )
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(RuntimeError), capture.random_weights(model):
        model(torch.randn(2, 3))
    assert torch.equal(model(x), output) and not any(
        "_slicefine_kept" in m.__dict__ for m in model.modules()
    )


def test_random_weights_follow_the_modules_own_initialization():
    model = nn.Sequential(nn.Linear(300, 400))
    with capture.random_weights(model):
        output = model(torch.eye(300))
    assert float((output - output.mean(0)).std()) == pytest.approx(
        1 / math.sqrt(3 * 300), rel=0.02
    )  # uniform in +-1/sqrt(300)


def test_passes_keep_within_their_budget():
    widths = [576, 576, 1536, 576, 1536]
    found = capture.passes(widths, samples=100, examples=28, budget=4 * 128 * 2200)
    assert found == [[0, 1], [2, 3], [4]]
    assert all(sum(4 * widths[i] * 128 for i in group) <= 4 * 128 * 2200 for group in found)
    with pytest.raises(ValueError, match="raise the budget or sample fewer rows"):
        capture.passes(widths, 100, 28, 4 * 128 * 1000)
