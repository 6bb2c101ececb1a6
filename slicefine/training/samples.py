"""What a language model says to a few prompts, before training and after it."""

from __future__ import annotations

from typing import Any

import torch

from slicefine.training.data import Row
from slicefine.training.tasks import CausalLM

NEW_TOKENS = 48
# of a plain text, which has no prompt, this many tokens are given to go on from
_START = 8


def prompts_of(task: CausalLM, rows: list[Row], count: int) -> list[list[int]]:
    """Token ids of the prompts of the first rows; a text's first tokens where it has no prompt."""
    prompts = []
    for row in rows[:count]:
        prompt = task.prompt(row)
        rendered = task.rendered(row)
        text = prompt or rendered.text
        ids = task.tokenizer(text, add_special_tokens=rendered.special_tokens)["input_ids"]
        if not prompt:
            ids = ids[: max(1, min(_START, len(ids) // 2))]
        room = max(1, task.max_length - 1)
        # a prompt that is too long loses its start: the answer follows its end
        prompts.append(ids[-room:])
    return prompts


@torch.no_grad()
def says(model: Any, task: CausalLM, prompts: list[list[int]]) -> list[str]:
    """The most likely continuations of prompts, up to 48 tokens each."""
    training = model.training
    model.eval()
    limit = getattr(model.config, "max_position_embeddings", None) or 2**31
    answers = []
    for ids in prompts:
        device = next(model.parameters()).device
        given = torch.tensor([ids], device=device)
        made = model.generate(
            input_ids=given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=max(1, min(NEW_TOKENS, limit - len(ids))),
            do_sample=False,
            pad_token_id=task.tokenizer.pad_token_id,
        )
        answers.append(task.tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True))
    model.train(training)
    return answers


def table(
    task: CausalLM, prompts: list[list[int]], before: list[str], after: list[str]
) -> Any:
    """One entry a prompt, for the file beside the model."""
    texts = [task.tokenizer.decode(ids) for ids in prompts]
    return [
        {"prompt": p, "before": b, "after": a}
        for p, b, a in zip(texts, before, after, strict=True)
    ]
