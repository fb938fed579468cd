"""Batches of edits at the engine: what comes out, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import ddengine

CONFIG = ddengine.DirectDragConfig.preset(
    "default", n_inference_step=10, drag_end_step=2, track_per_step=2, max_drag_per_track=1
)
UP, SIDE = [((64, 50), (64, 40))], [((30, 80), (44, 80)), ((90, 60), (90, 70))]


@pytest.fixture(scope="module")
def engine() -> ddengine.Engine:
    return ddengine.Engine.load()


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.kron(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8), np.ones((8, 8, 1), dtype=np.uint8))


def test_each_result_is_that_of_its_single_edit(engine: ddengine.Engine, picture: np.ndarray) -> None:
    source, mask = engine.prepare(picture, config=CONFIG), np.zeros((128, 128), dtype=bool)
    mask[:, :64] = True
    wanted: list[Any] = [(source, UP), (picture, SIDE), (picture, SIDE[:1], mask)]
    told: list[str] = []
    together = engine.edit_batch(wanted, config=CONFIG, progress=lambda at: told.append(at.stage))
    assert told.count("invert") == 8 and told.count("decode") == 3  # the picture that is given twice is prepared once
    for result, (image, drags, *rest) in zip(together, wanted, strict=True):
        alone = engine.edit(image, drags, mask=rest[0] if rest else None, config=CONFIG)
        apart = np.abs(np.asarray(result.image).astype(int) - np.asarray(alone.image).astype(int))
        # Rounding decides the sign of a tiny gradient now and then, and Adam makes a whole step of it.
        assert apart.mean() < 1.5 and np.quantile(apart, 0.9) <= 6
        assert np.abs(np.array(result.handles) - np.array(alone.handles)).max() <= 2
        assert np.allclose(result.mask, alone.mask) and len(result.handles) == len(drags)
        assert len(result.history) == len(alone.history) and set(result.timings) == set(alone.timings)
    forwards = {"forward": 8, "backward": 0}
    preparing = {"invert": forwards, "reference": forwards}  # of the one that was no source
    for result in together:
        assert {stage: result.passes[stage] for stage in preparing} == preparing
        assert all(0 < result.timings[stage] < result.timings["total"] for stage in ("encode", *preparing))
        assert result.backend["invert"].startswith("eager")
    (again,) = engine.edit_batch([(source, UP)], config=CONFIG)
    assert again.timings["invert"] == 0 and "invert" not in again.passes
    assert again.backend["invert"] == "prepared before"
    right = np.asarray(together[2].image)[:, 66:]
    assert np.array_equal(right, picture[:, 66:]) and together[0].backend["drag"].startswith("eager")


def test_what_is_refused(engine: ddengine.Engine, picture: np.ndarray) -> None:
    with pytest.raises(ddengine.InputError, match=r"a batch of no edits was given.*\(image, drags\)"):
        engine.edit_batch([])
    with pytest.raises(ddengine.InputError, match=r"edit 1 of the batch is str 'cat.png'"):
        engine.edit_batch([(picture, UP), "cat.png"])
    with pytest.raises(ddengine.InputError, match="handle"):
        engine.edit_batch([(picture, UP), (picture, [((500, 5), (6, 6))])], config=CONFIG)
    with pytest.raises(ddengine.InputError, match=r"working sizes .*one size together"):
        engine.edit_batch([(picture, UP), (picture[:64], [((64, 50), (64, 40))])], config=CONFIG)
