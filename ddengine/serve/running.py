"""Running jobs on an engine: one edit, one preparation, or several edits as a batch; every job gets its final event."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

from PIL import Image

from ddengine.errors import BackendUnavailable, Cancelled, DDEngineError, InputError, ModelError
from ddengine.serve.contract import Edited, EditJob, Event, Failed, Prepared, PrepareJob, Step
from ddengine.serve.limits import Limits
from ddengine.serve.line import Entry, Late
from ddengine.serve.pictures import from_pil
from ddengine.serve.sources import Sources

if TYPE_CHECKING:
    from ddengine.engine import Engine
    from ddengine.progress import Progress
    from ddengine.result import EditResult

log = logging.getLogger(__name__)

FAULTY = Failed("unavailable", "the device failed; this worker will be replaced", 10)
_FAULTS = ("CUDA error", "cuDNN error", "CUBLAS_STATUS", "CUDNN_STATUS", "device-side assert")


class Runner:
    """Runs what a worker takes from its line, in the worker's thread. batches, batched: how many, of how many edits."""

    def __init__(
        self, limits: Limits, sources: Sources, stopping: Callable[[], bool], faulty: Callable[[Exception], None]
    ) -> None:
        """stopping: whether a cancelled job is so because the service ends. faulty: told that the device has failed."""
        self._limits, self._sources, self._stopping, self._faulty = limits, sources, stopping, faulty
        self.batches = self.batched = 0

    def run(self, engine: Engine, entries: list[Entry]) -> None:
        """Run one job or one batch; whatever happens becomes a job's final event."""
        started = time.monotonic()
        try:
            if len(entries) > 1:
                return self._edit_batch(engine, entries, started)
            if isinstance(entries[0].job, PrepareJob):
                final = self._prepare(engine, entries[0], entries[0].job, started)
            else:
                final = self._edit(engine, entries[0], entries[0].job, started)
            entries[0].end(final)
        except Exception as error:
            final = self._failed(error, entries)
            for entry in entries:
                entry.end(final)

    def _edit(self, engine: Engine, entry: Entry, job: EditJob, started: float) -> Event:
        entry.check()
        tell = self._teller(entry, job.previews)

        def report(at: Progress) -> None:
            entry.check()
            tell(at)

        result = engine.edit(
            entry.image, entry.drags, prompt=entry.prompt, config=entry.config, seed=job.seed, progress=report
        )
        return _edited(result, started - entry.came)

    def _prepare(self, engine: Engine, entry: Entry, job: PrepareJob, started: float) -> Event:
        entry.check()
        tell, limits = self._teller(entry, False), self._limits

        def report(at: Progress) -> None:
            entry.check()
            tell(at)

        source = engine.prepare(
            entry.image, prompt=entry.prompt, config=entry.config, budget=limits.source_bytes // 2, progress=report
        )
        entry.check()
        nbytes = source.nbytes.total
        if not self._sources.put(job.source, source, nbytes):
            return Failed("too_large", f"the prepared picture takes {nbytes} bytes, the limit is {limits.source_bytes}")
        if (stopped := entry.stopped()) is not None:  # meanwhile: nobody will ever name it
            self._sources.drop(job.source)
            raise stopped
        passes = {stage: dict(counts) for stage, counts in source.passes.items()}
        facts = (*source.image.size, nbytes, limits.source_s, dict(source.timings), passes)
        return Prepared(job.source, *facts, waited_s=started - entry.came)

    def _edit_batch(self, engine: Engine, entries: list[Entry], started: float) -> None:
        """Several edits as one: who is cancelled or late is told so at once, and the batch ends with its last one."""
        alive = list(entries)

        def sort_out() -> None:
            for entry in list(alive):
                if (error := entry.stopped()) is not None:
                    alive.remove(entry)
                    entry.end(self._failed(error, [entry]))
            if not alive:
                raise Cancelled("nobody waits for the batch")

        tellers = {id(entry): self._teller(entry, False) for entry in entries}

        def report(at: Progress) -> None:
            sort_out()
            for entry in alive:
                tellers[id(entry)](at)

        ready, results = entries, []
        try:
            sort_out()
            ready = list(alive)
            results = engine.edit_batch(
                [(entry.image, entry.drags) for entry in ready],
                prompt=ready[0].prompt,
                config=ready[0].config,
                seed=ready[0].seed,
                progress=report,
            )
        except Cancelled:
            return
        except (InputError, BackendUnavailable) as error:
            log.warning("a batch of %d is taken apart: %s", len(ready), error, extra={"facts": facts_of(ready)})
        if not results:  # outside the handler, so that the failed batch's tensors are let go
            for entry in alive:
                self.run(engine, [entry])
            return
        if len(ready) > 1:
            self.batches, self.batched = self.batches + 1, self.batched + len(ready)
        for entry, result in zip(ready, results, strict=True):
            if entry in alive:
                entry.end(_edited(result, started - entry.came, len(ready)))

    def _teller(self, entry: Entry, previews: bool) -> Callable[[Progress], None]:
        """Tells an entry's owner its progress, not too often."""
        stage, told, shown, limits = "", 0.0, time.monotonic(), self._limits

        def tell(at: Progress) -> None:
            nonlocal stage, told, shown
            now = time.monotonic()
            looks = previews and at.preview is not None and now - shown >= limits.preview_s
            if not looks and at.stage == stage and at.step < at.total and now - told < limits.progress_s:
                return
            preview = None
            if looks and at.preview is not None:
                preview, shown = _jpeg(at.preview(), limits.preview_side), time.monotonic()
            points = None if at.points is None else tuple((float(x), float(y)) for x, y in at.points)
            stage, told = at.stage, now
            entry.emit(Step(at.stage, at.step, at.total, points, preview))

        return tell

    def _failed(self, error: Exception, entries: Sequence[Entry]) -> Failed:
        if isinstance(error, Late):
            return Failed("deadline", str(error))
        if isinstance(error, Cancelled):
            if self._stopping():
                return Failed("unavailable", "the service is being stopped", 5)
            return Failed("cancelled", str(error))
        if _is_memory(error):
            return Failed("out_of_memory", line_of(error), 10)
        if isinstance(error, (InputError, ModelError)):  # of a loaded model: that it cannot take a prompt
            return Failed("invalid", line_of(error))
        if isinstance(error, BackendUnavailable):
            log.error("nothing built for a request: %s", error, extra={"facts": facts_of(entries)})
            return Failed("invalid", "this service has nothing built for pictures of this shape; send another size")
        if _is_fault(error):
            self._faulty(error)
            return FAULTY
        log.error("an edit failed", exc_info=error, extra={"facts": facts_of(entries)})
        if isinstance(error, DDEngineError):
            return Failed("internal", line_of(error))
        return Failed("internal", "the edit failed inside the service; its log says why")


def facts_of(entries: Sequence[Entry]) -> dict[str, Any]:
    """What a log line about some jobs carries, so that it is found by the id that the application's lines have."""
    return {"edits": [entry.job.id for entry in entries]} if len(entries) > 1 else dict(*(one.facts for one in entries))


def line_of(error: BaseException) -> str:
    """An error's message as one line of bounded length."""
    return " ".join(str(error).split())[:1000]


def _is_memory(error: Exception) -> bool:
    """Too little of it, as Python, torch and `memory_errors` say so."""
    if isinstance(error, DDEngineError):
        return "has not enough memory" in str(error)
    return isinstance(error, MemoryError) or "out of memory" in str(error)


def _is_fault(error: Exception) -> bool:
    """Whether it is the device's: its context is lost, and every later call in this process fails too."""
    if isinstance(error, DDEngineError):
        return False
    return type(error).__name__ == "AcceleratorError" or any(word in str(error) for word in _FAULTS)


def _edited(result: EditResult, waited: float, batch: int = 1) -> Edited:
    return Edited(
        from_pil(result.image),
        tuple((float(x), float(y)) for x, y in result.handles),
        {stage: float(seconds) for stage, seconds in result.timings.items()},
        {stage: dict(counts) for stage, counts in result.passes.items()},
        dict(result.backend),
        tuple(result.notes),
        waited,
        batch,
    )


def _jpeg(picture: Image.Image, side: int) -> bytes:
    small = picture.convert("RGB")
    small.thumbnail((side, side))
    file = BytesIO()
    small.save(file, "JPEG", quality=80)
    return file.getvalue()
