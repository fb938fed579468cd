"""What the HTTP application and the workers behind it say to each other: frozen records that pickle, and `Workers`.

A job goes in, events come out of an async iterator, the last of which is final (`Edited`, `Prepared` or `Failed`).
Whoever stops reading early (cancels the task that reads, or closes the iterator) cancels the job: it ends within one
step of the engine. Nothing that goes wrong in a job is raised: it is a `Failed`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

Pair: TypeAlias = tuple[tuple[float, float], tuple[float, float]]  # handle and target, (x, y) in pixels of the picture

# What `timings` may hold seconds of: the engine's stages, and all of an edit.
STAGES = ("load", "encode", "invert", "reference", "warp", "drag", "denoise", "decode", "total")

# What can go wrong, and the HTTP status that says so. `Failed.code` and the code in every error body is one of these.
STATUS: Mapping[str, int] = {
    "bad_request": 400,  # not readable: broken JSON, a broken multipart body, a header that makes no sense
    "unauthorized": 401,
    "origin_not_allowed": 403,  # another site's page, in a browser
    "not_found": 404,
    "method_not_allowed": 405,
    "not_acceptable": 406,
    "body_timeout": 408,  # the body came too slowly
    "not_finished": 409,  # asked for the picture of an edit that still runs
    "cancelled": 409,  # asked for the outcome of an edit that was cancelled
    "gone": 410,  # a source or an edit that was there; send the picture again
    "too_large": 413,  # body bytes or pixels
    "unsupported_media": 415,
    "host_not_allowed": 421,  # a Host header that is not one of this server's names
    "invalid": 422,  # readable, but not an edit: points, settings, seed, picture
    "key_reused": 422,  # an idempotency key with another body
    "busy": 429,  # queue full
    "client_gone": 499,  # in the logs and metrics alone: nobody is there to be told
    "internal": 500,
    "unavailable": 503,  # not ready, draining, too many requests at once, a lost or poisoned worker
    "out_of_memory": 503,
    "deadline": 504,
}


@dataclass(frozen=True)
class Picture:
    """A checked, upright picture: `rgb` holds height x width x 3 bytes, row by row; `profile` is its colour profile."""

    width: int
    height: int
    rgb: bytes
    profile: bytes | None = None


@dataclass(frozen=True)
class EditJob:
    """One edit, of a picture or of a prepared source (exactly one of the two).

    config: a preset's name; None for "default", or for the configuration a source was prepared with. settings: fields
    changed on top. deadline_s: seconds the job has from when it is handed over, waiting included. previews: whether
    its `Step` events carry pictures.
    """

    id: str
    drags: tuple[Pair, ...]
    picture: Picture | None = None
    source: str | None = None
    config: str | None = None
    settings: tuple[tuple[str, Any], ...] = ()
    prompt: str = ""
    seed: int = 0
    deadline_s: float | None = None
    previews: bool = False


@dataclass(frozen=True)
class PrepareJob:
    """Prepare a picture and keep it under the id `source`, which the application has made and nobody can guess."""

    id: str
    source: str
    picture: Picture
    config: str | None = None
    settings: tuple[tuple[str, Any], ...] = ()
    prompt: str = ""
    deadline_s: float | None = None


@dataclass(frozen=True)
class Queued:
    """The job waits behind `ahead` others of its worker."""

    ahead: int


@dataclass(frozen=True)
class Step:
    """Where a job stands: `step` of `total` of a stage; current handles (x, y) in pixels; preview: a JPEG file."""

    stage: str
    step: int
    total: int
    points: tuple[tuple[float, float], ...] | None = None
    preview: bytes | None = None


@dataclass(frozen=True)
class Edited:
    """Final: the edited picture, and what `ddengine.EditResult` says of it. batch: edits that ran together."""

    picture: Picture
    handles: tuple[tuple[float, float], ...]
    timings: Mapping[str, float]
    passes: Mapping[str, Mapping[str, int]]
    backend: Mapping[str, str]
    notes: tuple[str, ...] = ()
    waited_s: float = 0.0
    batch: int = 1


@dataclass(frozen=True)
class Prepared:
    """Final: the source is kept for `expires_s` seconds from its last use, room permitting."""

    source: str
    width: int
    height: int
    nbytes: int
    expires_s: float
    timings: Mapping[str, float]
    passes: Mapping[str, Mapping[str, int]]
    waited_s: float = 0.0


@dataclass(frozen=True)
class Failed:
    """Final: `code` is a key of STATUS, `message` is for people. retry_s: when it may be worth another try."""

    code: str
    message: str
    retry_s: float | None = None


Event: TypeAlias = Queued | Step | Edited | Prepared | Failed
FINAL = (Edited, Prepared, Failed)


@dataclass(frozen=True)
class Readiness:
    """Whether jobs are taken. state: loading, testing, ready, failed, poisoned or draining; reason: in words."""

    ready: bool
    state: str
    reason: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)  # model, digest, backend, device, dtype, size


@dataclass(frozen=True)
class Stats:
    """Numbers of now (the first six) and since the start, summed over the workers."""

    workers: int = 1
    queued: int = 0
    running: int = 0
    sources: int = 0
    source_bytes: int = 0
    device_bytes: int = 0  # memory that the device's allocator holds; 0 on a CPU
    source_hits: int = 0
    source_misses: int = 0
    source_evictions: int = 0
    batches: int = 0  # of two or more edits
    batched: int = 0  # edits that ran in those


class Workers(Protocol):
    """One worker or many; what the HTTP application knows of them. Methods are called from one event loop."""

    def edit(self, job: EditJob) -> AsyncIterator[Event]:
        """Run an edit; see the module's text for how events end and jobs are cancelled."""
        ...

    def prepare(self, job: PrepareJob) -> AsyncIterator[Event]:
        """Prepare a source and keep it where the edits that name it will run."""
        ...

    async def forget(self, source: str) -> bool:
        """Drop a source; False if it is not there."""
        ...

    async def ready(self) -> Readiness:
        """Whether a job handed over now would be taken; never waits for one."""
        ...

    async def stats(self) -> Stats: ...

    async def close(self, drain_s: float = 0.0) -> None:
        """Take no more jobs, give those there `drain_s` seconds, cancel what is left, and stop."""
        ...
