"""The scene bench: held-out drags whose right answer is known, so quality is a number and not an impression.

A drag's scene, its goal (the same scene with the part moved) and the embedded model's edit give three figures:

- goal gain = 1 - MSE(edit, goal) / MSE(input, goal) over the pixels that differ between input and goal: 1 is
  the perfect answer, 0 is what doing nothing scores, below 0 is worse than nothing;
- distance from where the part is found in the edit to its target, as a share of the drag's length: 1 for no motion;
- PSNR in dB against the input over all pixels that should not change.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from ddengine.artifacts import atomic_write, check_writable, make_folder, save_picture
from ddengine.config import DirectDragConfig, ablation
from ddengine.drags import Drag
from ddengine.draw import with_arrows
from ddengine.scenes.scene import TrueDrag, true_drag

if TYPE_CHECKING:
    from ddengine.engine import Engine

SIZE = 128
SEED = 30_000_000  # training and the choice of the default settings used other seeds
CHANGED = 12  # levels of 255 by which a pixel must differ between input and goal to count as changed
MARGIN = 6  # pixels around the changed region that belong to neither region
RIM = 2  # pixels around a part that are compared along with it
FLAWLESS = 60.0  # dB that stand for identical pixels, so that a mean exists

Picture = NDArray[np.float32]


@dataclass(frozen=True)
class Score:
    """Figures of one edit; `moved` is the part's name."""

    moved: str
    goal_gain: float
    distance: float
    psnr_outside: float


def held_out(count: int, seed: int = SEED) -> list[TrueDrag]:
    """`count` drags that no training run has seen."""
    return [true_drag(np.random.default_rng((seed, k))) for k in range(count)]


def score(drag: TrueDrag, edited: Image.Image) -> Score:
    """Judge an edited picture (`SIZE` x `SIZE`) against the drag's goal."""
    before, goal, after = (np.asarray(x, np.float32) for x in (drag.scene.render(SIZE), drag.goal.render(SIZE), edited))
    changed = np.abs(before - goal).max(2) > CHANGED
    still = ~_grown(changed, MARGIN)
    gain = 1 - np.square(after - goal)[changed].mean() / np.square(before - goal)[changed].mean()
    error = float(np.square(after - before)[still].mean()) if still.any() else 0.0
    psnr = min(FLAWLESS, 10 * math.log10(255**2 / max(error, 1e-9)))
    return Score(drag.part, float(gain), distance(drag, before, after), psnr)


def distance(drag: TrueDrag, before: Picture, after: Picture) -> float:
    """How far from its target the part lies, over the drag's length.

    The part's own pixels around the handle are looked for in the edit, at every pixel within 1.25 drag lengths of the
    drag's path, by the smallest mean squared difference of colours. No network judges.
    """
    handle, target = (np.array(p) * SIZE - 0.5 for p in (drag.handle, drag.target))
    length = float(np.hypot(*(target - handle)))
    radius = int(np.clip(round(drag.radius * SIZE), 4, 12))
    origin = np.rint(handle).astype(int)
    template = _patch(_padded(before, radius), origin, radius)
    part = _patch(_padded(_part_pixels(drag, before), radius), origin, radius)
    padded = _padded(after, radius)
    ys, xs = np.mgrid[0:SIZE, 0:SIZE]
    near = _near(xs, ys, handle, target, 1.25 * length)
    best, where = math.inf, handle
    for x, y in zip(xs[near], ys[near], strict=True):
        error = float((part * np.square(_patch(padded, (x, y), radius) - template)).sum())
        if error < best:
            best, where = error, np.array((x, y), float)
    return float(np.hypot(*(where - np.rint(target)))) / length


def _part_pixels(drag: TrueDrag, before: Picture) -> Picture:
    """1 where the part is seen in the input, and on a rim around it that holds its outline, [SIZE, SIZE, 1].

    The part is what changes when it is drawn far away. Without the rim, a part of one colour would be found anywhere
    inside a larger one of that colour (a hill's peak in the hill).
    """
    (x0, y0), (x1, y1) = drag.handle, drag.target
    away = 4 * drag.radius / math.hypot(x1 - x0, y1 - y0)
    without = drag.scene.moved(drag.subject, drag.part, away * (x0 - x1), away * (y0 - y1)).render(SIZE)
    seen = np.abs(before - np.asarray(without, np.float32)).max(2) > CHANGED
    return _grown(seen, RIM)[..., None].astype(np.float32)


def _near(xs: NDArray, ys: NDArray, start: NDArray, end: NDArray, reach: float) -> NDArray[np.bool_]:
    along = end - start
    share = np.clip(((xs - start[0]) * along[0] + (ys - start[1]) * along[1]) / (along @ along), 0, 1)
    return np.hypot(xs - start[0] - share * along[0], ys - start[1] - share * along[1]) <= reach


def _padded(picture: Picture, radius: int) -> Picture:
    return np.pad(picture, ((radius, radius), (radius, radius), (0, 0)), mode="edge")


def _patch(padded: Picture, xy: Sequence[int] | NDArray, radius: int) -> Picture:
    """The square patch of `radius` around a pixel (x, y) of the unpadded picture."""
    x, y = xy
    return padded[y : y + 2 * radius + 1, x : x + 2 * radius + 1]


def _grown(region: NDArray[np.bool_], margin: int) -> NDArray[np.bool_]:
    out = region.copy()
    for axis in (0, 1):
        padded = np.pad(out, [(margin, margin) if a == axis else (0, 0) for a in (0, 1)])
        out = np.lib.stride_tricks.sliding_window_view(padded, 2 * margin + 1, axis).any(-1)
    return out


def configurations(rows: bool) -> dict[str, DirectDragConfig]:
    """What the bench compares: the default, the default with every stage off, and with `rows` the ablation on it."""
    table = ablation("default")
    chosen = {"default": table["+SM+RG+LWF"].config, "all stages off": table["baseline"].config}
    if rows:
        chosen |= {"soft mask": table["+SM"].config, "soft mask, readout": table["+SM+RG"].config}
        chosen |= {name: DirectDragConfig.preset(name) for name in ("fast", "preview", "paper")}
    return chosen


def measure(engine: Engine, count: int, folder: Path, *, rows: bool = False, progress: bool = False) -> dict[str, Any]:
    """Edit `count` held-out drags with every configuration; writes scenes.json and contact.png in `folder`."""
    drags, configs = held_out(count), configurations(rows)
    check_writable(make_folder(folder) / "scenes.json")
    scores: dict[str, list[Score]] = {name: [] for name in ("unedited", *configs, "goal")}
    sheet = []
    for drag in tqdm(drags, disable=not progress):
        picture, goal = drag.scene.render(SIZE), drag.goal.render(SIZE)
        arrow = Drag(*((x * SIZE - 0.5, y * SIZE - 0.5) for x, y in (drag.handle, drag.target)))
        edited = {name: engine.edit(picture, [arrow], config=config).image for name, config in configs.items()}
        for name, image in {"unedited": picture, **edited, "goal": goal}.items():
            scores[name].append(score(drag, image))
        sheet.append([with_arrows(picture, [arrow], 2), *(x.resize((256, 256), 2) for x in (goal, *edited.values()))])
    facts = {
        "summary": {name: summary(found) for name, found in scores.items()},
        "configs": {name: config.to_dict() for name, config in configs.items()},
        "model": engine.model.digest,
        "backend": engine.backend.name,
        "edits": {name: [asdict(s) for s in found] for name, found in scores.items()},
    }
    atomic_write(folder / "scenes.json", json.dumps(facts, indent=1).encode())
    save_picture(contact_sheet(sheet), folder / "contact.png")
    return facts


def contact_sheet(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """One line per drag: the input with its arrow, the goal, and each configuration's edit."""
    width, height = rows[0][0].size
    sheet = Image.new("RGB", (width * len(rows[0]), height * len(rows)))
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(image, (x * width, y * height))
    return sheet


def summary(scores: Sequence[Score]) -> dict[str, float]:
    """Means over edits (and the median gain, which single failures do not move)."""
    gains = [s.goal_gain for s in scores]
    return {
        "edits": len(scores),
        "goal_gain": float(np.mean(gains)),
        "goal_gain_median": float(np.median(gains)),
        "distance": float(np.mean([s.distance for s in scores])),
        "psnr_outside": float(np.mean([s.psnr_outside for s in scores])),
    }


def table(summaries: Mapping[str, Mapping[str, float]]) -> str:
    """The summary as a Markdown table."""
    lines = [
        "| configuration | goal gain (mean) | (median) | distance | PSNR outside, dB |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, s in summaries.items():
        numbers = f"{s['goal_gain']:.2f} | {s['goal_gain_median']:.2f} | {s['distance']:.2f} | {s['psnr_outside']:.1f}"
        lines.append(f"| {name} | {numbers} |")
    return "\n".join(lines)
