"""A whole training step of an encoder with a new head: forward, loss, backward, update, zero_grad.

Every method trains the same head and, within the same linear layers, what the method trains; the
embeddings' output requires a gradient for every method. So all of them propagate through every
layer, and the frozen baseline (head only) is what no method that keeps its weights dense can
undercut. torch's AdamW is the fused one, the fastest that torch has. Dropout is on, as in training.
"""

from __future__ import annotations

import copy
import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.methods import Method, linear_names, prepare
from benchmarks.quality.sentiment import SentenceClassifier
from benchmarks.speed.registry import Case
from benchmarks.speed.turns import DTYPES, Contestant, rank

TARGETS = ["query", "key", "value", "dense"]


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

    # it reports the pooler, which is not used
    logging.set_verbosity_error()
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
    model.encoder.embeddings.register_forward_hook(
        lambda module, args, out: out.requires_grad_()
    )
    return model.to(device, DTYPES[case.dtype]).train().requires_grad_(False)


class Trainer:
    """One method's model with its optimizer; `loss` is that of the last step."""

    def __init__(self, case: Case, method: Method, device: str) -> None:
        generator = torch.Generator().manual_seed(0)
        batch = case.tokens // case.length
        ids = torch.randint(1000, 20_000, (batch, case.length), generator=generator)
        self.batch = {
            "input_ids": ids.to(device),
            "attention_mask": torch.ones(
                batch, case.length, dtype=torch.int64, device=device
            ),
        }
        self.labels = torch.randint(0, 2, (batch,), generator=generator).to(device)
        self.steps = 0
        self.loss: Tensor | None = None
        model = new_model(case, device)
        self.prepared = prepare(
            method,
            model,
            linear_names(model, TARGETS),
            r=rank(case, method),
            saved=["classifier"],
            fused=True,
        )
        self.model = self.prepared.model

    def step(self) -> None:
        # the same dropout for every method
        torch.manual_seed(self.steps)
        self.steps += 1
        loss = F.cross_entropy(self.model(self.batch).float(), self.labels)
        loss.backward()
        self.prepared.update()
        self.loss = loss.detach()


def contestants(case: Case, device: str) -> dict[str, Contestant]:
    made = {}
    for method in case.methods:
        trainer = Trainer(case, method, device)
        prepared = trainer.prepared
        made[method.name] = Contestant(trainer.step, prepared.trainable, prepared.held)
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
