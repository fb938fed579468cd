"""Engines and threads: one engine's edits follow each other, two engines do not disturb each other."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

import ddengine

CONFIG = ddengine.DirectDragConfig.preset(
    "default", n_inference_step=8, drag_end_step=1, track_per_step=2, max_drag_per_track=2
)
DRAGS = [[((64, 50), (64, 40))], [((30, 80), (44, 80))], [((90, 60), (90, 74)), ((20, 20), (30, 20))]]


def picture() -> np.ndarray:
    rng = np.random.default_rng(1)
    return np.kron(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8), np.ones((8, 8, 1), dtype=np.uint8))


def test_threads_get_what_they_would_get_alone() -> None:
    one, two = ddengine.Engine.load(), ddengine.Engine.load()
    image, threads, state = picture(), torch.get_num_threads(), torch.random.get_rng_state()
    alone = [one.edit(image, drags, config=CONFIG).image.tobytes() for drags in DRAGS]
    assert len(set(alone)) == 3
    with ThreadPoolExecutor(4) as pool:
        shared = [pool.submit(one.edit, image, drags, config=CONFIG) for drags in DRAGS]
        beside = [pool.submit(two.edit, image, drags, config=CONFIG) for drags in DRAGS]
        assert [job.result().image.tobytes() for job in shared] == alone
        assert [job.result().image.tobytes() for job in beside] == alone
    assert torch.get_num_threads() == threads and torch.equal(torch.random.get_rng_state(), state)
