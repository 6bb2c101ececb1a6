"""What trains beside slices without the config's saying so is part of the delta, or refused."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from slicefine import DeltaError, SliceAdamW, SliceConfig, SliceModel, get_slice_model


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.head = nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.norm(self.a(x)))


def base():
    torch.manual_seed(0)
    return Net()


def sliced(**options):
    return get_slice_model(base(), SliceConfig(r=4, target_modules=["a"], **options))


def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.randn(8, 16)).square().mean().backward()
    optimizer.step()


def same(a, b):
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


@pytest.mark.parametrize("kind", [SliceAdamW, torch.optim.AdamW, "two optimizers"])
@pytest.mark.parametrize("copied", [False, True])
def test_what_is_unfrozen_by_hand_is_in_the_delta(kind, copied, tmp_path):
    model = sliced()
    model.head.requires_grad_(True)
    model = copy.deepcopy(model) if copied else model
    if kind == "two optimizers":
        optimizers = [SliceAdamW([model.a.slice_weight], lr=0.1)]
        optimizers.append(
            torch.optim.SGD([*model.norm.parameters(), *model.head.parameters()], 0.1)
        )
    else:
        optimizers = [kind(model.parameters(), lr=0.1)]
    for i in range(3):
        # in the middle of training, as gradual unfreezing does
        model.norm.requires_grad_(i > 0)
        model(torch.randn(8, 16)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert not torch.equal(model.norm.weight, base().norm.weight)
    with model.disable_adapter():
        assert same(base(), model)
    model.save_pretrained(tmp_path)
    x = torch.randn(4, 16)
    loaded = SliceModel.from_pretrained(base(), tmp_path)
    assert torch.equal(loaded(x), model(x))
    # trained on, the delta is of the same base
    again = SliceModel.from_pretrained(base(), tmp_path, is_trainable=True)
    assert torch.equal(again(x), model(x))
    step(again, SliceAdamW(again.parameters(), lr=0.1))
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(SliceModel.from_pretrained(base(), tmp_path / "again")(x), again(x))
    model.revert()
    assert same(base(), model)


def test_weights_loaded_before_the_first_step_are_the_base():
    model = sliced()
    model.head.requires_grad_(True)
    torch.manual_seed(1)
    other = Net()
    model.load_state_dict(other.state_dict())
    step(model, SliceAdamW(model.parameters(), lr=0.1))
    model.revert()
    assert same(other, model)


def test_a_checkpoint_does_not_become_the_base_of_what_was_unfrozen():
    model = sliced()
    model.head.requires_grad_(True)
    optimizer = SliceAdamW(model.parameters(), lr=0.1)
    step(model, optimizer)
    weights, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    resumed = sliced()
    resumed.head.requires_grad_(True)
    optimizer = SliceAdamW(resumed.parameters(), lr=0.1)
    resumed.load_state_dict(weights)
    optimizer.load_state_dict(state)
    step(resumed, optimizer)
    trained = copy.deepcopy(resumed.state_dict())
    with pytest.raises(
        DeltaError, match=r"head\.weight trains beside the slices and was loaded"
    ):
        resumed.delta()
    with pytest.raises(DeltaError, match="modules_to_save"), resumed.disable_adapter():
        pass
    assert resumed.active_adapters == ["default"] and not resumed.a.disabled
    assert all(torch.equal(v, trained[k]) for k, v in resumed.state_dict().items())


def llama():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes, **heads))


@pytest.mark.parametrize("saved", [None, ["embed_tokens", "lm_head"]])
def test_embeddings_resized_afterwards_are_refused_by_name(saved, tmp_path):
    config = SliceConfig(r=4, target_modules=["q_proj"], modules_to_save=saved)
    model = get_slice_model(llama(), config)
    model.resize_token_embeddings(24)
    ids = torch.arange(24)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    SliceAdamW(model.parameters(), lr=0.1).step()
    words = r"model\.embed_tokens\.weight had the shape \(20, 16\).* has \(24, 16\) now"
    with pytest.raises(DeltaError, match=words):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    if saved is None:
        return
    before = model(input_ids=ids).logits
    with pytest.raises(DeltaError, match=words), model.disable_adapter():
        pass
    assert model.active_adapters == ["default"]
    assert not model.model.layers[0].self_attn.q_proj.disabled
    assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_no_hook_is_left_on_the_embeddings():
    model = llama()
    embeddings = model.get_input_embeddings()
    get_slice_model(model, SliceConfig(r=4))
    for reentrant in (False, True, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    # transformers' hook and ours, each once
    assert len(embeddings._forward_hooks) == 2
    model.gradient_checkpointing_disable()
    model.merge_and_unload().requires_grad_(False).eval()
    assert not embeddings._forward_hooks
    assert not model(input_ids=torch.zeros(1, 4, dtype=torch.long)).logits.requires_grad


def test_hooks_that_were_there_before_slices_stay():
    model = llama()
    model.enable_input_require_grads()
    get_slice_model(model, SliceConfig(r=4))
    model.enable_input_require_grads()
    assert len(model.get_input_embeddings()._forward_hooks) == 1
    model.merge_and_unload()
    assert len(model.get_input_embeddings()._forward_hooks) == 1
