"""Every limit of the service in one record, each with a default that is safe on a small machine."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from ddengine.config import DirectDragConfig
from ddengine.drags import MAX_DRAGS
from ddengine.errors import InputError


def _limit(default: float, low: float, high: float, doc: str) -> Any:
    return field(default=default, metadata={"doc": doc, "low": low, "high": high})


@dataclass(frozen=True)
class Limits:
    """Limits of requests, of waiting and of memory; `ddengine serve --help` lists them. InputError for a bad value."""

    # Of one request.
    body_bytes: int = _limit(16 << 20, 1 << 10, 1 << 32, "bytes of a request's body")
    head_s: float = _limit(10.0, 0.05, 3600, "seconds in which a connection must have sent a request's headers")
    body_s: float = _limit(30.0, 0.05, 3600, "seconds in which a body must have arrived")
    pixels: int = _limit(16_000_000, 4096, 64_000_000, "pixels of a picture, by its header")
    decode_s: float = _limit(10.0, 0.05, 600, "seconds of decoding a picture; a decoder that takes longer is killed")
    decoders: int = _limit(2, 1, 64, "pictures decoded at once, each by a process of its own")
    points: int = _limit(32, 1, MAX_DRAGS, "drags of one edit")
    steps: int = _limit(100, 1, 1000, "n_inference_step of an edit")
    updates: int = _limit(1000, 0, 1_000_000, "latent updates of an edit: its drag steps x trackings x updates each")
    prompt: int = _limit(400, 0, 10_000, "characters of a prompt; 0: none is taken")
    deadline_s: float = _limit(
        120.0, 0.05, 86_400, "seconds an edit may take, waiting included; a request may ask for less"
    )

    # Of many.
    queue: int = _limit(16, 0, 10_000, "jobs that wait; the next one is told to come back later")
    concurrency: int = _limit(1, 1, 1024, "jobs that run at once: the number of workers")
    batch: int = _limit(1, 1, 64, "same-shape edits that may run as one where the backend takes several at once")
    connections: int = _limit(256, 1, 100_000, "requests answered at once, and open connections that wait for one")
    drain_s: float = _limit(30.0, 0, 3600, "seconds that jobs get to end in when the service is stopped")

    # Of what is kept.
    sources: int = _limit(16, 1, 10_000, "prepared sources a worker keeps")
    source_bytes: int = _limit(2 << 30, 1 << 16, 1 << 44, "bytes of memory that a worker's sources may take")
    source_s: float = _limit(900.0, 0.05, 604_800, "seconds after its last use at which a source expires")
    jobs: int = _limit(256, 1, 100_000, "edits whose outcome is kept")
    job_bytes: int = _limit(256 << 20, 1 << 16, 1 << 40, "bytes of memory that outcomes may take")
    job_s: float = _limit(600.0, 0.05, 604_800, "seconds an outcome is kept")
    events: int = _limit(512, 8, 100_000, "progress events of an edit that are kept for readers who come later")

    # Of progress.
    progress_s: float = _limit(0.05, 0, 60, "least seconds between two progress events of a stage")
    preview_s: float = _limit(1.0, 0, 3600, "least seconds between two previews of an edit")
    preview_side: int = _limit(512, 16, 4096, "long side of a preview in pixels")

    def __post_init__(self) -> None:
        for item in fields(self):
            value, rule = getattr(self, item.name), item.metadata
            kinds = (int,) if isinstance(item.default, int) else (int, float)
            if not isinstance(value, kinds) or isinstance(value, bool) or not rule["low"] <= value <= rule["high"]:
                raise InputError(
                    f"{item.name} is {value!r}; it must be {'a whole number ' if kinds == (int,) else ''}"
                    f"from {rule['low']:g} to {rule['high']:g} ({rule['doc']})"
                )

    def check_cost(self, config: DirectDragConfig) -> DirectDragConfig:
        """The configuration; InputError if an edit with it takes more steps or updates than allowed."""
        if config.n_inference_step > self.steps:
            raise InputError(f"n_inference_step is {config.n_inference_step}, the limit is {self.steps}; lower it")
        updates = config.drag_end_step * config.track_per_step * config.max_drag_per_track
        if updates > self.updates:
            raise InputError(
                f"drag_end_step x track_per_step x max_drag_per_track is {updates}, the limit is {self.updates}; "
                f"lower one of them"
            )
        return config
