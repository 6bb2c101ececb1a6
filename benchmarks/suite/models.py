"""A whole training step of an encoder with a new head: forward, loss, backward, update, zero_grad.

Every method trains the same head and, within the same linear layers, what the method trains; the
embeddings' output requires a
gradient for every method. So all of them propagate through every layer, and the frozen floor (head
only) is what no method that
keeps its weights dense can undercut. torch's AdamW is the fused one, the fastest that torch has.
Dropout is on, as in training.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.baselines import MaskedGradient
from benchmarks.suite.registry import Case, Method
from benchmarks.suite.turns import DTYPES, Contestant, rank
from examples.sentiment import SentenceClassifier
from slicefine import SliceAdamW, SliceConfig, get_slice_model

TARGETS = ["query", "key", "value", "dense"]
LR = 1e-4
PEFT = ("lora", "lorafa", "dora", "miss", "shira", "vera", "ia3")


class RandomEncoder(SentenceClassifier):
    """The same architecture at another width, random weights."""

    def __init__(self, width: int, depth: int) -> None:
        nn.Module.__init__(self)
        from transformers import BertConfig, BertModel

        config = BertConfig(
            hidden_size=width,
            num_attention_heads=width // 32,
            intermediate_size=4 * width,
            num_hidden_layers=depth,
            vocab_size=30522,
            attn_implementation="eager",
        )
        self.encoder = BertModel(config, add_pooling_layer=False)
        self.classifier = nn.Linear(width, 2)


@functools.cache
def _pretrained() -> SentenceClassifier:
    from transformers.utils import logging

    logging.set_verbosity_error()  # it reports the pooler, which is not used
    logging.disable_progress_bar()
    torch.manual_seed(0)
    return SentenceClassifier()


def new_model(case: Case, device: str) -> SentenceClassifier:
    """The same start for every method, nothing requires a gradient but the embeddings' output."""
    torch.manual_seed(0)
    model = (
        copy.deepcopy(_pretrained())
        if case.width is None
        else RandomEncoder(case.width, case.depth)
    )
    del model.encoder.encoder.layer[case.depth :]
    model.encoder.embeddings.register_forward_hook(lambda module, args, out: out.requires_grad_())
    return model.to(device, DTYPES[case.dtype]).train().requires_grad_(False)


class Trainer:
    """One method's model with its optimizer; `loss` is that of the last step."""

    def __init__(self, case: Case, method: Method, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        batch = case.tokens // case.length
        self.batch = {
            "input_ids": (
                torch.randint(1000, 20_000, (batch, case.length), generator=generator).to(device)
            ),
            "attention_mask": torch.ones(batch, case.length, dtype=torch.int64, device=device),
        }
        self.labels = torch.randint(0, 2, (batch,), generator=generator).to(device)
        self.masked: MaskedGradient | None = None
        self.steps = 0
        self.loss: Tensor | None = None
        model = new_model(case, device)
        self.model, self.optimizer = self._prepare(model, method, rank(case, method))

    def _prepare(
        self, model: SentenceClassifier, method: Method, r: int | None
    ) -> tuple[nn.Module, torch.optim.Optimizer]:
        adamw: Callable[..., torch.optim.Optimizer] = functools.partial(
            torch.optim.AdamW, lr=LR, weight_decay=0.0, fused=True
        )
        names = [
            n
            for n, m in model.named_modules()
            if isinstance(m, nn.Linear) and n.rpartition(".")[2] in TARGETS
        ]
        if method.kind in PEFT:
            return self._peft(model, method, r, adamw)
        model.classifier.requires_grad_(True)
        if method.kind == "slice":
            config = SliceConfig(
                r=r or 16,
                slice_type=method.slice_type,
                switch_interval=None,
                target_modules=names,
                modules_to_save=["classifier"],
            )
            get_slice_model(model, config)
            return model, SliceAdamW(model.parameters(), lr=LR, optimizer_in_bwd=method.in_bwd)
        if method.kind == "masked":
            chosen = torch.arange(r or 16, device=self.labels.device)
            self.masked = MaskedGradient(
                model, names, lambda name, move: (None, chosen), None, also=("classifier",)
            )
            return model, adamw(self.masked.parameters())
        if method.kind == "dense":
            for name in names:
                model.get_submodule(name).weight.requires_grad_(True)
        elif method.kind != "floor":
            raise ValueError(
                f"method {method.name!r} has kind {method.kind!r}, which a model does not know"
            )
        return model, adamw([p for p in model.parameters() if p.requires_grad])

    def _peft(self, model: nn.Module, method: Method, r: int | None, adamw: Any) -> Any:
        import peft

        shared: dict[str, Any] = {"target_modules": TARGETS, "modules_to_save": ["classifier"]}
        build = {
            "lora": lambda: peft.LoraConfig(r=r, lora_alpha=r, **shared),
            "lorafa": lambda: peft.LoraConfig(r=r, lora_alpha=r, **shared),
            "dora": lambda: peft.LoraConfig(r=r, lora_alpha=r, use_dora=True, **shared),
            "miss": lambda: peft.MissConfig(r=r, **shared),
            "shira": lambda: peft.ShiraConfig(r=r, random_seed=0, **shared),
            "vera": lambda: peft.VeraConfig(r=r, **shared),
            "ia3": lambda: peft.IA3Config(feedforward_modules=["dense"], **shared),
        }
        adapted: Any = peft.get_peft_model(
            model, build[method.kind](), autocast_adapter_dtype=method.fp32_adapters
        )
        if method.kind == "lorafa":
            from peft.optimizers import create_lorafa_optimizer

            return adapted, create_lorafa_optimizer(adapted, r=r, lora_alpha=r, lr=LR)
        return adapted, adamw([p for p in adapted.parameters() if p.requires_grad])

    def step(self) -> None:
        torch.manual_seed(self.steps)  # dropout
        self.steps += 1
        loss = F.cross_entropy(self.model(self.batch).float(), self.labels)
        loss.backward()
        if self.masked is not None:
            self.masked.mask()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.loss = loss.detach()

    def held(self) -> Iterator[Tensor]:
        yield from self.model.parameters()
        yield from self.model.buffers()
        for state in self.optimizer.state.values():
            yield from (v for v in state.values() if isinstance(v, Tensor))
        if self.masked is not None:
            yield from self.masked.masks.values()


def contestants(case: Case, device: str) -> dict[str, Contestant]:
    made = {}
    for method in case.methods:
        trainer = Trainer(case, method, device)
        trainable = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        made[method.name] = Contestant(trainer.step, trainable, trainer.held)
    return made


def check(case: Case, device: str, made: dict[str, Contestant]) -> None:
    """Every method starts from the floor's loss and trains; column slices follow the masked
    baseline. Raises AssertionError.
    """
    trainers: dict[str, Trainer] = {
        name: contestant.step.__self__ for name, contestant in made.items()
    }  # type: ignore[attr-defined]
    losses: dict[str, list[float]] = {name: [] for name in trainers}
    for name, trainer in trainers.items():
        before = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
        for _ in range(2):
            trainer.step()
            assert trainer.loss is not None
            losses[name].append(trainer.loss.item())
        after = [p for p in trainer.model.parameters() if p.requires_grad]
        changed = sum(not torch.equal(a, b) for a, b in zip(after, before, strict=True))
        # in bfloat16 an update of IA3's, which start at 1, may round away
        enough = len(after) // 2 if case.dtype == "fp32" else 1
        assert changed >= enough, (
            f"{case.name}, {name}: {changed} of {len(after)} parameters have trained"
        )
    bound = {"fp32": 1e-4, "bf16": 3e-2, "fp16": 3e-2}[case.dtype]
    starts = {name: found[0] for name, found in losses.items()}
    assert max(starts.values()) - min(starts.values()) < bound, (
        f"{case.name}: the first losses differ: {starts}"
    )
    pretrained = new_model(case, device).state_dict()
    for method in case.methods:
        if method.kind != "slice" or method.slice_type != "column":
            continue
        apart = abs(losses[method.name][1] - losses["masked gradient"][1])
        assert apart < bound, (
            f"{case.name}, {method.name}: loss {apart:.1e} from the masked baseline's"
        )
        r = rank(case, method)
        for key, weight in trainers[method.name].model.state_dict().items():
            if key.startswith("encoder.encoder") and key.endswith("dense.weight"):
                assert torch.equal(weight[:, r:], pretrained[key][:, r:]), (
                    f"{method.name} wrote outside its slice, {key}"
                )
