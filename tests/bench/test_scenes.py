"""The scene bench must rank a perfect answer, no answer and a wrong one as a person would."""

from __future__ import annotations

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


def test_the_arrow_lies_on_pixel_centres():
    for drag in DRAGS:
        for point, at in zip(
            (drag.handle, drag.target), (scenes.arrow(drag).handle, scenes.arrow(drag).target), strict=True
        ):
            assert [(pixel + 0.5) / scenes.SIZE for pixel in at] == pytest.approx(list(point))
