"""The compiled drag step held to the plain one: step by step from the same states, and over whole edits.

Adam's first update has the size of the learning rate whatever the gradient, so that roundings grow along an edit. Two
runs of it are compared state by state (teacher-forced), and whole edits only by what becomes of them. What rounding
alone does to a whole edit is measured beside it: the plain step again, its network's latent changed in the last bit.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ddengine.artifacts import atomic_write, check_writable, make_folder
from ddengine.backends.compiled import ROUNDING, CompiledPasses
from ddengine.backends.eager import EagerPasses
from ddengine.backends.passes import Size
from ddengine.bench import scenes
from ddengine.bench.timer import Timing, machine, measure
from ddengine.config import DirectDragConfig
from ddengine.directdrag.adam import BETA1
from ddengine.directdrag.drag import PlainUnit, StepShape, Unit
from ddengine.directdrag.edit import Task, edit_batch
from ddengine.directdrag.run import Run
from ddengine.directdrag.step import HANDLES, RAN, Goal, Rules, State
from ddengine.directdrag.unit import CompiledUnit
from ddengine.drags import Drag
from ddengine.engine import Engine
from ddengine.models.load import Model
from ddengine.models.network import Observation
from ddengine.scenes.scene import TrueDrag
from ddengine.store import ArtefactStore

SEED = 31_000_000  # of the drags whose ends are compared; no training, choice of settings or scene bench drew from it
LAST_BIT = 2.0**-23
TERMS = ("drag loss", "background loss", "readout loss", "total loss")
DECISIONS = ("iteration", "updates", "still", "active", "finished", "fresh")


@dataclass(frozen=True)
class Seen:
    """One call of a unit in an edit: what went in and what the plain step made of it; k is None for a look."""

    state: State
    goal: Goal
    k: int | None
    skip: int
    after: State


class Recorder(PlainUnit):
    """The plain step, in the shapes of a compiled one, keeping all that passes through it."""

    fixed = True

    def __init__(self, passes: EagerPasses, rules: Rules) -> None:
        super().__init__(passes, rules)
        self.rules, self.seen = rules, list[Seen]()

    def step(self, state: State, goal: Goal, k: int, skip: int, run: Run) -> State:
        after = super().step(state, goal, k, skip, run)
        self.seen.append(Seen(state, goal, k, skip, after))
        return after

    def look(self, state: State, goal: Goal, run: Run) -> State:
        after = super().look(state, goal, run)
        self.seen.append(Seen(state, goal, None, 0, after))
        return after


def recorded(passes: EagerPasses, task: Task, config: DirectDragConfig) -> tuple[Recorder, StepShape]:
    """An edit by the plain step, every state of it kept, and the shape that another unit has to be opened for.

    Its goals forgive the rounding that a compiled network is allowed, as a compiled edit's do.
    """
    passes.rounding = ROUNDING[passes.dtype]
    made: list[tuple[Recorder, StepShape]] = []

    def unit(given: Any, rules: Rules, shape: StepShape) -> Unit:
        made.append((Recorder(given, rules), shape))
        return made[0][0]

    edit_batch(passes, [task], config, unit=unit)
    return made[0]


def differences(found: State, seen: Seen) -> dict[str, float]:
    """How far a unit's state lies from the plain one after the same call.

    Losses: of each term, relative to it. gradient: recovered from Adam's first moment, the largest difference as a
    share of the largest element, the RMS as a share of the RMS, and 1 - cosine. first, second moment: RMS shares.
    latent: the largest difference, and the share of elements that differ by more than a hundredth of the learning rate.
    points: feature cells. decisions: counters and flags that differ. noise, after a look: RMS share.
    """
    wanted, before = seen.after, seen.state
    out = {
        "points": _largest(found.handles_yx, wanted.handles_yx),
        "decisions": float(sum(int((_of(found, n) != _of(wanted, n)).sum()) for n in DECISIONS)),
    }
    if seen.k is None:
        return out | {"noise": _rms(found.noise, wanted.noise)}
    row, other = found.history[seen.k], wanted.history[seen.k]
    if bool(other[:, RAN].any()):
        out |= {name: _relative(row[:, i], other[:, i]) for i, name in enumerate(TERMS)}
        out["points"] = max(out["points"], _largest(row[:, HANDLES:], other[:, HANDLES:]))
    if bool((wanted.updates > before.updates).any()):
        gradient, plain = ((s.first.double() - BETA1 * before.first.double()) / (1 - BETA1) for s in (found, wanted))
        out |= {
            "gradient, largest": _largest(gradient, plain) / float(plain.abs().max()),
            "gradient, RMS": _rms(gradient, plain),
            "gradient, 1 - cosine": 1 - float(torch.cosine_similarity(gradient.flatten(), plain.flatten(), dim=0)),
            "first moment": _rms(found.first, wanted.first),
            "second moment": _rms(found.second, wanted.second),
            "latent": _largest(found.latent, wanted.latent),
            "latent, share apart": float(
                ((found.latent - wanted.latent).abs() > 0.01 * float(seen.goal.corrections[-1, 0])).double().mean()
            ),
        }
    return out


def worst(found: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Largest and median of every quantity over all calls, and the number of calls that have it."""
    names = list(dict.fromkeys(name for row in found for name in row))
    table = {}
    for name in names:
        values = [row[name] for row in found if name in row]
        table[name] = {"worst": max(values), "median": statistics.median(values), "calls": len(values)}
    return table


def compare(unit: Unit, seen: Sequence[Seen], device: torch.device) -> dict[str, dict[str, float]]:
    """`worst` of a unit's differences, called from every recorded state."""
    run, found = Run(device), []
    for call in seen:
        if call.k is None:
            after = unit.look(call.state, call.goal, run)
        else:
            after = unit.step(call.state, call.goal, call.k, call.skip, run)
        found.append(differences(after, call))
    return worst(found)


def units(model: Model, rules: Rules, shape: StepShape, store: ArtefactStore) -> tuple[dict[str, Unit], float]:
    """The units to compare, by name, compiled where the store lacks them; and the seconds until they were loaded."""
    found: dict[str, Unit] = {"eager, again": PlainUnit(EagerPasses(model), rules)}
    started = time.perf_counter()
    for name, graphed in (("compiled", False), ("replayed", True)):
        stand_in = repeated if graphed and model.device.type == "cpu" else None
        passes = CompiledPasses(model, store=store, building=True, capture=stand_in)
        passes.packaged = graphed
        unit = found[name] = CompiledUnit(passes, rules)
        unit.open(shape, make=True)
    return found, (time.perf_counter() - started) / 2


def repeated(body: Callable[[], None]) -> Callable[[], None]:
    """What stands for a CUDA graph on a CPU: the same buffers, filled by the same body."""
    body()
    return body


class NudgedPasses(EagerPasses):
    """The plain passes whose drag step sees its latent with the last bit changed, up or down at random."""

    def supervise(self, latent: Tensor, timestep: int | Tensor, *, readout_hw: Size | None = None) -> Observation:
        generator = torch.Generator().manual_seed(0)
        up = torch.randint(-1, 2, latent.shape, generator=generator).to(latent)
        return super().supervise(latent * (1 + LAST_BIT * up), timestep, readout_hw=readout_hw)


@dataclass(frozen=True)
class End:
    """What two whole edits of one drag come to: distances of the final points and of the pictures, and both scores.

    points: the largest distance in pixels; image: mean absolute difference in levels of 255; psnr in dB, `FLAWLESS` of
    the scene bench for equal pictures. updates: latent updates of either edit. changed: MSE that the plain edit itself
    made, in levels squared, to compare `image` with.
    """

    moved: str
    points: float
    image: float
    psnr: float
    gain: float
    plain_gain: float
    updates: tuple[int, int]


def end(drag: TrueDrag, found: Any, plain: Any) -> End:
    """`found` and `plain`: results of two edits of the same drag."""
    one, other = (np.asarray(result.image, np.float64) for result in (found, plain))
    apart = float(np.square(one - other).mean())
    return End(
        drag.part,
        max(math.dist(a, b) for a, b in zip(found.handles, plain.handles, strict=True)),
        float(np.abs(one - other).mean()),
        min(scenes.FLAWLESS, 10 * math.log10(255**2 / max(apart, 1e-9))),
        scenes.score(drag, found.image).goal_gain,
        scenes.score(drag, plain.image).goal_gain,
        (len(found.history), len(plain.history)),
    )


def engine_of(passes: EagerPasses) -> Engine:
    """An engine that edits with given passes."""
    engine = Engine(passes.model, "eager")
    engine._passes[passes.model.digest] = ("", passes)
    return engine


def ends(
    engines: Mapping[str, Engine], plain: Engine, count: int, config: DirectDragConfig, *, progress: bool = False
) -> dict[str, list[End]]:
    """Whole edits of `count` drags drawn from `SEED`: each engine's against the plain engine's."""
    found: dict[str, list[End]] = {name: [] for name in engines}
    for drag in tqdm(scenes.held_out(count, SEED), disable=not progress):
        picture, arrow = task_of(drag)
        wanted = plain.edit(picture, [arrow], config=config)
        for name, engine in engines.items():
            found[name].append(end(drag, engine.edit(picture, [arrow], config=config), wanted))
    return found


def task_of(drag: TrueDrag) -> tuple[Image.Image, Drag]:
    """A drawn drag as a user would give it."""
    handle, target = ((x * scenes.SIZE - 0.5, y * scenes.SIZE - 0.5) for x, y in (drag.handle, drag.target))
    return drag.scene.render(scenes.SIZE), Drag(handle, target)


def summary(found: Sequence[End]) -> dict[str, float]:
    """What whole edits come to, over all drags."""
    points, gains = [e.points for e in found], [e.gain - e.plain_gain for e in found]
    return {
        "edits": len(found),
        "points, median px": statistics.median(points),
        "points, largest px": max(points),
        "points within 1 px": sum(p <= 1 for p in points),
        "image, mean levels": statistics.fmean(e.image for e in found),
        "image, largest levels": max(e.image for e in found),
        "psnr, median dB": statistics.median(e.psnr for e in found),
        "psnr, least dB": min(e.psnr for e in found),
        "goal gain": statistics.fmean(e.gain for e in found),
        "goal gain, plain": statistics.fmean(e.plain_gain for e in found),
        "goal gain, mean difference": statistics.fmean(gains),
        "goal gain, standard error": statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else 0.0,
        "same number of updates": sum(e.updates[0] == e.updates[1] for e in found),
    }


def run(
    model: Model,
    output: Path,
    *,
    count: int,
    config: DirectDragConfig,
    store: ArtefactStore,
    progress: bool = False,
) -> dict[str, Any]:
    """Both comparisons and the units' speed, on the model's device, written as JSON; returns what was written.

    The first of the drawn drags is the one whose states are compared; `count` whole edits follow.
    """
    check_writable(make_folder(output.parent) / output.name)
    passes = EagerPasses(model)
    plain = engine_of(passes)
    recorder, shape = recorded(passes, drawn_task(plain, config), config)
    found, loading = units(model, recorder.rules, shape, store)
    tables = {name: compare(unit, recorder.seen, model.device) for name, unit in found.items()}
    compiled = CompiledPasses(model, store=store, building=True)
    engines = {"compiled": engine_of(compiled), "eager, last bit changed": engine_of(NudgedPasses(model))}
    edits = ends(engines, plain, count, config, progress=progress) if count else {}
    facts = {
        "machine": machine(model.device),
        "model": model.digest,
        "dtype": str(model.dtype).removeprefix("torch."),
        "config": config.to_dict(),
        "seed": SEED,
        "steps": {"calls": len(recorder.seen), "units": tables},
        "speed": {name: asdict(timing) for name, timing in speed(found, recorder.seen, model.device).items()},
        "load_seconds": loading,
        "summary": {name: summary(rows) for name, rows in edits.items()},
        "edits": {name: [asdict(row) for row in rows] for name, rows in edits.items()},
    }
    atomic_write(output, json.dumps(facts, indent=1).encode())
    return facts


def drawn_task(engine: Engine, config: DirectDragConfig, number: int = 0) -> Task:
    """One of the drawn drags, prepared."""
    from ddengine.directdrag.points import points_for

    picture, arrow = task_of(scenes.held_out(number + 1, SEED)[number])
    source = engine.prepare(picture, config=config)
    return Task(source.prepared, *points_for(config, [arrow], source.spaces))


def speed(found: Mapping[str, Unit], seen: Sequence[Seen], device: torch.device) -> dict[str, Timing]:
    """Seconds of one drag step that moves the latent but does not track, in turns."""
    period = {int(call.state.iteration) for call in seen if call.k is not None}
    call = next(c for c in seen if c.k is not None and c.k % 3 == min(1, len(period) - 1))
    run = Run(device)

    def once(unit: Unit) -> Callable[[], object]:
        assert call.k is not None
        number = call.k
        return lambda: unit.step(call.state, call.goal, number, call.skip, run)

    return measure({name: once(unit) for name, unit in found.items()}, device, seconds=10.0, fewest=5)


def text(facts: Mapping[str, Any]) -> str:
    """Both comparisons as Markdown tables."""
    tables = facts["steps"]["units"]
    lines = [f"| worst of {facts['steps']['calls']} calls | {' | '.join(tables)} |", "| --- |" + " --- |" * len(tables)]
    names = dict.fromkeys(name for table in tables.values() for name in table)
    shown = {name: " | ".join(f"{table[name]['worst']:.1e}" for table in tables.values()) for name in names}
    lines += [f"| {name} | {values} |" for name, values in shown.items()]
    if facts["summary"]:
        rows = facts["summary"]
        lines += ["", f"| whole edits against the plain step | {' | '.join(rows)} |", "| --- |" + " --- |" * len(rows)]
        for name in next(iter(rows.values())):
            lines.append(f"| {name} | " + " | ".join(f"{row[name]:.3g}" for row in rows.values()) + " |")
    times = ", ".join(f"{name} {1e3 * timing['median']:.3g} ms" for name, timing in facts["speed"].items())
    return "\n".join([*lines, "", f"A drag step: {times}; packages loaded in {facts['load_seconds']:.2g} s."])


def _of(state: State, name: str) -> Tensor:
    value: Tensor = getattr(state, name)
    return value


def _largest(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).abs().max())


def _relative(found: Tensor, wanted: Tensor) -> float:
    """The largest |a - b| / |b|; 0 where both are 0."""
    apart = (found.double() - wanted.double()).abs()
    return float(torch.where(apart == 0, 0, apart / wanted.double().abs()).max())


def _rms(found: Tensor, wanted: Tensor) -> float:
    """The RMS of the difference over the RMS of the plain one; 0 where both are 0."""
    apart = float((found.double() - wanted.double()).norm())
    return apart / float(wanted.double().norm()) if apart else 0.0
