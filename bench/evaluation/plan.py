"""What an evaluation is asked for, and how it tells where it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddengine.bench.evaluation.rows import Row
from ddengine.bench.evaluation.suites import Suite


@dataclass(frozen=True)
class Progress:
    """Where a run is. phase: "edit" or "judge"; done of total rows of samples, the failed ones among them."""

    phase: str
    done: int
    total: int
    failed: int
    at: str = ""


Watch = Callable[[Progress], None]


@dataclass(frozen=True)
class Plan:
    """What to evaluate, with what, where.

    engine: options of `Engine.load`. weights: folders of the judges lpips, clip and dift, as far as there are any.
    jobs: processes, or actors with `ray` (a cluster's address, see `cluster.on_ray`), 0 there for all there is room
    for. seed: of every edit.
    """

    suite: Suite
    rows: tuple[Row, ...]
    folder: Path
    engine: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, Path] = field(default_factory=dict)
    jobs: int = 1
    ray: str | None = None
    seed: int = 0
