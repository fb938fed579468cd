"""A tiny published set of drawn pictures, settings of a few passes, and an engine that only shifts pixels."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ddengine.bench.evaluation.plan import Plan
from ddengine.bench.evaluation.rows import plan_rows
from ddengine.bench.evaluation.suites import read_suite
from ddengine.result import EditResult
from ddengine.scenes.scene import random_scene

FEW = {"n_inference_step": "4", "drag_end_step": "1", "track_per_step": "1", "max_drag_per_track": "1"}
NAMES = ("animals/a", "animals/b", "land_scape/c")


def _sample(root: Path, name: str, seed: int, *, prompt: str = "a picture", points: Any = ((40, 40), (60, 48))) -> Path:
    """One sample of DragBench's extracted form, 96 x 80."""
    folder = root / name
    folder.mkdir(parents=True)
    picture = random_scene(np.random.default_rng(seed)).render(96).crop((0, 0, 96, 80))
    picture.save(folder / "original_image.png")
    facts = {"prompt": prompt, "points": [list(point) for point in points]}
    (folder / "drag_instruction.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture(scope="session")
def sample() -> Callable[..., Path]:
    """Makes one: (root, name, seed, prompt=, points=)."""
    return _sample


@pytest.fixture
def dragbench(tmp_path: Path) -> Path:
    root = tmp_path / "set"
    for seed, name in enumerate(NAMES):
        _sample(root, name, seed, points=((40, 40), (60, 48), (20, 30), (24, 50))[: 2 if seed else 4])
    return root


class Shifter:
    """Stands for the engine: moves the picture by the first drag's length. fail: names no edit of which succeeds."""

    edits = 0
    fail: Any = None

    def __init__(self) -> None:
        self.backend = SimpleNamespace(name="eager")
        self.model = SimpleNamespace(
            digest="0" * 64, size=96, dtype=torch.float32, device=torch.device("cpu"), text=None
        )

    @classmethod
    def load(cls, **options: Any) -> Shifter:
        return cls()

    def prepare(self, picture: Image.Image, *, config: Any, prompt: str) -> Any:
        return SimpleNamespace(image=picture, timings={"invert": 1.0}, config=config)

    def edit(self, source: Any, drags: Any, *, prompt: str, config: Any, seed: int) -> EditResult:
        type(self).edits += 1
        pixels = np.asarray(source.image)
        if self.fail is not None and self.fail(pixels, config):
            raise RuntimeError(f"{pixels.shape} <b>cannot</b> be\nedited")
        by = round(drags[0].target[0] - drags[0].handle[0]) + 3 * config.soft_mask
        image = Image.fromarray(np.roll(pixels, by, 1))
        return EditResult(image, ((1.0, 2.0),), None, {"invert": 0.0, "total": 2.0}, {}, (), {"drag": "eager"}, ())


@pytest.fixture
def shifter(monkeypatch: pytest.MonkeyPatch) -> type[Shifter]:
    monkeypatch.setattr("ddengine.engine.Engine", Shifter)
    monkeypatch.setattr(Shifter, "edits", 0)
    monkeypatch.setattr(Shifter, "fail", None)
    return Shifter


@pytest.fixture
def plan(dragbench: Path, tmp_path: Path) -> Plan:
    """Two rows on the tiny set."""
    return Plan(read_suite("dragbench", dragbench), plan_rows(["default", "paper"], FEW), tmp_path / "out")
