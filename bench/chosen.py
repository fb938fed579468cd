"""What each of `default`'s own settings is worth, on drawn scenes: docs/quality.md's last table.

`python -m ddengine.bench.chosen --measure` edits the scenes and writes bench/results/chosen-cpu.json, about 20 minutes;
without `--measure` it writes the page's table from that file. The scenes are none of training's and none of
`ddengine eval`'s. One value is changed at a time.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ddengine.artifacts import atomic_write
from ddengine.bench.scenes import arrow, held_out, score
from ddengine.bench.timer import machine
from ddengine.config import DirectDragConfig
from ddengine.engine import Engine

ROOT = Path(__file__).resolve().parent.parent
PAGE, RESULT = ROOT / "docs" / "quality.md", ROOT / "bench" / "results" / "chosen-cpu.json"
PLACE = re.compile(r"(<!-- chosen: (\w+) -->\n).*?(\n<!-- end -->)", re.DOTALL)
SCENES, SEED = 24, 40_000_000
OURS = ("latent_warpage_ratio", "warp_reach", "ms_reference", "reach", "readout_weight", "preserve")
TRIED: dict[str, Any] = {"lam": 0.3, "latent_lr": 0.01, "soft_mask_sigma": 24.0}
FIGURES = ("goal_gain", "distance", "psnr_outside")


def rows() -> dict[str, DirectDragConfig]:
    """The configurations by name: `default`, each of its own values as in the paper, values tried, shorter edits."""
    default, paper = DirectDragConfig.preset(), DirectDragConfig.preset("paper")
    changes = {name: getattr(paper, name) for name in OURS} | TRIED
    short = DirectDragConfig.preset("preview")
    fewer = {name: getattr(short, name) for name in ("drag_end_step", "track_per_step")}
    return {
        "default": default,
        **{f"{name}={_said(value)}": default.changed(**{name: value}) for name, value in changes.items()},
        "preview": short,
        "as few updates as preview": default.changed(**fewer),
    }


def measure() -> dict[str, Any]:
    """Every row on every scene, on the embedded model on a CPU."""
    engine, scenes, configs = Engine.load(backend="eager", device="cpu"), held_out(SCENES, SEED), rows()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in configs}
    with tqdm(total=len(scenes) * len(configs), unit="edit") as bar:
        for scene in scenes:
            for name, config in configs.items():
                result = engine.edit(scene.scene.render(engine.model.size), [arrow(scene)], config=config)
                judged = score(scene, result.image)
                found[name].append({figure: round(getattr(judged, figure), 5) for figure in FIGURES})
                bar.update()
    return {"scenes": SCENES, "seed": SEED, "model": engine.model.digest, "machine": machine("cpu"), "rows": {
        name: {"config": config.to_dict(), "edits": found[name]} for name, config in configs.items()}}  # fmt: skip


def means(facts: Mapping[str, Any], name: str) -> tuple[float, ...]:
    """Mean goal gain, distance, and PSNR outside in dB, of a row."""
    edits = facts["rows"][name]["edits"]
    return tuple(statistics.fmean(edit[figure] for edit in edits) for figure in FIGURES)


def table(facts: Mapping[str, Any]) -> str:
    """The rows in Markdown, and on how many scenes a change did better than `default` by goal gain."""
    lines = ["| changed | goal gain | distance | PSNR outside, dB | better on |", "| --- | ---: | ---: | ---: | ---: |"]
    plain = [edit["goal_gain"] for edit in facts["rows"]["default"]["edits"]]
    for name, row in facts["rows"].items():
        gain, far, outside = means(facts, name)
        better = sum(edit["goal_gain"] > mine for edit, mine in zip(row["edits"], plain, strict=True))
        count = "-" if name == "default" else f"{better} of {len(plain)}"
        lines.append(f"| {_cell(name)} | {gain:.2f} | {far:.2f} | {outside:.1f} | {count} |")
    return "\n".join(lines)


def page(words: str, facts: Mapping[str, Any]) -> str:
    """The page with its table as the result has it."""
    return PLACE.sub(lambda match: match[1] + table(facts) + match[3], words)


def _said(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _cell(name: str) -> str:
    return f"`{name}`" if "=" in name or name in ("default", "preview") else name


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measure", action="store_true", help="edit the scenes first")
    if parser.parse_args().measure:
        atomic_write(RESULT, (json.dumps(measure(), indent=1) + "\n").encode())
    known = json.loads(RESULT.read_text(encoding="utf-8"))
    atomic_write(PAGE, page(PAGE.read_text(encoding="utf-8"), known).encode())
