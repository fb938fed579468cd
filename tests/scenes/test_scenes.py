"""Scenes: seeded, drawn alike at every size, and every true drag really moves what it says."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddengine.scenes.scene import LONGEST, SHORTEST, random_scene, true_drag


def pixels(scene, size=64):
    return np.asarray(scene.render(size), np.float32)


@given(st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_a_seed_is_a_scene(seed):
    a, b = (random_scene(np.random.default_rng(seed)) for _ in range(2))
    assert a == b
    assert np.array_equal(pixels(a), pixels(b))


@given(st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_a_true_drag_moves_its_part_by_its_length(seed):
    drag = true_drag(np.random.default_rng(seed))
    length = np.hypot(drag.target[0] - drag.handle[0], drag.target[1] - drag.handle[1])
    assert SHORTEST - 1e-9 <= length <= LONGEST + 1e-9
    moved = [
        new.at
        for old_subject, new_subject in zip(drag.scene.subjects, drag.goal.subjects, strict=True)
        for old, new in zip(old_subject.parts(), new_subject.parts(), strict=True)
        if old.name == drag.part and old.at == drag.handle
    ]
    assert any(at == pytest.approx(drag.target, abs=1e-9) for at in moved)
    assert np.abs(pixels(drag.scene) - pixels(drag.goal)).max() > 24


@given(st.integers(0, 2**31), st.floats(-0.1, 0.1), st.floats(-0.1, 0.1))
@settings(max_examples=25, deadline=None)
def test_every_part_of_every_subject_can_be_moved_there_and_back(seed, dx, dy):
    scene = random_scene(np.random.default_rng(seed))
    for index, subject in enumerate(scene.subjects):
        for part in subject.parts():
            there = scene.moved(index, part.name, dx, dy)
            moved = next(p for p in there.subjects[index].parts() if p.name == part.name)
            assert moved.at == pytest.approx((part.at[0] + dx, part.at[1] + dy), abs=1e-9)
            back = there.moved(index, part.name, -dx, -dy)
            assert np.abs(pixels(back) - pixels(scene)).max() <= 96  # a border pixel may round the other way


def test_the_scene_is_drawn_alike_at_every_size():
    scene = replace(random_scene(np.random.default_rng(3)), texture=0.0)
    large = np.asarray(scene.render(256).resize((128, 128), 4), np.float32)
    small = np.asarray(scene.render(128), np.float32)
    assert np.abs(large - small).mean() < 2.0
