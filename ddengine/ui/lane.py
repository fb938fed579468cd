"""One edit after the other: a worker thread, a bounded queue that everyone sees, and jobs that tell and can stop."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from PIL import Image

from ddengine.drags import Point
from ddengine.errors import Cancelled, DDEngineError, InputError
from ddengine.progress import Progress

log = logging.getLogger(__name__)

MAX_WAITING = 8
PREVIEW_SHARE = 0.1  # of an edit's time that previews may take
PREVIEW_EVERY = 0.4  # seconds at least between two of them
# What a step of a stage costs next to one network pass, to say how far an edit is.
_COST = {"drag": 3.0, "denoise": 2.0}


class Job:
    """One edit under way: what it has told last, whether it is asked to stop, and its end. Safe between threads."""

    def __init__(
        self, work: Callable[[Job], Any], plan: dict[str, int], targets: tuple[Point, ...] = (), drags: int = 0
    ) -> None:
        """work: computes the result, calling `tell` with every Progress. plan: expected steps by stage.

        drags: denoising steps that begin with dragging, the first ones; it may end early in each.
        """
        self._work, self._plan, self.targets, self._drags = work, plan, targets, drags
        self._lock = threading.Lock()
        self._stop, self.ended = threading.Event(), threading.Event()
        self._done: dict[str, float] = {}
        self._preview_after = 0.0
        self.started: float | None = None
        self.seconds = 0.0
        self.at: Progress | None = None
        self.points: tuple[Point, ...] = ()
        self.preview: Image.Image | None = None
        self.result: Any = None
        self.error: str | None = None
        self.cancelled = False

    def cancel(self) -> None:
        """Ask it to stop: at once while it waits, else at its next step."""
        self._stop.set()

    def tell(self, at: Progress) -> None:
        """The engine's progress callback; raises Cancelled once the job is asked to stop."""
        if self._stop.is_set():
            raise Cancelled("stopped")
        now = time.monotonic()
        preview = None
        if at.preview is not None and now >= self._preview_after:
            preview = at.preview()
            took = time.monotonic() - now
            self._preview_after = now + took + max(PREVIEW_EVERY, took / PREVIEW_SHARE)
        with self._lock:
            self.at = at
            self._done[at.stage], self._plan[at.stage] = at.step, at.total
            if at.points is not None:
                self.points = tuple((float(x), float(y)) for x, y in at.points)
            if preview is not None:
                self.preview = preview

    def look(self) -> tuple[Progress | None, tuple[Point, ...], Image.Image | None]:
        """The last progress, handles and preview, of one moment."""
        with self._lock:
            return self.at, self.points, self.preview

    def share(self) -> float:
        """How far it is, 0 to 1; stages that were left early count as done once a later one began."""
        with self._lock:
            stages = list(self._plan)
            reached = max((stages.index(stage) for stage in self._done), default=-1)
            total = sum(_COST.get(stage, 1.0) * steps for stage, steps in self._plan.items())
            # Dragging and denoising alternate, so neither is over before the edit is. What has been dragged is told by
            # the denoising that follows it, since it may end early.
            made = dict(self._done)
            if self._drags and made.get("denoise"):
                share = min(1.0, made["denoise"] / self._drags)
                made["drag"] = max(made.get("drag", 0), share * self._plan.get("drag", 0))
            done = sum(
                _COST.get(stage, 1.0) * (steps if number < reached and stage not in _COST else made.get(stage, 0))
                for number, (stage, steps) in enumerate(self._plan.items())
            )
        return min(1.0, done / total) if total else 0.0

    def run(self) -> None:
        """Do the work and keep its end, whatever it is; called by the lane."""
        self.started = time.monotonic()
        try:
            if self._stop.is_set():
                raise Cancelled("stopped")
            self.result = self._work(self)
        except Cancelled:
            self.cancelled = True
        except DDEngineError as error:
            self.error = str(error)
        except MemoryError:
            self.error = "There was not enough memory for this edit; open a smaller picture, or start with --size"
        except Exception as error:
            log.exception("an edit failed")
            self.error = f"The edit failed unexpectedly ({type(error).__name__}); the terminal has the details."
        finally:
            self.seconds = time.monotonic() - self.started
            self._work = _nothing  # which holds pictures
            self.ended.set()


class Lane:
    """Runs jobs in the order they came, one at a time, on a thread of its own."""

    def __init__(self) -> None:
        self._waiting: deque[Job] = deque()
        self._change = threading.Condition()
        self._running: Job | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="ddengine-ui-edits", daemon=True)
        self._thread.start()

    def add(self, job: Job) -> None:
        """Queue a job; InputError where MAX_WAITING wait already or the lane is closed."""
        with self._change:
            if self._closed:
                raise InputError("the editor is closing; start it again with `ddengine ui`")
            if len(self._waiting) >= MAX_WAITING:
                raise InputError(f"{len(self._waiting)} edits wait already, the limit is {MAX_WAITING}; try again soon")
            self._waiting.append(job)
            self._change.notify()

    def ahead(self, job: Job) -> int:
        """How many edits end before this one begins."""
        with self._change:
            if job not in self._waiting:
                return 0
            return list(self._waiting).index(job) + (self._running is not None)

    def cancel(self, job: Job) -> None:
        """Stop a job: one that waits leaves the queue now, one that runs ends within a step."""
        job.cancel()
        with self._change:
            waits = job in self._waiting
            if waits:
                self._waiting.remove(job)
        if waits:
            job.run()  # which only notes that it was stopped

    def close(self, timeout: float = 30.0) -> None:
        """Stop all jobs and the thread."""
        with self._change:
            self._closed = True
            jobs = [*self._waiting, *([self._running] if self._running else [])]
            self._change.notify()
        for job in jobs:
            self.cancel(job)
        self._thread.join(timeout)

    def _work(self) -> None:
        while True:
            with self._change:
                self._running = None
                self._change.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                job = self._running = self._waiting.popleft()
            job.run()
            del job


def _nothing(_: Job) -> None:
    pass
