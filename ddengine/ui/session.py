"""What one open page holds, and the shelf of all of them: nothing is shared, and memory is bounded."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from PIL import Image

from ddengine.config import DirectDragConfig
from ddengine.recipe import Recipe
from ddengine.ui.arrows import Arrows
from ddengine.ui.view import View

if TYPE_CHECKING:
    from ddengine.result import EditResult
    from ddengine.source import Source
    from ddengine.ui.lane import Job

# A source serves every edit that has these fields as it was prepared with, and no more drag steps.
_TRAJECTORY = ("n_inference_step", "inversion_strength", "resize", "rg_reference", "rg_grid")


@dataclass(frozen=True, eq=False)
class Picture:
    """A picture to edit: its file's name, the upright RGB pixels, and the same at the size that is shown."""

    name: str
    image: Image.Image
    shown: Image.Image

    @classmethod
    def of(cls, name: str, image: Image.Image) -> Picture:
        return cls(name, image, View(image.size).enlarge(image))

    @property
    def view(self) -> View:
        return View(self.image.size)

    @property
    def nbytes(self) -> int:
        return sum(3 * picture.width * picture.height for picture in (self.image, self.shown))


@dataclass(frozen=True, eq=False)
class Done:
    """An edit that ended well: what it was made of, what was asked, what came out, and seconds saved by its source."""

    base: Picture
    edited: Picture
    recipe: Recipe
    result: EditResult
    seconds: float
    prepared: float
    saved: float


@dataclass
class Session:
    """One open page. original, last: the picture that was opened, and the last edit; base: the picture to edit."""

    key: str
    used: float = 0.0
    original: Picture | None = None
    base: Picture | None = None
    last: Done | None = None
    arrows: Arrows = field(default_factory=lambda: Arrows((1, 1)))
    edits: int = 0
    job: Job | None = None

    def open(self, picture: Picture) -> None:
        """Begin anew with a picture."""
        self.original = self.base = picture
        self.last, self.edits = None, 0
        self.arrows = Arrows(picture.image.size)

    @property
    def pictures(self) -> dict[str, Picture]:
        """What can be edited next, by name: the original, what was edited last, and what came out."""
        found = [self.original, self.base, self.last.edited if self.last else None]
        return {one.name: one for one in found if one}

    def choose(self, name: str) -> None:
        """Edit one of `pictures`; the arrows stay, since all have one size."""
        self.base = self.pictures.get(name, self.base)

    @property
    def nbytes(self) -> int:
        """Bytes of its pictures."""
        pictures = {id(one): one for one in (self.original, self.base) if one}
        if self.last:
            pictures |= {id(one): one for one in (self.last.base, self.last.edited)}
        return sum(one.nbytes for one in pictures.values())


@dataclass(frozen=True)
class Limits:
    """Bounds of a shelf: open pages, bytes of their pictures, seconds they are kept unused; the same of sources."""

    sessions: int = 32
    picture_bytes: int = 2 << 30
    session_seconds: float = 4 * 3600
    sources: int = 4
    source_bytes: int = 4 << 30
    source_seconds: float = 1200


class Shelf:
    """Sessions by key and their prepared sources, the longest unused leaving first. Safe between threads."""

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits = limits or Limits()
        self._clock = clock
        self._dropped: list[Callable[[Session], None]] = []
        self._lock = threading.RLock()
        self._sessions: dict[str, Session] = {}  # the last used last, as in all of these
        self._sources: dict[tuple[str, int], tuple[float, Picture, Source]] = {}  # by session and picture

    def on_drop(self, told: Callable[[Session], None]) -> None:
        """Have a callable told of every session that leaves."""
        self._dropped.append(told)

    def session(self, key: str) -> Session:
        """The session of a key, made where there is none."""
        with self._lock:
            found = self._sessions.pop(key, None) or Session(key)
            found.used = self._clock()
            self._sessions[key] = found
        self.purge(keep=key)
        return found

    def holds(self, session: Session) -> bool:
        """Whether a session is on the shelf still; once it is not, everyone has been told of it or is about to be."""
        with self._lock:
            return self._sessions.get(session.key) is session

    def drop(self, key: str) -> None:
        """Forget a session, its sources too."""
        with self._lock:
            found = self._taken(key)
        self._tell(found)

    def _taken(self, key: str) -> list[Session]:
        for place in [place for place in self._sources if place[0] == key]:
            del self._sources[place]
        found = self._sessions.pop(key, None)
        return [] if found is None else [found]

    def _tell(self, sessions: list[Session]) -> None:
        """Without the lock: who is told may wait for a lock of its own, whose holder looks at this shelf."""
        for session in sessions:
            for told in self._dropped:
                told(session)

    def source(self, key: str, picture: Picture, prompt: str, config: DirectDragConfig) -> Source | None:
        """The session's own source of a picture, if there is one that serves such an edit."""
        with self._lock:
            place = (key, id(picture))
            held = self._sources.get(place)
            if held is None or held[2].prompt != prompt or not serves(held[2].prepared.config, config):
                return None
            self._sources[place] = (self._clock(), *self._sources.pop(place)[1:])
            return held[2]

    def keep(self, key: str, picture: Picture, source: Source) -> None:
        """Keep a source for its session's next edits, as long as there is room; it replaces the picture's last."""
        with self._lock:
            if key in self._sessions:
                self._sources.pop((key, id(picture)), None)
                # With the picture, so that no other can come to have its id.
                self._sources[key, id(picture)] = (self._clock(), picture, source)
        self.purge(keep=key)

    def purge(self, keep: str | None = None) -> None:
        """Let go what is too old or too much; `keep`: a session that stays."""
        limits, now = self.limits, self._clock()
        left: list[Session] = []
        with self._lock:
            held = sum(source.nbytes.total for _, _, source in self._sources.values())
            for place, (used, _, source) in list(self._sources.items()):
                over = len(self._sources) > limits.sources or held > limits.source_bytes
                if over or now - used > limits.source_seconds:
                    del self._sources[place]
                    held -= source.nbytes.total
            held = sum(session.nbytes for session in self._sessions.values())
            for key, session in list(self._sessions.items()):
                over = len(self._sessions) > limits.sessions or held > limits.picture_bytes
                busy = session.job is not None and not session.job.ended.is_set()
                if key != keep and (over or (now - session.used > limits.session_seconds and not busy)):
                    held -= session.nbytes
                    left += self._taken(key)
        self._tell(left)

    def __len__(self) -> int:
        return len(self._sessions)

    @property
    def held(self) -> dict[str, Any]:
        """How much there is: sessions, sources and their bytes."""
        with self._lock:
            sources = [source for _, _, source in self._sources.values()]
            return {
                "sessions": len(self._sessions),
                "picture_bytes": sum(session.nbytes for session in self._sessions.values()),
                "sources": len(sources),
                "source_bytes": sum(source.nbytes.total for source in sources),
            }


def serves(made: DirectDragConfig, wanted: DirectDragConfig) -> bool:
    """Whether a source prepared with one configuration can be edited with another (`Prepared.check`)."""
    same = all(getattr(made, name) == getattr(wanted, name) for name in _TRAJECTORY)
    guided = wanted.readout_guidance is False or (
        made.readout_guidance == wanted.readout_guidance and made.drag_end_step > 0
    )
    return same and guided and wanted.drag_end_step <= made.drag_end_step
