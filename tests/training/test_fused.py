"""A sliced head whose weight the loss reads past the layer is refused before the first step."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

from slicefine import SliceConfig, get_slice_model
from slicefine.integrations.transformers import SliceCallback


def llama(targets, **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(vocab_size=20, **sizes, **heads)
    model = transformers.LlamaForCausalLM(config)
    return get_slice_model(model, SliceConfig(r=4, target_modules=targets, **options))


def lce_forward(self, input_ids=None, labels=None, **kwargs):
    """The shape of Liger's: logits are never made."""
    hidden = self.model(input_ids=input_ids)[0]
    logits = nn.functional.linear(hidden, self.lm_head.weight)
    return logits.sum()


def test_a_forward_in_the_models_place_is_told_from_its_own():
    model = llama(["q_proj", "lm_head"])
    # the model's own forward calls its head
    model.train()
    model.forward = types.MethodType(lce_forward, model)
    with pytest.raises(ValueError, match=r"lm_head has slices, and .*lce_forward"):
        model.train()
    model.eval()
    # in a wrapper, as Trainer and DDP hold it
    with pytest.raises(ValueError, match="lm_head has slices"):
        nn.ModuleDict({"module": model}).train()
    with pytest.raises(ValueError, match="lm_head has slices"):
        SliceCallback().on_train_begin(None, None, None, model=model)
    plain = llama(["q_proj"])
    plain.forward = types.MethodType(lce_forward, plain)
    plain.train()


# trl's own warnings of its release, and of pickled tensors
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("callbacks", [[], [SliceCallback()]])
def test_sft_trainer_as_it_comes(tmp_path, callbacks):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    tokenizers = pytest.importorskip("tokenizers")
    words = {name: i for i, name in enumerate(["[PAD]", "[EOS]", "a", "b", "c"])}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(tokenizers.models.WordLevel(words, "a")),
        pad_token="[PAD]",
        eos_token="[EOS]",
    )

    def train(model):
        args = trl.SFTConfig(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=2,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            gradient_checkpointing=False,
            bf16=False,
        )
        rows = datasets.Dataset.from_list([{"input_ids": [2, 3, 4, 2]}] * 8)
        trl.SFTTrainer(
            model=model,
            args=args,
            train_dataset=rows,
            processing_class=tokenizer,
            callbacks=callbacks,
        ).train()
        return model

    with pytest.raises(ValueError, match=r"lm_head has slices, and trl\.trainer"):
        train(llama(["q_proj", "lm_head"]))
    assert train(llama(["q_proj"]))
    assert train(llama(["q_proj"], modules_to_save=["lm_head"]))
