"""A lean model: the same losses and gradients, less kept, and back to what it was."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

transformers = pytest.importorskip("transformers")

import slicefine
import slicefine.lean
from slicefine import SliceAdamW, SliceConfig, get_slice_model, track_memory
from slicefine.backends import lean_reference as reference
from slicefine.lean import modules
from slicefine.lean.loss import ChunkedCrossEntropy, LazyLogits
from slicefine.ops import use_backend
from slicefine.swapping import slice_layers
from tests.configs import slices_alone

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SIZES | {"num_key_value_heads": 2, "head_dim": 8}
SMALL_GPT = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4}
SMALL_GPT |= {"bos_token_id": 1, "eos_token_id": 2}
SMALL_GPT |= dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
IMAGE = {k: v for k, v in SIZES.items() if not k.endswith(("token_id", "vocab_size"))}

# model class, config class, options, norms, gated MLPs, activations, whether the loss is lean
FAMILIES = {
    "Llama": ("LlamaForCausalLM", "LlamaConfig", GROUPED, 5, 2, 0, True),
    "Qwen2": ("Qwen2ForCausalLM", "Qwen2Config", GROUPED, 5, 2, 0, True),
    "Qwen3": ("Qwen3ForCausalLM", "Qwen3Config", GROUPED, 9, 2, 0, True),
    "Mistral": ("MistralForCausalLM", "MistralConfig", GROUPED, 5, 2, 0, True),
    "Gemma": ("GemmaForCausalLM", "GemmaConfig", GROUPED, 5, 2, 0, True),
    "Gemma 2": ("Gemma2ForCausalLM", "Gemma2Config", GROUPED, 9, 2, 0, True),
    "Gemma 3": ("Gemma3ForCausalLM", "Gemma3TextConfig", GROUPED, 13, 2, 0, True),
    "Phi-3": ("Phi3ForCausalLM", "Phi3Config", GROUPED, 5, 2, 0, True),
    "Phi": ("PhiForCausalLM", "PhiConfig", SIZES, 0, 0, 2, True),
    "Cohere": ("CohereForCausalLM", "CohereConfig", GROUPED, 0, 2, 0, True),
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", SMALL_GPT, 0, 0, 2, True),
    "BERT": ("BertForMaskedLM", "BertConfig", SIZES | NO_DROPOUT, 0, 0, 0, True),
    "BERT classifier": (
        "BertForSequenceClassification",
        "BertConfig",
        SIZES | NO_DROPOUT,
        0,
        0,
        0,
        False,
    ),
    "ViT": (
        "ViTForImageClassification",
        "ViTConfig",
        IMAGE | NO_DROPOUT | {"image_size": 16, "patch_size": 8},
        0,
        0,
        0,
        False,
    ),
}


def build(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    kind, config, options, *_ = FAMILIES[name]
    torch.manual_seed(0)
    made = getattr(transformers, config)(**options)
    made._attn_implementation = "eager"
    for key in ("attention_dropout", "resid_pdrop", "embd_pdrop", "hidden_dropout"):
        if hasattr(made, key):
            setattr(made, key, 0.0)
    model = getattr(transformers, kind)(made).to(dtype).train()
    for parameter in model.parameters():
        # ones and zeros would hide a forgotten weight
        with torch.no_grad():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


class ExactRMSNorm(nn.Module):
    """transformers' norms without their float32 in the middle."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight = norm.weight
        self.eps = getattr(norm, "eps", None) or norm.variance_epsilon
        self.offset = 1.0 if "Gemma" in type(norm).__name__ else 0.0

    def forward(self, x):
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        return normed * (self.offset + self.weight)


def exact(model: nn.Module) -> nn.Module:
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                setattr(parent, name, ExactRMSNorm(child))
    return model


def batch(name: str) -> dict:
    torch.manual_seed(1)
    if name == "ViT":
        return {"pixel_values": torch.randn(3, 3, 16, 16, dtype=torch.float64)}
    return {"input_ids": torch.randint(3, 97, (2, 17))}


def loss_of(model: nn.Module, name: str, **options) -> torch.Tensor:
    """A user's own loss, without the float32 of transformers' own."""
    logits = model(**batch(name)).logits
    if logits.dim() == 2:
        return F.cross_entropy(logits, torch.arange(len(logits)) % 2)
    labels = batch(name)["input_ids"].clone()
    labels[:, :5] = -100
    shifted = logits[..., :-1, :].contiguous().view(-1, 97)
    return F.cross_entropy(shifted, labels[:, 1:].reshape(-1), **options)


def gradients(model: nn.Module, name: str, **options) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss = loss_of(model, name, **options)
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {**found, "loss": loss.detach()}


def assert_equal(found: dict, wanted: dict, tolerance: float = 1e-10) -> None:
    assert found.keys() == wanted.keys() and len(wanted) > 1
    for name, value in wanted.items():
        assert (found[name] - value).abs().max() <= tolerance * (1 + value.abs().max()), (
            name
        )


@pytest.mark.filterwarnings("ignore:classifier is fully trained")
@pytest.mark.parametrize("first", ["slices first", "lean first"])
@pytest.mark.parametrize("slice_type", ["column", "row"])
@pytest.mark.parametrize("name", FAMILIES)
def test_losses_and_gradients_are_the_same(name, slice_type, first):
    config = SliceConfig(r=4, slice_type=slice_type, bias="slice_only")
    plain = get_slice_model(exact(build(name)), config)
    wanted = gradients(plain, name)
    model = exact(build(name))
    steps = [
        lambda m: get_slice_model(m, config),
        lambda m: slicefine.lean(m, verbose=False),
    ]
    for step in steps if first == "slices first" else steps[::-1]:
        step(model)
    report = model._lean_report
    *_, norms, mlps, activations, loss = FAMILIES[name]
    assert report.left.keys() <= {"loss"} or name == "Cohere"
    counts = (
        len(report.norms),
        len(report.mlps),
        len(report.activations),
        report.loss is not None,
    )
    assert counts == (norms, mlps, activations, loss)
    assert_equal(gradients(model, name), wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["Llama", "Gemma 2", "Phi-3", "Cohere", "GPT-2", "BERT"])
def test_the_models_own_loss_in_low_precision(name, dtype):
    """Against float64: the lean step's error is at most twice the stock step's, in norm."""
    config = SliceConfig(r=4)
    found = {}
    for key, kind in (("exact", torch.float64), ("stock", dtype), ("lean", dtype)):
        model = get_slice_model(build(name).to(dtype).to(kind), config)
        if key == "lean":
            slicefine.lean(model, verbose=False)
        labels = batch(name)["input_ids"].clone()
        labels[:, :5] = -100
        output = model(**batch(name), labels=labels)
        assert isinstance(output.logits, LazyLogits) == (key == "lean")
        output.loss.backward()
        grads = [
            p.grad.double().flatten() for p in model.parameters() if p.grad is not None
        ]
        found[key] = torch.cat([output.loss.detach().double().flatten(), *grads])
    error = lambda key: (found[key] - found["exact"]).norm()
    one_rounding = torch.finfo(torch.float32).eps * found["exact"][0]
    assert 0 < error("lean") <= 2 * error("stock") + one_rounding


# attention: features that attention does not keep itself, and a row slice behind it does
@pytest.mark.parametrize(
    ("name", "attention"),
    [("Llama", 0), ("Qwen3", 0), ("GPT-2", 0), ("BERT", 0), ("Gemma 2", 64)],
)
@pytest.mark.parametrize("slice_type", ["row", "row_column"])
def test_row_slices_keep_no_more_than_column_slices(name, attention, slice_type):
    kept = {}
    for kind in ("column", slice_type):
        # norms that train keep their input, whatever lean does
        config = slices_alone(r=2, slice_type=kind, switch_interval=None)
        for lean in (False, True):
            model = build(name, torch.float32)
            if not attention:
                model.set_attn_implementation("sdpa")
            get_slice_model(model, config)
            # where the coupled slice is a row slice
            for layer in slice_layers(model):
                while layer.axis == "column" and kind == "row_column":
                    layer.schedule.move(lambda axis: torch.zeros(0))
                    layer.select_slice()
            if lean:
                slicefine.lean(model, verbose=False)
            kept[kind, lean] = bytes_kept(model)
    # the input of the first layer receives no gradient, so its norm has no node to ask: 32 features
    column, tokens = kept["column", True], 4 * 64 * 4
    more = kept[slice_type, True] - column
    assert more <= (40 + attention) * tokens
    assert kept[slice_type, False] - kept["column", False] >= more + 80 * tokens


def bytes_kept(model: nn.Module) -> int:
    """Storages that the graph of a step holds and the model does not."""
    own = {p.untyped_storage().data_ptr() for p in [*model.parameters(), *model.buffers()]}
    storages: dict[int, int] = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.base_model(input_ids=torch.randint(3, 97, (4, 64)))
    return sum(storages.values())


@pytest.mark.parametrize("name", ["Llama", "GPT-2"])
def test_a_result_that_was_changed_is_kept_not_made_again(name):
    """A hook that writes to a norm's result in place, unseen by autograd."""
    config = SliceConfig(r=4, slice_type="row")

    def louder(module, args, output):
        output.detach().mul_(1.5)

    found = []
    for lean in (False, True):
        model = get_slice_model(exact(build(name)), config)
        for module_name, module in model.named_modules():
            if module_name.endswith(("input_layernorm", "ln_1")):
                module.register_forward_hook(louder)
        if lean:
            slicefine.lean(model, verbose=False)
        found.append(gradients(model, name))
    assert_equal(found[1], found[0])


@pytest.mark.parametrize("name", ["Llama", "GPT-2", "ViT"])
def test_the_graph_can_be_gone_through_twice(name):
    config = SliceConfig(r=4, slice_type="row", modules_to_save=[])
    model = get_slice_model(exact(build(name)), config)
    # torch's chunked loss refuses it
    slicefine.lean(model, loss=False, verbose=False)
    wanted = gradients(model, name)
    model.zero_grad()
    loss = loss_of(model, name)
    loss.backward(retain_graph=True)
    model.zero_grad()
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert_equal({**found, "loss": loss.detach()}, wanted, 1e-14)


@pytest.mark.parametrize("checkpoint", ["full", "selective"])
def test_row_slices_and_checkpoints(checkpoint):
    """A checkpoint lets what a layer has kept be read once."""
    config = SliceConfig(r=4, slice_type="row")
    wanted = gradients(get_slice_model(exact(build("Llama")), config), "Llama")
    model = get_slice_model(exact(build("Llama")), config)
    slicefine.lean(model, checkpoint=checkpoint, verbose=False)
    assert_equal(gradients(model, "Llama"), wanted)


def test_it_is_undone_exactly():
    model = build("Llama")
    before = [(type(m), set(vars(m))) for m in model.modules()]
    hooks = lambda: [
        len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()
    ]
    state, wanted, had = model.state_dict(), gradients(model, "Llama"), hooks()
    slicefine.lean(model, checkpoint="full", verbose=False)
    assert [type(m) for m in model.modules()] != [kind for kind, _ in before]
    slicefine.lean.undo(model)
    assert [(type(m), set(vars(m))) for m in model.modules()] == before and hooks() == had
    assert not model.is_gradient_checkpointing
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    again = gradients(model, "Llama")
    assert all(torch.equal(again[key], wanted[key]) for key in wanted)
    with pytest.raises(ValueError, match="the model is not lean"):
        slicefine.lean.undo(model)


@pytest.mark.parametrize("first", ["slices first", "lean first"])
def test_merge_and_unload_undoes_it(first):
    model = build("Llama")
    before = [(type(m), set(vars(m))) for m in model.modules()]
    if first == "lean first":
        slicefine.lean(model, verbose=False)
    get_slice_model(model, SliceConfig(r=4))
    if first == "slices first":
        slicefine.lean(model, verbose=False)
    loss_of(model, "Llama").backward()
    model.merge_and_unload()
    assert [(type(m), set(vars(m))) for m in model.modules()] == before
    assert not isinstance(model(**batch("Llama")).logits, LazyLogits)


def test_copies_and_pickles_are_lean_by_themselves():
    model = get_slice_model(build("Llama"), SliceConfig(r=4))
    slicefine.lean(model, verbose=False)
    wanted = gradients(model, "Llama")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert isinstance(other(**batch("Llama")).logits, LazyLogits)
        # its own weights are read
        with torch.no_grad():
            other.model.layers[0].input_layernorm.weight.mul_(2)
        assert not torch.equal(gradients(other, "Llama")["loss"], wanted["loss"])
        slicefine.lean.undo(other)
    assert_equal(gradients(model, "Llama"), wanted)


def test_a_sliced_head_is_refused_by_name():
    config = SliceConfig(r=4, target_modules=["q_proj", "lm_head"])
    model = get_slice_model(build("Llama"), config)
    with pytest.raises(
        ValueError, match="lm_head is sliced, and lean's loss reads its weight"
    ):
        slicefine.lean(model)
    assert "_lean_report" not in vars(model)
    slicefine.lean(model, loss=False, verbose=False)
    assert model.lm_head.slice_weight.requires_grad
    late = slicefine.lean(build("Llama"), verbose=False)
    get_slice_model(late, config)
    with pytest.raises(ValueError, match="the head is sliced"):
        late(**batch("Llama"))


def test_what_is_wrong_is_said():
    model = build("ViT")
    with pytest.raises(ValueError, match="checkpoint is 'half'; expected None, 'full' or"):
        slicefine.lean(model, checkpoint="half")
    with pytest.raises(
        ValueError, match="Linear has none of activation_checkpointing_enable"
    ):
        slicefine.lean(nn.Linear(2, 2), checkpoint="full")
    slicefine.lean(model, verbose=False)
    with pytest.raises(ValueError, match="lean already"):
        slicefine.lean(model)


def test_it_prints_what_it_changed_and_what_it_did_not_know(capsys):
    slicefine.lean(build("Cohere"))
    said = capsys.readouterr().out
    assert "lean: the loss in chunks, without the logits of lm_head, 2 gated MLPs\n" in said
    assert (
        "model.layers.0.input_layernorm and 2 more, a CohereLayerNorm that computes" in said
    )
    slicefine.lean(build("ViT"))
    assert "lean: 7 inputs that row slices do not keep" in capsys.readouterr().out


def test_an_mlp_that_computes_something_else_stays():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj = nn.Linear(8, 12), nn.Linear(8, 12)
            self.down_proj, self.act_fn = nn.Linear(12, 8), nn.SiLU()

        def forward(self, x):
            return self.down_proj(self.act_fn(self.gate_proj(x)) * (self.up_proj(x) + 1))

    model = nn.ModuleDict({"mlp": Odd()})
    slicefine.lean(model, loss=False, verbose=False)
    assert type(model["mlp"]) is Odd
    assert (
        "an Odd" in model._lean_report.left["mlp"]
        or "a Odd" in model._lean_report.left["mlp"]
    )


@pytest.mark.parametrize("checkpoint", ["full", "selective"])
def test_checkpoints_change_nothing_but_memory(checkpoint):
    config = SliceConfig(r=4)
    ids = torch.randint(3, 97, (4, 128))
    found, peaks = {}, {}
    for how in (None, checkpoint):
        model = get_slice_model(exact(build("Llama")), config)
        slicefine.lean(model, checkpoint=how, verbose=False)
        found[how] = gradients(model, "Llama")
        with track_memory(model=model) as report:
            model(input_ids=ids, labels=ids).loss.backward()
        peaks[how] = report.peak_bytes
    assert_equal(found[checkpoint], found[None], 1e-14)
    assert peaks[checkpoint] < peaks[None]


def test_selective_keeps_more_than_full_and_computes_less():
    from torch.utils.flop_counter import FlopCounterMode

    peaks, work = {}, {}
    ids = torch.randint(3, 97, (4, 128))
    for how in (None, "full", "selective"):
        model = get_slice_model(build("Llama"), SliceConfig(r=4))
        slicefine.lean(model, checkpoint=how, verbose=False)
        with track_memory(model=model) as report:
            model(input_ids=ids, labels=ids).loss.backward()
        peaks[how] = report.peak_bytes
        with FlopCounterMode(display=False) as counter:
            model(input_ids=ids, labels=ids).loss.backward()
        work[how] = counter.get_total_flops()
    assert peaks["full"] <= peaks["selective"] < peaks[None]
    assert work[None] < work["selective"] < work["full"]


def test_it_trains_under_autocast_and_accumulates():
    torch.manual_seed(0)
    results = []
    for lean in (False, True):
        model = get_slice_model(build("Llama", torch.float32), SliceConfig(r=4))
        if lean:
            slicefine.lean(model, verbose=False)
        optimizer = SliceAdamW(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(4):
            for _ in range(2):
                with torch.autocast("cpu", torch.bfloat16):
                    ids = batch("Llama")["input_ids"]
                    loss = model(
                        input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(64)
                    ).loss
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        results.append(losses)
    stock, lean = torch.tensor(results)
    assert stock[-1] < stock[0] - 0.1
    assert (stock - lean).abs().max() <= 2e-2 * stock.max()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("without_torchs", [False, True])
def test_the_loss_in_several_chunks(monkeypatch, smoothing, reduction, without_torchs):
    """torch's chunked loss, and ours, which torch before 2.13 needs."""
    from slicefine.lean import loss as module

    monkeypatch.setattr(module, "CHUNK", 97 * 5)
    if without_torchs:
        monkeypatch.delattr(F, "linear_cross_entropy", raising=False)
    options = {"label_smoothing": smoothing, "reduction": reduction}
    model = get_slice_model(exact(build("Llama")), SliceConfig(r=4))
    wanted = gradients(model, "Llama", **options)
    slicefine.lean(model, verbose=False)
    assert_equal(gradients(model, "Llama", **options), wanted)


def test_a_capped_head_in_several_chunks(monkeypatch):
    from slicefine.lean import loss as module

    monkeypatch.setattr(module, "CHUNK", 97 * 5)
    called = []
    plain = ChunkedCrossEntropy.apply
    monkeypatch.setattr(
        ChunkedCrossEntropy, "apply", lambda *a: called.append(a) or plain(*a)
    )
    model = get_slice_model(exact(build("Gemma 2")), SliceConfig(r=4))
    wanted = gradients(model, "Gemma 2")
    slicefine.lean(model, verbose=False)
    assert_equal(gradients(model, "Gemma 2"), wanted)
    assert len(called) == 1 and len(called[0][4]) >= 3


def test_a_head_that_trains_whole_gets_its_gradient():
    config = SliceConfig(r=4, modules_to_save=["lm_head"])
    model = get_slice_model(exact(build("Llama")), config)
    wanted = gradients(model, "Llama")
    slicefine.lean(model, verbose=False)
    assert any("lm_head" in name for name in wanted)
    assert_equal(gradients(model, "Llama"), wanted)


def test_logits_are_there_when_they_are_asked_for():
    model = get_slice_model(build("Llama"), SliceConfig(r=4))
    wanted = model(**batch("Llama")).logits
    slicefine.lean(model, verbose=False)
    lazy = model(**batch("Llama")).logits
    assert isinstance(lazy, LazyLogits) and lazy.shape == wanted.shape
    assert lazy.dtype == wanted.dtype and lazy.requires_grad
    assert torch.equal(lazy.argmax(-1), wanted.argmax(-1))
    assert torch.allclose(lazy.softmax(-1).sum(-1), torch.ones(2, 17, dtype=torch.float64))
    assert (lazy[:, -1] - wanted[:, -1]).abs().max() <= 1e-6
    assert (lazy.log_softmax(-1) - wanted.log_softmax(-1)).abs().max() <= 1e-6
    model.eval()
    assert type(model(**batch("Llama")).logits) is torch.Tensor
    model.train()
    with torch.no_grad():
        assert type(model(**batch("Llama")).logits) is torch.Tensor


def test_no_tensor_as_large_as_the_logits(monkeypatch):
    """V 1,009 beside 32 features: the stock step holds logits several times over."""
    from slicefine.lean import loss as module

    monkeypatch.setattr(module, "CHUNK", 1009 * 8)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**(GROUPED | {"vocab_size": 1009}))
    ids = torch.randint(3, 1009, (2, 128))
    reports = []
    for lean in (False, True):
        model = get_slice_model(transformers.LlamaForCausalLM(config), SliceConfig(r=4))
        if lean:
            slicefine.lean(model, verbose=False)
        with track_memory(model=model, logits_width=1009) as report:
            model(input_ids=ids, labels=ids).loss.backward()
        reports.append(report)
    stock, lean = reports
    logits = 2 * 128 * 1009 * 4
    assert stock.breakdown["logits"] >= logits and lean.breakdown["logits"] < logits / 4
    assert stock.peak_bytes - lean.peak_bytes >= 2 * logits


def test_compile_is_refused_by_name_or_runs():
    model = get_slice_model(build("Llama", torch.float32), SliceConfig(r=4))
    wanted = model(**batch("Llama"), labels=batch("Llama")["input_ids"]).loss.item()
    slicefine.lean(model, loss=False, verbose=False)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager")
    loss = compiled(**batch("Llama"), labels=batch("Llama")["input_ids"]).loss
    loss.backward()
    assert abs(loss.item() - wanted) <= 1e-5 * wanted
    slicefine.lean.undo(model)
    slicefine.lean(model, verbose=False)
    torch._dynamo.reset()
    with pytest.raises(
        Exception, match="torch.compile does not take the loss of a lean model"
    ):
        torch.compile(model, backend="aot_eager")(**batch("Llama"))
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", reference.ACTIVATIONS)
def test_the_ops_against_autograd(kind):
    torch.manual_seed(0)
    gate, up = (
        torch.randn(5, 7, dtype=torch.float64, requires_grad=True) for _ in range(2)
    )
    from slicefine.lean.functions import RMSNormFunction, gated_activation

    assert torch.autograd.gradcheck(lambda g, u: gated_activation(g, u, kind), (gate, up))
    weight = torch.rand(7, dtype=torch.float64)
    for offset in (0.0, 1.0):
        norm = lambda x, o=offset: RMSNormFunction.apply(
            x, weight, 1e-6, o, True, torch.float64
        )
        assert torch.autograd.gradcheck(norm, (gate,))


@pytest.mark.parametrize("name", ["Llama", "Gemma", "Gemma 2", "Phi-3"])
def test_a_norm_rounds_as_its_own_forward_does(name):
    """In bfloat16 bit for bit: whether the weight is multiplied before or after the rounding."""
    norm = next(
        m
        for m in build(name, torch.bfloat16).modules()
        if type(m).__name__.endswith("RMSNorm")
    )
    norm.requires_grad_(False)
    x = torch.randn(50, 32, dtype=torch.bfloat16)
    wanted = norm(x)
    modules.become(norm, modules.LeanRMSNorm, modules.recognize_norm(norm))
    x.requires_grad_()
    with use_backend("reference"):
        assert torch.equal(norm(x), wanted)
    # sums in another order: another rounding here and there
    fast = norm(x)
    assert torch.allclose(fast, wanted, rtol=2**-7, atol=0)
    assert (fast != wanted).float().mean() <= 0.02
