"""What the report's parts ask of a result: which rows, which figures, in what order."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean
from typing import Any

Facts = Mapping[str, Any]

FULL = "+SM+RG+LWF"  # the row that is shown first where it is there
SHORT = {"goal_gain": "gain", "psnr_outside": "PSNR, dB", "MD": "MD, px"}  # below a small picture


def main_row(facts: Facts) -> str:
    """The row shown first: the whole method's, or the first that edits."""
    edits = edited(facts)
    return FULL if FULL in edits else edits[0]


def edited(facts: Facts) -> list[str]:
    """The rows that edit, in the table's order."""
    return [name for name, row in facts["rows"].items() if row["config"] is not None]


def value_of(facts: Facts, sample: str, row: str, figure: str) -> float | None:
    """A sample's figure in a row, the mean over its drags; None where it is not known."""
    found = facts["edits"][sample]["rows"].get(row, {}).get(figure, [])
    values = found if isinstance(found, list) else [found]
    return fmean(values) if values else None


def known_cells(facts: Facts, figure: str, kind: str) -> list[float]:
    """The figure's cells of the rows that edit, without empty ones."""
    cells = [facts["rows"][name]["cells"][figure][kind] for name in edited(facts)]
    return [value for value in cells if value is not None]


def ranking(facts: Facts) -> str:
    """The figure that samples are ranked by: the first of the suite's choices that is known."""
    main = main_row(facts)
    known = [name for name in facts["worst"] if facts["rows"][main]["cells"][name]["samples"]]
    return known[0] if known else ""


def ranked(facts: Facts) -> list[str]:
    """Samples, those without a figure first, then the worst; equal ones by name."""
    figure, main = ranking(facts), main_row(facts)
    sign = 1 if any(each["name"] == figure and each["better"] == "higher" for each in facts["figures"]) else -1

    def key(sample: str) -> tuple[float, str]:
        value = value_of(facts, sample, main, figure) if figure else None
        return (-math.inf if value is None else sign * value, sample)

    return sorted(facts["edits"], key=key)
