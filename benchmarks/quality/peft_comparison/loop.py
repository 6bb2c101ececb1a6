"""Train and evaluate one experiment: the plain loop of PEFT's comparison, the same for every
method.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.quality.peft_comparison.settings import TrainParams
from benchmarks.quality.peft_comparison.setup import (
    base_model_only,
    build_optimizer,
    count_parameters,
)
from benchmarks.quality.peft_comparison.tasks import AnswerTask, Row, accuracy, batches
from benchmarks.record import quantiles
from slicefine import track_memory

EMPTY_CACHE_EVERY = 10
# label of a token that has no loss
IGNORED = -100


@dataclass
class Result:
    """What a run leaves for the file. twin: what PEFT's schema has no key for."""

    status: str = "failed"
    error_msg: str = ""
    train_time: float = 0.0
    trainable: int = 0
    total: int = 0
    metrics: list[dict[str, Any]] = field(default_factory=list)
    reserved: list[int] = field(default_factory=list)
    allocated: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    # of this process: what other work on the machine cannot stretch
    cpu_seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    twin: dict[str, Any] = field(default_factory=dict)


class Runner:
    """One model on one task.

    memory_at_start: bytes reserved on the GPU before the model was there.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        task: AnswerTask,
        params: TrainParams,
        memory_at_start: int = 0,
    ) -> None:
        self.model, self.tokenizer, self.task, self.params = model, tokenizer, task, params
        self.memory_at_start, self.device = memory_at_start, next(model.parameters()).device
        self.result = Result()

    def run(self) -> Result:
        """Never raises for what goes wrong in a run: the result says so, as PEFT's does."""
        result, start = self.result, time.perf_counter()
        self.evaluating = 0.0
        try:
            self._run()
            result.status = "success"
        except KeyboardInterrupt:
            result.status, result.error_msg = "canceled", "manually canceled"
        except Exception as error:
            result.status, result.error_msg = "canceled", f"{type(error).__name__}: {error}"
        result.train_time = time.perf_counter() - start - self.evaluating
        for name, seconds in (
            ("step_ms", result.seconds),
            ("step_cpu_ms", result.cpu_seconds),
        ):
            spread = quantiles([1e3 * s for s in seconds]) if seconds else [None] * 3
            result.twin[name] = dict(zip(("p20", "p50", "p80"), spread, strict=True))
        return result

    def _run(self) -> None:
        params, result = self.params, self.result
        self.optimizer, self.scheduler = build_optimizer(self.model, params)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=params.use_amp)
        result.trainable, result.total = count_parameters(self.model)
        before = self._base_metrics()
        plan = list(
            islice(
                batches(self.task.train, params.batch_size, self._encode_rows),
                params.max_steps,
            )
        )
        measured = self._longest_step(plan)
        self.model.train()
        for step, rows in enumerate(plan, 1):
            self._step(rows, measure=step == measured)
            if step % params.eval_steps == 0:
                self._validate(step)
            if step % EMPTY_CACHE_EVERY == 0 and self.device.type == "cuda":
                torch.cuda.empty_cache()
        self.model.eval()
        right = accuracy(self.generate(self.task.test), self.task.test)
        result.metrics.append(
            {
                "step": params.max_steps,
                "test accuracy": right,
                "train loss": self._recent(result.losses),
                "train samples": sum(len(rows) for rows in plan),
                "train total tokens": sum(result.tokens),
                "forgetting": self.general_loss() - before,
            }
        )
        self._check_base(before)

    def _base_metrics(self) -> float:
        """Loss on general text and valid accuracy of the base model; the loss is PEFT's reference
        for forgetting.
        """
        self.model.eval()
        context, how = base_model_only(self.model)
        with context:
            loss = self.general_loss()
            start = time.perf_counter()
            valid = accuracy(self.generate(self.task.valid), self.task.valid)
            self.evaluating += time.perf_counter() - start
        self.result.twin |= {
            "base_general_loss": loss,
            "base_valid_accuracy": valid,
            "base_metrics_by": how,
        }
        low, high = self.task.general_bounds or (0.0, float("inf"))
        if not low < loss < high:
            raise ValueError(
                f"the base model's loss on general text is {loss:.3f}; expected {low} to {high}"
            )
        return loss

    def _check_base(self, before: float) -> None:
        """Is the base model still there after training? Only where the method can show it."""
        context, how = base_model_only(self.model)
        after = None
        if how == "disable_adapter":
            with context:
                after = self.general_loss()
        self.result.twin["base_general_loss_after_training"] = after
        self.result.twin["base_unchanged"] = None if after is None else after == before

    def _step(self, rows: list[list[int]], measure: bool) -> None:
        result, start, cpu_start = self.result, time.perf_counter(), time.process_time()
        batch = self._training_batch(rows)
        # and the end token
        result.tokens.append(sum(len(ids) + 1 for ids in rows))
        with (
            track_memory(self._held(), self.device) if measure else nullcontext() as report
        ):
            result.losses.append(self._update(batch))
        if report is not None:
            result.twin["peak_memory_tracked"] = report.peak_bytes
            result.twin["held_memory_tracked"] = report.bytes_before
            result.twin["peak_memory_tracked_by"] = (
                f"slicefine.track_memory: storages that tensors hold in step {len(result.losses)}, "
                "the longest batch after the first"
            )
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            result.allocated.append(torch.cuda.memory_allocated() - self.memory_at_start)
            result.reserved.append(torch.cuda.memory_reserved() - self.memory_at_start)
        result.seconds.append(time.perf_counter() - start)
        result.cpu_seconds.append(time.process_time() - cpu_start)

    def _update(self, batch: dict[str, Tensor]) -> float:
        self.optimizer.zero_grad()
        with (
            torch.autocast(self.device.type, enabled=True)
            if self.params.use_amp
            else nullcontext()
        ):
            loss = self.model(
                **batch, num_items_in_batch=int(batch["attention_mask"].sum())
            ).loss
        self.scaler.scale(loss).backward()
        if self.params.grad_norm_clip:
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(
                self.model.parameters(), self.params.grad_norm_clip
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        return loss.item()

    def _training_batch(self, rows: list[list[int]]) -> dict[str, Tensor]:
        """Padded on the right with end tokens, of which the first after each row has a loss: it is
        how answers end.
        """
        batch = dict(self.tokenizer.pad({"input_ids": rows}, return_tensors="pt"))
        places = torch.arange(batch["input_ids"].shape[1])
        past_the_end = places > torch.tensor([[len(ids)] for ids in rows])
        batch["labels"] = batch["input_ids"].masked_fill(past_the_end, IGNORED)
        return {key: value.to(self.device) for key, value in batch.items()}

    def _encode_rows(self, rows: list[Row]) -> list[list[int]]:
        template = self.params.query_template
        return self._encode(
            [template.format(query=row.query) + row.response for row in rows]
        )

    def _encode(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(
            texts, truncation=True, max_length=self.params.max_seq_length
        )["input_ids"]

    def _validate(self, step: int) -> None:
        result, start, n = self.result, time.perf_counter(), self.params.eval_steps
        self.model.eval()
        right = accuracy(self.generate(self.task.valid), self.task.valid)
        self.model.train()
        took = time.perf_counter() - start
        self.evaluating += took
        seconds = sum(result.seconds[-n:])
        result.metrics.append(
            {
                "step": step,
                "valid accuracy": right,
                "train loss": self._recent(result.losses),
                "train samples": step * self.params.batch_size,
                "train time": seconds,
                "eval time": took,
                "tokens / sec": sum(result.tokens[-n:]) / seconds,
                "mem allocated avg": self._recent(result.allocated),
                "mem reserved avg": self._recent(result.reserved),
                "elapsed time": sum(result.seconds) + self.evaluating,
            }
        )
        print(
            f"  step {step}: loss {self._recent(result.losses):.4f}, valid accuracy {right:.3f},"
            f" {took:.0f} s",
            flush=True,
        )

    def _recent(self, values: list[Any]) -> float | None:
        recent = values[-self.params.eval_steps :]
        return sum(recent) / len(recent) if recent else None

    @torch.inference_mode()
    def generate(self, rows: list[Row]) -> list[str]:
        """Prompt and continuation of every row, as PEFT decodes them."""
        from transformers import GenerationConfig

        texts: list[str] = []
        for start in range(0, len(rows), self.params.batch_size_eval):
            chosen = rows[start : start + self.params.batch_size_eval]
            ids = self._encode(
                [self.params.query_template.format(query=row.query) for row in chosen]
            )
            batch = self.tokenizer.pad(
                {"input_ids": ids}, return_tensors="pt", padding_side="left"
            ).to(self.device)
            kwargs = {
                k: v for k, v in self.params.generation_kwargs.items() if v is not None
            }
            # transformers takes one: the tighter
            if "max_length" in kwargs and "max_new_tokens" in kwargs:
                room = batch["input_ids"].shape[1] + kwargs.pop("max_new_tokens")
                kwargs["max_length"] = min(room, kwargs["max_length"])
            ends = {
                "pad_token_id": self.tokenizer.pad_token_id,
                "eos_token_id": self.tokenizer.eos_token_id,
            }
            output = self.model.generate(
                **batch, generation_config=GenerationConfig(**{**ends, **kwargs})
            )
            texts += self.tokenizer.batch_decode(output, skip_special_tokens=True)
        return texts

    @torch.inference_mode()
    def general_loss(self) -> float:
        """Mean loss per token of general text, in small batches, so that training decides the peak
        memory.
        """
        total, count = 0.0, 0
        texts = self.task.general
        for start in range(0, len(texts), self.params.batch_size):
            ids = self._encode(texts[start : start + self.params.batch_size])
            batch = self.tokenizer.pad(
                {"input_ids": ids}, return_tensors="pt", padding_side="left"
            ).to(self.device)
            logits = self.model(**batch).logits
            for row, tokens in enumerate(ids):
                target = torch.tensor(tokens[1:], device=self.device)
                found = logits[row, -len(tokens) : -1].float()
                total += F.cross_entropy(found, target, reduction="sum").item()
                count += len(tokens) - 1
        return total / count

    def _longest_step(self, plan: list[list[list[int]]]) -> int | None:
        """The step whose memory is tracked on a CPU: the largest padded batch once the optimizer
        has its state.
        """
        # a GPU's allocator tells, for the whole run
        if self.device.type != "cpu":
            return None
        sizes = [len(rows) * max(map(len, rows)) for rows in plan]
        later = range(1, len(sizes)) if len(sizes) > 1 else range(1)
        return 1 + max(later, key=sizes.__getitem__)

    def _held(self) -> Iterator[Tensor]:
        yield from self.model.parameters()
        yield from self.model.buffers()
        for state in self.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))
