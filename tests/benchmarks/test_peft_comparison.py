"""The PEFT twin: its files have PEFT's keys, its configs are checked, and both kinds of method run
through one loop.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from benchmarks.quality.peft_comparison import __main__ as twin
from benchmarks.quality.peft_comparison import report
from benchmarks.quality.peft_comparison.settings import (
    PEFT_COMMIT,
    experiment_names,
    load_experiment,
    load_setting,
)
from benchmarks.quality.peft_comparison.setup import base_model_only
from benchmarks.quality.peft_comparison.tasks import (
    AnswerTask,
    Row,
    accuracy,
    answer,
    batches,
    is_right,
    load_task,
)

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "peft_comparison"
# huggingface/peft 5d602fd, method_comparison/MetaMathQA: log_results() and train() in utils.py and
# run.py, against
# its 63 files in results/ (written before "peft_worktree_is_dirty" was added).
SCHEMA = {
    "run_info": (
        "created_at total_time experiment_name peft_branch peft_worktree_is_dirty train_config"
        " peft_config error_msg"
    ),
    "train_info": (
        "accelerator_memory_reserved_avg accelerator_memory_max accelerator_memory_reserved_99th"
        " train_time file_size num_trainable_params num_total_params status metrics"
    ),
    "meta_info": "model_info dataset_info package_info system_info pytorch_info",
}
TRAIN_CONFIG = (
    "model_id dtype max_seq_length batch_size batch_size_eval max_steps eval_steps compile use_gc"
    " query_template seed grad_norm_clip optimizer_type optimizer_kwargs lr_scheduler use_amp"
    " autocast_adapter_dtype generation_kwargs attn_implementation init_kv_cache_prefix"
)
VALID_METRICS = {
    "step",
    "valid accuracy",
    "train loss",
    "train samples",
    "train time",
    "eval time",
    "tokens / sec",
    "mem allocated avg",
    "mem reserved avg",
    "elapsed time",
}
TEST_METRICS = {
    "step",
    "test accuracy",
    "train loss",
    "train samples",
    "train total tokens",
    "forgetting",
}
PACKAGE_INFO = {
    f"{package}-{what}"
    for package in ("transformers", "peft", "datasets", "bitsandbytes", "torch")
    for what in ("version", "commit-hash")
}
SYSTEM_INFO = {"system", "release", "version", "machine", "processor", "accelerator"}
# default_training_params.json of the same commit
PEFT_DEFAULTS = {
    "model_id": "meta-llama/Llama-3.2-3B",
    "dtype": "bfloat16",
    "max_seq_length": 768,
    "batch_size": 4,
    "batch_size_eval": 50,
    "max_steps": 5000,
    "eval_steps": 250,
    "compile": False,
    "use_gc": False,
    "seed": 0,
    "grad_norm_clip": 1.0,
    "optimizer_type": "AdamW",
    "optimizer_kwargs": {"lr": 1e-4, "weight_decay": 0.1},
    "lr_scheduler": "cosine",
    "use_amp": False,
    "autocast_adapter_dtype": True,
    "attn_implementation": None,
    "generation_kwargs": {"max_length": 800, "max_new_tokens": 300},
    "query_template": "Question: {query} Think step by step.\nAnswer:",
    "init_kv_cache_prefix": None,
}


def check_schema(values: dict) -> None:
    assert set(values) == {*SCHEMA, "twin_info"}
    for section, keys in SCHEMA.items():
        assert list(values[section]) == keys.split()
    assert set(values["run_info"]["train_config"]) == set(TRAIN_CONFIG.split())
    assert set(values["meta_info"]["package_info"]) == PACKAGE_INFO
    assert set(values["meta_info"]["system_info"]) == SYSTEM_INFO
    assert set(values["meta_info"]["model_info"]) == {"sha", "created_at"}
    assert all(
        set(info) == {"sha", "created_at"}
        for info in values["meta_info"]["dataset_info"].values()
    )
    *valid, test = values["train_info"]["metrics"]
    assert all(set(row) == VALID_METRICS for row in valid) and set(test) == TEST_METRICS
    assert values["twin_info"]["peft_source_commit"] == PEFT_COMMIT


def tiny_llama(params, device):
    """A random Llama of two layers and a tokenizer of whole words; nothing is downloaded."""
    words = [
        "<eos>",
        "<unk>",
        "Question",
        "The",
        "answer",
        "is",
        ":",
        "Answer",
        "good",
        "bad",
        "film",
        "?",
        "a",
    ]
    words_only = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>")
    )
    words_only.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words_only, eos_token="<eos>", pad_token="<eos>", unk_token="<unk>"
    )
    config = transformers.LlamaConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config).to(device), tokenizer


def tiny_task() -> AnswerTask:
    rows = [
        Row(f"a {word} film", f" The answer is: {word}") for word in ("good", "bad") * 6
    ]
    return AnswerTask(
        rows, rows[:2], rows[:3], ["the film is good", "a bad answer is a film"]
    )


def tiny_setting():
    setting = load_setting("small")
    setting.training_params |= {
        "dtype": "float32",
        "batch_size": 2,
        "max_seq_length": 32,
        "max_steps": 2,
        "eval_steps": 1,
    }
    setting.short_run.slice_switch_interval = 1
    return setting


def run(name: str) -> dict:
    setting = tiny_setting()
    return twin.run_experiment(
        load_experiment(name, setting), setting, tiny_task(), load=tiny_llama
    )


@pytest.mark.parametrize(
    "name", ["slice/column-r16", "slice/row-r16-all-linear", "full-finetuning/lr_0.00001"]
)
def test_two_steps_write_pefts_keys(name, tmp_path):
    values = run(name)
    assert (
        values["run_info"]["error_msg"] == ""
        and values["train_info"]["status"] == "success"
    )
    path = report.write(values, tmp_path)
    check_schema(json.loads(path.read_text()))
    assert path.name == name.replace("/", "--") + ".json"
    config = values["run_info"]["peft_config"]
    assert config is None if name.startswith("full") else config["peft_type"] == "SLICE"
    memory = values["twin_info"]
    assert (
        memory["peak_memory_tracked"] > memory["held_memory_tracked"] > 0
        and "track_memory" in memory["peak_memory_tracked_by"]
    )
    assert (
        values["train_info"]["accelerator_memory_max"] is None or torch.cuda.is_available()
    )
    if name == "slice/column-r16":
        # two layers of q (32 -> 32) and v (32 -> 16), 16 columns each; both positions of each have
        # been active
        assert values["train_info"]["num_trainable_params"] == 2 * (32 + 16) * 16
        assert memory["visited_slices_bytes"] == 2 * (32 + 16) * 32 * 4


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # peft's SHiRA
@pytest.mark.parametrize(
    "name",
    [
        "lora/lora-rank32",
        "lora/lora-rank32-lorafa",
        "shira/shira-random",
        "ia3/ia3-lr_0.001",
    ],
)
def test_pefts_methods_run_through_the_same_loop(name, tmp_path):
    setting = tiny_setting()
    experiment = load_experiment(name, setting)
    if name.startswith("shira"):  # rank 32 would be more weights than the tiny layers have
        experiment.peft_values["r"] = 4
    values = twin.run_experiment(experiment, setting, tiny_task(), load=tiny_llama)
    assert (
        values["run_info"]["error_msg"] == ""
        and values["train_info"]["status"] == "success"
    )
    check_schema(json.loads(report.write(values, tmp_path).read_text()))
    info = values["twin_info"]
    assert info["base_metrics_by"] == "disable_adapter" and info["base_unchanged"] is True
    assert (info["peak_memory_tracked"] is None) == torch.cuda.is_available()
    assert (
        0 < values["train_info"]["file_size"] < 4 * values["train_info"]["num_total_params"]
    )


def test_a_run_that_fails_is_written_as_canceled(tmp_path):
    setting, task = tiny_setting(), tiny_task()
    task.test[0] = Row("a film", "no answer here")
    values = twin.run_experiment(
        load_experiment("slice/column-r16", setting), setting, task, load=tiny_llama
    )
    assert (
        values["train_info"]["status"] == "canceled"
        and "no answer" in values["run_info"]["error_msg"]
    )
    assert report.write(values, tmp_path).parent.name == "cancelled_results"
    with pytest.raises(ValueError, match="no result of a successful run"):
        report.read(tmp_path)


def test_the_base_model_comes_from_disable_adapter_as_soon_as_there_is_one():
    class WithDisable(nn.Linear):
        disabled = 0

        @contextlib.contextmanager
        def disable_adapter(self):
            self.disabled += 1
            yield

    model = WithDisable(2, 2)
    context, how = base_model_only(model)
    with context:
        assert model.disabled == 1 and how == "disable_adapter"
    context, how = base_model_only(nn.Linear(2, 2))
    with context:
        assert how == "evaluated before training"


# Settings and experiments


def test_the_official_setting_is_pefts_and_the_small_one_differs_in_model_and_data_only():
    official, small = load_setting("official"), load_setting("small")
    assert (
        official.training_params == PEFT_DEFAULTS and official.short_run.peft_lr_factor == 1
    )
    scaled = {
        "model_id",
        "max_seq_length",
        "max_steps",
        "eval_steps",
        "generation_kwargs",
        "query_template",
    }
    assert {
        k for k in PEFT_DEFAULTS if small.training_params[k] != PEFT_DEFAULTS[k]
    } == scaled


@pytest.mark.parametrize("setting", ["small", "official"])
def test_every_experiment_loads(setting):
    experiments = [
        load_experiment(name, load_setting(setting)) for name in experiment_names()
    ]
    assert {e.kind for e in experiments} == {"slice", "peft", "full"} and len(
        experiments
    ) >= 13
    lora = next(
        e for e in experiments if e.name == "lora/lora-rank32"
    ).params.optimizer_kwargs
    assert lora == {"lr": 1e-3 if setting == "small" else 1e-4, "weight_decay": 0.1}
    column = next(e for e in experiments if e.name == "slice/column-r16")
    assert column.slice_config.switch_interval == (20 if setting == "small" else 100)
    assert (
        column.params.optimizer_type == "SliceAdamW"
        and column.params.optimizer_kwargs == {"lr": 1e-3}
    )


def write_experiment(folder: Path, file: str, values: dict) -> Path:
    (folder / "new" / "one").mkdir(parents=True, exist_ok=True)
    (folder / "new" / "one" / file).write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(
    "file, values, message",
    [
        (
            "slice_config.json",
            {"rank_paterns": {}},
            r"unknown key 'rank_paterns' \(did you mean 'rank_pattern'",
        ),
        ("slice_config.json", {"r": 0}, "r is 0"),
        (
            "adapter_config.json",
            {"peft_type": "LORAX"},
            r"peft_type is 'LORAX' \(did you mean 'LORA'",
        ),
        ("adapter_config.json", {"peft_type": "ADALORA"}, "after every step"),
        (
            "adapter_config.json",
            {"peft_type": "LORA", "lora_alfa": 1},
            r"did you mean 'lora_alpha'",
        ),
        ("training_params.json", {"max_step": 1}, r"did you mean 'max_steps'"),
        ("training_params.json", {"dtype": "int8"}, "dtype is 'int8'"),
        ("training_params.json", {"optimizer_type": "Adan"}, "optimizer_type is 'Adan'"),
        ("training_params.json", {"query_template": "what?"}, "query_template"),
        ("training_params.json", {"eval_steps": 999}, "more than the 80"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path, file, values, message):
    folder = write_experiment(tmp_path, file, values)
    with pytest.raises(ValueError, match=message):
        load_experiment("new/one", load_setting("small"), folder=folder)


def test_unknown_names_say_what_exists(capsys):
    with pytest.raises(
        ValueError, match=r"did you mean 'slice/column-r16'.*lora/lora-rank32"
    ):
        load_experiment("slice/colum-r16", load_setting("small"))
    with pytest.raises(ValueError, match="expected one of small, official"):
        load_setting("tiny")
    with pytest.raises(ValueError, match="expected one of movie-sentiment"):
        load_task("math", Path())
    with pytest.raises(SystemExit):
        twin.main(["--experiment", "nothing/here"])
    assert "there are: " in capsys.readouterr().err


# Answers, batches, tables


def test_answers_are_read_as_peft_reads_them():
    assert answer("Q\nAnswer: 4^2. The answer is: 16.\nmore") == "16"
    assert answer("#### $70,000") == "70,000" and answer("The final answer is 50%") == "50"
    assert answer("The answer is: a The answer is: b ") == "b" and answer("sixteen") is None
    assert is_right("The answer is: 20/35", "The answer is: 0.5714285714285714")
    assert is_right("The answer is: 16.0", "#### 16") and not is_right(
        "The answer is: 1/0", "#### 16"
    )
    assert is_right(
        "The answer is: positive.", " The answer is: positive"
    ) and not is_right("positive", "#### positive")
    assert accuracy(["#### 1", "#### 2"], [Row("", "#### 1"), Row("", "#### 1")]) == 0.5
    with pytest.raises(ValueError, match="no answer"):
        is_right("#### 1", "1")


def test_buckets_keep_the_order_and_sort_within():
    rows = list(range(100))  # row i has i % 7 + 1 tokens
    stream = batches(rows, 2, lambda chosen: [[i] * (i % 7 + 1) for i in chosen])
    first = [next(stream) for _ in range(20)]
    assert sorted(ids[0] for batch in first for ids in batch) == rows[:40]
    lengths = [len(ids) for batch in first for ids in batch]
    assert lengths == sorted(lengths, reverse=True)
    rest = [next(stream) for _ in range(30)]
    assert sorted(ids[0] for batch in rest for ids in batch) == rows[40:]
    assert next(stream) == first[0]  # the next epoch


def test_the_table_of_the_stored_results(capsys):
    runs = report.read(RESULTS)
    for values in runs:
        check_schema(values)
    assert twin.main(["--table", str(RESULTS)]) == 0
    printed = capsys.readouterr().out
    assert all(values["run_info"]["experiment_name"] in printed for values in runs)
    assert len(printed.strip().splitlines()) == 2 + len(runs) and "MiB*" in printed
    page = (RESULTS.parents[2] / "docs" / "peft-comparison.md").read_text(encoding="utf-8")
    assert all(
        line in page for line in report.table(runs).splitlines()
    )  # the page shows what is stored


def test_the_table_reads_pefts_own_files():
    last = {"test accuracy": 0.4784, "forgetting": 0.05}
    theirs = {
        "run_info": {"experiment_name": "lora/llama-3.2-3B-rank32"},
        "train_info": {
            "accelerator_memory_max": 22292725760,
            "train_time": 941.96,
            "file_size": 36715216,
            "num_trainable_params": 9175040,
            "metrics": [last],
        },
    }
    row = report.table([theirs]).splitlines()[-1]
    assert (
        row
        == "| lora/llama-3.2-3B-rank32 | 47.8 % | 21,260 MiB | 942 | - | 36.7 | 9,175,040 |"
        " +0.050 |"
    )
