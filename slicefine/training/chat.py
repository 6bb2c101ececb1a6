"""Rows of a language model in the forms that people have, as a text and the parts of it to learn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from slicefine.training.data import Row, UserError, text_in

Message = dict[str, Any]

# In the order in which they are looked for: many data sets have a ready-made text beside them.
FORMS = {
    "messages": ("messages",),
    "conversations": ("conversations",),
    "prompt": ("prompt", "completion"),
    "instruction": ("instruction", "output"),
}
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "system": "system",
}
# Taori et al. 2023, for tokenizers without a chat template
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes"
    " the request.\n\n### Instruction:\n{instruction}\n\n"
)
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further"
    " context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
    "{instruction}\n\n### Input:\n{input}\n\n"
)
_RESPONSE = "### Response:\n"


@dataclass(frozen=True)
class Example:
    """What one row says: a plain text, a prompt with its completion, or messages.

    prompt: "" for a plain text. messages: of a conversation, then prompt and completion are "".
    learned: how many of the last messages are a completion; None: every message of the assistant.
    """

    prompt: str = ""
    completion: str = ""
    messages: tuple[Message, ...] = ()
    learned: int | None = None
    tools: Any = None


@dataclass(frozen=True)
class Rendered:
    """A text and the (start, end) of its parts that are learned; whole: special tokens too."""

    text: str
    spans: tuple[tuple[int, int], ...]
    special_tokens: bool
    whole: bool


def form_of(row: Row, text_column: str) -> str:
    """Which form a data set has, by the columns of a row.

    Raises:
        UserError: if there is none of the forms, naming them.
    """
    # A column that was asked for by name wins over forms that are found.
    if text_column != "text" and text_column in row:
        return "text"
    for form, columns in FORMS.items():
        if all(row.get(column) is not None for column in columns):
            return form
    if text_column in row:
        return "text"
    raise UserError(
        f"no column {text_column!r}; the data have {', '.join(map(repr, row))}. A language model"
        " learns from text, prompt and completion, messages, conversations, or instruction, input"
        " and output; name a column of texts with --text-column"
    )


def example_of(
    row: Row,
    form: str,
    text_column: str,
    where: str,
) -> Example:
    """A row in its form, every part of it checked. Raises UserError naming the row."""
    if form == "text":
        return Example(completion=_filled(row, text_column, where))
    if form == "messages":
        return _conversation(row, "messages", where)
    if form == "conversations":
        return _conversation(row, "conversations", where)
    if form == "instruction":
        return _instruction(row, where)
    if isinstance(row.get("prompt"), list):
        return _prompt_of_messages(row, where)
    prompt = text_in(row, "prompt", where)
    return Example(prompt, _filled(row, "completion", where))


def _filled(row: Row, column: str, where: str) -> str:
    text = text_in(row, column, where)
    if not text:
        raise UserError(f"{where} has no value in column {column!r}")
    return text


def _conversation(row: Row, column: str, where: str) -> Example:
    messages = _messages(row.get(column), column, where)
    system = row.get("system")
    if isinstance(system, str) and system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    if not any(message["role"] == "assistant" for message in messages):
        raise UserError(
            f"{where}: column {column!r} has no message of the assistant to learn from"
        )
    return Example(messages=tuple(messages), tools=row.get("tools"))


def _prompt_of_messages(row: Row, where: str) -> Example:
    prompt = _messages(row["prompt"], "prompt", where)
    completion = _messages(row.get("completion"), "completion", where)
    return Example(messages=(*prompt, *completion), learned=len(completion))


def _messages(value: Any, column: str, where: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise UserError(
            f"{where}: column {column!r} holds a {type(value).__name__}; expected a list of"
            " messages, each with role and content"
        )
    return [_message(m, f"{where}, {column}[{i}]") for i, m in enumerate(value)]


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise UserError(
            f"{where}: a {type(message).__name__}; expected an object with role and content"
        )
    # Arrow gives every message all keys that any of them has
    given = {key: value for key, value in message.items() if value is not None}
    if "from" in given and "value" in given:
        role = _ROLES.get(str(given["from"]).lower())
        if role is None:
            raise UserError(
                f"{where}: from is {given['from']!r}; expected human, gpt or system"
            )
        given = {"role": role, "content": given["value"]}
    if not isinstance(given.get("role"), str):
        raise UserError(
            f"{where}: no role; the message has {', '.join(map(repr, given)) or 'nothing'}"
        )
    if "content" not in given and given.get("tool_calls"):
        return given
    text_in(given, "content", where)
    return given


def _instruction(row: Row, where: str) -> Example:
    instruction = _filled(row, "instruction", where)
    more = text_in(row, "input", where) if row.get("input") is not None else ""
    output = _filled(row, "output", where)
    system = text_in(row, "system", where) if row.get("system") else ""
    asked = f"{instruction}\n\n{more}" if more else instruction
    messages = [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": output},
    ]
    if system:
        messages = [{"role": "system", "content": system}, *messages]
    template = _ALPACA_INPUT if more else _ALPACA
    prompt = template.format(instruction=instruction, input=more) + _RESPONSE
    return Example(prompt, output, tuple(messages), learned=1)


class Chat:
    """Renders examples by a tokenizer's chat template.

    What is learned of a conversation is found by rendering it up to each answer, which needs a
    template that leaves earlier messages as they were; those that do not are replaced by TRL's
    version for training where it has one.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.template: str | None = None
        self._chosen = False

    def render(
        self,
        example: Example,
        answers_only: bool,
        where: str,
    ) -> Rendered:
        """A row as text with what is learned of it. Raises UserError naming the row."""
        if example.messages and (self.tokenizer.chat_template or not example.completion):
            return self._conversation(example, answers_only, where)
        return self._plain(example, answers_only)

    def prompt_of(self, example: Example, where: str) -> str:
        """What the model is asked: everything before the last answer; "" for a plain text."""
        if example.messages and (self.tokenizer.chat_template or not example.completion):
            messages = list(example.messages)
            last = max(i for i, m in enumerate(messages) if m["role"] == "assistant")
            return self._text(messages[:last], where, example.tools, answer_next=True)
        return example.prompt

    def _plain(self, example: Example, answers_only: bool) -> Rendered:
        end = self.tokenizer.eos_token or ""
        completion = example.completion
        # without an end to learn from, a model never stops answering
        if not end or not completion.endswith(end):
            completion += end
        text = example.prompt + completion
        whole = not example.prompt or not answers_only
        return Rendered(text, ((len(example.prompt), len(text)),), True, whole)

    def _conversation(
        self,
        example: Example,
        answers_only: bool,
        where: str,
    ) -> Rendered:
        messages = list(example.messages)
        text = self._text(messages, where, example.tools)
        if not answers_only:
            # no special tokens from the tokenizer: the template has written them
            return Rendered(text, ((0, len(text)),), False, True)
        first = 0 if example.learned is None else len(messages) - example.learned
        spans = []
        for i, message in enumerate(messages):
            if i < first or message["role"] != "assistant":
                continue
            before = self._text(messages[:i], where, example.tools, answer_next=True)
            upto = self._text(messages[: i + 1], where, example.tools)
            if not (text.startswith(upto) and upto.startswith(before)):
                raise UserError(
                    f"{where}: the tokenizer's chat template renders message {i + 1} in another way"
                    " when others follow, so what the assistant says cannot be told apart. Give"
                    " another template with --set chat_template_path=FILE.jinja, train on whole"
                    " conversations with --set assistant_only_loss=false, or use prompt and"
                    " completion"
                )
            # a template may put a system message of its own before a first answer
            start = len(before) or max(
                0, upto.rfind(str(message.get("content", "")).strip())
            )
            # the line break that templates put behind an answer is not what it learns
            spans.append((start, len(upto.rstrip())))
        if not spans:
            raise UserError(f"{where}: no message of the assistant in the completion")
        return Rendered(text, tuple(spans), False, False)

    def _text(
        self, messages: list[Message], where: str, tools: Any, answer_next: bool = False
    ) -> str:
        self._choose(where)
        if not messages:
            return ""
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tools=tools,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=answer_next,
            )
        except Exception as error:
            raise UserError(
                f"{where}: the tokenizer's chat template does not take this conversation: {error}"
            ) from error

    def _choose(self, where: str) -> None:
        """Own template, or TRL's for training if the own one changes what came before."""
        if self._chosen:
            return
        # before it is true: _text below comes here again
        self._chosen = True
        if not self.tokenizer.chat_template:
            raise UserError(
                f"{where} is a conversation, and the model's tokenizer has no chat template. Give"
                " one with --set chat_template_path=FILE.jinja, or use prompt and completion"
            )
        # the shortest conversation in which a first answer has another one behind it
        turns = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
        ] * 2
        try:
            before = self._text(turns[:2], where, None)
            if self._text(turns, where, None).startswith(before):
                return
            from trl.chat_template_utils import get_training_chat_template

            self.template = get_training_chat_template(self.tokenizer)
        except (ImportError, ValueError, UserError):
            # Then the tokenizer's own: a row that it spoils is refused by its number.
            self.template = None
