"""Real photographs through folders of the Stable Diffusion 1.5 family, from file to file."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

import ddengine
from ddengine import DirectDragConfig, Engine

QUICK = {"n_inference_step": 8, "drag_end_step": 1, "track_per_step": 1, "max_drag_per_track": 2}


def photograph(folder):
    points = json.loads((folder / "drag_instruction.json").read_text())["points"]
    return folder / "original_image.png", list(zip(points[::2], points[1::2], strict=True))


@pytest.fixture(scope="module")
def engine(sd15_original):
    return Engine.load(sd15_original)


@pytest.mark.parametrize("number", [0, 7, 13, 20])
def test_a_photograph_comes_back_at_its_size(engine, photographs, number, tmp_path):
    file, drags = photograph(photographs[number])
    result = engine.edit(file, drags, config=DirectDragConfig.preset("default", **QUICK))
    saved = result.save(tmp_path / "out.png")
    with Image.open(file) as before, Image.open(saved) as after:
        assert after.size == before.size
    assert len(result.handles) == len(drags)
    assert any("readout" in note for note in result.notes)  # the folder has no head, and the result says so


def test_a_readout_head_a_prompt_and_a_mask(golden, photographs):
    file, drags = photograph(photographs[0])
    engine = Engine.load(golden / "tiny-sd", readout=golden / "tiny-readout-appearance.safetensors")
    with Image.open(file) as picture:
        small = picture.convert("RGB").resize((192, 160))
        scale = np.array([192, 160]) / picture.size
    drags = [tuple(tuple(np.array(point) * scale) for point in pair) for pair in drags]
    config = DirectDragConfig.preset("paper", **QUICK)
    plain = engine.edit(small, drags, config=config)
    assert plain.history[0]["readout_loss"] >= 0 and not plain.notes
    prompted = engine.edit(small, drags, config=config, prompt="the cat and dog")
    assert prompted.image.tobytes() != plain.image.tobytes()
    mask = np.zeros((160, 192), np.uint8)
    mask[40:120, 40:150] = 255
    assert engine.edit(small, drags, config=config, mask=mask).image.tobytes() != plain.image.tobytes()


def test_readout_guidance_without_a_head_is_refused(engine, photographs):
    file, drags = photograph(photographs[0])
    with pytest.raises(ddengine.ModelError, match="readout"):
        engine.edit(file, drags, config=DirectDragConfig.preset("default", readout_guidance=True, **QUICK))
