"""The example pictures in the repository are the ones the code draws."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from ddengine.scenes.showcase import write

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_the_examples_are_what_the_code_draws(tmp_path):
    write(tmp_path)
    listed = json.loads((EXAMPLES / "demo.json").read_text())
    assert listed == json.loads((tmp_path / "demo.json").read_text())
    for entry in listed:
        with Image.open(EXAMPLES / entry["image"]) as ours, Image.open(tmp_path / entry["image"]) as drawn:
            # Pillow's releases may round a border pixel differently.
            assert np.abs(np.asarray(ours, float) - np.asarray(drawn, float)).mean() < 0.5
