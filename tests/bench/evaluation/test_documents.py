"""The documents' table of scenes is the committed result, which is the one this code makes a table of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ddengine.bench.evaluation import tables
from ddengine.bench.evaluation.rows import plan_rows
from ddengine.bench.evaluation.sheet import pictures_of
from ddengine.bench.evaluation.suites import DISTANCE, GAIN, PSNR, read_suite

ROOT = Path(__file__).resolve().parents[3]
FIGURES = (GAIN, DISTANCE, PSNR)


@pytest.fixture(scope="module")
def facts() -> dict:
    return json.loads((ROOT / "bench" / "results" / "scenes-cpu.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("document", ["README.md", "docs/quality.md"])
def test_the_table_is_the_results(document: str, facts: dict) -> None:
    text, table = (ROOT / document).read_text(encoding="utf-8"), tables.markdown(facts)
    assert table in text, f"{document} lacks\n{table}"


def test_the_contact_sheet_shows_the_results_edits(facts: dict) -> None:
    shown = pictures_of(ROOT / "docs" / "quality" / "contact.png")
    assert list(shown) == list(facts["edits"])[:6]
    for sample, rows in shown.items():
        assert rows == {row: facts["edits"][sample]["rows"][row]["picture"] for row in ("baseline", "+SM+RG+LWF")}


def test_the_result_is_its_edits(facts: dict) -> None:
    assert len(facts["edits"]) == facts["samples"] == 60 and facts["failures"] == []
    for row, about in facts["rows"].items():
        judged = {
            name: {"figures": {figure.name: sample["rows"][row][figure.name] for figure in FIGURES}}
            for name, sample in facts["edits"].items()
        }
        cells = tables.cells("scenes", row, FIGURES, judged)
        for figure in FIGURES:
            for kind in ("per_image", "median", "error"):
                assert cells[figure.name][kind] == pytest.approx(about["cells"][figure.name][kind], abs=2e-6)


def test_the_result_is_of_the_scenes_and_settings_of_this_version(facts: dict) -> None:
    suite = read_suite("scenes", limit=3)
    assert [item.name for item in suite.items] == list(facts["edits"])[:3]
    rows = plan_rows(["default", "fast", "preview", "paper"], ablated=True)
    assert {row.name: row.config.to_dict() for row in rows if not row.prompt} == {
        name: row["config"] for name, row in facts["rows"].items() if row["config"] is not None
    }
