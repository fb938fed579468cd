"""The contact sheet shows what the run made, in its place, and nothing that is not the run's."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddengine.bench.evaluation import sheet
from ddengine.bench.evaluation.plan import Plan
from ddengine.bench.evaluation.run import evaluate
from ddengine.bench.evaluation.sheet import EDGE, GAP, HEAD, LINE, main, pictures_of
from ddengine.errors import InputError


def tile(picture: Image.Image, column: int, row: int, size: tuple[int, int], below: int) -> np.ndarray:
    """What lies at a place of a sheet whose tiles are all of one size, below each so many lines."""
    x, y = EDGE + column * (size[0] + GAP), EDGE + HEAD + row * (size[1] + 4 + below * LINE + GAP)
    return np.asarray(picture.crop((x, y, x + size[0], y + size[1])))


def test_every_edit_lies_in_its_place(plan: Plan, shifter, tmp_path: Path) -> None:
    facts = evaluate(plan)
    png = tmp_path / "sheet.png"
    png.write_bytes(sheet.sheet(facts, plan.suite, plan.folder, ["paper", "default"], count=2, side=96))
    with Image.open(png) as picture:
        assert picture.size == (2 * EDGE + 3 * 96 + 2 * GAP, EDGE + HEAD + 2 * (80 + 4 + 2 * LINE + GAP))
        for number, item in enumerate(plan.suite.items[:2]):
            for column, row in enumerate(["paper", "default"], 1):
                with Image.open(plan.folder / "results" / row / item.name / "dragged_image.png") as edit:
                    np.testing.assert_array_equal(tile(picture, column, number, (96, 80), 2), np.asarray(edit))
            with Image.open(item.truth.image) as before:
                shown = tile(picture, 0, number, (96, 80), 2)
                assert 0 < (shown != np.asarray(before.convert("RGB"))).any(2).mean() < 0.25  # its arrows alone
        assert (np.asarray(picture) == 255).mean() > 0.2  # the gutters
    assert pictures_of(png) == {
        name: {row: facts["edits"][name]["rows"][row]["picture"] for row in ("paper", "default")}
        for name in ("animals/a", "animals/b")
    }


def test_a_failed_edit_leaves_its_place_and_another_runs_edit_is_refused(plan: Plan, shifter) -> None:
    calls: list[int] = []
    shifter.fail = staticmethod(lambda pixels, config: calls.append(1) or len(calls) == 2)
    facts = evaluate(plan)
    made = Image.open(io.BytesIO(sheet.sheet(facts, plan.suite, plan.folder, side=96)))
    assert made.height == EDGE + HEAD + 3 * (80 + 4 + 2 * LINE + GAP)
    failed = tile(made, 2, 0, (96, 80), 2)
    assert (failed[:20] == failed[0, 0]).all() and failed[0, 0].tolist() == [236, 236, 240]
    with pytest.raises(InputError, match="no row 'fast' in the run; it has default, paper"):
        sheet.sheet(facts, plan.suite, plan.folder, ["fast"])
    (plan.folder / "results/default/animals/a/dragged_image.png").write_bytes(b"another")
    with pytest.raises(InputError, match="is not the edit that"):
        sheet.sheet(facts, plan.suite, plan.folder)


def test_the_command_makes_it_from_a_folder(plan: Plan, shifter, dragbench: Path, tmp_path: Path, capsys) -> None:
    evaluate(replace(plan, rows=plan.rows[:1]))
    out = tmp_path / "sheet.png"
    main([str(plan.folder), str(out), "--data", str(dragbench), "--count", "1", "--side", "64"])
    assert list(pictures_of(out)) == ["animals/a"] and str(out) in capsys.readouterr().out
    for words, said in (
        ([str(tmp_path / "nowhere"), str(out)], "went to its end"),
        ([str(plan.folder), str(out)], "with --data"),
        ([str(plan.folder), str(out), "--data", str(dragbench), "--row", "x"], "no row 'x'"),
        ([str(plan.folder), str(out), "--count", "0"], "at least 1"),
    ):
        with pytest.raises(SystemExit):
            main(words)
        assert said in capsys.readouterr().err
    (plan.folder / "evaluation.json").write_text(json.dumps([]))
    with pytest.raises(SystemExit):
        main([str(plan.folder), str(out)])
    assert "no result of this version" in capsys.readouterr().err
