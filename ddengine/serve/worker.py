"""A worker: one engine and the one thread that runs it. Jobs wait in a line; events go to whoever handed one over."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING, Any

from ddengine.errors import DDEngineError
from ddengine.serve.contract import EditJob, Event, Failed, PrepareJob, Queued, Readiness, Stats
from ddengine.serve.first_edit import try_out
from ddengine.serve.limits import Limits
from ddengine.serve.line import Emit, Entry, Gone, batch_key, entry_for, takes_several
from ddengine.serve.running import FAULTY, Runner, facts_of, line_of
from ddengine.serve.sources import Sources

if TYPE_CHECKING:
    from ddengine.engine import Engine

log = logging.getLogger(__name__)

BROKEN = Failed("unavailable", "the worker failed; it will be replaced", 10)
_SWEEP_S = 5.0  # after which at the latest an expired source is let go of, while nothing runs


class Worker:
    """Loads an engine in its own thread, tries it out, then runs jobs one after the other (or several as a batch).

    Methods may be called from any thread and return at once, but for `close`. A fault of the device leaves a process
    whose every later call fails, and an error outside of any job leaves one of which nothing is known: the worker is
    then poisoned, takes no more jobs and waits to be replaced.
    """

    def __init__(
        self,
        load: Callable[[], Engine],
        limits: Limits | None = None,
        *,
        self_test: bool = True,
        lost: Callable[[], object] | None = None,
    ) -> None:
        """load: makes the engine, called once. self_test: whether an edit must pass before `readiness` says so.

        lost: called, from the worker's thread, once no job will run here any more: loading or the first edit failed, or
        the device or the worker itself did.
        """
        self.limits = limits or Limits()
        self.sources = Sources(self.limits.sources, self.limits.source_bytes, self.limits.source_s)
        self._load, self._self_test, self._lost = load, self_test, lost or (lambda: None)
        self._engine: Engine | None = None
        self._changed = threading.Condition()
        self._waiting: deque[Entry] = deque()
        self._running: list[Entry] = []
        self._state, self._reason = "loading", "the model is being loaded"
        self._stopping = False
        self._runner = Runner(self.limits, self.sources, lambda: self._stopping, self._faulty)
        self._thread = threading.Thread(target=self._live, name="ddengine-worker", daemon=True)
        self._thread.start()

    # What others see.

    def submit(self, job: EditJob | PrepareJob, emit: Emit) -> None:
        """Put a job in line. `emit` gets its events, from the worker's thread or this one; the last one is final."""
        try:
            entry = entry_for(job, emit, self.limits, self.sources)
        except Gone as error:
            return emit(Failed("gone", str(error)))
        except DDEngineError as error:
            return emit(Failed("invalid", str(error)))
        with self._changed:
            if self._state != "ready":
                refusal: Event = Failed("unavailable", f"the worker is {self._state}: {self._reason}", 5)
            elif len(self._waiting) >= self.limits.queue + self.limits.concurrency:
                refusal = Failed("busy", f"{len(self._waiting)} jobs wait, the limit is reached; try again later", 5)
            else:
                refusal = Queued(len(self._waiting) + len(self._running))
                self._waiting.append(entry)
                # Under the lock, so that no event of the running job overtakes it.
                emit(refusal)
                self._changed.notify_all()
                return
        emit(refusal)

    def cancel(self, job_id: str) -> bool:
        """Cancel a job: out of the line at once, or at the engine's next step; False if there is none of that id."""
        with self._changed:
            for entry in self._waiting:
                if entry.job.id == job_id:
                    self._waiting.remove(entry)
                    self._changed.notify_all()
                    break
            else:
                running = [entry for entry in self._running if entry.job.id == job_id]
                for entry in running:
                    entry.cancelled.set()
                return bool(running)
        entry.end(Failed("cancelled", "the edit was cancelled"))
        return True

    def forget(self, source: str) -> bool:
        return self.sources.drop(source)

    def readiness(self) -> Readiness:
        with self._changed:
            state, reason, engine = self._state, self._reason, self._engine
        about = {} if engine is None else _about(engine)
        return Readiness(state == "ready", state, reason, about)

    def stats(self) -> Stats:
        count, nbytes = self.sources.usage()
        with self._changed:
            waiting, running, engine = len(self._waiting), len(self._running), self._engine
        return Stats(
            1,
            waiting,
            running,
            count,
            nbytes,
            _device_bytes(engine),
            self.sources.hits,
            self.sources.misses,
            self.sources.evictions,
            self._runner.batches,
            self._runner.batched,
        )

    def close(self, drain_s: float = 0.0) -> None:
        """Take no more jobs, give those there `drain_s` seconds, cancel the rest, end the thread. Blocks until then."""
        with self._changed:
            if self._state in ("ready", "loading", "testing"):
                self._state, self._reason = "draining", "the service is being stopped"
            self._changed.wait_for(lambda: not (self._waiting or self._running), timeout=drain_s)
            left, self._stopping = list(self._waiting), True
            self._waiting.clear()
            for entry in self._running:
                entry.cancelled.set()
            self._changed.notify_all()
        for entry in left:
            entry.end(Failed("unavailable", "the service is being stopped", 5))
        self._thread.join(timeout=30)
        self.sources.clear()

    # The thread.

    def _live(self) -> None:
        try:
            engine = self._load()
            with self._changed:
                self._engine = engine
                if self._state == "loading":
                    self._state, self._reason = "testing", "a first edit is being tried"
            if self._self_test:
                try_out(engine, lambda: self._stopping)
        except BaseException as error:  # SystemExit too would end the thread without a word
            if not self._stopping:
                log.exception("the worker does not get ready")
                with self._changed:
                    self._state, self._reason = "failed", f"{type(error).__name__}: {line_of(error)}"
                self._lost()
            return
        with self._changed:
            if self._state == "testing":
                self._state, self._reason = "ready", ""
        try:
            while self._work(engine):
                pass
        except BaseException as error:
            log.critical("the worker failed", exc_info=error, extra={"facts": facts_of(self._running)})
            try:
                for entry in self._running:
                    entry.end(Failed("internal", "the edit failed inside the service; its log says why"))
            finally:
                with self._changed:
                    self._running = []
                self._give_up(f"the worker failed: {type(error).__name__}", BROKEN)

    def _work(self, engine: Engine) -> bool:
        """Run the first job in line once there is one, with those that go with it; False when the worker is to end."""
        with self._changed:
            sweep_s = min(self.limits.source_s, _SWEEP_S)
            self._changed.wait_for(lambda: self._waiting or self._stopping, timeout=sweep_s)
            if self._stopping:
                return False
            self._running = [self._waiting.popleft()] if self._waiting else []
        if self._running:
            self._add_those_alike(engine)
            self._runner.run(engine, self._running)
            with self._changed:
                self._running = []
                self._changed.notify_all()
        self.sources.usage()  # lets go of what has expired
        return True

    def _add_those_alike(self, engine: Engine) -> None:
        """To the job that is to run, those behind it in line that can run in one batch with it."""
        (first,) = self._running
        if self.limits.batch == 1 or not isinstance(first.job, EditJob) or not takes_several(engine, first.prompt):
            return
        # The engine is asked without the lock: it may take its time, and others want to know how the worker is.
        with self._changed:
            line = [entry for entry in self._waiting if isinstance(entry.job, EditJob)]
        key = batch_key(engine, first)
        alike = (entry for entry in line if key is not None and batch_key(engine, entry) == key)
        found = list(islice(alike, self.limits.batch - 1))
        with self._changed:
            there = [entry for entry in found if entry in self._waiting]
            for entry in there:
                self._waiting.remove(entry)
            self._running = [first, *there]

    def _faulty(self, error: Exception) -> None:
        """The device has failed: nothing more will run in this process."""
        facts = facts_of(self._running)
        log.critical("the device failed, the worker takes no more jobs", exc_info=error, extra={"facts": facts})
        self._give_up(line_of(error), FAULTY)

    def _give_up(self, reason: str, final: Failed) -> None:
        """Take no more jobs; all who wait are told so, and whoever runs the process."""
        with self._changed:
            self._state, self._reason = "poisoned", reason
            left = list(self._waiting)
            self._waiting.clear()
            self._changed.notify_all()
        try:
            for entry in left:
                entry.end(final)
        finally:
            self._lost()


def _about(engine: Engine) -> dict[str, Any]:
    model = engine.model
    return {
        "model": model.name,
        "digest": model.digest,
        "backend": engine.backend.name,
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "size": model.size,
    }


def _device_bytes(engine: Engine | None) -> int:
    if engine is None or engine.model.device.type != "cuda":
        return 0
    import torch

    return int(torch.cuda.memory_reserved(engine.model.device))
