"""The table by hand: both poolings side by side, the paper's figures, and empty columns that say why."""

from __future__ import annotations

import pytest

from ddengine.bench.evaluation import sections, tables
from ddengine.bench.evaluation.suites import CLIP, DAI, GAIN, IF, MD, PSNR
from ddengine.metrics.judges import NOT_GIVEN


def scores(fidelity, distances, dai=None):
    empty = {"CLIP": NOT_GIVEN}
    return {"scores": {"fidelity": fidelity, "similarity": None, "distances": distances, "dai": dai, "empty": empty}}


JUDGED = {
    "a/one": scores(0.9, [10.0], {"10": [0.5]}),
    "b/two": scores(0.7, [2.0, 4.0, 6.0], {"10": [0.1, None, 0.3]}),
}


def test_published_and_per_image_pooling():
    cells = tables.cells("dragbench", "+SM", (IF, CLIP, MD, DAI[2]), JUDGED)
    assert cells["MD"]["published"] == pytest.approx((10 + 2 + 4 + 6) / 4)  # every drag alike
    assert cells["MD"]["per_image"] == pytest.approx((10 + 4) / 2)  # every picture alike
    assert (cells["MD"]["samples"], cells["MD"]["drags"], cells["MD"]["paper"]) == (2, 4, 31.35)
    assert cells["IF"]["published"] == cells["IF"]["per_image"] == pytest.approx(0.8)
    assert cells["IF"]["error"] == pytest.approx(0.1)  # deviation 0.1414 over the root of 2
    assert cells["DAI_10"]["published"] == pytest.approx((0.5 / 1 + 0.2 / 2) / 2)  # divided twice
    assert cells["DAI_10"]["per_image"] == pytest.approx((0.5 + 0.2) / 2)
    assert cells["CLIP"]["published"] is None and cells["CLIP"]["empty"] == {NOT_GIVEN: 2}
    assert tables.cells("drag100", "+SM", (IF,), JUDGED)["IF"]["paper"] is None  # the paper's table is DragBench's


def result(suite, figures, judged, rows=("default",)):
    return {
        "suite": suite,
        "title": "A set",
        "samples": len(judged),
        "figures": [{"name": f.name, "better": f.better, "digits": f.digits} for f in figures],
        "rows": {row: {"cells": tables.cells(suite, row, figures, judged)} for row in rows},
        "missing": {"CLIP": NOT_GIVEN},
        "left_out": {},
        "notes": ["a [red]note[/red]"],
        "failures": [{"sample": f"a/[b]{k}[/b]", "row": "default", "error": "damaged"} for k in range(9)],
    }


def test_the_terminal_shows_everything_as_it_is():
    facts = result("dragbench", (IF, CLIP, MD), JUDGED, ("+SM", "x[bold]y"))
    text = tables.terminal(facts)
    line = next(line for line in text.split("\n") if line.strip().startswith("+SM"))
    assert line.split() == ["+SM", "0.800", "0.800", "0.895", "-", "0.979", "5.50", "7.00", "31.35"]
    assert "x[bold]y" in text and "note: a [red]note[/red]" in text and f"empty: CLIP: {NOT_GIVEN}" in text
    assert "failed: a/[b]7[/b] (default): damaged" in text and "... and 1 more" in text


def test_the_documents_table_of_scenes():
    judged = {k: {"figures": {"goal_gain": v, "psnr_outside": 30 + v}} for k, v in (("a", 0.1), ("b", 0.2), ("c", 0.9))}
    assert tables.markdown(result("scenes", (GAIN, PSNR), judged)).split("\n") == [
        "| row | goal gain (mean) | goal gain (median) | PSNR outside, dB |",
        "| --- | --- | --- | --- |",
        "| default | 0.40 | 0.20 | 30.4 |",
    ]


def lacking():
    """Three samples, the hardest of which a row failed at; a fourth could not be read."""
    values = {"a": 0.1, "b": 0.2, "c": 0.9}
    judged = {k: {"figures": {"goal_gain": v, "psnr_outside": 30 + 4 * v}} for k, v in values.items()}
    facts = result("scenes", (GAIN, PSNR), judged, ("whole",))
    less = {k: judged[k] for k in "bc"}
    facts["rows"]["flattered"] = {"cells": tables.cells("scenes", "flattered", (GAIN, PSNR), less)}
    return facts | {"samples": 4}


def test_a_row_that_lacks_samples_says_so_beside_its_figures():
    facts = lacking()
    lines = tables.markdown(facts).split("\n")
    assert lines[0].endswith("| PSNR outside, dB | scored |") and lines[1].count("---") == 5
    assert lines[2:4] == ["| whole | 0.40 | 0.20 | 31.6 | 3 of 4 |", "| flattered | 0.55 | 0.55 | 32.2 | 2 of 4 |"]
    assert "left out of the row, not counted as a bad one" in lines[-1]
    text = tables.terminal(facts)
    assert "3 of 4" in text and "2 of 4" in text and lines[-1] in text
    page = str(sections.results({**facts, "paper": "", "rows": {
        name: {**row, "config": {}, "about": ""} for name, row in facts["rows"].items()
    }}))  # fmt: skip
    assert ">scored</th>" in page and 'short">2 of 4</td>' in page and lines[-1] in page
    assert 'class="best' not in page  # the row of two samples leads by having lost the third
    facts["rows"]["flattered"]["cells"]["psnr_outside"]["samples"] = 1
    assert tables.scored(facts, "flattered") == "goal gain 2, PSNR outside 1 of 4"


def test_a_table_of_all_samples_has_no_such_column_and_says_that():
    facts = lacking() | {"samples": 3}
    del facts["rows"]["flattered"]
    assert "scored" not in tables.markdown(facts) and "Every row is of all 3 samples." in tables.terminal(facts)
    empty = result("dragbench", (CLIP,), JUDGED)
    assert tables.coverage(empty) == "" and tables.scored(empty, "default") == "-" and tables.all_scored(empty)
