"""Edits and preparations from request to outcome: places in the queue, events, waiting, cancelling, keeping."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import fields, is_dataclass, replace

from ddengine.serve.contract import FINAL, Edited, Event, Failed, Picture, Prepared, Queued, Step
from ddengine.serve.faults import Fault
from ddengine.serve.limits import Limits
from ddengine.serve.metrics import Metrics
from ddengine.serve.pictures import encoded

log = logging.getLogger(__name__)

_INTERNAL = Failed("internal", "the edit failed inside the service; its log says why")
_JOB_BYTES = 4096
_RECORD_BYTES = 200  # of a record's table of fields and its place among the events
_GRACE_S = 0.5  # that a worker has to tell a passed deadline itself
_LOOK_S = 0.02  # between two looks at whether all jobs have ended
_STOPPING = "the service is being stopped"
_AGAIN = {"cancelled", "client_gone", "unavailable", "busy", "deadline", "out_of_memory", "internal"}


class Job:
    """One edit or preparation: its events so far, and its final one."""

    def __init__(self, job_id: str, kind: str, owner: str, events: int, clock: Callable[[], float]) -> None:
        self.id, self.kind, self.owner = job_id, kind, owner
        self.final: Edited | Prepared | Failed | None = None
        self.png = b""
        self.waiting = 0  # requests that wait for it
        self.detached = False  # goes on without any
        self.until = float("inf")
        self.key: tuple[str, str] | None = None
        self._clock, self.began = clock, clock()
        self._events: deque[tuple[int, Event]] = deque(maxlen=events)
        self._count = self._held = 0
        self._pulse = asyncio.Event()
        self._why: Failed | None = None
        self.task: asyncio.Task[None] | None = None

    @property
    def state(self) -> str:
        """queued, running, done, failed or cancelled."""
        if isinstance(self.final, Failed):
            return "cancelled" if self.final.code in ("cancelled", "client_gone") else "failed"
        if self.final is not None:
            return "done"
        return "running" if any(isinstance(event, Step) for _, event in self._events) else "queued"

    @property
    def last(self) -> Event | None:
        """The newest event."""
        return self._events[-1][1] if self._events else None

    def add(self, event: Event) -> None:
        """Note an event; of pictures shown on the way only the newest one is kept."""
        if isinstance(event, Step) and event.preview is not None:
            for at, (number, old) in enumerate(self._events):
                if isinstance(old, Step) and old.preview is not None:
                    self._held -= sys.getsizeof(old.preview) - sys.getsizeof(None)
                    self._events[at] = number, replace(old, preview=None)
        if len(self._events) == self._events.maxlen:
            self._held -= _weight(self._events[0][1])
        self._count += 1
        self._events.append((self._count, event))
        self._held += _weight(event)
        if isinstance(event, FINAL):
            self.final = event
        self._pulse.set()
        self._pulse = asyncio.Event()

    async def follow(self, after: int = 0) -> AsyncIterator[tuple[int, Event]]:
        """Events with their numbers from the one after `after` on (as far as they are kept), to the final one."""
        while True:
            pulse = self._pulse
            for number, event in list(self._events):
                if number > after:
                    after = number
                    yield number, event
                    if isinstance(event, FINAL):
                        return
            if self.final is not None and after >= self._count:
                return
            await pulse.wait()

    async def ended(self) -> Edited | Prepared | Failed:
        """The final event, once it is there."""
        while self.final is None:
            await self._pulse.wait()
        return self.final

    def cancel(self, code: str, message: str) -> bool:
        """End it with a `Failed`; False if it has ended already."""
        if self.final is not None or self.task is None:
            return False
        self._why = self._why or Failed(code, message)
        self.task.cancel()
        return True

    @property
    def stopping(self) -> bool:
        """Whether it has been cancelled, or is about to end so."""
        return self._why is not None

    async def run(self, stream: Callable[[], AsyncIterator[Event]], deadline_s: float) -> None:
        """Read a worker's events to the end; whatever happens, there is a final one."""
        final: Event
        try:
            final = await asyncio.wait_for(self._read(stream()), deadline_s + _GRACE_S)
        except (asyncio.TimeoutError, TimeoutError):
            final = Failed(
                "deadline", f"the edit took longer than its deadline of {deadline_s:g} s; ask for fewer steps"
            )
        except asyncio.CancelledError:
            final = self._why or Failed("unavailable", "the service is being stopped", 5)
        except Exception:
            log.exception("a worker was lost", extra={"facts": self.facts})
            final = Failed("unavailable", "the worker was lost; send the edit again", 1)
        if isinstance(final, Edited):
            try:
                self.png = await asyncio.to_thread(encoded, final.picture, "image/png")
                final = replace(final, picture=Picture(final.picture.width, final.picture.height, b""))
            except asyncio.CancelledError:
                final = self._why or Failed("unavailable", "the service is being stopped", 5)
            except MemoryError:
                log.warning("a result does not fit", exc_info=True, extra={"facts": self.facts})
                final = Failed("out_of_memory", "there is not enough memory for the result; send a smaller picture", 10)
            except Exception:
                log.exception("a result cannot be encoded", extra={"facts": self.facts})
                final = _INTERNAL
        self.add(final)

    async def _read(self, stream: AsyncIterator[Event]) -> Event:
        try:
            async for event in stream:
                if isinstance(event, FINAL):
                    return event
                self.add(event)
        finally:
            close = getattr(stream, "aclose", None)
            if close is not None:
                await close()
        return Failed("unavailable", "the worker was lost; send the edit again", 1)

    @property
    def seconds(self) -> float:
        return self._clock() - self.began

    @property
    def facts(self) -> dict[str, str]:
        """What log lines about it carry."""
        return {self.kind: self.id}

    @property
    def nbytes(self) -> int:
        """How much memory it takes at most: picture, events, and itself with its task and keys."""
        return len(self.png) + self._held + _JOB_BYTES


class Slot:
    """A place among the jobs that are not ended yet; given back once."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs: Jobs | None = jobs

    def free(self) -> None:
        if self._jobs is not None:
            self._jobs.open -= 1
            self._jobs = None

    def __enter__(self) -> Slot:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Free where no job came of it; a job frees it when it ends."""
        if kind is not None:
            self.free()


class Jobs:
    """All jobs of an application, ended ones within bounds of number, bytes and time; one event loop's."""

    def __init__(self, limits: Limits, metrics: Metrics, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits, self.metrics, self._clock = limits, metrics, clock
        self.open = 0
        self.draining = False
        self._ends = float("inf")  # when those that still run are cancelled, by the event loop's clock
        self._closed = False
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._keys: dict[tuple[str, str], tuple[bytes, Job]] = {}
        self._typical_s = 5.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None

    def reserve(self) -> Slot:
        """A place for one more job, taken before its body is read; Fault busy or unavailable."""
        if self.draining:
            raise Fault("unavailable", "the service is being stopped; try another one", 5)
        most = self.limits.concurrency + self.limits.queue
        if self.open >= most:
            retry_s = min(self._typical_s * self.limits.queue / self.limits.concurrency, 300)
            raise Fault("busy", f"{self.open} jobs run or wait, the limit is {most}; try again later", retry_s)
        self.open += 1
        return Slot(self)

    def start(
        self,
        job_id: str,
        kind: str,
        owner: str,
        slot: Slot,
        stream: Callable[[], AsyncIterator[Event]],
        deadline_s: float,
    ) -> Job:
        """Begin a job in a reserved place, which it gives back when it ends; Fault unavailable."""
        if self._closed:
            raise Fault("unavailable", _STOPPING, 5)
        self._sweep()
        job = self._jobs[job_id] = Job(job_id, kind, owner, self.limits.events, self._clock)
        job.task = asyncio.get_running_loop().create_task(job.run(stream, deadline_s))
        self._tasks.add(job.task)

        def ended(task: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            slot.free()
            if job.final is None:  # cancelled before its first step, or something that is no Exception
                job.add(job._why or (Failed("cancelled", "the edit was cancelled") if task.cancelled() else _INTERNAL))
            assert job.final is not None
            self.metrics.ended(kind, job.final, job.seconds)
            outcome = job.final.code if isinstance(job.final, Failed) else "ok"
            log.info("job", extra={"facts": {**job.facts, "outcome": outcome, "seconds": round(job.seconds, 4)}})
            if not isinstance(job.final, Failed):
                self._typical_s += 0.2 * (job.seconds - self._typical_s)
            elif job.final.code in _AGAIN:
                self._forget_key(job)  # the same request may be tried again
            job.until = self._clock() + self.limits.job_s
            self._sweep()

        job.task.add_done_callback(ended)
        return job

    def known(self, owner: str, key: str, fingerprint: bytes) -> Job | None:
        """The job that a key was first used for; Fault key_reused if that was with another body."""
        self._sweep()
        held = self._keys.get((owner, key))
        if held is None or held[1].stopping:
            return None
        if held[0] != fingerprint:
            raise Fault("key_reused", "this Idempotency-Key was used with another body; use a new one")
        return held[1]

    def remember(self, owner: str, key: str, fingerprint: bytes, job: Job) -> None:
        job.key = (owner, key)
        self._keys[job.key] = fingerprint, job

    def get(self, job_id: str, owner: str) -> Job | None:
        """A job of this owner; None if it is not kept (any more)."""
        self._sweep()
        job = self._jobs.get(job_id)
        return job if job is not None and job.owner == owner else None

    async def drain(self, seconds: float) -> None:
        """Take no more jobs, give those there and those whose body still comes some seconds, cancel the rest.

        To be called as often as one likes: a later call can only shorten the time.
        """
        now = asyncio.get_running_loop().time
        self.draining = True
        self._ends = min(self._ends, now() + seconds)
        while self.open and now() < self._ends:
            await asyncio.sleep(min(_LOOK_S, max(self._ends - now(), 0)))
        self._closed = True
        for job in list(self._jobs.values()):
            job.cancel("unavailable", _STOPPING)
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=5)

    def _sweep(self) -> None:
        """Let go of what has ended: too long ago, too many, or too large; by a timer where no request comes."""
        ended = [job for job in self._jobs.values() if job.final is not None and job.until < float("inf")]
        now, size = self._clock(), sum(job.nbytes for job in ended)
        for number, job in enumerate(sorted(ended, key=lambda job: job.until)):
            if now < job.until and len(ended) - number <= self.limits.jobs and size <= self.limits.job_bytes:
                if self._timer is None:
                    self._timer = asyncio.get_running_loop().call_later(job.until - now, self._sweep_later)
                break
            size -= job.nbytes
            self._jobs.pop(job.id, None)
            self._forget_key(job)

    def _sweep_later(self) -> None:
        self._timer = None
        self._sweep()

    def _forget_key(self, job: Job) -> None:
        if job.key is not None and self._keys.get(job.key, (b"", None))[1] is job:
            del self._keys[job.key]


def _weight(value: object) -> int:
    """How many bytes a record and all it holds take at most (what several share counts for each of them)."""
    size = sys.getsizeof(value)
    if isinstance(value, (tuple, list)):
        return size + sum(map(_weight, value))
    if isinstance(value, Mapping):
        return size + sum(_weight(key) + _weight(held) for key, held in value.items())
    if is_dataclass(value):
        return size + _RECORD_BYTES + sum(_weight(getattr(value, item.name)) for item in fields(value))
    return size


def told(job: Job) -> Queued | Step | None:
    """Where an unfinished job stands."""
    return job.last if isinstance(job.last, (Queued, Step)) else None
