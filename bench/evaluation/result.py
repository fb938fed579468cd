"""The result of a run as plain data: rows with their tables, samples with their figures, what is missing and failed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ddengine.bench.evaluation import folder as files
from ddengine.bench.evaluation import tables
from ddengine.bench.evaluation.paper import SOURCE
from ddengine.bench.evaluation.plan import Plan
from ddengine.bench.evaluation.rows import GOAL, REFERENCES, UNEDITED, Row, slug_of
from ddengine.bench.evaluation.suites import Item, Suite

RAN = ("warp", "drag", "denoise", "decode")  # stages of an edit itself; its preparation may be shared

Edits = Mapping[tuple[str, str], tuple[str, Mapping[str, Any]]]  # (sample, row): digest of the picture, facts
Judged = Mapping[str, Mapping[str, tables.Judgement]]  # row, sample


def assemble(
    plan: Plan,
    planned: Sequence[Row],
    setup: Mapping[str, Any],
    edits: Edits,
    judged: Judged,
    failures: Mapping[tuple[str, str], str],
    left_out: Mapping[str, str],
) -> dict[str, Any]:
    """Everything about a run, ready for JSON, in an order that does not depend on who finished first.

    planned: the rows that were edited. failures: by sample and row, "" for all of a sample's.
    """
    from ddengine.bench.timer import machine

    suite = plan.suite
    configs = {row.name: row.facts() for row in planned}
    rows: dict[str, Any] = {}
    for name in [UNEDITED, *configs, *([GOAL] if suite.drawn else [])]:
        made = [facts for (_, row), (_, facts) in sorted(edits.items()) if row == name]
        rows[name] = {
            "slug": slug_of(planned, name),
            "about": REFERENCES.get(name, ""),
            **configs.get(name, {"config": None, "prompt": False}),
            "backend": sorted(
                {f"{stage}: {what}" for facts in made for stage, what in facts["backend"].items() if stage in RAN}
            ),
            "cells": tables.cells(suite.name, name, suite.figures, judged.get(name, {})),
        }
    notes = {note for _, facts in edits.values() for note in facts["notes"]}
    notes |= {note for row in judged.values() for facts in row.values() for note in facts["notes"]}
    notes |= _mixed(rows)
    return {
        "format": files.FORMAT,
        "suite": suite.name,
        "title": suite.title,
        "source": suite.source,
        "data": suite.digest,
        "samples": len(suite.items) + len(suite.refused),
        "setup": {"name": Path(str(plan.engine.get("model", "embedded"))).name, **setup},
        "machine": machine(),
        "figures": [asdict(figure) for figure in suite.figures],
        "worst": list(suite.worst),
        "paper": SOURCE if any(cell["paper"] for row in rows.values() for cell in row["cells"].values()) else "",
        "rows": rows,
        "left_out": dict(left_out),
        "missing": _missing(suite, rows),
        "notes": sorted(notes),
        "failures": [{"sample": name, "row": row, "error": error} for (name, row), error in sorted(failures.items())],
        "edits": {item.name: _sample(suite, item, list(rows), edits, judged) for item in suite.items},
    }


def _sample(suite: Suite, item: Item, rows: Sequence[str], edits: Edits, judged: Judged) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for row in rows:
        judgement = judged.get(row, {}).get(item.name)
        if judgement is not None:
            found[row] = {figure.name: _rounded(tables.values_of(judgement, figure.name)) for figure in suite.figures}
            if (item.name, row) in edits:
                found[row]["picture"] = edits[item.name, row][0]
    return {
        "category": item.category,
        "prompt": item.prompt,
        "size": list(item.size),
        "drags": [[list(drag.handle), list(drag.target)] for drag in item.drags],
        "rows": found,
    }


def _mixed(rows: Mapping[str, Any]) -> set[str]:
    """A note for every stage that a row's edits did not all compute alike: their pixels differ by rounding."""
    found = set()
    for row in rows.values():
        stages = Counter(what.partition(":")[0] for what in row["backend"])
        for stage in (stage for stage, count in stages.items() if count > 1):
            which = [what.partition(": ")[2] for what in row["backend"] if what.startswith(f"{stage}:")]
            found.add(
                f"the {stage} of some edits ran on {', of others on '.join(which)}: not the same was built for all; "
                "name a --backend"
            )
    return found


def _missing(suite: Suite, rows: Mapping[str, Any]) -> dict[str, str]:
    """Figures without a single value, and the reason most samples give."""
    found = {}
    for figure in suite.figures:
        if any(row["cells"][figure.name]["samples"] for row in rows.values()):
            continue
        reasons: Counter[str] = Counter()
        for row in rows.values():
            reasons.update(row["cells"][figure.name]["empty"])
        if reasons:
            found[figure.name] = reasons.most_common(1)[0][0]
    return found


def _rounded(values: list[float]) -> Any:
    """Enough digits to make the table again; one number where there is one."""
    found = [round(value, 6) for value in values]
    return found[0] if len(found) == 1 else found
