"""Arrows under a user's hand: what clicks, pulls, undo and clear make of them. Plain data, always a valid edit."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ddengine.drags import MAX_DRAGS, Drag, Point

MAX_PAST = 200  # states that undo can bring back
_ENDS = ("handle", "target")


@dataclass(frozen=True)
class Arrows:
    """The drags of a picture of `size` (width, height), and what the hand holds; points are whole (x, y) pixels.

    start: a handle that waits for its target. held: (number, end) of an arrow's end that was picked up and goes where
    the next click lands. past: earlier (drags, start), the last one last. At most one of start and held is set.
    """

    size: tuple[int, int]
    drags: tuple[Drag, ...] = ()
    start: Point | None = None
    held: tuple[int, str] | None = None
    past: tuple[tuple[tuple[Drag, ...], Point | None], ...] = ()

    def click(self, point: Point, near: float = 0.0) -> Arrows:
        """A click: places what is held, ends an arrow, picks up an end within `near` pixels, or starts an arrow.

        A second click on a start, or on the place an end is held from, takes it back.
        """
        point = self.inside(point)
        if self.held is not None:
            return self._placed(self.held, point)
        if self.start is not None:
            return self._changed(self.drags, None) if point == self.start else self._added(self.start, point)
        held = self.end_near(point, near)
        if held is not None:
            return replace(self, held=held)
        return self._changed(self.drags, point) if len(self.drags) < MAX_DRAGS else self

    def pull(self, begin: Point, end: Point, near: float = 0.0) -> Arrows:
        """A press at one point and a release at another: moves the end pressed on, or makes a whole arrow."""
        begin, end = self.inside(begin), self.inside(end)
        held = None if self.start is not None and math.dist(begin, self.start) <= near else self.end_near(begin, near)
        if held is not None:
            return self._placed(held, end)
        if self.start is not None and math.dist(begin, self.start) <= near:
            begin = self.start
        return replace(self, held=None) if begin == end else self._added(begin, end)

    def undo(self) -> Arrows:
        """Put down what is held, or else as before the last change."""
        if self.held is not None:
            return replace(self, held=None)
        if not self.past:
            return self
        drags, start = self.past[-1]
        return replace(self, drags=drags, start=start, past=self.past[:-1])

    def clear(self) -> Arrows:
        """No arrows; undo brings them back."""
        return replace(self._changed((), None), held=None)

    def end_near(self, point: Point, near: float) -> tuple[int, str] | None:
        """The nearest end of an arrow within `near` pixels; of two equally near ones the later."""
        ends = [(number, end) for number in range(len(self.drags)) for end in _ENDS]
        found = [(math.dist(point, getattr(self.drags[n], end)), -n, n, end) for n, end in ends]
        best = min(found, default=None)
        return best[2:] if best is not None and best[0] <= near else None

    def inside(self, point: Point) -> Point:
        """The whole pixel of the picture nearest to a point; its first one for what is no number."""
        x, y = (
            float(min(max(round(value), 0), side - 1)) if math.isfinite(value) else 0.0
            for value, side in zip(point, self.size, strict=True)
        )
        return x, y

    def hint(self) -> str:
        """What the next click will do, for people."""
        if self.held is not None:
            return f"Click where the {self.held[1]} of arrow {self.held[0] + 1} should be."
        if self.start is not None:
            return "Now click where it should go."
        if not self.drags:
            return "Click what should move, then where it should go."
        if len(self.drags) == MAX_DRAGS:
            return f"{MAX_DRAGS} arrows are the limit. Click an end to move it."
        return "Add another arrow, or click an end to move it."

    def _changed(self, drags: tuple[Drag, ...], start: Point | None) -> Arrows:
        if (drags, start) == (self.drags, self.start):
            return self
        past = (*self.past, (self.drags, self.start))[-MAX_PAST:]
        return replace(self, drags=drags, start=start, past=past)

    def _added(self, handle: Point, target: Point) -> Arrows:
        if len(self.drags) >= MAX_DRAGS:
            return replace(self, held=None)
        return replace(self._changed((*self.drags, Drag(handle, target)), None), held=None)

    def _placed(self, held: tuple[int, str], point: Point) -> Arrows:
        number, end = held
        moved = replace(self.drags[number], **{end: point})
        if moved.handle == moved.target:  # no arrow: the end stays in the hand
            return replace(self, held=held if self.start is None else None)
        drags = (*self.drags[:number], moved, *self.drags[number + 1 :])
        return replace(self._changed(drags, self.start), held=None)
