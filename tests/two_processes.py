"""Two processes with gloo that run the functions of a test: started once per file, because
importing torch takes longer than a test.
"""

from __future__ import annotations

import datetime
import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2
# Seconds for one function, in which a deadlock becomes a failure. The first one also imports what its
# file imports, which takes half a minute where other work is running.
TIMEOUT = 150


class Pair:
    """Runs ``function(*args)`` in both processes; functions are module-level and know their rank
    from torch.distributed.
    """

    def __init__(self, connections: list[Any]) -> None:
        self.connections, self.late = connections, False

    def __call__(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What the function returned, by rank. Raises AssertionError with the traceback of a
        process that raised.
        """
        # a late answer would be taken for that of the next function
        assert not self.late, "an earlier function has given no answer in time"
        for connection in self.connections:
            connection.send((function, args))
        answers = []
        for connection in self.connections:
            if connection.poll(TIMEOUT):
                answers.append(connection.recv())
            else:
                self.late = True
                answers.append((f"no answer within {TIMEOUT} s", None))
        failures = [
            f"process {rank}:\n{failure}"
            for rank, (failure, _) in enumerate(answers)
            if failure is not None
        ]
        assert not failures, "\n".join(failures)
        return [answer for _, answer in answers]


@contextmanager
def pair(folder: Path) -> Iterator[Pair]:
    context = mp.get_context("spawn")
    processes, connections = [], []
    for rank in range(WORLD):
        here, there = context.Pipe()
        process = context.Process(
            target=_serve, args=(rank, str(folder / "store"), there), daemon=True
        )
        process.start()
        there.close()
        processes.append(process)
        connections.append(here)
    try:
        yield Pair(connections)
    finally:
        for connection in connections:
            connection.close()
        for process in processes:
            process.join(10)
            if process.is_alive():
                process.kill()


def _serve(rank: int, store: str, connection: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=TIMEOUT),
    )
    while True:
        try:
            function, args = connection.recv()
        except EOFError:  # the test is over
            break
        torch.manual_seed(0)
        try:
            answer = None, function(*args)
        except Exception:
            answer = traceback.format_exc(), None
        connection.send(answer)
    os._exit(0)  # nothing left to say to the other process, and no need to wait for it
