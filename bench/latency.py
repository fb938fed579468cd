"""Latency of edits as users make them: for each backend and number of points, the first edit of a picture and the next.

What is timed is `Engine.edit`, on a picture and on its `Source`, or `Engine.edit_batch`. Backends take turns, edit by
edit, so that whatever else the machine does falls on each alike. A backend that is not equal to eager gets no time
(bench/latency_gate.py). After every round the file holds all that is known.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from ddengine.artifacts import atomic_write, check_writable, make_folder
from ddengine.bench.clock import Clock
from ddengine.bench.latency_gate import Equality, calls, says
from ddengine.bench.latency_meter import Meter
from ddengine.bench.latency_rows import KINDS, Lane, kept, missing, place_of, provenance, summed
from ddengine.bench.latency_work import Candidate, candidates, drags, picture
from ddengine.bench.limits import Limits, limits_of
from ddengine.bench.timer import machine
from ddengine.config import DirectDragConfig
from ddengine.engine import SMALL_MODEL, Engine
from ddengine.errors import Cancelled, DDEngineError, InputError
from ddengine.models.load import Model
from ddengine.request import spaces_for
from ddengine.torch_state import working


@dataclass(frozen=True)
class Plan:
    """What a run measures, with what: all that tells two runs apart but where and when."""

    model: Model
    config: DirectDragConfig
    points: tuple[int, ...] = (1, 2, 4, 8, 16)
    batch: int = 1
    edits: int = 20
    load_seconds: float | None = None  # of the model, where somebody clocked it

    def facts(self, image: Image.Image) -> dict[str, Any]:
        model = self.model
        return {
            "model": model.name,
            "digest": model.digest,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
            "size": list(spaces_for(image, model.size, self.config).work_size),
            "picture": list(image.size),
            "config": self.config.to_dict(),
            "batch": self.batch,
        }


def run(
    output: Path,
    plan: Plan,
    backends: Sequence[str] = (),
    *,
    build: bool = False,
    resume: bool = False,
    described: Sequence[str] = (),
    progress: bool = False,
) -> dict[str, Any]:
    """Measure and write the rows to `output` as JSON; returns what was written.

    backends: by name, all that run here if none is named. build: what a named one lacks is built, which takes minutes.
    resume: rows that `output` already has, of the same plan, machine, versions and commit, are kept. described: the
    command line's words for the model. A backend that is not equal to eager has no times, see `refuse`. Raises
    InputError.
    """
    image, device = picture(), plan.model.device
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device {device} cannot be timed; use 'cpu' or 'cuda'")
    if not plan.points or plan.edits < 1 or plan.batch < 1:
        raise InputError(f"{plan.points} points, {plan.edits} edits, batch {plan.batch}: there must be one of each")
    if output.parent != Path():
        make_folder(output.parent)
    check_writable(output)
    work = {count: drags(count) for count in dict.fromkeys(plan.points)}
    engines = candidates(plan.model, backends, build=build, described=described)
    with working(device, one_thread=plan.model.size <= SMALL_MODEL):
        facts: dict[str, Any] = {
            "plan": plan.facts(image),
            "clock": Clock(device).name,
            "machine": machine(device),
            "rows": [],
        }
        before = kept(output, facts, plan.edits) if resume else []
        width, height = facts["plan"]["size"]
        meter, limits = Meter(device), limits_of(plan.model, (height, width), plan.config)
        facts["model_load_seconds"], facts["built"] = plan.load_seconds, build
        facts["memory"], facts["energy"] = meter.memory.what, meter.no_energy or "joules counted by the driver"

        def write(rows: Sequence[Mapping[str, Any]]) -> None:
            facts["rows"] = sorted(rows, key=place_of)
            atomic_write(output, (json.dumps(facts, indent=1) + "\n").encode())

        rows = list(before)
        total = sum(missing(rows, name.name, count) for name in engines for count in work) * plan.edits
        with tqdm(total=total * len(KINDS), disable=not progress, unit="edit") as bar:
            for count, arrows in work.items():
                todo = [one for one in engines if missing(rows, one.name, count)]
                rows = [row for row in rows if (row["points"], row["backend"]) not in {(count, o.name) for o in todo}]
                bar.set_description_str(f"{count} point{'s' * (count > 1)}, equality")
                for found in measure(plan, image, arrows, todo, meter, limits, facts["machine"], bar):
                    write([*rows, *found])
                rows = facts["rows"]
    return facts


def refuse(facts: Mapping[str, Any]) -> None:
    """DDEngineError if a backend was not equal to eager, with all that was off, or if none could be timed."""
    rows = facts["rows"]
    failed = [f"{row['backend']} at {row['points']} points is {row['failed']}" for row in rows if "failed" in row]
    if failed:
        raise DDEngineError(f"not timed: {'. '.join(failed)}")
    if not any("ms" in row for row in rows):
        reasons = dict.fromkeys(f"{row['backend']}: {row['skipped']}" for row in rows)
        raise DDEngineError(f"nothing could be timed: {'. '.join(reasons)}")


def measure(
    plan: Plan,
    image: Image.Image,
    arrows: Sequence[Any],
    engines: Sequence[Candidate],
    meter: Meter,
    limits: Limits | str,
    about: Mapping[str, Any],
    bar: Any,
) -> Iterator[list[dict[str, Any]]]:
    """The rows of all backends at one number of points: after equality was looked at, every round, every profile."""
    equality: Equality | None = None
    rows: list[dict[str, Any]] = []
    lanes: list[Lane] = []
    for one in engines:
        common: dict[str, Any] = {"points": len(arrows), "backend": one.name, "batch": plan.batch, "edits": 0}
        common["on"] = provenance(about)
        if one.engine is None:
            rows.append({**common, "skipped": one.skipped})
        else:
            equality = equality or Equality(plan.model, image, arrows, plan.config)
            found = opened(plan, one.engine, image, arrows, equality, common, limits)
            lanes += found if isinstance(found, list) else []
            rows += [lane.row for lane in found] if isinstance(found, list) else [found]
        if not lanes or lanes[-1].row["backend"] != one.name:
            bar.total = max(0, bar.total - plan.edits * len(KINDS))
        bar.refresh()
    yield rows
    for _ in range(plan.edits if lanes else 0):
        for lane in lanes:
            bar.set_description_str(f"{len(arrows)} point{'s' * (len(arrows) > 1)}, {lane.row['backend']}")
            lane.samples.append(meter.take(lane.call))
            bar.update()
        for lane in lanes:
            lane.row |= summed(lane, meter, limits, about)
        yield rows
    for lane in lanes if meter.device.type == "cuda" else ():  # last, since the profile of a large model takes long
        bar.set_description_str(f"{len(arrows)} point{'s' * (len(arrows) > 1)}, {lane.row['backend']}, profile")
        lane.busy = meter.busy(lane.call)
        lane.row |= summed(lane, meter, limits, about)
        yield rows


def opened(
    plan: Plan,
    engine: Engine,
    image: Image.Image,
    arrows: Sequence[Any],
    equality: Equality,
    common: Mapping[str, Any],
    limits: Limits | str,
) -> list[Lane] | dict[str, Any]:
    """The lanes of a backend, warm and found equal to eager; otherwise its one row, which says why it has no times."""
    config, batch, clock = plan.config, plan.batch, Clock(plan.model.device)
    try:
        anew = calls(engine, image, arrows, config, batch)
        began = clock.now()
        (first, *_) = anew()
        warm_up = clock.now() - began
        again = calls(engine, engine.prepare(image, config=config), arrows, config, batch)
        (later, *_) = again()
        verdict = equality.judge(engine, batch)
    except Cancelled:
        raise
    except DDEngineError as error:  # nothing built, no memory, ...: the others go on
        return {**common, "skipped": str(error)}
    if not verdict["equal"]:
        return {**common, "gate": verdict, "failed": says(verdict)}
    lanes = []
    for kind, call, result in zip(KINDS, (anew, again), (first, later), strict=True):
        floors: dict[str, float] = {}
        if isinstance(limits, Limits):
            floors = {"step": limits.step_ms(batch)} if result.history else {}
            # Passes of a batch are the batch's; what an edit of it costs at least is not told by them.
            floors |= {"edit": limits.edit_ms(result.passes)} if batch == 1 else {}
        row = {**common, "edit": kind, "gate": verdict, "ran": result.backend, "passes": result.passes}
        if kind == "first":
            row["warm_up_seconds"] = warm_up  # what no later edit pays: programs opened, packages loaded
        lanes.append(Lane(row, call, floors))
    return lanes
