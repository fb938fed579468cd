"""Prepared sources of one worker: the last used stay, within a number, a budget of bytes and a time to live."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass
class _Kept:
    source: Any
    nbytes: int
    until: float


class Sources:
    """A bounded mapping of ids to sources; safe to use from several threads."""

    def __init__(self, count: int, nbytes: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        """At most `count` sources of `nbytes` bytes in all, each until `seconds` after its last use."""
        self._most, self._room, self._seconds, self._clock = count, nbytes, seconds, clock
        self._kept: OrderedDict[str, _Kept] = OrderedDict()  # the last used last
        self._lock = threading.Lock()
        self.hits = self.misses = self.evictions = 0

    def put(self, key: str, source: Any, nbytes: int) -> bool:
        """Keep a source, the longest unused ones making room; False if it is larger than the whole budget."""
        with self._lock:
            if nbytes > self._room:
                return False
            self._kept.pop(key, None)
            self._expire()
            while self._kept and (len(self._kept) >= self._most or self._bytes() + nbytes > self._room):
                self._kept.popitem(last=False)
                self.evictions += 1
            self._kept[key] = _Kept(source, nbytes, self._clock() + self._seconds)
            return True

    def get(self, key: str) -> Any | None:
        """The source, which has now been used; None if it is not there (any more)."""
        with self._lock:
            self._expire()
            kept = self._kept.get(key)
            if kept is None:
                self.misses += 1
                return None
            self.hits += 1
            kept.until = self._clock() + self._seconds
            self._kept.move_to_end(key)
            return kept.source

    def drop(self, key: str) -> bool:
        """Forget a source; False if it is not there."""
        with self._lock:
            self._expire()
            return self._kept.pop(key, None) is not None

    def clear(self) -> None:
        with self._lock:
            self._kept.clear()

    def usage(self) -> tuple[int, int]:
        """How many there are, and their bytes; what has expired is let go."""
        with self._lock:
            self._expire()
            return len(self._kept), self._bytes()

    def _bytes(self) -> int:
        return sum(kept.nbytes for kept in self._kept.values())

    def _expire(self) -> None:
        now = self._clock()
        for key in [key for key, kept in self._kept.items() if kept.until <= now]:
            del self._kept[key]
            self.evictions += 1
