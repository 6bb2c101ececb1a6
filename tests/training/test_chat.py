"""What a language model learns of a row: decoded from the labels that it is trained on."""

from __future__ import annotations

import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers")

from slicefine.training.chat import form_of
from slicefine.training.data import UserError
from slicefine.training.tasks import CausalLM, Columns

TURNS = [
    {"role": "user", "content": "What is 1 plus 2?"},
    {"role": "assistant", "content": "It is 3."},
    {"role": "user", "content": "And doubled?"},
    {"role": "assistant", "content": "Then it is 6."},
]


@pytest.fixture
def task(tiny_lm):
    made = CausalLM(Columns(), 256)
    made.load_inputs(str(tiny_lm))
    return made


def learned(task, row):
    """(the whole text, what is learned of it) by the token ids of a batch."""
    task.form = None
    task.prepare([row])
    batch = task.batch([row])
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    assert bool(((labels == ids) | (labels == -100)).all())
    return task.tokenizer.decode(ids), task.tokenizer.decode(labels[labels != -100])


def test_messages_learn_every_answer_and_nothing_else(task):
    text, answers = learned(task, {"messages": TURNS})
    assert text == task.tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert answers == "It is 3.<|im_end|>Then it is 6.<|im_end|>"


def test_sharegpt_is_the_same_conversation(task):
    said = [
        {"from": "human" if turn["role"] == "user" else "gpt", "value": turn["content"]}
        for turn in TURNS
    ]
    assert learned(task, {"conversations": said}) == learned(task, {"messages": TURNS})


def test_a_prompt_is_not_learned(task):
    text, answer = learned(task, {"prompt": "1 plus 2 is", "completion": " 3."})
    assert text == "1 plus 2 is 3.<|im_end|>" and answer == " 3.<|im_end|>"
    of_messages = {"prompt": TURNS[:3], "completion": TURNS[3:]}
    text, answer = learned(task, of_messages)
    assert text == learned(task, {"messages": TURNS})[0]
    assert answer == "Then it is 6.<|im_end|>"


def test_instructions(task):
    row = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    text, answer = learned(task, row)
    assert "<|im_start|>user\nAdd.\n\n1 and 2<|im_end|>" in text and answer == "3<|im_end|>"
    task.tokenizer.chat_template = None
    text, answer = learned(task, row)
    assert text.endswith("### Input:\n1 and 2\n\n### Response:\n3<|im_end|>")
    assert answer == "3<|im_end|>"


def test_a_text_is_learned_whole(task):
    text, all_of_it = learned(task, {"text": "a film"})
    assert text == all_of_it == "a film<|im_end|>"
    task.answers_only = False
    text, all_of_it = learned(task, {"messages": TURNS})
    assert text == all_of_it


def test_a_system_message_of_the_template_is_not_an_answer(task):
    text, answers = learned(task, {"messages": [TURNS[1], *TURNS]})
    assert text.startswith("<|im_start|>system") and answers.startswith(
        "It is 3.<|im_end|>It is 3"
    )


def test_the_form_by_the_columns():
    assert (
        form_of({"text": "a", "instruction": "b", "output": "c"}, "text") == "instruction"
    )
    assert form_of({"prompt": "a", "messages": TURNS}, "text") == "messages"
    assert form_of({"body": "a", "messages": TURNS}, "body") == "text"
    assert form_of({"text": "a", "messages": None}, "text") == "text"
    with pytest.raises(UserError, match="no column 'text'; the data have 'a', 'b'"):
        form_of({"a": 1, "b": 2}, "text")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": 5}, "row 1: column 'text' holds int 5, expected a text"),
        ({"messages": "hello"}, "row 1: column 'messages' holds a str; expected a list"),
        (
            {"messages": [{"role": "user", "content": "a"}]},
            "row 1.*no message of the assistant",
        ),
        ({"messages": ["a"]}, r"messages\[0\]: a str; expected an object"),
        ({"messages": [{"content": "a"}]}, r"messages\[0\]: no role"),
        (
            {"messages": [{"role": "user", "content": 3}]},
            r"messages\[0\].*'content' holds int 3",
        ),
        ({"conversations": [{"from": "tool", "value": "a"}]}, "from is 'tool'"),
        ({"prompt": "a", "completion": ["b"]}, "'completion' holds list"),
        ({"prompt": "a", "completion": ""}, "no value in column 'completion'"),
        ({"instruction": "a", "output": 1}, "'output' holds int 1"),
    ],
)
def test_rows_that_are_no_text_are_refused(task, row, message):
    with pytest.raises(UserError, match=message):
        task.prepare([row])


def test_a_column_of_messages_is_never_taken_for_text(task):
    task.columns.text = "messages"
    with pytest.raises(UserError, match="'messages' holds list"):
        task.prepare([{"messages": TURNS}])


def test_no_template_a_refusing_one_and_one_that_rewrites(task, tmp_path, tiny_lm):
    task.form = "messages"
    task.tokenizer.chat_template = "{{ raise_exception('no system here') }}"
    task.chat._chosen = True
    with pytest.raises(UserError, match="row 3.*no system here"):
        task.rendered({"messages": TURNS}, "row 3")
    task.tokenizer.chat_template, task.chat._chosen = None, False
    with pytest.raises(UserError, match="the model's tokenizer has no chat template"):
        task.rendered({"messages": TURNS}, "row 3")
    # earlier answers are hidden, as reasoning models' templates hide their thoughts
    rewriting = (
        "{% for m in messages %}{{ m.role }}: "
        "{{ m.content if loop.last or m.role == 'user' else '...' }}\n{% endfor %}"
    )
    path = tmp_path / "rewriting.jinja"
    path.write_text(rewriting)
    other = CausalLM(Columns(), 256)
    other.chat_template = str(path)
    other.load_inputs(str(tiny_lm))
    other.prepare([{"messages": TURNS}])
    with pytest.raises(UserError, match="row 3: .*renders message 2 in another way"):
        other.rendered({"messages": TURNS}, "row 3")
    other.answers_only = False
    assert other.rendered({"messages": TURNS}).text.startswith("user: What is")


def test_what_is_cut_or_left_out_is_said(task):
    pytest.importorskip("datasets")
    task.max_length = 8
    rows = [
        {"prompt": "a b c d e f g h i j k", "completion": "l"},
        {"prompt": "a", "completion": " b c d e f g h i j k l m n"},
        {"prompt": "a", "completion": "b"},
    ]
    task.prepare(rows)
    data = task.dataset(rows)
    assert len(data) == 2 and all(len(row["input_ids"]) <= 8 for row in data)
    cut, left_out = task.notes
    assert "2 of 3 rows are longer than --max-length 8 tokens" in cut
    assert "1 of 3 rows have nothing to learn" in left_out and "row 1" in left_out
    with pytest.raises(UserError, match="no row has anything to predict"):
        task.dataset(rows[:1])


def test_a_model_that_knows_nothing_has_no_perplexity(task):
    """exp(1000) is no float; the training before it must not be lost for that."""

    class Bad(torch.nn.Module):
        def forward(self, **batch):
            return SimpleNamespace(loss=torch.tensor(1000.0))

    value = task.evaluate(Bad(), [[{"text": "a film"}]], nullcontext, torch.device("cpu"))
    assert value == math.inf
