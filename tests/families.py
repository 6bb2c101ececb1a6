"""The model families that slicefine is tested with, as data: tests/models/test_models.py trains
each, docs/support.md lists them.

Sizes are tiny and weights random: nothing is downloaded. A family that is added here is trained by
    the test as it stands;
``python tests/families.py`` then writes the table of docs/support.md anew.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TEXT = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "num_labels": 5,
}
DECODER = {k: v for k, v in TEXT.items() if k != "num_labels"} | {
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "max_position_embeddings": 32,
}
IMAGE = {k: v for k, v in TEXT.items() if k != "vocab_size"} | {
    "image_size": 16,
    "patch_size": 8,
}
MOE = DECODER | {"num_experts_per_tok": 2, "moe_intermediate_size": 12}


@dataclass(frozen=True)
class Family:
    """name: as in the support matrix. kind: its section there.

    model: a class of transformers, or timm's name of a model. config: a class of transformers;
        empty for timm.
    sizes: arguments of the config (of timm's create_model).
    inputs: "tokens", "seq2seq", "image" or "image_text".
    r: width of a slice. layers: how many weights become slices. note: what is particular about the
        family.
    parameters: target_parameters.
    """

    name: str
    kind: str
    model: str
    config: str
    sizes: dict[str, Any]
    inputs: str
    layers: int
    note: str = ""
    r: int = 3
    parameters: list[str] = field(default_factory=list)

    @property
    def library(self) -> str:
        return "transformers" if self.config else "timm"


FAMILIES = [
    Family(
        "BERT", "encoder", "BertForSequenceClassification", "BertConfig", TEXT, "tokens", 13
    ),
    Family(
        "RoBERTa",
        "encoder",
        "RobertaForSequenceClassification",
        "RobertaConfig",
        TEXT,
        "tokens",
        12,
    ),
    Family(
        "DistilBERT",
        "encoder",
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"vocab_size": 40, "dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24},
        "tokens",
        13,
    ),
    Family(
        "DeBERTa-v2",
        "encoder",
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        TEXT
        | {
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "share_att_key": True,
            "max_position_embeddings": 32,
        },
        "tokens",
        13,
        "disentangled attention: keys and queries project positions too",
    ),
    Family(
        "ModernBERT",
        "encoder",
        "ModernBertForSequenceClassification",
        "ModernBertConfig",
        TEXT | {"pad_token_id": 0},
        "tokens",
        9,
        "fused qkv, gated feed-forward",
    ),
    Family(
        "ELECTRA",
        "encoder",
        "ElectraForSequenceClassification",
        "ElectraConfig",
        TEXT | {"embedding_size": 12},
        "tokens",
        13,
    ),
    Family(
        "ALBERT",
        "encoder",
        "AlbertForSequenceClassification",
        "AlbertConfig",
        TEXT | {"embedding_size": 12},
        "tokens",
        8,
        "one layer used twice: its slice gets the gradients of both uses",
    ),
    Family(
        "T5",
        "encoder-decoder",
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": 40,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 24,
            "num_layers": 2,
            "num_heads": 2,
            "decoder_start_token_id": 0,
        },
        "seq2seq",
        32,
    ),
    Family("Llama", "decoder", "LlamaForCausalLM", "LlamaConfig", DECODER, "tokens", 14),
    Family("Qwen2", "decoder", "Qwen2ForCausalLM", "Qwen2Config", DECODER, "tokens", 14),
    Family("Qwen3", "decoder", "Qwen3ForCausalLM", "Qwen3Config", DECODER, "tokens", 14),
    Family(
        "Mistral", "decoder", "MistralForCausalLM", "MistralConfig", DECODER, "tokens", 14
    ),
    Family(
        "Gemma 2",
        "decoder",
        "Gemma2ForCausalLM",
        "Gemma2Config",
        DECODER,
        "tokens",
        14,
        "head tied to the embedding",
    ),
    Family(
        "Phi-3",
        "decoder",
        "Phi3ForCausalLM",
        "Phi3Config",
        DECODER,
        "tokens",
        8,
        "fused qkv, fused gate and up",
    ),
    Family(
        "GPT-2",
        "decoder",
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
        "tokens",
        8,
        "Conv1D: weights stored (in, out); fused qkv; head tied to the embedding",
    ),
    Family(
        "GPT-NeoX",
        "decoder",
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        TEXT,
        "tokens",
        8,
        "fused qkv, by head",
    ),
    Family(
        "OPT",
        "decoder",
        "OPTForCausalLM",
        "OPTConfig",
        {
            "vocab_size": 40,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "ffn_dim": 24,
            "word_embed_proj_dim": 16,
            "max_position_embeddings": 32,
        },
        "tokens",
        12,
        "head tied to the embedding",
    ),
    Family("ViT", "vision", "ViTForImageClassification", "ViTConfig", IMAGE, "image", 12),
    Family(
        "DINOv2",
        "vision",
        "Dinov2ForImageClassification",
        "Dinov2Config",
        IMAGE | {"mlp_ratio": 2},
        "image",
        12,
    ),
    Family(
        "CLIP",
        "vision",
        "CLIPModel",
        "CLIPConfig",
        {
            "projection_dim": 12,
            "vision_config": IMAGE,
            "text_config": TEXT | {"max_position_embeddings": 32, "eos_token_id": 39},
        },
        "image_text",
        26,
        "two towers, contrastive loss",
    ),
    Family(
        "timm ViT",
        "vision",
        "vit_tiny_patch16_224",
        "",
        {
            "img_size": 16,
            "patch_size": 8,
            "embed_dim": 16,
            "depth": 2,
            "num_heads": 2,
            "num_classes": 5,
        },
        "image",
        8,
        "fused qkv",
    ),
    Family(
        "timm Swin",
        "vision",
        "swin_tiny_patch4_window7_224",
        "",
        {
            "img_size": 16,
            "patch_size": 2,
            "window_size": 4,
            "embed_dim": 8,
            "depths": (1, 2),
            "num_heads": (1, 2),
            "num_classes": 5,
        },
        "image",
        13,
        "fused qkv, patch merging; the convolution of the patches stays frozen",
    ),
    Family(
        "timm ConvNeXt",
        "vision",
        "convnext_tiny",
        "",
        {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16), "num_classes": 5},
        "image",
        8,
        "its 1x1 convolutions are linear layers; other convolutions stay frozen",
    ),
    Family(
        "Mixtral",
        "mixture of experts",
        "MixtralForCausalLM",
        "MixtralConfig",
        DECODER | {"num_local_experts": 4},
        "tokens",
        12,
        "`target_parameters`, column slices",
        parameters=["experts.gate_up_proj", "experts.down_proj"],
    ),
    Family(
        "Qwen3-MoE",
        "mixture of experts",
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        MOE | {"num_experts": 4},
        "tokens",
        12,
        "`target_parameters`, column slices",
        parameters=["experts.gate_up_proj", "experts.down_proj"],
    ),
]


SUPPORT = Path(__file__).parent.parent / "docs" / "support.md"
BEGIN, END = (
    "<!-- families: written by python tests/families.py -->",
    "<!-- end of families -->",
)


def table() -> str:
    """The table of families in docs/support.md."""
    lines = [
        "| family | kind | model tested | slices | weights sliced | particular |",
        "|---|---|---|---|--:|---|",
    ]
    for f in FAMILIES:
        model = f"transformers `{f.model}`" if f.config else f"timm `{f.model}`"
        slices = "column" if f.parameters else "column, row"
        lines.append(
            f"| {f.name} | {f.kind} | {model} | {slices} | {f.layers} | {f.note} |"
        )
    return "\n".join(lines)


def committed_table() -> str:
    return SUPPORT.read_text(encoding="utf-8").split(BEGIN)[1].split(END)[0].strip()


if __name__ == "__main__":
    text = SUPPORT.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    SUPPORT.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}", encoding="utf-8")
