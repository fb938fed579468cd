"""The scene bench must rank a perfect answer, no answer and a wrong one as a person would."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from ddengine.bench import scenes

DRAGS = scenes.held_out(6)


@pytest.mark.parametrize("drag", DRAGS, ids=[d.part for d in DRAGS])
def test_scores_of_known_answers(drag):
    goal = scenes.score(drag, drag.goal.render(scenes.SIZE))
    nothing = scenes.score(drag, drag.scene.render(scenes.SIZE))
    rng = np.random.default_rng(0)
    noise = scenes.score(drag, Image.fromarray(rng.integers(0, 256, (scenes.SIZE, scenes.SIZE, 3), dtype=np.uint8)))
    assert goal.goal_gain == 1.0 and goal.psnr_outside == scenes.FLAWLESS
    assert nothing.goal_gain == 0.0 and nothing.psnr_outside == scenes.FLAWLESS
    assert noise.goal_gain < 0.5 and noise.psnr_outside < 15
    assert goal.distance < 0.5 < nothing.distance


def test_a_moved_disc_is_found_to_the_pixel():
    drag = next(d for d in scenes.held_out(60) if d.part == "disc")
    before, goal = (np.asarray(s.render(scenes.SIZE), np.float32) for s in (drag.scene, drag.goal))
    length = scenes.SIZE * np.hypot(drag.target[0] - drag.handle[0], drag.target[1] - drag.handle[1])
    assert scenes.distance(drag, before, goal) * length <= 1.5
    assert scenes.distance(drag, before, before) == pytest.approx(1, abs=1.5 / length)


def test_held_out_scenes_are_fixed_and_distinct():
    again = scenes.held_out(6)
    assert again == DRAGS
    assert len({d.scene for d in DRAGS}) == len(DRAGS)


def test_summary_is_the_mean_and_the_table_shows_it():
    found = [scenes.Score("a", 0.2, 0.4, 30.0), scenes.Score("b", 0.6, 0.2, 40.0)]
    summary = scenes.summary(found)
    assert summary == pytest.approx(
        {"edits": 2, "goal_gain": 0.4, "goal_gain_median": 0.4, "distance": 0.3, "psnr_outside": 35.0}
    )
    assert scenes.table({"x": summary}).endswith("| x | 0.40 | 0.40 | 0.30 | 35.0 |")


def test_the_bench_edits_and_writes(tmp_path, monkeypatch):
    """A stand-in engine that answers every drag perfectly must score 1, and one that does nothing 0."""
    goals = {np.asarray(d.scene.render(scenes.SIZE)).tobytes(): d.goal.render(scenes.SIZE) for d in DRAGS}
    perfect = SimpleNamespace(
        model=SimpleNamespace(digest="0"),
        backend=SimpleNamespace(name="eager"),
        edit=lambda picture, drags, config: SimpleNamespace(
            image=goals[np.asarray(picture).tobytes()] if config.soft_mask else picture
        ),
    )
    facts = scenes.measure(perfect, len(DRAGS), tmp_path / "new", rows=False)
    assert facts["summary"]["default"]["goal_gain"] == facts["summary"]["goal"]["goal_gain"] == 1
    assert facts["summary"]["all stages off"]["goal_gain"] == facts["summary"]["unedited"]["goal_gain"] == 0
    assert json.loads((tmp_path / "new" / "scenes.json").read_text())["summary"] == facts["summary"]
    with Image.open(tmp_path / "new" / "contact.png") as sheet:
        assert sheet.size == (256 * 4, 256 * len(DRAGS))
