"""Which names a SliceConfig means: PEFT's matching rules, and what to say when nothing matches.

A list matches whole names or suffixes (``name == entry or name.endswith("." + entry)``), a string
is a regular expression for the whole name (``re.fullmatch``). Checked against peft in
tests/core/test_targets.py.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from slicefine.config import SliceConfig


class Rules:
    """The names that a config means, in one model.

    Args:
        config: whose entries are matched.
        names: of all modules of the model.
    """

    def __init__(self, config: SliceConfig, names: Iterable[str]) -> None:
        self.names = list(names)
        self.everything = means_everything(config)
        self.entries = config.target_modules or []
        self._exclude = config.exclude_modules or []
        self._ranks = config.rank_pattern
        self.saved_by_entry = {
            entry: self._inside(entry) for entry in config.modules_to_save or ()
        }
        layers = config.layers_to_transform
        self._layers = [layers] if isinstance(layers, int) else layers
        patterns = config.layers_pattern
        self._patterns = [patterns] if isinstance(patterns, str) else patterns

    def _inside(self, entry: str) -> re.Pattern[str]:
        """What matches a module of modules_to_save and everything inside it.

        A plain name that the model has is that name; else the entry is a regular expression.
        """
        # escaped first: the dot in a plain name is no wildcard
        plain = re.compile(rf"(^|.*\.){re.escape(entry)}($|\..*)")
        if any(plain.match(name) for name in self.names):
            return plain
        return re.compile(rf"(^|.*\.){entry}($|\..*)")

    def saved(self, name: str) -> bool:
        """Whether modules_to_save names a module, or one around it."""
        return any(pattern.match(name) for pattern in self.saved_by_entry.values())

    def excluded(self, name: str) -> bool:
        """Whether a module is not to become a slice, whatever else names it."""
        return (bool(self._exclude) and named(self._exclude, name)) or self.saved(name)

    def listed(self, name: str) -> bool:
        """Whether target_modules names a module, and layers_to_transform its layer."""
        if not named(self.entries, name):
            return False
        # layers_to_transform narrows suffixes only: a whole name says its layer itself
        if isinstance(self.entries, str) or name in self.entries or not self._layers:
            return True
        return self.layer_number(name) in self._layers

    def layer_number(self, name: str) -> int | None:
        """The number of the layer that a module is in, as layers_pattern counts them."""
        if self._patterns:
            regexes = [rf"(?:^|.*?\.){p}\.(?P<index>\d+)\." for p in self._patterns]
        else:
            # without a pattern: the first number that stands behind any name, as in PEFT
            regexes = [r"(?:^|.*?\.)[^.]*\.(?P<index>\d+)\."]
        found = next((m for regex in regexes if (m := re.match(regex, name))), None)
        return None if found is None else int(found["index"])

    def rank(self, name: str) -> int | None:
        """r of a layer if rank_pattern gives it."""
        # the first pattern that fits wins, in the order of the config
        for pattern, r in self._ranks.items():
            if _ends_with(pattern, name):
                return r
        return None

    def without_effect(self, targets: list[str], candidates: Iterable[str]) -> list[str]:
        """What to say of entries that change nothing, most likely by a typing error.

        Args:
            targets: names of the layers that the config means.
            candidates: names that would be targets without exclude_modules.
        """
        notes, candidates = [], list(candidates)
        listed = [self._exclude] if isinstance(self._exclude, str) else self._exclude
        for entry in listed:
            # an expression is matched as a whole; a name as a list of one, by suffix
            form = entry if isinstance(self._exclude, str) else [entry]
            matched = [name for name in self.names if named(form, name)]
            if not matched:
                notes.append(f"exclude_modules names {entry!r}, which matches no module")
            elif not any(named(form, name) for name in candidates) and not any(
                self.saved(name) for name in matched
            ):
                notes.append(
                    f"exclude_modules names {entry!r}, which is no layer that would become a slice"
                    " (it takes the layers themselves, not the modules around them)"
                )
        for pattern in self._ranks:
            matched = [name for name in self.names if _ends_with(pattern, name)]
            if not matched and not any(_ends_with(pattern, name) for name in targets):
                notes.append(f"rank_pattern names {pattern!r}, which matches no module")
            elif not any(_ends_with(pattern, name) for name in targets):
                notes.append(
                    f"rank_pattern names {pattern!r}, and {some(matched)} is no target: it has no"
                    " effect"
                )
        return notes

    def check_layers(self) -> None:
        """Raise ValueError for an entry of layers_to_transform that is the number of no layer."""
        if not self._layers or isinstance(self.entries, str):
            return
        entries = self.entries
        listed = [n for n in self.names if n not in entries and named(entries, n)]
        found = sorted({i for n in listed if (i := self.layer_number(n)) is not None})
        missing = [i for i in self._layers if i not in found]
        if missing and listed:
            raise ValueError(
                f"layers_to_transform={self._layers} names layer {', '.join(map(str, missing))},"
                f" which target_modules={entries!r} are not in. They are in layers"
                f" {', '.join(map(str, found)) or 'that have no number'}; layers are counted from"
                " 0, and layers_pattern names the list that they stand in"
            )


def means_everything(config: SliceConfig) -> bool:
    """Whether target_modules is "all-linear"."""
    targets = config.target_modules
    return targets is None or (isinstance(targets, str) and targets.lower() == "all-linear")


def named(entries: list[str] | str, name: str) -> bool:
    """Whether entries, names or one regular expression, match a name."""
    if isinstance(entries, str):
        return re.fullmatch(entries, name) is not None
    return name in entries or any(name.endswith(f".{entry}") for entry in entries)


def _ends_with(pattern: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({pattern})$", name) is not None


def check_entries(
    entries: list[str] | str,
    names: Iterable[str],
    field: str = "target_modules",
    what: str = "modules",
) -> None:
    """Raise ValueError naming every entry that matches nothing, with the nearest names."""
    names = [name for name in names if name]
    unmatched = []
    for entry in [entries] if isinstance(entries, str) else entries:
        form = entry if isinstance(entries, str) else [entry]
        if not any(named(form, name) for name in names):
            unmatched.append(entry)
    if not unmatched:
        return
    # last parts too: who mistypes q_proj has not written the whole path
    suffixes = sorted({name.rsplit(".", 1)[-1] for name in names} | set(names))
    lines = []
    for entry in unmatched:
        near = difflib.get_close_matches(entry, suffixes, n=3, cutoff=0.5)
        hint = f"; nearest names: {', '.join(near)}" if near else ""
        lines.append(f"  {entry!r}: nothing matches{hint}")
    raise ValueError(
        f"{field} names {what} that the model does not have:\n" + "\n".join(lines)
    )


def some(names: Iterable[str], most: int = 8) -> str:
    """The first names of a list, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) + more) or "none"
