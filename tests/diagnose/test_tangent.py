"""Slice tangents: equal to torch.func, the papers' ranks, and the sharp number of examples."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call, jacrev, vmap

from slicefine import track_memory
from slicefine.diagnose import tangent
from slicefine.diagnose.capture import linear_layers
from slicefine.diagnose.tangent import (
    model_outputs,
    sample_size,
    slice_gram,
    slice_jacobian,
    tangent_rank,
)

WHOLE = (None, None)


class Attention(nn.Module):
    """Self-attention and an MLP with an activation in place, mean over positions: (n, T, d) -> (n,
    C).
    """

    def __init__(self, d=12, classes=3):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(d, d) for _ in range(4))
        self.up, self.down, self.head = (
            nn.Linear(d, 2 * d),
            nn.Linear(2 * d, d),
            nn.Linear(d, classes),
        )
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        h = x + self.o(
            torch.softmax(self.q(x) @ self.k(x).mT / math.sqrt(x.shape[-1]), -1) @ self.v(x)
        )
        h = h + self.down(self.act(self.up(h)))
        return self.head(h.mean(-2))


def by_torch_func(model, slices, x):
    """The same J by jacrev and vmap over the whole weights, of which the slices' entries are kept."""
    state = dict(model.named_parameters())
    names = [f"{name}.weight" for name in slices]

    def f(weights, sample):
        return functional_call(model, {**state, **weights}, (sample.unsqueeze(0),))[0]

    jacobian = vmap(jacrev(f), in_dims=(None, 0))({n: state[n].detach() for n in names}, x)
    parts = []
    for name, (rows, cols) in slices.items():
        j = jacobian[f"{name}.weight"]  # [n, C, out, in]
        j = j if rows is None else j[:, :, rows]
        j = j if cols is None else j[..., cols]
        parts.append(j.flatten(2).flatten(0, 1))
    return torch.cat(parts, 1).detach()


SLICES = {
    "q": (None, torch.tensor([2, 3, 4])),
    "v": (torch.tensor([0, 5]), None),
    "up": (torch.tensor([1, 2, 20]), torch.tensor([4, 7])),
    "down": (None, torch.tensor([0, 9])),
    "head": (torch.tensor([1]), None),
}


def test_jacobian_and_gram_equal_torch_func():
    model, x = Attention().double(), torch.randn(6, 5, 12, dtype=torch.float64)
    expected = by_torch_func(model, SLICES, x)
    batches = [{"x": x[:4]}, {"x": x[4:]}]
    flags = [p.requires_grad for p in model.parameters()]
    found = slice_jacobian(model, SLICES, batches)
    assert found.shape == (18, 12 * 3 + 2 * 12 + 3 * 2 + 12 * 2 + 12)
    assert float((found - expected).abs().max()) < 1e-12 * float(expected.abs().max())
    for chunk in (1, 1000, 1 << 20):
        gram = slice_gram(model, SLICES, batches, chunk_bytes=chunk)
        assert float((gram - expected @ expected.t()).abs().max()) < 1e-12 * float(
            gram.abs().max()
        )
    assert [p.requires_grad for p in model.parameters()] == flags and model.training
    assert not any(m._forward_hooks for m in model.modules())


def test_a_layer_that_is_called_twice_and_batches_of_other_lengths():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(torch.tanh(self.shared(torch.tanh(self.shared(x)))).mean(-2))

    model = Twice().double()
    slices = {"shared": (None, torch.tensor([1, 3]))}
    short, long = (
        torch.randn(3, 2, 4, dtype=torch.float64),
        torch.randn(2, 5, 4, dtype=torch.float64),
    )
    expected = torch.cat(
        [by_torch_func(model, slices, short), by_torch_func(model, slices, long)]
    )
    found = slice_jacobian(model, slices, [{"x": short}, {"x": long}])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    gram = slice_gram(model, slices, [{"x": short}, {"x": long}])
    torch.testing.assert_close(gram, expected @ expected.t(), rtol=1e-12, atol=1e-14)


def test_memory_is_that_of_the_slice():
    """64 examples, 10 outputs, a layer of 128 x 128: J of a slice of 8 columns, against
    torch.func's of the whole weight.
    """
    model = nn.Sequential(nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 10))
    x = torch.randn(64, 128)
    slices = {"0": (None, torch.arange(8))}
    with track_memory(model=model) as hooked:
        jacobian = slice_jacobian(model, slices, [{"input": x}])
    with track_memory(model=model) as gram_only:
        slice_gram(model, slices, [{"input": x}])
    expected = by_torch_func(model, slices, x)
    torch.testing.assert_close(jacobian, expected, rtol=1e-4, atol=1e-6)
    size = jacobian.numel() * 4
    extra = lambda report: report.peak_bytes - report.bytes_before
    assert (
        extra(hooked) < 3.2 * size
    )  # J, its copy while batches are joined, the gradients at the outputs
    assert (
        4 * 64 * 10 * model[0].weight.numel() == 16 * size
    )  # J of the layer, which never exists
    # the Gram matrix: no J, but its own (640, 640) in float64, three at a time
    assert extra(gram_only) < 3.5 * 8 * 640**2


def ranks(model, x, slices=None):
    slices = slices or {layer.name: WHOLE for layer in linear_layers(model)}
    found = tangent_rank(model, slices, [{"x": x}])
    exact = int(
        torch.linalg.matrix_rank(slice_jacobian(model, slices, [{"x": x}]), rtol=1e-9)
    )
    assert found.rank == exact
    return found.rank


class Convolution(nn.Module):
    """sum_s a_s . tanh(w x_{s..s+2} + b) over three places; w shared, or one w for each place. The
    last input of a place is 1.
    """

    def __init__(self, width, shared):
        super().__init__()
        self.kernels = nn.ModuleList(
            nn.Linear(4, width, bias=False) for _ in range(1 if shared else 3)
        )
        self.out = nn.Linear(3 * width, 1, bias=False)

    def forward(self, x):
        places = torch.stack(
            [torch.cat([x[:, s : s + 3], torch.ones_like(x[:, :1])], 1) for s in range(3)],
            1,
        )
        if len(self.kernels) == 1:
            hidden = self.kernels[0](places)
        else:
            hidden = torch.stack(
                [kernel(places[:, s]) for s, kernel in enumerate(self.kernels)], 1
            )
        return self.out(torch.tanh(hidden).flatten(1))


class Dense(nn.Module):
    """a . tanh(W x + b); the last input is 1."""

    def __init__(self, d, width):
        super().__init__()
        self.hidden, self.out = (
            nn.Linear(d + 1, width, bias=False),
            nn.Linear(width, 1, bias=False),
        )

    def forward(self, x):
        return self.out(
            torch.tanh(self.hidden(torch.cat([x, torch.ones_like(x[:, :1])], 1)))
        )


@pytest.mark.parametrize("times", [1, 3, 10])
def test_the_tangent_ranks_of_one_function_in_three_families_are_7_15_and_21(times):
    """f(x) = sum_s tanh(.6 x_s + .8 x_{s+1} + x_{s+2}), d = 5, embedded in networks of any width
    (figure 3 of arXiv 2406.18035).
    """
    kernel, x = (
        torch.tensor([0.6, 0.8, 1.0, 0.0], dtype=torch.float64),
        torch.randn(80, 5, dtype=torch.float64),
    )
    shared, own, dense = (
        Convolution(times, True).double(),
        Convolution(times, False).double(),
        Dense(5, 3 * times).double(),
    )
    with torch.no_grad():
        for model in (shared, own, dense):
            for parameter in model.parameters():
                parameter.zero_()
        for convolution in (shared, own):
            for part in convolution.kernels:
                part.weight[0] = kernel
            convolution.out.weight[0, ::times] = 1.0
        for s in range(3):
            dense.hidden.weight[s, s : s + 3] = kernel[:3]
            dense.out.weight[0, s] = 1.0
    torch.testing.assert_close(shared(x), dense(x))
    torch.testing.assert_close(shared(x), own(x))
    assert [ranks(m, x) for m in (shared, own, dense)] == [7, 15, 21]


@pytest.mark.parametrize(
    ("d", "k", "width"),
    [(5, 1, 2), (5, 2, 10), (5, 3, 30), (8, 1, 30), (8, 2, 4), (8, 3, 12)],
)
def test_a_target_of_k_neurons_has_rank_k_times_d_plus_1(d, k, width):
    """Theorem 5: two-layer tanh without bias, whatever the width; neurons split in two and neurons
    that are null.
    """
    model = nn.Sequential(
        nn.Linear(d, width, bias=False), nn.Tanh(), nn.Linear(width, 1, bias=False)
    ).double()
    w, a = torch.randn(k, d, dtype=torch.float64), torch.rand(k, dtype=torch.float64) + 0.5
    with torch.no_grad():
        model[0].weight.zero_()
        model[2].weight.zero_()
        model[0].weight[:k], model[2].weight[0, :k] = w, a
        if width >= 2 * k:  # split: the same neuron again, with a part of its output
            model[0].weight[k : 2 * k] = w
            model[2].weight[0, :k], model[2].weight[0, k : 2 * k] = 0.3 * a, 0.7 * a
    x = torch.randn(120, d, dtype=torch.float64)
    found = tangent_rank(model, {"0": WHOLE, "2": WHOLE}, [{"input": x}])
    assert found.rank == k * (d + 1) and found.n_min == k * (d + 1) and not found.saturated
    # invisible to fewer examples, visible to as many
    target = lambda n: tangent_rank(
        model, {"0": WHOLE, "2": WHOLE}, [{"input": x[:60]}], [{"input": x[60 : 60 + n]}]
    )
    assert target(k * (d + 1)).invisible < 1e-3 and target(k * (d + 1)).train_rank == k * (
        d + 1
    )
    assert (
        target(k * (d + 1) - 1).invisible > 0.01
        and target(k * (d + 1) - 1).train_rank == k * (d + 1) - 1
    )


def test_products_of_matrices_have_rank_2kd_minus_k_squared():
    found = []
    for k in (1, 2, 3, 4):
        model = nn.Sequential(
            nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        ).double()
        with torch.no_grad():
            model[0].weight[k:], model[1].weight[:, k:] = 0.0, 0.0
        slices = {"0": WHOLE, "1": WHOLE}
        found.append(
            tangent_rank(model, slices, [{"input": torch.eye(4, dtype=torch.float64)}]).rank
        )
    assert found == [7, 12, 15, 16]


def levenberg_marquardt(weight, base, head, x, y, rows, steps=60):
    """Fit rows of a two-layer tanh network to targets from the pretrained point; J by torch.func."""

    def f(part):
        return (torch.tanh(x @ torch.cat([part, weight[rows:]]).t()) @ head.t()).flatten()

    part, damping = base.clone(), 1e-3
    error = f(part) - y
    for _ in range(steps):
        jacobian = jacrev(f)(part).flatten(1)
        step = torch.linalg.solve(
            jacobian.t() @ jacobian + damping * torch.eye(part.numel()).double(),
            jacobian.t() @ error,
        )
        trial = part - step.view_as(part)
        trial_error = f(trial) - y
        if trial_error.square().sum() < error.square().sum():
            part, error, damping = trial, trial_error, max(damping / 5, 1e-14)
        else:
            damping *= 4
        if error.abs().max() < 1e-13:
            break
    return part


@pytest.mark.parametrize(
    ("d", "m", "r", "C", "n_min"), [(8, 16, 2, 3, 8), (8, 16, 4, 3, 11), (6, 32, 4, 10, 6)]
)
def test_recovery_of_a_slice_jumps_from_0_to_1_at_n_min(d, m, r, C, n_min):
    """Targets are the same network with r rows changed by 30 %; only the slice trains, from the
    pretrained point.
    """
    successes = {n_min - 1: 0, n_min: 0}
    for seed in range(6):
        torch.manual_seed(seed)
        draw = lambda *shape: torch.randn(*shape, dtype=torch.float64)
        weight, head = draw(m, d) / math.sqrt(d), draw(C, m) / math.sqrt(m)
        change = draw(r, d)
        target = weight[:r] + 0.3 * change * weight[:r].norm() / change.norm()
        model = nn.Sequential(
            nn.Linear(d, m, bias=False), nn.Tanh(), nn.Linear(m, C, bias=False)
        ).double()
        with torch.no_grad():
            model[0].weight.copy_(torch.cat([target, weight[r:]]))
            model[2].weight.copy_(head)
        pool = draw(100, d)
        report = tangent_rank(model, {"0": (torch.arange(r), None)}, [{"input": pool}], r=r)
        assert (report.rank, report.n_min, report.advised) == (r * d, n_min, 2 * r * d)
        for n in successes:
            x = draw(n, d)
            y = model(x).detach().flatten()
            fitted = levenberg_marquardt(weight, weight[:r], head, x, y, r)
            unseen = torch.tanh(pool @ torch.cat([fitted, weight[r:]]).t()) @ head.t()
            successes[n] += int((unseen - model(pool)).abs().max() < 1e-6)
    assert successes == {n_min - 1: 0, n_min: 6}


def test_outputs():
    logits = torch.randn(4, 5)
    batch = {"x": torch.zeros(4)}
    assert torch.equal(model_outputs("logits")(logits, batch), logits)
    contrast = model_outputs("contrast")(logits, batch)
    torch.testing.assert_close(contrast, (logits - logits.mean(1, keepdim=True))[:, :4])
    positions = torch.randn(2, 3, 5)
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    found = model_outputs()(positions, {"attention_mask": mask})
    assert torch.equal(found, torch.stack([positions[0, 1], positions[1, 2]]))
    projected = model_outputs(3)(logits, batch)
    assert projected.shape == (4, 3) and torch.equal(
        projected, model_outputs(3)(logits, batch)
    )
    with pytest.raises(ValueError, match="expected 'logits', 'contrast' or a number"):
        model_outputs("probabilities")


def test_a_pool_that_is_too_small_says_so():
    model = nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 2)).double()
    report = tangent_rank(
        model, {"0": (None, torch.arange(5))}, [{"input": torch.randn(8, 10).double()}]
    )
    assert report.saturated and report.rank == 16 and "too small" in report.verdict
    assert (
        report.parameters == 100
        and report.spectrum[0] == 1.0
        and len(report.spectrum) == 16
    )


def test_label_alignment_and_the_share_of_the_top():
    torch.manual_seed(1)
    jacobian, targets = (
        torch.randn(12, 7, dtype=torch.float64),
        torch.randn(6, 2, dtype=torch.float64),
    )
    singular = torch.linalg.svdvals(jacobian)
    expected = (
        (jacobian.t() @ targets.flatten()).square().sum()
        / targets.square().sum()
        / singular[0].square()
    )
    gram = jacobian @ jacobian.t()
    assert tangent.label_alignment(gram, targets) == pytest.approx(float(expected))
    assert tangent.label_alignment(
        gram, torch.linalg.svd(jacobian).U[:, 0].view(6, 2)
    ) == pytest.approx(1.0)
    share = singular.square()[:5].sum() / singular.square().sum()
    assert tangent.report_from_gram(gram, 6, 2, 7).top_share == pytest.approx(float(share))
    with pytest.raises(
        ValueError, match="targets have 4 entries and the Gram matrix 12 rows"
    ):
        tangent.label_alignment(gram, targets[:2])


def test_errors():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    batch = [{"input": torch.randn(2, 3)}]
    with pytest.raises(ValueError, match="no linear layers called 7; there are 0, 1"):
        slice_jacobian(model, {"7": WHOLE}, batch)
    with pytest.raises(ValueError, match="tolerance is 1e-12"):
        tangent_rank(model, {"0": WHOLE}, batch, tolerance=1e-12)
    with pytest.raises(ValueError, match="expected at least 1"):
        sample_size(0, 1)
    with pytest.raises(ValueError, match="slices is empty"):
        slice_gram(model, {}, batch)
    with pytest.raises(ValueError, match="expected \\(examples, C\\)"):
        slice_gram(model, {"0": WHOLE}, batch, outputs=lambda result, batch: result.sum(1))
    assert tangent.slice_of(linear_layers(model)[0], 2, "column", 1)[1].tolist() == [1, 2]
    assert (
        sample_size(32, 3, 4) == (11, 64)
        and sample_size(24, 10, 4) == (6, 48)
        and sample_size(5, 2) == (3, 10)
    )
