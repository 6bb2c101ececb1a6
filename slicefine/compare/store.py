"""What a comparison has done so far: an Optuna journal, which survives a kill and serves several
processes.
"""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from slicefine import atomic
from slicefine.training.data import UserError


class Results:
    """Finished pieces of work in a folder, by key.

    Args:
        folder: of the comparison.
        setup: what the pieces depend on; another one in the same folder is refused.

    Raises:
        UserError: the folder holds another comparison.
    """

    def __init__(self, folder: Path, setup: dict[str, Any]) -> None:
        self.folder = folder
        for part in ("claims", "answers"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        path = folder / "setup.json"
        if path.exists():
            before = json.loads(path.read_text(encoding="utf-8"))
            now = json.loads(json.dumps(setup))
            if differing := [k for k in now if now[k] != before.get(k)]:
                name = differing[0]
                raise UserError(
                    f"{folder} holds another comparison: {name} was {before.get(name)!r}, now"
                    f" {now[name]!r}. Give the same options to go on, or another --output"
                )
        else:
            atomic.write_text(path, json.dumps(setup, indent=2) + "\n")
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        journal = folder / "journal.log"
        _drop_torn_line(journal)
        self.study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(journal))),
            study_name="compare",
            direction="maximize",
            load_if_exists=True,
        )

    def done(self) -> dict[str, dict[str, Any]]:
        """key -> what `finish` was given for it."""
        return {t.user_attrs["key"]: t.user_attrs["content"] for t in self.study.trials}

    def finish(
        self,
        key: str,
        content: dict[str, Any],
        value: float | None = None,
        answers: dict[str, np.ndarray] | None = None,
    ) -> None:
        """Keep a piece; the arrays first, so that a piece that is listed is complete."""
        if answers:
            with (
                atomic.replacing(self.folder / "answers" / f"{key}.npz") as temporary,
                open(temporary, "wb") as file,
            ):
                np.savez_compressed(file, **answers)  # pyright: ignore[reportArgumentType]
        state = optuna.trial.TrialState
        trial = optuna.create_trial(
            state=state.FAIL if value is None else state.COMPLETE,
            value=value,
            user_attrs={"key": key, "content": content},
        )
        self.study.add_trial(trial)
        (self.folder / "claims" / key).unlink(missing_ok=True)

    def answers(self, key: str) -> dict[str, np.ndarray]:
        with np.load(self.folder / "answers" / f"{key}.npz") as arrays:
            return dict(arrays)

    def claim(self, key: str) -> bool:
        """Take a piece for this process; False if another one that is alive has it."""
        path = self.folder / "claims" / key
        mine = f"{socket.gethostname()} {os.getpid()}"
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return _take_over(path, mine)
        with os.fdopen(handle, "w") as file:
            file.write(mine)
        return True


def _drop_torn_line(journal: Path) -> None:
    """Cut off the line that a power cut has left half written: Optuna would append to it."""
    if not journal.exists():
        return
    content = journal.read_bytes()
    if content and not content.endswith(b"\n"):
        os.truncate(journal, content.rfind(b"\n") + 1)


def _take_over(path: Path, mine: str) -> bool:
    """Whether a claim was left by a process of this machine that has ended."""
    try:
        host, _, pid = path.read_text().partition(" ")
    except FileNotFoundError:
        return False
    if host == socket.gethostname() and pid.isdigit() and not _alive(int(pid)):
        atomic.write_text(path, mine)
        return True
    return f"{host} {pid}" == mine


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
