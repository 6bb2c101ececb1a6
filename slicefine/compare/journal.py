"""What has been trained, in Optuna's journal: a kill loses no more than the training it stops, and
several processes share the work.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slicefine.training.data import UserError

try:
    import optuna
    from filelock import FileLock, Timeout
    from optuna.storages.journal._file import BaseJournalFileLock
except ImportError as missing:
    raise UserError(
        f"slicefine compare needs Optuna ({missing}): pip install 'slicefine[compare]'"
    ) from missing

Result = dict[str, Any]


class _Lock(BaseJournalFileLock):
    """A lock that the system gives back when its process dies, unlike Optuna's own."""

    def __init__(self, path: Path) -> None:
        self.lock = FileLock(path)

    def acquire(self) -> bool:
        self.lock.acquire()
        return True

    def release(self) -> None:
        self.lock.release()


class Journal:
    """Results by the name of their piece of work. identity: what makes it this comparison."""

    def __init__(self, folder: Path, identity: Result) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.folder, path = folder, folder / "journal.log"
        folder.mkdir(parents=True, exist_ok=True)
        lock = _Lock(folder / "journal.lock")
        with lock.lock:
            _drop_torn_line(path)
        backend = optuna.storages.journal.JournalFileBackend(str(path), lock_obj=lock)
        storage = optuna.storages.JournalStorage(backend)
        with FileLock(folder / "begin.lock"):
            self.study = optuna.create_study(
                study_name="compare", storage=storage, load_if_exists=True
            )
            known = self.study.user_attrs.get("identity")
            if known is None:
                self.study.set_user_attr("identity", identity)
        if known is not None and known != identity:
            wrong = [k for k in {*known, *identity} if known.get(k) != identity.get(k)]
            raise UserError(
                f"{folder} holds another comparison: {', '.join(sorted(wrong))} differ. Give the"
                " same data and options to go on with it, or another --output"
            )

    def results(self) -> dict[str, Result]:
        """What is finished."""
        trials = self.study.get_trials(deepcopy=False)
        return {
            t.user_attrs["piece"]: t.user_attrs["result"]
            for t in trials
            if "piece" in t.user_attrs
        }

    def finish(self, pieces: list[str], work: Callable[[str], Result]) -> dict[str, Result]:
        """Do what nobody has done or is doing, wait for the others, and return all results."""
        while True:
            left = [name for name in pieces if name not in self.results()]
            if not left:
                return {name: self.results()[name] for name in pieces}
            if not any([self._try(name, work) for name in left]):
                time.sleep(0.5)

    def _try(self, name: str, work: Callable[[str], Result]) -> bool:
        lock = FileLock(self.folder / f"{name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        with lock:
            # another process may have finished it since
            if name not in self.results():
                attributes = {"piece": name, "result": work(name)}
                state = optuna.trial.TrialState.COMPLETE
                # one line of the journal: all of it or nothing
                self.study.add_trial(
                    optuna.trial.create_trial(state=state, value=0.0, user_attrs=attributes)
                )
        return True


def _drop_torn_line(path: Path) -> None:
    """Take away the end of a line that a kill has cut: the next one would be joined to it."""
    if path.exists():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with path.open("r+b") as file:
                file.truncate(whole)
