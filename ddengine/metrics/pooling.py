"""From the figures of samples to the one number of a column: pooled as published, and as a mean over pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from ddengine.metrics.dai import RADII
from ddengine.metrics.judges import CLIP, DAI, IF, MD, Scores

BORDER = "every patch crosses the picture's border"


@dataclass(frozen=True)
class Column:
    """One column of a table; None where it is empty.

    published: pooled as the published scripts do (method specification, section 13): IF and CLIP the mean over
    samples; MD over all drags of all samples alike, so that a sample with many drags weighs more; DAI the mean over
    samples of what the script calls a sample's value, its mean over drags divided by their number a second time.
    per_image: the mean over samples of each sample's mean, without that second division. samples, drags: how many
    figures stand behind both. empty: the reasons of empty cells, each with the number of samples.
    """

    published: float | None
    per_image: float | None
    samples: int
    drags: int
    empty: Mapping[str, int]


def pool(scores: Iterable[Scores]) -> dict[str, Column]:
    """The columns IF, CLIP, MD, DAI_1, DAI_5, DAI_10 and DAI_20 of a table, in whatever order samples come."""
    # In the order of names: sums of floats depend on theirs, and shards come back in any.
    ordered = sorted(scores, key=lambda each: each.name)
    columns = {
        IF: _column(ordered, IF, [() if each.fidelity is None else (each.fidelity,) for each in ordered]),
        CLIP: _column(ordered, CLIP, [() if each.similarity is None else (each.similarity,) for each in ordered]),
        MD: _column(ordered, MD, [each.distances or () for each in ordered], over_drags=True),
    }
    for radius in RADII:
        drags = [
            tuple(value for value in (each.dai or {}).get(str(radius), ()) if value is not None) for each in ordered
        ]
        columns[f"{DAI}_{radius}"] = _column(ordered, DAI, drags, twice=True)
    return columns


def _column(
    ordered: Sequence[Scores],
    name: str,
    values: Sequence[Sequence[float]],
    *,
    over_drags: bool = False,
    twice: bool = False,
) -> Column:
    known = [each for each in values if each]
    empty: dict[str, int] = {}
    for each, figures in zip(ordered, values, strict=True):
        if not figures:
            reason = each.empty.get(name, BORDER if name == DAI else "not computed")
            empty[reason] = empty.get(reason, 0) + 1
    if not known:
        return Column(None, None, 0, 0, empty)
    per_image = fmean(fmean(figures) for figures in known)
    published = per_image
    if over_drags:
        published = fmean(value for figures in known for value in figures)
    elif twice:
        published = fmean(fmean(figures) / len(figures) for figures in known)
    return Column(published, per_image, len(known), sum(map(len, known)), empty)
