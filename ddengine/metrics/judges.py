"""All metrics of one sample; what cannot be computed leaves its column empty and says why."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from PIL import Image

from ddengine.artifacts import StrPath
from ddengine.errors import DDEngineError
from ddengine.image import read_image, to_tensor
from ddengine.metrics.clip import Clip
from ddengine.metrics.dai import RADII, dai
from ddengine.metrics.datasets import Sample
from ddengine.metrics.dift import Dift
from ddengine.metrics.lpips import Lpips
from ddengine.metrics.matching import distances
from ddengine.models.place import resolve_device

log = logging.getLogger(__name__)

IF, CLIP, MD, DAI = "IF", "CLIP", "MD", "DAI"

# What a network or a metric may stop with when files, a picture or memory are at fault (CUDA's is a RuntimeError).
_FAILURES = (DDEngineError, RuntimeError, ValueError, OSError, MemoryError)
NOT_GIVEN = "no folder of weights was given"

Judge = TypeVar("Judge")
Made = TypeVar("Made")


@dataclass(frozen=True)
class Scores:
    """The figures of one sample, such that JSON keeps them. None is an empty cell, and `empty` says why, by column.

    fidelity: IF = 1 - LPIPS. similarity: CLIP. distances: pixels, of each drag (MD). dai: by the radius in digits, of
    each drag, None where a patch crosses the border.
    """

    name: str
    fidelity: float | None = None
    similarity: float | None = None
    distances: Sequence[float] | None = None
    dai: Mapping[str, Sequence[float | None]] | None = None
    empty: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Judges:
    """The networks that judge. missing: why a column will be empty. notes: how a network differs from the published."""

    lpips: Lpips | None = None
    clip: Clip | None = None
    dift: Dift | None = None
    missing: Mapping[str, str] = field(default_factory=dict)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader of the figures should know about the networks, in sentences."""
        return tuple(note for judge in (self.clip, self.dift) if judge is not None for note in judge.notes)

    def score(self, sample: Sample, result: Any) -> Scores:
        """Judge an edited picture (a path, PIL picture or array); whatever fails is an empty cell with its reason.

        A result of another size is first resized to the original's (bilinear), for all metrics: the published DAI
        script does not, and so reads results that were shrunk at wrong places.
        """
        empty = dict(self.missing)

        def attempt(column: str, judge: Judge | None, compute: Callable[[Judge], Made]) -> Made | None:
            if judge is None:
                empty.setdefault(column, NOT_GIVEN)
                return None
            try:
                value = compute(judge)
                if isinstance(value, float) and not math.isfinite(value):
                    raise DDEngineError(f"the value is {value}; check the weights")
                return value
            except _FAILURES as error:
                empty[column] = str(error) or type(error).__name__
                log.warning("%s: %s is left empty: %s", sample.name, column, empty[column])
                return None

        try:
            original, edited = read_image(sample.image), read_image(result)
        except _FAILURES as error:
            return Scores(sample.name, empty={**dict.fromkeys((IF, CLIP, MD, DAI), str(error)), **empty})
        if edited.size != original.size:
            edited = edited.resize(original.size, Image.Resampling.BILINEAR)
        return Scores(
            sample.name,
            fidelity=attempt(IF, self.lpips, lambda lpips: lpips.fidelity(original, edited)),
            similarity=attempt(CLIP, self.clip, lambda clip: clip.similarity(original, edited)),
            distances=attempt(MD, self.dift, lambda dift: _distances(dift, sample, original, edited)),
            dai=attempt(DAI, sample.drags, lambda drags: {str(r): dai(original, edited, drags, r) for r in RADII}),
            empty=empty,
        )


def load_judges(
    *,
    lpips: StrPath | None = None,
    clip: StrPath | None = None,
    dift: StrPath | None = None,
    device: torch.device | str = "auto",
) -> Judges:
    """Load what judges from local folders (`Lpips.load`, `Clip.load`, `Dift.load`); what cannot be is `missing`.

    Raises InputError for an unknown device, nothing for weights: a run goes on without them, their columns empty.
    """
    on = resolve_device(device)
    missing: dict[str, str] = {}

    def attempt(column: str, folder: StrPath | None, load: Callable[[StrPath, torch.device], Made]) -> Made | None:
        if folder is None:
            missing[column] = NOT_GIVEN
            return None
        try:
            return load(folder, on)
        except _FAILURES as error:
            missing[column] = str(error) or type(error).__name__
            log.warning("%s will be left empty: %s", column, missing[column])
            return None

    return Judges(attempt(IF, lpips, Lpips.load), attempt(CLIP, clip, Clip.load), attempt(MD, dift, Dift.load), missing)


def _distances(dift: Dift, sample: Sample, original: Image.Image, edited: Image.Image) -> tuple[float, ...]:
    source, found = dift.pair(to_tensor(original), to_tensor(edited), sample.prompt)
    return tuple(distances(source, found, sample.drags, original.size))
