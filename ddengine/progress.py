"""Progress of an edit: one frozen record a step, and the adapter from what users pass to what the stages call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ddengine.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image
    from tqdm import tqdm


@dataclass(frozen=True)
class Progress:
    """Where an edit stands.

    `stage`: load, encode, invert, reference, warp, drag, denoise or decode; identity while one is fitted; build while
    what a backend lacks is built (from step 0 on). `step` of `total`: steps of that stage done so far, 1 to total.
    `points`: current handles, float64 [n, 2] as (x, y) in input pixels. `preview`: call it for a look at the edit so
    far, an RGB picture at the working size; that costs a decoding. Both are None where the stage has none.
    """

    stage: str
    step: int
    total: int
    points: NDArray[np.float64] | None = None
    preview: Callable[[], Image.Image] | None = None


Reporter = Callable[[Progress], None]


@contextmanager
def reporter(progress: bool | Reporter | None = None, plan: Mapping[str, int] | None = None) -> Iterator[Reporter]:
    """Turn a user's `progress` argument into the callable that stages report to, for the time of one edit.

    None or False: silence. A callable: itself; what it raises (`Cancelled` above all) stops the edit and
    reaches the caller. True: one tqdm bar on stderr over the whole edit, with the stage's name. `plan` maps
    stages to their expected steps so that the bar's total is right from the start; without it the total grows
    as stages are reached. Raises InputError for anything else.
    """
    if progress is None or progress is False:
        yield _silent
    elif progress is True:
        bar = _Bar(plan or {})
        try:
            yield bar
        finally:
            bar.close()
    elif callable(progress):
        yield progress
    else:
        raise InputError(
            f"progress is {progress!r}; pass None, True (a progress bar) or a callable that takes a Progress"
        )


def _silent(_: Progress) -> None:
    pass


class _Bar:
    """One bar over all stages; a stage's place is kept by name, so stages may alternate or end early."""

    def __init__(self, plan: Mapping[str, int]) -> None:
        self._done: dict[str, int] = {}
        self._total = dict(plan)
        self._stage = ""
        self._bar = self._open()

    def _open(self) -> tqdm[Any]:
        from tqdm import tqdm

        layout = "{desc:<9} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
        return tqdm(total=sum(self._total.values()) or None, bar_format=layout, dynamic_ncols=True)

    def __call__(self, at: Progress) -> None:
        self._done[at.stage] = at.step
        self._total[at.stage] = at.total
        self._bar.total = sum(self._total.values())
        self._bar.n = sum(self._done.values())
        if at.stage != self._stage:
            self._stage = at.stage
            self._bar.set_description_str(at.stage, refresh=False)
            self._bar.refresh()
        self._bar.update(0)

    def close(self) -> None:
        self._bar.close()
