"""Slices of experts, parameters of shape (experts, out, in), against transformers' own
implementations.
"""

from __future__ import annotations

import copy
import io
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slicefine import (
    SliceAdamW,
    SliceLayer,
    get_slice_model,
    list_targets,
    track_memory,
)
from tests.families import MOE

transformers: Any = pytest.importorskip("transformers", minversion="5.0")
from transformers.integrations.moe import use_experts_implementation

from tests.configs import slices_alone

EXPERTS, WIDTH, INNER, TOKENS, K = 4, 12, 10, 9, 2
NAMES = ["experts.gate_up_proj", "experts.down_proj"]


def make_experts(
    gate: bool = True, bias: bool = False, norm: bool = False, transposed: bool = False
) -> Any:
    """A module of experts as transformers makes them, and the loop over experts that says what it
    computes.
    """

    class ToyExperts(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.num_experts, self.act_fn = EXPERTS, nn.SiLU()
            inner = 2 * INNER if gate else INNER
            name = "gate_up_proj" if gate else "up_proj"
            self.register_parameter(
                name, nn.Parameter(torch.randn(EXPERTS, inner, WIDTH) * 0.3)
            )
            self.down_proj = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER) * 0.3)
            if bias:
                self.register_parameter(
                    f"{name}_bias", nn.Parameter(torch.randn(EXPERTS, inner))
                )
                self.down_proj_bias = nn.Parameter(torch.randn(EXPERTS, WIDTH))
            if norm:
                self.post_expert_norm = nn.LayerNorm(WIDTH)

        def forward(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            out = []
            for token, experts, shares in zip(hidden, index, weights, strict=True):
                total = torch.zeros_like(token)
                for e, share in zip(experts, shares, strict=True):
                    first = self.gate_up_proj if gate else self.up_proj
                    h = first[e] @ token
                    h = (
                        h + (self.gate_up_proj_bias if gate else self.up_proj_bias)[e]
                        if bias
                        else h
                    )
                    h = self.act_fn(h[:INNER]) * h[INNER:] if gate else self.act_fn(h)
                    y = self.down_proj[e] @ h
                    y = y + self.down_proj_bias[e] if bias else y
                    total = total + share * (self.post_expert_norm(y) if norm else y)
                out.append(total)
            return torch.stack(out)

    decorated: Any = use_experts_implementation(
        ToyExperts,
        has_gate=gate,
        has_bias=bias,
        has_post_expert_norm=norm,
        is_transposed=transposed,
    )
    model = nn.Module()
    model.experts = decorated(SimpleNamespace(_experts_implementation="eager"))
    model.forward = lambda *args, m=model: m.experts(*args)
    return model.double()


def routed(
    seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens and their experts; expert 2 gets none."""
    generator = torch.Generator().manual_seed(seed)
    choice = torch.tensor([0, 1, 3])
    index = torch.stack(
        [choice[torch.randperm(3, generator=generator)[:K]] for _ in range(TOKENS)]
    )
    return (
        torch.randn(TOKENS, WIDTH, generator=generator).to(dtype),
        index,
        torch.rand(TOKENS, K, generator=generator).to(dtype),
    )


@pytest.mark.parametrize("mode", ["ascending", "gradient", "magnitude"])
@pytest.mark.parametrize(
    "options", [{}, {"gate": False}, {"bias": True}, {"norm": True}], ids=str
)
def test_it_trains_as_the_masked_gradient_of_a_plain_loop_does(options, mode):
    plain = make_experts(**options)
    first = "gate_up_proj" if options.get("gate", True) else "up_proj"
    model = copy.deepcopy(plain)
    model.forward = lambda *args: model.experts(*args)
    config = slices_alone(
        r=4,
        switch_interval=2,
        switch_mode=mode,
        target_modules=[],
        target_parameters=[first, "down_proj"],
        bias="slice_only",
    )
    get_slice_model(model, config)
    experts, layers = (
        model.experts,
        {n: model.experts.slice_of(n) for n in (first, "down_proj")},
    )
    weights = {n: plain.experts.get_parameter(n) for n in layers}
    biases = [p for n, p in plain.experts.named_parameters() if n.endswith("proj_bias")]
    dense = torch.optim.AdamW([*weights.values(), *biases], lr=1e-2, weight_decay=0.0)
    optimizer = SliceAdamW(model.parameters(), lr=1e-2)
    before = copy.deepcopy(plain.state_dict())
    visited = {
        n: torch.zeros(WIDTH if n == first else INNER, dtype=torch.bool) for n in weights
    }
    where = set()
    for step in range(7):
        cols = {n: layer.cols.clone() for n, layer in layers.items()}
        where.add(str(cols))
        losses = []
        for module, update in ((plain, dense), (model, optimizer)):
            update.zero_grad()
            hidden, index, shares = routed(step % 2)
            hidden.requires_grad_(True)
            loss = (module.experts(hidden, index, shares) - 1).square().mean()
            loss.backward()
            losses.append((loss.item(), hidden.grad))
            for n, weight in weights.items() if module is plain else ():
                mask = torch.zeros(weight.shape[-1], dtype=torch.bool)
                mask[cols[n]] = True
                weight.grad.mul_(mask)
                visited[n] |= mask
            update.step()
        assert abs(losses[0][0] - losses[1][0]) < 1e-12
        torch.testing.assert_close(losses[1][1], losses[0][1], rtol=0, atol=1e-12)
        for n, layer in layers.items():
            if not torch.equal(layer.cols, cols[n]):
                dense.state.pop(weights[n], None)
    assert len(where) == 3 if mode == "ascending" else len(where) > 1
    after = {f"experts.{n}": v for n, v in experts.state_dict().items()}
    for n, weight in weights.items():
        key = f"experts.{n}"
        torch.testing.assert_close(after[key], weight.detach(), rtol=0, atol=1e-12)
        assert torch.equal(after[key][..., ~visited[n]], before[key][..., ~visited[n]])
        assert torch.equal(after[key][2], before[key][2]), (
            "an expert without tokens has no gradient"
        )
        assert not torch.equal(after[key][0], before[key][0])


def qwen3(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    sizes = MOE | {
        "moe_intermediate_size": 16
    }  # torch's grouped_mm wants rows of 16 bytes in bfloat16
    config = transformers.Qwen3MoeConfig(**sizes, num_experts=4)
    return transformers.AutoModelForCausalLM.from_config(
        config, dtype=dtype
    ).eval()  # rotary buffers stay float32


IDS = torch.arange(1, 13).view(2, 6)
CONFIG = slices_alone(r=4, switch_interval=2, target_parameters=NAMES)


def train(model: Any, steps: int = 5, **options: Any) -> list[float]:
    optimizer, losses = SliceAdamW(model.parameters(), lr=1e-2, **options), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bit_equal_to_the_default_implementation_before_and_after(dtype, tmp_path):
    model = qwen3(dtype)
    assert model.config._experts_implementation == "grouped_mm"
    keys, before = list(model.state_dict()), model(IDS).logits
    get_slice_model(model, CONFIG)
    assert torch.equal(model(IDS).logits, before)
    losses = train(model)
    assert losses[-1] < losses[0]
    trained = model(IDS).logits
    model.save_pretrained(tmp_path, whole_model=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype).eval()
    assert torch.equal(loaded(IDS).logits, trained)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(twin(IDS).logits, trained)
        train(twin, 1)
        assert not torch.equal(twin(IDS).logits, trained) and torch.equal(
            model(IDS).logits, trained
        )
    fresh = get_slice_model(qwen3(dtype), CONFIG)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(IDS).logits, trained)
    merged = model.merge_and_unload()
    assert torch.equal(merged(IDS).logits, trained) and list(merged.state_dict()) == keys
    assert repr(merged) == repr(qwen3(dtype)) and not any(
        isinstance(m, SliceLayer) for m in merged.modules()
    )


def test_autocast_and_checkpointing():
    plain, model = qwen3(), get_slice_model(qwen3(), CONFIG)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(IDS).logits, plain(IDS).logits)
        assert train(model)[-1] < train(get_slice_model(qwen3(), CONFIG), 1)[0]
    reference, checkpointed = (
        get_slice_model(qwen3(), CONFIG),
        get_slice_model(qwen3(), CONFIG).train(),
    )
    enable = "activation_checkpointing_enable"  # transformers' new name
    getattr(
        checkpointed,
        enable if hasattr(checkpointed, enable) else "gradient_checkpointing_enable",
    )()
    assert train(reference) == train(checkpointed)


def test_no_gradient_of_all_experts_exists():
    """Peak memory of a forward and backward pass beyond the weights; the dense run holds two
    gradients of all experts.
    """
    width, inner = 64, 128
    sizes = MOE | {
        "hidden_size": width,
        "moe_intermediate_size": inner,
        "num_hidden_layers": 1,
        "head_dim": 32,
    }
    peaks = []
    for slices in (False, True):
        torch.manual_seed(0)
        model: Any = transformers.Qwen3MoeForCausalLM(
            transformers.Qwen3MoeConfig(**sizes, num_experts=16)
        )
        model.requires_grad_(False)
        if slices:
            get_slice_model(
                model, slices_alone(r=4, target_modules=[], target_parameters=NAMES)
            )
        else:
            for name in NAMES:
                model.get_parameter(f"model.layers.0.mlp.{name}").requires_grad_(True)
        with track_memory(model.parameters()) as report:
            model(IDS, labels=IDS).loss.backward()
        peaks.append(report.peak_bytes - report.bytes_before)
    every = 16 * 3 * inner * width * 4
    assert peaks[0] > every and peaks[1] < every / 4


@pytest.mark.filterwarnings("ignore:experts stay as they are")
def test_what_is_refused():
    model = get_slice_model(qwen3(), CONFIG)
    with pytest.raises(
        RuntimeError, match="optimizer_in_bwd=True does not work with target_parameters"
    ):
        train(model, optimizer_in_bwd=True)
    refuse = lambda message: pytest.raises(ValueError, match=message)
    cases = [
        (
            "slice_type is 'row'; experts take column slices only",
            {"slice_type": "row", "target_parameters": NAMES},
        ),
        (
            "'expert.gate_up': nothing matches; nearest names: .*gate_up_proj",
            {"target_parameters": ["expert.gate_up"]},
        ),
        (
            "q_proj.weight is the weight of a linear layer; name the layer in target_modules",
            {"target_parameters": ["q_proj.weight"]},
        ),
        (
            (
                r"gate.weight cannot become a slice: it is a parameter of shape \(4, 16\) of a"
                r" Qwen3MoeTopKRouter; only projections"
            ),
            {"target_parameters": ["mlp.gate.weight"]},
        ),
        (
            "width 17 does not fit a weight of shape",
            {"r": 17, "target_modules": [], "target_parameters": NAMES},
        ),
    ]
    for message, options in cases:
        model = qwen3()
        with refuse(message):
            get_slice_model(model, slices_alone(**{"r": 4, **options}))
        assert (
            all(p.requires_grad for p in model.parameters())
            and type(model) is transformers.Qwen3MoeForCausalLM
        )
    with refuse("store their weights transposed"):
        get_slice_model(
            make_experts(transposed=True),
            slices_alone(r=4, target_modules=[], target_parameters=["down_proj"]),
        )
    with pytest.raises(
        TypeError,
        match="target_parameters is 'experts'; expected a list of parameter names",
    ):
        slices_alone(target_parameters="experts")  # pyright: ignore[reportArgumentType]
    parallel = get_slice_model(
        make_experts(),
        slices_alone(r=4, target_modules=[], target_parameters=["down_proj"]),
    )
    parallel.experts._is_expert_parallel = True
    with pytest.raises(RuntimeError, match="expert parallelism"):
        parallel.experts(*routed())
    parallel.experts._is_expert_parallel = False
    hidden, index, shares = routed()
    index[0, 0] = EXPERTS
    with pytest.raises(
        RuntimeError, match="a token asks for expert 4; there are experts 0 to 3"
    ):
        parallel.experts(hidden, index, shares)


def test_experts_that_no_entry_names_are_pointed_out():
    message = (
        r"experts stay as they are; to train them too: target_parameters=\['experts.gate_up_proj',"
        r" 'experts.down_proj'\]"
    )
    with pytest.warns(UserWarning, match=message):
        get_slice_model(qwen3(), slices_alone(r=4))
    with pytest.warns(UserWarning, match=r"target_parameters=\['experts.gate_up_proj'\]"):
        model = get_slice_model(
            qwen3(), slices_alone(r=4, target_parameters=["experts.down_proj"])
        )
    assert isinstance(model.model.layers[0].mlp.experts.gate_up_proj, nn.Parameter)
    assert train(model)[-1] < train(get_slice_model(qwen3(), CONFIG), 1)[0]
    for deliberate in ({"target_modules": ["q_proj"]}, {"exclude_modules": ["experts"]}):
        get_slice_model(qwen3(), slices_alone(r=4, **deliberate))  # no warning
    rows = {
        m.name: (m.out_features, m.in_features, m.parameters)
        for m in list_targets(qwen3(), CONFIG)
    }
    assert rows["model.layers.0.mlp.experts.down_proj"] == (4 * 16, 16, 4 * 16 * 4)
