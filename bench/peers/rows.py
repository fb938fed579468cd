"""A system of the comparison and its row: what it is, what its edits took, and how they compare with this engine's."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ddengine.bench.peers.child import Child
from ddengine.bench.peers.order import DEFAULT, Config

GROUPS = {
    "load": ("load",),
    "invert": ("encode", "invert", "reference"),
    "drag": ("warp", "drag"),
    "denoise": ("denoise", "decode"),
}


@dataclass
class System:
    """What takes part: a name for rows and files, its adapter, and for a peer its checkout and Python."""

    name: str
    adapter: Path
    python: Path = Path(sys.executable)
    checkout: Path | None = None
    config: Config = DEFAULT
    child: Child | None = None
    row: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    nexts: list[dict[str, Any]] = field(default_factory=list)

    @property
    def own(self) -> bool:
        return self.checkout is None


def described(system: System, ours: System) -> dict[str, Any]:
    """A system's row: what it is, what it took, and the ratio of its edits to this engine's of the same round.

    Its stages and updates are those of the edit in the middle, so that they add up to one that was made.
    """
    row: dict[str, Any] = {"system": system.name, "own": system.own, "preset": system.config[0] if system.own else None}
    row["changes"] = system.config[1] if system.own else None
    told = ("name", "source", "python", "versions", "clock", "needs", "published", "settings", "notes", "stand_ins")
    row |= {name: system.row.get(name) for name in (*told, "redirected", "lora")}
    row["error"] = system.row.get("error")
    edits = [edit_ms(sample) for sample in system.samples]
    if not edits:
        return row
    middle = sorted(system.samples, key=edit_ms)[(len(edits) - 1) // 2]
    stages, counts = middle["stages"], middle["counts"]
    grouped = {group: 1e3 * sum(stages.get(name, 0.0) for name in parts) for group, parts in GROUPS.items()}
    if loaded := system.row.get("loaded", {}).get("load"):
        grouped["load"] = 1e3 * loaded  # once a process, not once an edit
    updates = counts.get("updates", 0)
    row |= {
        "edit_ms": spread_of(edits),
        "next_ms": spread_of([edit_ms(sample) for sample in system.nexts]) if system.nexts else None,
        "ms": grouped,
        "stages_ms": {name: 1e3 * seconds for name, seconds in stages.items()},
        "load": "once a process" if loaded else "every edit",
        "updates": updates,
        "update_ms": grouped["drag"] / updates if updates else None,
        "counts": counts,
        "memory_bytes": max((sample["memory_bytes"] or 0) for sample in system.samples) or None,
        "picture": f"{system.name}.png",
    }
    if ours.samples and system is not ours:
        row["ratio"] = spread_of([edit / edit_ms(mine) for edit, mine in zip(edits, ours.samples, strict=False)])
    if ours.nexts and system is not ours:
        row["ratio_next"] = spread_of([edit / edit_ms(mine) for edit, mine in zip(edits, ours.nexts, strict=False)])
    return row


def differences(systems: Sequence[System], folder: Path) -> dict[str, dict[str, float]]:
    """Mean difference, in levels of 255, of this engine's pictures from those of every peer."""
    pictures = {}
    for system in systems:
        path = folder / f"{system.name}.png"
        if system.samples and path.is_file():
            with Image.open(path) as picture:
                pictures[system.name] = np.asarray(picture.convert("RGB"), np.float32)
    return {
        mine.name: {
            peer.name: float(np.abs(pictures[mine.name] - pictures[peer.name]).mean())
            for peer in systems
            if not peer.own and peer.name in pictures and pictures[peer.name].shape == pictures[mine.name].shape
        }
        for mine in systems
        if mine.own and mine.name in pictures
    }


def edit_ms(sample: Mapping[str, Any]) -> float:
    """Milliseconds of an edit without loading weights, which some do once and some in every edit."""
    return 1e3 * float(sample["seconds"] - sample["stages"].get("load", 0.0))


def spread_of(values: Sequence[float]) -> dict[str, Any]:
    """Median, lowest and highest of a few samples, and all of them in the order of the rounds."""
    return {
        "median": float(np.median(values)),
        "low": float(min(values)),
        "high": float(max(values)),
        "samples": len(values),
        "rounds": list(values),
    }


def revision(checkout: Path) -> dict[str, Any]:
    """The commit of a checkout and whether its own Python files differ from it; None where git does not tell."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(checkout), *words], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    top = git("rev-parse", "--show-toplevel")
    if top is None or Path(top).resolve() != checkout.resolve():
        return {"commit": None, "dirty": None}
    return {
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no", "--", "*.py")),
    }
