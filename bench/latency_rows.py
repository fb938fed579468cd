"""The rows of a latency run: what their samples come to, where they come from, and which an earlier run left."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddengine.bench.latency_meter import Call, Meter, Sample
from ddengine.bench.latency_work import BACKENDS
from ddengine.bench.limits import Limits, shares
from ddengine.bench.timer import driver, summary
from ddengine.errors import InputError

KINDS = ("first", "next")  # an edit of a picture, and one of a picture that was prepared before
# Of bench/timer.py's account of the machine, what every row carries beside the device's name.
PROVENANCE = (
    *("driver", "clocks_mhz", "threads", "torch", "triton", "tensorrt", "onnxruntime", "python"),
    *("commit", "dirty"),
)


@dataclass
class Lane:
    """One kind of edit by one backend at one number of points: what is called, and what came of it so far.

    floors: ms that an edit and a drag step take at least, where somebody knows. busy: seconds of a call on the device.
    """

    row: dict[str, Any]
    call: Call
    floors: dict[str, float]
    busy: float | None = None
    samples: list[Sample] = field(default_factory=list)


def summed(lane: Lane, meter: Meter, limits: Limits | str, about: Mapping[str, Any]) -> dict[str, Any]:
    """A lane's samples as percentiles: ms an edit, a point and a drag step, by stage, and what else was measured."""
    taken, edits, clock = lane.samples, lane.row["batch"], meter.clock.name
    points = lane.row["points"]

    def ms(values: Sequence[float]) -> dict[str, float]:
        found = summary([1e3 * value for value in values], clock)
        return {"p20": found.p20, "p50": found.median, "p80": found.p80}

    each = [sample.seconds / edits for sample in taken]
    steps = [s.stages["drag"] / sum(s.updates) for s in taken if sum(s.updates)]
    facts: dict[str, Any] = {
        "edits": len(taken),
        "ms": {
            "edit": ms(each),
            "point": ms([value / points for value in each]),
            "step": ms(steps) if steps else None,
            "wall": ms([sample.wall / edits for sample in taken]),
        },
        "stages": {stage: ms([s.stages[stage] / edits for s in taken]) for stage in taken[0].stages},
        "updates": {"least": min(min(s.updates) for s in taken), "most": max(max(s.updates) for s in taken)},
        "gap": None,
        "memory_bytes": max((s.peak_bytes for s in taken if s.peak_bytes is not None), default=None),
        "joules": None,
        "load": None,
    }
    if lane.busy is not None:
        facts["gap"] = ms([max(0.0, s.wall - lane.busy) / edits for s in taken])
    if all(s.joules is not None for s in taken):
        found = summary([(s.joules or 0.0) / edits for s in taken], "")
        facts["joules"] = {"p20": found.p20, "p50": found.median, "p80": found.p80}
    if loads := [s.load for s in taken if s.load is not None]:
        facts["load"] = [round(min(loads), 1), round(max(loads), 1)]
    facts["limit"] = shares(limits, {name: facts["ms"][name]["p50"] for name in lane.floors}, lane.floors)
    facts["on"] = provenance({**about, **driver(meter.device)})
    return facts


def provenance(about: Mapping[str, Any]) -> dict[str, Any]:
    """What every row says of where it comes from."""
    where = about["gpu"]["name"] if "gpu" in about else about["processor"]
    return {"device": where, **{name: about[name] for name in PROVENANCE}}


def place_of(row: Mapping[str, Any]) -> tuple[int, int, int]:
    """Where a row stands: by points, backend and kind."""
    return row["points"], BACKENDS.index(row["backend"]), KINDS.index(row.get("edit", "first"))


def missing(rows: Sequence[Mapping[str, Any]], backend: str, points: int) -> bool:
    """Whether a backend has no row at a number of points."""
    return not any((row["backend"], row["points"]) == (backend, points) for row in rows)


def kept(output: Path, facts: Mapping[str, Any], edits: int) -> list[dict[str, Any]]:
    """Finished rows of an earlier run; InputError if its plan, clock, machine, versions or commit were others.

    facts: of the run that goes on. Times of two machines, or of two codes, are no rows of one table.
    """
    if not output.exists():
        return []
    now = {"clock": facts["clock"], **facts["plan"], **_lasting(provenance(facts["machine"]))}
    try:
        before = json.loads(output.read_text(encoding="utf-8"))
        rows = before["rows"]
        places = [provenance(before["machine"]), *(row["on"] for row in rows)]
        had = [{"clock": before["clock"], **before["plan"], **_lasting(place)} for place in places]
        short = {(row["backend"], row["points"]) for row in rows if "ms" not in row or row["edits"] < edits}
        for row in rows:
            place_of(row)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"cannot resume from {output}: it is no latency run; name another file with -o") from error
    if other := [name for name in now if any(row.get(name) != now[name] for row in had)]:
        raise InputError(f"cannot resume from {output}: its {', '.join(other)} differ; name another file with -o")
    return [row for row in rows if (row["backend"], row["points"]) not in short]


def _lasting(on: Mapping[str, Any]) -> dict[str, Any]:
    """Where a row comes from, without what changes from minute to minute; its device is the machine's."""
    return {"machine" if name == "device" else name: value for name, value in on.items() if name != "clocks_mhz"}
