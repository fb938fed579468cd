"""A job in a worker's line: everything that can be found wrong with it without running it has been."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from PIL import Image

from ddengine.config import DirectDragConfig
from ddengine.drags import Drag, parse_drags
from ddengine.errors import Cancelled, DDEngineError, InputError
from ddengine.request import ANY_SIZE, checked_seed, spaces_for
from ddengine.serve.contract import EditJob, Event, PrepareJob
from ddengine.serve.limits import Limits
from ddengine.serve.pictures import to_pil
from ddengine.serve.sources import Sources

if TYPE_CHECKING:
    from ddengine.engine import Engine
    from ddengine.source import Source

log = logging.getLogger(__name__)

Emit = Callable[[Event], None]


class Gone(DDEngineError):
    """The source that a job names is not kept any more."""


class Late(Cancelled):
    """A deadline has passed."""


@dataclass(eq=False)
class Entry:
    """A job in the line, with what it needs found and checked when it came."""

    job: EditJob | PrepareJob
    emit: Emit
    config: DirectDragConfig
    image: Any  # a PIL picture or a Source
    prompt: str
    drags: tuple[Drag, ...]
    ends: float | None  # of time.monotonic
    came: float = field(default_factory=time.monotonic)
    cancelled: threading.Event = field(default_factory=threading.Event)
    ended: bool = False

    def end(self, final: Event) -> None:
        """Emit the final event; whoever has had one gets no other."""
        if not self.ended:
            self.ended = True
            self.emit(final)

    @property
    def facts(self) -> dict[str, str]:
        """What a log line about this job carries: its id, under the name that the application's lines have for it."""
        return {"edit" if isinstance(self.job, EditJob) else "source": self.job.id}

    def stopped(self) -> Cancelled | None:
        """Why the job is not to go on, None where it is."""
        if self.cancelled.is_set():
            return Cancelled("the edit was cancelled")
        if self.ends is not None and time.monotonic() > self.ends:
            return Late(f"the edit took longer than its deadline of {self.job.deadline_s:g} s; ask for fewer steps")
        return None

    def check(self) -> None:
        """Raise if the job is not to go on."""
        if (error := self.stopped()) is not None:
            raise error

    @property
    def seed(self) -> int:
        return self.job.seed if isinstance(self.job, EditJob) else 0


def entry_for(job: EditJob | PrepareJob, emit: Emit, limits: Limits, sources: Sources) -> Entry:
    """A job checked against the limits and its picture or source; Gone, InputError."""
    source: Source | None = None
    if isinstance(job, EditJob) and job.source is not None:
        source = sources.get(job.source)
        if source is None:
            raise Gone("the source is not kept any more; send the picture again")
    config = settled(job.config, job.settings, None if source is None else source.prepared.config)
    limits.check_cost(config)
    if source is not None:
        if job.prompt not in ("", source.prompt):
            raise InputError("the source was prepared with another prompt; prepare it again with this one")
        image: Any = source
        size, prompt = source.image.size, source.prompt
    else:
        assert job.picture is not None
        image, prompt = to_pil(job.picture), job.prompt
        size = image.size
        spaces_for(image, ANY_SIZE, config)  # for its refusals
    drags: tuple[Drag, ...] = ()
    if isinstance(job, EditJob):
        checked_seed(job.seed)
        drags = parse_drags(job.drags, *size)
    ends = None if job.deadline_s is None else time.monotonic() + job.deadline_s
    return Entry(job, emit, config, image, prompt, drags, ends)


def settled(
    preset: str | None, settings: tuple[tuple[str, Any], ...], of_source: DirectDragConfig | None = None
) -> DirectDragConfig:
    """The configuration a request means: a preset, or a source's own, with changes; InputError."""
    base = of_source if preset is None and of_source is not None else DirectDragConfig.preset(preset or "default")
    return base.changed(**dict(settings))


def takes_several(engine: Engine, prompt: str) -> bool:
    """Whether a batch gains anything: a program of a fixed shape takes one picture, or would have to be built anew."""
    try:
        return engine.backend.name in ("auto", "eager") and engine.passes(prompt).any_batch
    except DDEngineError:  # a prompt, where there is no text encoder: its edit will say so
        return False
    except Exception:
        log.exception("edits run one by one")
        return False


def batch_key(engine: Engine, entry: Entry) -> tuple[Any, ...] | None:
    """Edits with equal keys may run in one batch; None for one that runs alone, whose run will say what is wrong."""
    try:
        is_picture = isinstance(entry.image, Image.Image)
        spaces = spaces_for(entry.image, engine.model.size, entry.config) if is_picture else entry.image.spaces
    except Exception:
        return None
    return spaces.work_size, entry.config, entry.prompt, entry.seed
