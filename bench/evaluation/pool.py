"""Workers: this process, or several that are each given one job at a time and replaced when they die.

This file imports no torch, so that a new process can be told its number of threads before anything reads it.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import ddengine.errors as errors
from ddengine.errors import DDEngineError

log = logging.getLogger(__name__)


class Specification(Protocol):
    """What a worker is made of: `open` loads it and returns the function that answers jobs."""

    def open(self) -> Callable[[Any], Iterator[Any]]: ...


@dataclass(frozen=True)
class Died:
    """A worker ended in the middle of a job; what it had answered by then stands."""

    job: Any
    error: str


def here(do: Callable[[Any], Iterator[Any]], jobs: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
    """(job, answer) of every answer, in this process."""
    for job in jobs:
        for answer in do(job):
            yield job, answer


class Jobs:
    """What is still to be given out, one job ahead: nobody is started for nothing."""

    def __init__(self, jobs: Iterable[Any]) -> None:
        self._rest = iter(jobs)
        self._next = list(islice(self._rest, 1))

    def __bool__(self) -> bool:
        return bool(self._next)

    def take(self) -> Any:
        """The next job; only where there is one."""
        job = self._next.pop()
        self._next = list(islice(self._rest, 1))
        return job


def in_processes(what: Specification, jobs: Iterable[Any], count: int) -> Iterator[tuple[Any, Any]]:
    """(job, answer) of every answer of `count` processes, as they come; a (job, Died) where a process ended.

    Every process loads its own. One that cannot, be it the first or what replaces a dead one, costs no other: why is
    raised here when nobody is left for what is still to do. Processes are ended whenever the iterator is.
    """
    waiting, workers = Jobs(jobs), [_Worker(what) for _ in range(count)]
    try:
        while workers:
            ready = wait([worker.connection for worker in workers])
            for worker in [each for each in workers if each.connection in ready]:
                kind, content = worker.heard()
                if kind == "answer":
                    yield worker.job, content
                elif kind in ("broken", "died") and worker.job is None:
                    workers.remove(worker)
                    if kind == "broken":
                        worker.end()
                    error = (
                        _error(*content) if kind == "broken" else DDEngineError(f"a worker could not start: {content}")
                    )
                    if waiting and not workers:
                        raise error
                    log.warning("%s; those that are left go on: %d", error, len(workers))
                elif kind == "died":
                    workers.remove(worker)
                    yield worker.job, Died(worker.job, content)
                    if waiting:
                        workers.append(_Worker(what))
                elif waiting:
                    worker.give(waiting.take())
                else:
                    workers.remove(worker)
                    worker.end()
    finally:
        for worker in workers:
            worker.process.kill()
            worker.end()


class _Worker:
    """A process and our end of its pipe. job: what it is at."""

    def __init__(self, what: Specification) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(what, theirs), daemon=True)
        self.process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        self.job: Any = None

    def heard(self) -> tuple[str, Any]:
        """What it says next: ("ready" | "answer" | "done" | "broken" | "died", content)."""
        try:
            said: tuple[str, Any] = self.connection.recv()
            return said
        except (EOFError, OSError):
            return "died", self.end()

    def give(self, job: Any) -> None:
        self.job = job
        with suppress(OSError):  # it died while idle: what it says next is that
            self.connection.send(job)

    def end(self) -> str:
        """Close and wait; how it ended, in words."""
        self.connection.close()
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        code = self.process.exitcode or 0
        self.process.close()
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        return f"its process {how}; if memory was short, use fewer --jobs"


def _serve(what: Specification, connection: Connection) -> None:
    """The life of a worker process: load, then answer jobs until nobody asks."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        do = what.open()
    except Exception as error:
        connection.send(("broken", (type(error).__name__, str(error))))
        return
    try:
        connection.send(("ready", None))
        while True:
            for answer in do(connection.recv()):
                connection.send(("answer", answer))
            connection.send(("done", None))
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return


def _error(kind: str, message: str) -> Exception:
    known = getattr(errors, kind, None)
    if isinstance(known, type) and issubclass(known, DDEngineError):
        return known(message)
    return DDEngineError(f"a worker could not start ({kind}: {message}); try --jobs 1")
