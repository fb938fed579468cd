"""Equality before speed, for whole backends: each result beside eager's, in the process that will time it.

Whole edits fork on rounding, so that two right backends may end apart (docs/drag-step.md). Held are an edit that moves
nothing, picture against picture, and every update of a first drag step, from the state it started from (gate.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from ddengine.bench import gate
from ddengine.bench.engine_code import EngineCode
from ddengine.bench.latency_meter import Call
from ddengine.bench.published import Update
from ddengine.bench.waterfall import Work, make_gate
from ddengine.config import DirectDragConfig
from ddengine.directdrag.points import points_for
from ddengine.drags import Drag
from ddengine.engine import Engine
from ddengine.export.quality_gate import LIMIT_DB
from ddengine.image import resize, to_tensor
from ddengine.models.load import Model
from ddengine.request import spaces_for
from ddengine.source import Source

LEVELS = 1  # of 255, the largest difference of pictures that nothing moved in float32 and float64 (docs/backends.md)
# In half precision two right networks differ by more: there the picture needs `LIMIT_DB`, as an fp8 network's does.
HALVES = (torch.float16, torch.bfloat16)
# One drag step that looks and does not move: every pass of an edit, and the same compiled packages.
STILL: dict[str, Any] = {"latent_lr": 0.0, "preserve": False, "latent_warpage": False}


class Equality:
    """What eager makes of a picture and some drags, to compare backends with."""

    def __init__(self, model: Model, image: Image.Image, drags: Sequence[Drag], config: DirectDragConfig) -> None:
        self._model, self._image, self._drags = model, image, drags
        self._unmoving = config.changed(**STILL, drag_end_step=min(1, config.drag_end_step))
        self._still = self._unmoved(Engine(model, "eager"))
        self._short = self._gate = None
        if config.drag_end_step:
            spaces = spaces_for(image, model.size, config)
            work = resize(to_tensor(image), spaces.work_size).to(model.device)
            short = Work(work, *points_for(config, drags, spaces), config.changed(drag_end_step=1))
            self._short, self._gate = short, make_gate(model, short)

    def judge(self, engine: Engine, batch: int = 1) -> dict[str, Any]:
        """How far a backend is from eager and whether that is within the limits, which are told too."""
        found = np.abs(self._unmoved(engine, batch) - self._still)
        picture: dict[str, Any] = {"levels": float(found.max()), "psnr": min(map(_decibels, found))}
        half = self._model.dtype in HALVES
        picture |= {"at_least_db": LIMIT_DB} if half else {"at_most_levels": LEVELS}
        picture["equal"] = picture["psnr"] >= LIMIT_DB if half else picture["levels"] <= LEVELS
        facts: dict[str, Any] = {"picture": picture, "drag": None}
        if self._gate is not None and self._short is not None:
            seen: list[Update] = []
            code = EngineCode(engine.passes(), kept=False, edits=batch)
            self._short.first(code, seen.append)
            loss, gradient, handles = gate.LIMITS[self._model.dtype]
            limits = {"loss": loss, "gradient": gradient if math.isfinite(gradient) else None, "handles": handles}
            facts["drag"] = {**_finite(self._gate.compare(seen, batch).facts()), "at_most": limits}
        facts["equal"] = all(part["equal"] for part in (facts["picture"], facts["drag"]) if part is not None)
        return facts

    def _unmoved(self, engine: Engine, batch: int = 1) -> np.ndarray:
        """The picture through every pass, not dragged, once for each edit of a batch: float64 [N,H,W,3] in levels."""
        call = calls(engine, self._image, self._drags, self._unmoving, batch)
        return np.stack([np.asarray(result.image, np.float64) for result in call()])


def calls(
    engine: Engine, image: Image.Image | Source, drags: Sequence[Drag], config: DirectDragConfig, batch: int
) -> Call:
    """What is timed: an edit, or so many in one call, each of a picture of its own where it is not prepared."""
    if batch == 1:
        return lambda: [engine.edit(image, drags, config=config)]
    pictures = [image if isinstance(image, Source) else image.copy() for _ in range(batch)]
    return lambda: engine.edit_batch([(picture, drags) for picture in pictures], config=config)


def says(facts: dict[str, Any]) -> str:
    """Why a backend got no time, in words."""
    words = []
    picture, drag = facts["picture"], facts["drag"]
    if not picture["equal"]:
        most = f"{LEVELS} allowed" if "at_most_levels" in picture else f"{LIMIT_DB:g} dB needed"
        off = f"{picture['levels']:g} levels, {picture['psnr']:.1f} dB"
        words.append(f"a picture that nothing moved is off by {off} ({most})")
    if drag is not None and not drag["equal"]:
        most = drag["at_most"]
        for name, of in (("loss", " of the total"), ("gradient", " of its norm"), ("handles", " cells")):
            value = drag[name]
            if most[name] is not None and (value is None or value > most[name]):
                said = "is no number" if value is None else f"off by {value:.2g}{of}"
                words.append(f"its first drag step's {name} {said} ({most[name]:g} allowed)")
        if not drag["updates"]:
            words.append("it made no update")
    return "not equal to eager: " + "; ".join(words)


def _decibels(apart: np.ndarray) -> float:
    square = float(np.mean(apart**2))
    return 200.0 if square == 0 else 10 * math.log10(255.0**2 / square)  # 200: nothing is off


def _finite(facts: dict[str, Any]) -> dict[str, Any]:
    """JSON has no infinities: None in their place."""
    return {
        name: None if isinstance(value, float) and not math.isfinite(value) else value for name, value in facts.items()
    }
