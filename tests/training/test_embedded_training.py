"""The whole training with budgets of seconds yields a folder that loads and edits."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from ddengine.config import DirectDragConfig
from ddengine.engine import Engine
from ddengine.errors import InputError
from ddengine.models.readout_io import tap_dims
from ddengine.scenes.scene import random_scene
from ddengine.training import autoencoder
from ddengine.training.embedded import Budget, train

TINY = Budget(autoencoder_steps=3, unet_steps=3, readout_steps=2, latents=16, triplets=2)
QUICK = DirectDragConfig.preset("preview", n_inference_step=8, drag_end_step=1, track_per_step=1, max_drag_per_track=1)


def test_a_tiny_training_makes_a_model_that_edits(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(autoencoder, "psnr", lambda module, pictures: 12.346)  # its own test costs less
    folder = train(tmp_path, device="cpu", seed=3, budget=TINY)
    assert capfd.readouterr().err == ""
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["command"].startswith(f"ddengine train-embedded -o {tmp_path} --device cpu --seed 3 --minutes 60 110")
    assert record["reconstruction_psnr_db"] == 12.35
    parts = [record[name] for name in ("autoencoder", "unet", "readout")]
    assert [part["step"] for part in parts] == [3, 3, 2]
    assert record["seconds"] == sum(part["seconds"] for part in parts)

    engine = Engine.load(folder, device="cpu")
    assert engine.model.size == 128
    assert engine.model.readout.dims == tap_dims(engine.model.unet)[0]
    picture = random_scene(np.random.default_rng(0)).render(128)
    result = engine.edit(picture, [((60, 60), (70, 60))], config=QUICK)
    assert isinstance(result.image, Image.Image) and result.image.size == (128, 128)

    with pytest.raises(InputError, match="seed 3, this one has seed 4"):
        train(tmp_path, device="cpu", seed=4, budget=TINY)


def test_what_cannot_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="magic"):
        train(tmp_path / "run", device="magic")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="folder"):
        train(tmp_path / "file" / "run", device="cpu")
