"""Hot-fix listed wrong answers of a classifier, and say what it cost: efficacy, locality,
generality.

Two modes. ``exact`` constructs a side network that is right on every listed sample and zero on
every other listed one; it knows
those samples only, so it does not generalize. ``train`` trains a side network, a slice or LoRA; it
generalizes a little and is
not exact. Edits alone, with nothing listed to keep, destroyed 45 to 69 % of the other answers where
that was measured.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slicefine.atomic import write_text
from slicefine.capacity.editing import METHODS, Attempt, unload_lora
from slicefine.capacity.samples import Inputs, Samples, count, joined, predict, take
from slicefine.capacity.side import AdditiveSide, default_feature, exact_side, features_of
from slicefine.capacity.side_file import base_sha256, load_side, save_side
from slicefine.config import SliceConfig
from slicefine.deltas.delta import CONFIG_FILE, Delta, DeltaError

MODES = ("exact", "train")
DRAWS = 8  # perturbations of each edit
Perturb = Callable[[Inputs, torch.Generator], Inputs]
SIZES = {"slice": 64, "lora": 8, "side": 64}
NO_KEEP = (
    "no keep set: nothing holds the other answers, and edits alone destroyed 45 to 69 % of them"
    " where that was measured. List inputs whose answers must stay, 10 to 20 for each edit"
)


@dataclass(frozen=True)
class EditReport:
    """What an edit did. efficacy: share of the edits that are answered as asked. locality: share of
    the kept answers that stay;
    None without a keep set. held_out_flips: share of answers that nothing held and that changed.
    generality: share of perturbed
    edits answered as asked, generality_before: those that the unpatched model answers so.
        kept_bit_equal: share of the kept samples whose logits have not changed in any bit.
    """

    efficacy: float
    locality: float | None
    generality: float
    held_out_flips: float | None
    kept_bit_equal: float | None
    edits: int
    kept: int
    held_out: int
    perturbed: int
    generality_before: float


def edit_report(
    before: Callable[[Inputs], Tensor],
    after: Callable[[Inputs], Tensor],
    edits: Samples,
    keep: Inputs | None = None,
    held_out: Inputs | None = None,
    perturb: Perturb | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    variants: list[Inputs] | None = None,
) -> EditReport:
    """Compare a model's answers before and after an edit.

    before, after: inputs -> (n, classes) logits. edits: their labels are the answers asked for.
        keep, held_out: inputs that an
    edit was told to leave alone, and that it was not told of. perturb: of inputs; default
    `perturbed`. draws: per edit. variants: perturbed edits,
    instead of drawing them.
    """
    variants = _variants(edits, perturb, draws, seed) if variants is None else variants
    asked, asked_before = (
        float(
            torch.stack([f(v).argmax(1) == edits.labels for v in variants]).double().mean()
        )
        for f in (after, before)
    )
    kept = _compared(before, after, keep)
    flips = _compared(before, after, held_out)
    return EditReport(
        efficacy=float((after(edits.inputs).argmax(1) == edits.labels).double().mean()),
        locality=kept and kept[0],
        generality=asked,
        held_out_flips=flips and 1 - flips[0],
        kept_bit_equal=kept and kept[1],
        edits=len(edits),
        kept=0 if keep is None else count(keep),
        held_out=0 if held_out is None else count(held_out),
        perturbed=len(variants) * len(edits),
        generality_before=asked_before,
    )


def _variants(
    edits: Samples, perturb: Perturb | None, draws: int, seed: int
) -> list[Inputs]:
    generator = torch.Generator().manual_seed(seed)
    return [(perturb or perturbed)(edits.inputs, generator) for _ in range(draws)]


def _compared(
    before: Callable, after: Callable, inputs: Inputs | None
) -> tuple[float, float] | None:
    """(share of equal answers, share of bit-equal logits)."""
    if inputs is None or not count(inputs):
        return None
    old, new = before(inputs), after(inputs)
    return float((old.argmax(1) == new.argmax(1)).double().mean()), float(
        (old == new).all(1).double().mean()
    )


def perturbed(inputs: Inputs, generator: torch.Generator) -> Inputs:
    """The default perturbation: noise of 1 % of each feature's standard deviation; of encodings,
    one inner token dropped.
    """
    if isinstance(inputs, dict):
        return _without_a_token(inputs, generator)
    if not inputs.dtype.is_floating_point:
        raise ValueError(
            f"inputs are {inputs.dtype}; say how to perturb them with perturb="
        )
    # a deviation needs two samples; with one, that of all its features stands in
    spread = (
        inputs.std(0, correction=0)
        if len(inputs) > 1
        else inputs.std().expand(inputs.shape[1:])
    )
    return inputs + 0.01 * spread * torch.randn(
        inputs.shape, generator=generator, dtype=inputs.dtype
    )


def _without_a_token(
    inputs: dict[str, Tensor], generator: torch.Generator
) -> dict[str, Tensor]:
    mask = inputs.get("attention_mask")
    if mask is None:
        raise ValueError(
            "encodings without attention_mask: say how to perturb them with perturb="
        )
    result = {key: value.clone() for key, value in inputs.items()}
    for row, length in enumerate(mask.sum(1).tolist()):
        if length < 4:
            continue  # nothing but the special tokens and a word
        # an inner token: the first and the last one are special
        drop = 1 + int(torch.randint(length - 2, (), generator=generator))
        for key, value in inputs.items():
            if value.shape == mask.shape:
                result[key][row, drop : length - 1] = value[row, drop + 1 : length]
        # one token fewer: the last place becomes padding
        result["attention_mask"][row, length - 1] = 0
    return result


@dataclass
class Patch:
    """A hot-fix that is in a model, and can be taken out, stored and put back.

    model: the patched model (for LoRA peft's wrapper). report: what the fix did. warnings: what to
        know about it. parameters:
    numbers that the fix adds or changes. solved: whether every answer asked for was reached.
    """

    model: nn.Module
    mode: str
    method: str
    report: EditReport | None
    base: dict[str, Any]
    parameters: int
    solved: bool = True
    warnings: list[str] = field(default_factory=list)
    side: AdditiveSide | None = None
    delta: Delta | None = None
    _lora: tuple[nn.Module, set[str]] | None = None

    def remove(self) -> nn.Module:
        """The model without the fix. Raises DeltaError unless it then is the base, tensor for
        tensor, bit for bit.
        """
        model = self.model
        if self.side is not None:
            self.side.detach()
        elif self.delta is not None:
            self.delta.revert_from(model)
        elif self._lora is not None:
            unload_lora(model, *self._lora)
            self.model = model = self._lora[0]
        # removal is proven, not assumed
        if base_sha256(model) != self.base["sha256"]:
            raise DeltaError(
                "the model without the patch is not the base: something else has changed it"
                " meanwhile"
            )
        return model

    def row(self) -> dict[str, Any]:
        """The report as JSON."""
        report = {} if self.report is None else asdict(self.report)
        return {
            "mode": self.mode,
            "method": self.method,
            **report,
            "solved": self.solved,
            "parameters": self.parameters,
            "base": self.base,
            "warnings": self.warnings,
        }

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the fix to a folder: a side network, a delta, or peft's adapter; and patch.json,
        the report.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.side is not None:
            save_side(self.side, folder, self.base, self.row())
        elif self.delta is not None:
            self.delta.info.update(self.row())
            self.delta.save(folder)
            write_text(folder / CONFIG_FILE, self.delta.config_json())
        else:
            wrapped: Any = self.model
            wrapped.save_pretrained(folder)
        write_text(folder / "patch.json", json.dumps(self.row(), indent=2) + "\n")


def _check_signature(
    folder: Path, public_key: str | os.PathLike[str] | None, sha256: str | None
) -> None:
    """Raise DeltaError unless the file that was read is signed, where that is asked for.

    sha256: of that file; None for a LoRA, which carries no hash that could be signed.
    """
    if public_key is None:
        return
    from slicefine.deltas import signing

    if sha256 is None:
        raise signing.SignatureError(f"{folder} holds a LoRA, which is not signed")
    signing.verify(folder, public_key, sha256=sha256)


def load_patch(
    model: nn.Module,
    folder: str | os.PathLike[str],
    public_key: str | os.PathLike[str] | None = None,
) -> Patch:
    """Put a stored fix into the model that it was made for, in place; `Patch.remove` takes it out
    again.

    public_key: PEM file of a key that must have signed it (sides and slices; `slicefine patch
        --sign`).
    Raises DeltaError for another base, a damaged file or a missing signature, FileNotFoundError.
    """
    folder = Path(folder)
    try:
        row = json.loads((folder / "patch.json").read_text(encoding="utf-8"))
        kind = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))["peft_type"]
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"no patch in {folder}: {Path(error.filename).name} is missing"
        ) from error
    # hashed before anything is put in: a patch on another base would be silently wrong
    here = {"model": row["base"].get("model"), "sha256": base_sha256(model)}
    if here["sha256"] != row["base"]["sha256"]:
        raise DeltaError(
            f"the patch was made for another base model ({row['base'].get('model') or 'unnamed'},"
            f" {row['base']['sha256'][:12]}); this one is {here['sha256'][:12]}. Load the model it"
            " was made for, unchanged and in the same dtype."
        )
    patch = Patch(
        model,
        row["mode"],
        row["method"],
        None,
        here,
        row["parameters"],
        row["solved"],
        row["warnings"],
    )
    if kind == "ADDITIVE_SIDE":
        side, manifest = load_side(folder)
        _check_signature(folder, public_key, manifest["file_sha256"])
        if manifest["base"]["sha256"] != here["sha256"]:
            raise DeltaError(
                "the side network was made for another base model than patch.json says"
            )
        patch.side = side.attach(model)
    elif kind == "SLICEFINE":
        patch.delta = Delta.load(folder)
        _check_signature(folder, public_key, patch.delta.sha256)
        patch.delta.apply_to(model)
    else:
        import peft

        _check_signature(folder, public_key, None)
        # peft freezes the model; `remove` must give this back
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        wrapped: Any = model
        patch.model, patch._lora = (
            peft.PeftModel.from_pretrained(wrapped, str(folder)),
            (
                model,
                trained,
            ),
        )
    # patch.json holds more than the report
    known = EditReport.__dataclass_fields__
    patch.report = EditReport(**{key: row[key] for key in known})
    return patch


def patch(
    model: nn.Module,
    edits: Samples,
    keep: Inputs | None = None,
    *,
    mode: str = "exact",
    method: str = "side",
    held_out: Inputs | None = None,
    size: int | None = None,
    layers: int = 2,
    config: SliceConfig | None = None,
    feature: str | None = None,
    steps: int = 500,
    lr: float | None = None,
    margin: float = 1.0,
    perturb: Perturb | None = None,
    name: str | None = None,
    seed: int = 0,
) -> Patch:
    """Make a classifier answer ``edits`` as their labels say, in place, and report efficacy,
    locality and generality.

    keep: inputs whose present answers must stay (10 to 20 for each edit); where ``held_out`` is
        None a fifth of them is held out
    and measured only. mode: "exact" or "train". method: "side", "slice" or "lora"; only a side can
    be exact.
    size: of what trains: hidden neurons, width of a slice, rank. layers: of a side, 2 or 3.
        feature: the module whose input the
    side reads; default: the head. config: which layers slices and LoRA train. name: of the base
    model, for the record.
    out: a `Patch`, in the model. Warns without a keep set, and if not everything asked for was
        reached.
    """
    if mode not in MODES or method not in METHODS:
        raise ValueError(
            f"mode is {mode!r} and method {method!r}; expected {' or '.join(MODES)}, and one of"
            f" {', '.join(METHODS)}"
        )
    if mode == "exact" and method != "side":
        raise ValueError(
            f"mode 'exact' with method {method!r}: only a side network can be constructed. Take"
            " method='side', or mode='train'"
        )
    if not len(edits):
        raise ValueError("there are no edits; nothing to patch")
    # warnings come before the work, which may take long
    said = _warn(edits, keep)
    # what is optimized on cannot say what happens elsewhere, so a fifth is only measured
    if keep is not None and held_out is None:
        keep, held_out = _hold_out(keep, seed)
    base = {"model": name, "sha256": base_sha256(model)}
    # drawn once, before the edit: both models are asked the same
    variants = _variants(edits, perturb, DRAWS, seed)
    # all answers of the unpatched model, by the identity of the inputs: the patch changes it in
    # place
    before = {
        id(x): predict(model, x)
        for x in (edits.inputs, keep, held_out, *variants)
        if x is not None
    }
    classes = before[id(edits.inputs)].shape[1]
    if int(edits.labels.min()) < 0 or int(edits.labels.max()) >= classes:
        raise ValueError(
            f"edits ask for class {int(edits.labels.max())}; the model has classes 0 to"
            f" {classes - 1}"
        )
    # the present answers are the labels to keep
    kept = None if keep is None else Samples(keep, before[id(keep)].argmax(1))
    if mode == "exact":
        result = _exact(model, edits, kept, layers, feature, margin, base, seed)
    else:
        trial = Attempt(model, method, size or SIZES[method], config, layers, feature, seed)
        fit = trial.fit(edits, kept, steps=steps, lr=lr, margin=margin, seed=seed)
        trained = getattr(trial, "_trained", set())
        delta = trial.keep({})
        result = Patch(
            trial.model,
            mode,
            method,
            None,
            base,
            trial.trainable,
            fit.solved,
            [],
            trial.side,
            delta,
        )
        if method == "lora":
            result._lora = (model, trained)
        if delta is not None:
            delta.base["model"] = name
    result.report = edit_report(
        lambda x: before[id(x)],
        lambda x: predict(result.model, x),
        edits,
        keep,
        held_out,
        variants=variants,
    )
    result.solved = result.solved and result.report.efficacy == 1.0
    said.append(
        "an exact patch knows the listed samples only: it does not generalize, and what generality"
        " says of it is the luck of the projection"
        if mode == "exact"
        else (
            "a trained patch is not exact: answers that nothing lists may have changed, and listed"
            " ones move in their last bits"
        )
    )
    if not result.solved:
        reached = f"{result.report.efficacy:.0%} of the edits" + (
            ""
            if result.report.locality is None
            else f", {result.report.locality:.1%} of the kept answers"
        )
        said.append(
            f"not everything asked for was reached: {reached}. Give more steps or a larger size, or"
            " mode='exact'"
        )
        warnings.warn(said[-1], stacklevel=2)
    result.warnings = said
    return result


def _warn(edits: Samples, keep: Inputs | None) -> list[str]:
    said = []
    if keep is None or not count(keep):
        said.append(NO_KEEP)
    elif count(keep) < 10 * len(edits):
        said.append(
            f"{count(keep)} inputs to keep for {len(edits)} edits; 10 to 20 for each edit are usual"
        )
    for line in said:
        warnings.warn(line, stacklevel=3)
    return said


def _hold_out(keep: Inputs, seed: int) -> tuple[Inputs, Inputs]:
    """A fifth of what is to be kept, held out and measured only."""
    order = torch.randperm(count(keep), generator=torch.Generator().manual_seed(seed))
    held = max(1, count(keep) // 5)
    return take(keep, order[held:].sort().values), take(keep, order[:held].sort().values)


def _exact(
    model: nn.Module,
    edits: Samples,
    keep: Samples | None,
    layers: int,
    feature: str | None,
    margin: float,
    base: dict[str, Any],
    seed: int,
) -> Patch:
    feature = feature if feature is not None else default_feature(model)
    everything = joined([edits, keep]) if keep is not None else edits
    features, logits = features_of(model, everything.inputs, feature)
    wanted: dict[int, Tensor | int] = {
        i: int(label) for i, label in enumerate(edits.labels.tolist())
    }
    side = exact_side(
        features,
        wanted,
        logits=logits,
        margin=margin,
        layers=layers,
        projection="lda",
        seed=seed,
        feature=feature,
    )
    side.attach(model)
    return Patch(model, "exact", "side", None, base, side.stored, True, [], side)
