"""Several deltas on one base: load, switch, disable, merge and save them. The names are PEFT's.

Applied adapters form a stack. Each one keeps what it has written over, so taking them off in
reverse order restores every bit;
disjoint ones may be stacked in any order, overlapping ones only if asked for. The slices in
training are an adapter too.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from slicefine.deltas import live, packed
from slicefine.deltas.delta import Delta, DeltaError
from slicefine.deltas.folder import check_no_adapter, check_no_model, save_folder
from slicefine.deltas.format import SUFFIX
from slicefine.deltas.live import AdapterRegister
from slicefine.state import state_of

DEFAULT = "default"
# arguments of PreTrainedModel.save_pretrained and PeftModel.save_pretrained that change nothing
# about a delta
_OF_WHOLE_MODELS = {
    "safe_serialization",
    "save_function",
    "max_shard_size",
    "variant",
    "token",
    "save_peft_format",
    "save_embedding_layers",
}


class AdapterModel:
    """Mixed into the class of a model that has slices or loaded deltas."""

    @property
    def _adapters(self) -> AdapterRegister:
        state = state_of(self)
        assert state is not None, "a model of a mixed class has its state"
        return state.adapters

    # What there is

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that are applied, the lowest of the stack first."""
        return self._adapters.active

    @property
    def active_adapter(self) -> str | None:
        """The topmost applied adapter."""
        return self._adapters.active[-1] if self._adapters.active else None

    @property
    def adapters(self) -> list[str]:
        """Names of all adapters, applied or not."""
        name = self._adapters.trainable
        return [*([] if name is None else [name]), *self._adapters.deltas]

    def delta(
        self, adapter_name: str | None = None, info: dict[str, Any] | None = None
    ) -> Delta:
        """A loaded adapter, or what the slices in training have changed so far (the default, where
        there are slices).

        info: JSON to store with it, such as metrics. Raises RuntimeError if originals were not
            kept.
        """
        adapters = self._adapters
        name = adapter_name or adapters.trainable or self.active_adapter
        if name is not None and name == adapters.trainable:
            return live.trained_delta(self, info or {})
        delta = self._adapters.deltas[self._known(name)]
        # other info makes another file, whose hash is not known yet
        return replace(delta, info={**delta.info, **info}, sha256=None) if info else delta

    # On and off

    def load_adapter(
        self,
        path: str | os.PathLike[str] | Delta,
        adapter_name: str = DEFAULT,
        *,
        verify: bool = True,
    ) -> None:
        """Read a delta (folder, file or hub id) and check it against the base; `set_adapter`
        applies it.

        verify: hash the whole base model; False compares only the entries that the delta replaces.
        Raises DeltaError for a damaged file, another base, a name that is taken, or a delta that
        was trained on top of others
        which are not loaded.
        """
        check_name(_module(self), adapter_name)
        delta = path if isinstance(path, Delta) else Delta.load(local_path(path))
        below = self._below(delta)
        # Hashes are of the base, or of it with what this delta was trained on: nothing else
        # applied.
        with self.disable_adapter():
            for name in below:
                self._apply_one(name)
            delta.check_base(_module(self), everything=verify)
        packed.make_room(_module(self), delta.weights)
        self._adapters.deltas[adapter_name] = delta

    def set_adapter(self, adapter_name: str | list[str], *, stack: bool = False) -> None:
        """Apply these adapters and take the others off; bit-exact. An empty list leaves the base.

        stack: let later ones write over earlier ones where they overlap. Raises DeltaError where
            they overlap otherwise.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        # what disable_adapters remembers is over: this call says what applies from here on
        self._adapters.disabled = None
        for name in names:
            self._known(name)
        if len(set(names)) < len(names):
            raise DeltaError(f"an adapter is named twice: {names}")
        self._check_stack(names, stack)
        before = self.active_adapters
        try:
            self._unapply_all()
            for name in names:
                if name == self._adapters.trainable:
                    live.check_originals(self, names[:-1])
                self._apply_one(name)
        # also for Ctrl-C: half a stack must not stay
        except BaseException:
            self._unapply_all()
            for name in before:
                self._apply_one(name)
            raise

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter off if it is applied, and forget it. Raises DeltaError where slices have
        trained on top of its values.
        """
        if self._known(adapter_name) == self._adapters.trainable:
            raise DeltaError(
                f"{adapter_name!r} are the slices in training; revert() or merge_and_unload() ends"
                " them"
            )
        rest = [name for name in self.active_adapters if name != adapter_name]
        if rest != self.active_adapters:
            # stack: what was applied together before may stay so, overlaps and all
            self.set_adapter(rest, stack=True)
        del self._adapters.deltas[adapter_name]

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base model, bit for bit, inside the block; slices get no gradient there and an
        optimizer step raises.
        """
        names = self.active_adapters
        self._unapply_all()
        try:
            yield
        finally:
            self._unapply_all()
            for name in names:
                # else deleted inside the block
                if name in self.adapters:
                    self._apply_one(name)

    def revert(self) -> None:
        """Take the model back to its base, bit for bit: adapters off, slices and whole modules at
        their original values.

        Slices may go on training from there; their optimizer still holds its moments.
        """
        self._unapply_all()
        adapters = self._adapters
        if adapters.trainable is not None:
            live.restart_from_base(self)
            # At their originals, the slices are applied again: they have changed nothing so far.
            adapters.stack.append((adapters.trainable, None))

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "linear",
    ) -> None:
        """A new adapter: old + sum of weights times (new - old), in float64, rounded once.
        combination_type: "linear".

        Where one adapter alone changes an entry with weight 1 its value is copied, so disjoint
        deltas merge without rounding.
        """
        from slicefine.deltas.merging import weighted

        check_name(_module(self), adapter_name)
        if combination_type != "linear":
            raise ValueError(
                f"combination_type is {combination_type!r}; expected 'linear', the only one for"
                " deltas"
            )
        if len(adapters) != len(weights) or not adapters:
            raise ValueError(
                f"{len(adapters)} adapters and {len(weights)} weights; expected as many of each, at"
                " least one"
            )
        self._adapters.deltas[adapter_name] = weighted(
            [self.delta(name) for name in adapters], weights
        )

    # Files

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *args: Any,
        selected_adapters: list[str] | None = None,
        info: dict[str, Any] | None = None,
        whole_model: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write adapters as deltas, with config and model card, atomically: ``default`` to the
        folder, others to folders in it.

        The whole model is written instead, as its class does, by calls with ``state_dict=``, which
        is how Trainer and Accelerate write checkpoints; and always where the class takes no
        ``state_dict`` and so leaves its trainer no such way to ask: sentence-transformers, also
        for the transformer inside of one, and diffusers. There ``selected_adapters`` asks for
        deltas.

        Args:
            save_directory: a folder without a model or another tool's adapter in it.
            selected_adapters: those to write; default: the slices in training, else what is applied.
            info: JSON to store with them.
            whole_model: write the whole model.
            kwargs: is_main_process (False writes nothing); what only a whole model needs is ignored.

        Raises:
            DeltaError: nothing is applied, or the folder holds what would no longer load.
        """
        deltas = selected_adapters is not None or info is not None
        if whole_model or "state_dict" in kwargs or (not deltas and _saves_whole(self)):
            return _whole_save(self, save_directory, *args, **kwargs)
        if args or (unknown := kwargs.keys() - _OF_WHOLE_MODELS - {"is_main_process"}):
            named = ", ".join(sorted(unknown)) if not args else repr(args[0])
            raise TypeError(
                f"save_pretrained got {named}, which a delta has no use for:"
                " push_to_hub(repo_id) uploads it, whole_model=True saves the model as its class"
                " does"
            )
        if not kwargs.get("is_main_process", True):
            return None
        names = selected_adapters or (
            [self._adapters.trainable] if self._adapters.trainable else self.active_adapters
        )
        if not names:
            raise DeltaError(
                "no adapter is applied: nothing to save. set_adapter one, or name it in"
                " selected_adapters"
            )
        folders = {
            name: Path(save_directory) if name == DEFAULT else Path(save_directory) / name
            for name in names
        }
        # All of them first: a refused one must not leave the others written.
        for folder in folders.values():
            check_no_model(folder)
        for name, folder in folders.items():
            save_folder(self.delta(name, info), folder, name)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Write the delta as `save_pretrained` does and upload it; returns the address. kwargs:
        HfApi.create_repo's.
        """
        from slicefine.deltas.hub import push

        return push(self, repo_id, **kwargs)

    # Inside

    def _known(self, name: str | None) -> str:
        if name is None or name not in self.adapters:
            raise DeltaError(
                f"no adapter {name!r}; there are {', '.join(map(repr, self.adapters)) or 'none'}"
            )
        return name

    def _check_stack(self, names: list[str], stack: bool) -> None:
        """Refuse overlaps. Slices in training are not looked at: they may lie over adapters that
        they started from.
        """
        slices, deltas = self._adapters.trainable, self._adapters.deltas
        if slices in names and names[-1] != slices:
            raise DeltaError(
                f"{slices!r} are the slices in training; they must be the last of {names}"
            )
        loaded = [name for name in names if name != slices]
        for i, upper in enumerate(loaded):
            below = self._below(deltas[upper])
            if below != [name for name in loaded[:i] if name in below]:
                raise DeltaError(
                    f"adapter {upper!r} was trained on top of {', '.join(map(repr, below))}:"
                    f" set_adapter({[*below, upper]})"
                )
            for lower in loaded[:i] if not stack else ():
                if lower not in below and (common := deltas[upper].overlap(deltas[lower])):
                    raise DeltaError(
                        f"adapters {lower!r} and {upper!r} change the same entries of"
                        f" {', '.join(common[:3])}. stack=True lets the later one win."
                    )

    def _below(self, delta: Delta) -> list[str]:
        """The adapters that a delta was trained on top of, by the names that they have here, the
        lowest first.
        """
        here = {
            other.sha256: name
            for name, other in self._adapters.deltas.items()
            if other.sha256
        }
        wanted = delta.base.get("on", [])
        if missing := [entry["name"] for entry in wanted if entry["sha256"] not in here]:
            raise DeltaError(
                f"the delta was trained on top of {', '.join(map(repr, missing))}, which"
                f" {'is' if len(missing) == 1 else 'are'} not loaded: load_adapter them first"
            )
        return [here[entry["sha256"]] for entry in wanted]

    def _apply_one(self, name: str) -> None:
        adapters = self._adapters
        if name == adapters.trainable:
            live.switch_on(self)
            adapters.stack.append((name, None))
            return
        delta = adapters.deltas[name]
        # Read before written: what stands here now, base or lower adapter, is the way back.
        overwritten = delta.read(_module(self))
        delta.write(_module(self), "new")
        adapters.stack.append((name, overwritten))

    def _unapply_all(self) -> None:
        adapters = self._adapters
        while adapters.stack:
            _, overwritten = adapters.stack[-1]
            if overwritten is None:
                live.switch_off(self)
            else:
                # "new": `read` puts the values that it finds there
                overwritten.write(_module(self), "new")
            # Only now: if writing fails, the adapter is still known as applied.
            adapters.stack.pop()


# Names and paths


def check_name(model: nn.Module, name: str) -> None:
    """Raise DeltaError if an adapter has this name already, or it cannot be the name of a folder,
    which it will be.
    """
    if (
        not name
        or name.startswith(".")
        or name.endswith(SUFFIX)
        or any(c in name for c in "/\\:\0")
    ):
        raise DeltaError(
            f"an adapter cannot be called {name!r}: a folder of that name is made when it is saved"
        )
    state = state_of(model)
    known: AdapterRegister | None = None if state is None else state.adapters
    if known is not None and (name == known.trainable or name in known.deltas):
        raise DeltaError(
            f"there is an adapter {name!r} already; choose another adapter_name, or"
            " delete_adapter it"
        )


def _module(model: Any) -> nn.Module:
    return model


def _saves_whole(model: Any) -> bool:
    """Whether the model's own class writes whole models only, in parts, and asks nobody for a state
    dict.
    """
    # what the mixin has shadowed
    own = getattr(super(AdapterModel, model), "save_pretrained", None)
    if own is None:
        return False
    if "state_dict" not in inspect.signature(own).parameters:
        return True
    # sentence-transformers' module around a transformer saves it so, as a part of a whole model
    caller = inspect.currentframe()
    # two frames up: save_pretrained, and who called it
    for _ in range(2):
        caller = caller.f_back if caller is not None else None
    name = caller.f_globals.get("__name__", "") if caller is not None else ""
    return name.startswith("sentence_transformers.")


def _whole_save(
    model: Any, folder: str | os.PathLike[str], *args: Any, **kwargs: Any
) -> None:
    save = getattr(super(AdapterModel, model), "save_pretrained", None)
    if save is None:
        raise TypeError(
            f"{type(model).__name__} has no save_pretrained of its own;"
            " torch.save(model.state_dict(), ...) writes the whole model"
        )
    check_no_adapter(Path(folder))
    with packed.as_own_class_saves(model):
        save(folder, *args, **kwargs)


def local_path(path: str | os.PathLike[str]) -> Path:
    """A path here, or where a delta of the hub has been downloaded to.

    Raises:
        FileNotFoundError: there is no such folder, and the hub has none of that name.
    """
    if (
        Path(path).exists()
        or not isinstance(path, str)
        # an id of the hub is owner/name; a folder of that name here comes first
        or path.count("/") != 1
        or path.startswith((".", "/"))
    ):
        return Path(path)
    from slicefine.deltas.hub import pull

    try:
        return pull(path)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise FileNotFoundError(
            f"no folder {path} in {Path.cwd()}: neither a path here nor a hub id that could be read"
            f" ({type(error).__name__}: {reason})"
        ) from error
