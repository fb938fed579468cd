"""From figures of samples to the table: both poolings, medians, spreads, and the paper's figures beside them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, median, stdev
from typing import Any

from ddengine.bench.evaluation.paper import stated
from ddengine.bench.evaluation.suites import Figure

# A judgement as its record holds it: {"figures": ...} of scenes, {"scores": ...} (metrics.judges.Scores) of sets.
Judgement = Mapping[str, Any]
Cell = dict[str, Any]


def values_of(judgement: Judgement, figure: str) -> list[float]:
    """The figure's values in a judgement, of each drag where it has one for each; empty where it is not known."""
    if "figures" in judgement:
        return [judgement["figures"][figure]]
    scores = judgement["scores"]
    if figure == "IF":
        found = [scores["fidelity"]]
    elif figure == "CLIP":
        found = [scores["similarity"]]
    elif figure == "MD":
        found = list(scores["distances"] or ())
    else:
        found = list((scores["dai"] or {}).get(figure.removeprefix("DAI_"), ()))
    return [value for value in found if value is not None]


def value_of(judgement: Judgement, figure: str) -> float | None:
    """One number for a sample: the mean over its drags."""
    values = values_of(judgement, figure)
    return fmean(values) if values else None


def cells(suite: str, row: str, figures: Sequence[Figure], judged: Mapping[str, Judgement]) -> dict[str, Cell]:
    """A row of the table from the judgements of its samples, by figure.

    Each cell: published (pooled as the published scripts do), per_image (the mean over samples), median, error (the
    standard error of per_image), samples, drags, empty (reasons and how many), paper (what the paper states).
    """
    ordered = [judged[name] for name in sorted(judged)]  # sums of floats depend on the order
    pooled = _published(judged) if suite != "scenes" else {}
    table = {}
    for figure in figures:
        known = [value for value in (value_of(each, figure.name) for each in ordered) if value is not None]
        column = pooled.get(figure.name)
        table[figure.name] = {
            "published": column.published if column else None,
            "per_image": column.per_image if column else (fmean(known) if known else None),
            "median": median(known) if known else None,
            "error": stdev(known) / math.sqrt(len(known)) if len(known) > 1 else None,
            "samples": len(known),
            "drags": sum(len(values_of(each, figure.name)) for each in ordered),
            "empty": dict(column.empty) if column else {},
            "paper": stated(suite, row, figure.name),
        }
    return table


def _published(judged: Mapping[str, Judgement]) -> Mapping[str, Any]:
    from ddengine.metrics.judges import Scores
    from ddengine.metrics.pooling import pool

    return pool(Scores(name, **judgement["scores"]) for name, judgement in judged.items())


def shown(value: float | None, digits: int) -> str:
    """A figure to its digits, an empty cell as a dash."""
    return "-" if value is None else f"{value:.{digits}f}"


def columns(facts: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """The columns of the result's table: (figure, kind of cell, digits), without those that would be empty."""
    found = []
    for figure in facts["figures"]:
        kinds = ("per_image", "median") if facts["suite"] == "scenes" else ("published", "per_image", "paper")
        for kind in kinds:
            if kind == "median" and figure["name"] != "goal_gain":
                continue
            known = any(row["cells"][figure["name"]][kind] is not None for row in facts["rows"].values())
            # A figure without any value keeps its column, so that its absence is seen.
            if known or kind == kinds[0]:
                found.append((figure["name"], kind, figure["digits"]))
    return found


SCORED = "scored"  # the heading of how many samples a row is of, shown where it is not all of them
TITLES = {"published": "", "per_image": "per image", "median": "median", "paper": "paper"}
NAMES = {"goal_gain": "goal gain", "distance": "distance", "psnr_outside": "PSNR outside, dB", "MD": "MD, px"}


def title(figure: str, kind: str, suite: str) -> str:
    """A column's heading."""
    name = NAMES.get(figure, figure.replace("_", " "))
    if suite == "scenes":
        word = {"goal_gain": {"per_image": "(mean)", "median": "(median)"}}.get(figure, {}).get(kind, "")
        return f"{name} {word}".strip()
    return f"{name} {TITLES[kind]}".strip()


def scored(facts: Mapping[str, Any], row: str) -> str:
    """How many of the samples a row's figures are of: "58 of 60", by figure where they differ; "-" without figures."""
    found = counts(facts, row)
    if len(set(found.values())) > 1:
        names = {figure: NAMES.get(figure, figure.replace("_", " ")).partition(",")[0] for figure in found}
        return ", ".join(f"{names[figure]} {count}" for figure, count in found.items()) + f" of {facts['samples']}"
    return f"{next(iter(found.values()))} of {facts['samples']}" if found else "-"


def all_scored(facts: Mapping[str, Any]) -> bool:
    """Whether every row's figures are of all samples, but for figures that no row has."""
    return all(count == facts["samples"] for row in facts["rows"] for count in counts(facts, row).values())


def coverage(facts: Mapping[str, Any]) -> str:
    """What a reader of the table must know of the samples that a row lacks, in sentences; "" without any figure."""
    if not any(counts(facts, row) for row in facts["rows"]):
        return ""
    if all_scored(facts):
        return f"Every row is of all {facts['samples']} samples."
    return (
        "A row is of the samples that it scored: one that failed or could not be judged is left out of the row, not "
        "counted as a bad one. A row that fails where others do badly looks better than it is."
    )


def counts(facts: Mapping[str, Any], row: str) -> dict[str, int]:
    """Scored samples by figure, of the figures that any row has."""
    names = [figure["name"] for figure in facts["figures"]]
    known = [name for name in names if any(each["cells"][name]["samples"] for each in facts["rows"].values())]
    return {name: facts["rows"][row]["cells"][name]["samples"] for name in known}


def markdown(facts: Mapping[str, Any]) -> str:
    """The table as Markdown, as the documents have it; below it what it means that rows lack samples, if some do."""
    wanted, whole = columns(facts), all_scored(facts)
    heads = [title(figure, kind, facts["suite"]) for figure, kind, _ in wanted] + ([] if whole else [SCORED])
    lines = [f"| row | {' | '.join(heads)} |", "| --- |" + " --- |" * len(heads)]
    for name, row in facts["rows"].items():
        figures = [shown(row["cells"][figure][kind], digits) for figure, kind, digits in wanted]
        figures += [] if whole else [scored(facts, name)]
        lines.append(f"| {name} | {' | '.join(figures)} |")
    return "\n".join([*lines, *([] if whole else ["", coverage(facts)])])


def terminal(facts: Mapping[str, Any]) -> str:
    """The table for a terminal, with what is missing and what failed below it."""
    from io import StringIO

    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, title=None)
    table.add_column("row")
    wanted, whole = columns(facts), all_scored(facts)
    for figure, kind, _ in wanted:
        better = {"higher": "↑", "lower": "↓"}[next(f["better"] for f in facts["figures"] if f["name"] == figure)]
        arrow = f" {better}" if kind in ("published", "per_image") else ""
        table.add_column(title(figure, kind, facts["suite"]) + arrow, justify="right")
    if not whole:
        table.add_column(SCORED, justify="right")
    for name, row in facts["rows"].items():
        cells = [shown(row["cells"][f][kind], digits) for f, kind, digits in wanted]
        table.add_row(Text(name), *cells, *([] if whole else [scored(facts, name)]))
    out = StringIO()
    Console(file=out, width=max(100, 14 * len(wanted) + 44), color_system=None).print(table)
    lines = [f"{facts['title']}: {facts['samples']} samples", "\n".join(x.rstrip() for x in out.getvalue().split("\n"))]
    lines = [line.strip("\n") for line in [*lines, *filter(None, [coverage(facts)])]]
    lines += [f"empty: {name}: {why}" for name, why in facts["missing"].items()]
    lines += [f"left out: {name}: {why}" for name, why in facts["left_out"].items()]
    lines += [f"note: {note}" for note in facts["notes"]]
    failures = facts["failures"]
    lines += [f"failed: {each['sample']}{_of(each)}: {each['error']}" for each in failures[:8]]
    if len(failures) > 8:
        lines.append(f"... and {len(failures) - 8} more")
    return "\n".join(lines).encode("utf-8", "replace").decode()  # a file's name may hold what no terminal takes


def _of(failure: Mapping[str, Any]) -> str:
    return f" ({failure['row']})" if failure["row"] else ""
