"""Where the time goes: one edit in the published structure, then with one saving more a bar, up to this engine.

Every bar is the same edit of the same picture with the same number of updates, run in one process, the bars in turns.
The bars up to `kernels` are the published structure with savings made (bench/published.py), the later ones the engine.
A bar gets a time only if its first drag step equals the engine's eager one (bench/gate.py).
"""

from __future__ import annotations

import copy
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ddengine.artifacts import atomic_write, check_writable, make_folder
from ddengine.backends.compiled import CompiledPasses
from ddengine.backends.eager import EagerPasses
from ddengine.bench.account import Account
from ddengine.bench.clock import Clock
from ddengine.bench.devices import Device, named
from ddengine.bench.engine_code import EngineCode
from ddengine.bench.gate import Gate
from ddengine.bench.latency_work import ENDLESS, shortened
from ddengine.bench.published import SETTINGS, Outcome, PublishedCode, Update
from ddengine.bench.roofline import floor, floor_ms
from ddengine.bench.savings import Structure
from ddengine.bench.shapes import sd15
from ddengine.bench.timer import machine, summary
from ddengine.config import DirectDragConfig
from ddengine.demo import examples
from ddengine.directdrag.points import points_for
from ddengine.directdrag.prepare import prepare
from ddengine.errors import BackendUnavailable, DDEngineError, InputError
from ddengine.image import resize, to_tensor
from ddengine.models.cache import cache_dir
from ddengine.models.load import Model, load_model
from ddengine.request import spaces_for
from ddengine.store import ArtefactStore
from ddengine.torch_state import working

SHAPES = ("embedded", "sd15")
DOCS = {
    "published": "the published structure",
    "frozen": "weights are frozen: the only gradient is the latent's",
    "cast": "weights are cast to half precision once, and inversion and reference run in it too",
    "native": "features stay on the device at their own resolution; the readout reads before it enlarges",
    "folded": "keys and values of the prompt and terms of the times are constants",
    "kernels": "warp, mask, patches and tracking by this engine's operators",
    "compile": "the engine: one compiled package a drag step, on CUDA one a pass",
    "graph": "packages are replayed as CUDA graphs",
    "reference": "the unedited picture is walked once, its keys and values kept for this and later edits",
    "batch": "edits in one batch",
}


class Code(Protocol):
    """What a bar runs."""

    def edit(
        self,
        image: Tensor,
        handles_yx: Tensor,
        targets_yx: Tensor,
        config: DirectDragConfig,
        *,
        watch: Callable[[Update], None] | None = None,
    ) -> Outcome: ...


@dataclass(frozen=True)
class Work:
    """One edit: a picture [1,3,H,W] in −1..1 on the device, points [n,2] on its feature grid, settings."""

    image: Tensor
    handles_yx: Tensor
    targets_yx: Tensor
    config: DirectDragConfig

    def first(self, code: Code, watch: Callable[[Update], None] | None = None) -> Outcome:
        return code.edit(self.image, self.handles_yx, self.targets_yx, self.config, watch=watch)

    def next(self, code: EngineCode) -> Outcome:
        return code.edit_next(self.handles_yx, self.targets_yx, self.config)

    @property
    def updates(self) -> int:
        config = self.config
        return config.drag_end_step * config.track_per_step * config.max_drag_per_track


@dataclass(frozen=True)
class Bar:
    """One bar: its name, which savings it makes, what it runs, or why it does not."""

    name: str
    structure: Structure
    code: PublishedCode | EngineCode | None
    skipped: str = ""

    @property
    def edits(self) -> int:
        return self.code.edits if isinstance(self.code, EngineCode) else 1

    @property
    def kept(self) -> bool:
        return isinstance(self.code, EngineCode) and self.code.kept


def settings(config: DirectDragConfig | None = None, updates: int | None = None) -> DirectDragConfig:
    """A configuration as the published structure can run it, whole length or about so many updates an edit."""
    return shortened((config or DirectDragConfig.preset()).changed(**SETTINGS, **ENDLESS), updates)


def make_work(model: Model, config: DirectDragConfig) -> Work:
    """The first bundled example at the model's working size."""
    example = examples()[0]
    spaces = spaces_for(example.picture, model.size, config)
    image = resize(to_tensor(example.picture), spaces.work_size).to(model.device)
    return Work(image, *points_for(config, example.drags, spaces), config)


def make_models(shape: str, device: torch.device, half: torch.dtype | None) -> tuple[Model, Model]:
    """A float32 model and what the engine computes with: the same in half precision, or itself."""
    if shape == "embedded":
        whole = load_model("embedded", device=device, dtype=torch.float32)
    else:
        torch.manual_seed(0)
        whole = sd15(device, torch.float32)
    return whole, whole if half is None else in_half(whole, half)


def in_half(model: Model, half: torch.dtype) -> Model:
    """A copy in half precision; as in `load_model`, bfloat16 leaves the autoencoder in float32."""

    def cast(module: Any, dtype: torch.dtype = half) -> Any:
        return None if module is None else nn.Module.to(copy.deepcopy(module), dtype)

    vae = cast(model.vae, torch.float32 if half == torch.bfloat16 else half)
    parts = {"unet": cast(model.unet), "readout": cast(model.readout), "vae": vae}
    return replace(model, **parts, empty_context=model.empty_context.to(half))


def make_bars(whole: Model, engine: Model, work: Work, *, compile: bool, batch: int) -> list[Bar]:
    """All bars in order; each makes the savings of those before it."""
    half = None if engine is whole else engine.dtype
    structure = Structure()
    bars = []
    savings: dict[str, dict[str, bool]] = {
        "published": {},
        "frozen": {"frozen": True},
        "cast": {"cast_once": True, "half": True},
        "native": {"on_device": True, "targets_once": True, "native_readout": True},
        "folded": {"constant_cross": True, "time_table": True},
        "kernels": {},
    }
    for name, made in savings.items():
        structure = replace(structure, **made)
        if name == "cast" and half is None:
            bars.append(Bar(name, structure, None, "the engine computes in float32: nothing is cast"))
            continue
        model = engine if structure.cast_once else whole
        bars.append(Bar(name, structure, PublishedCode(model, structure, half=half, kernels=name == "kernels")))

    own = replace(structure, reuses_noise=not work.config.track_lag)
    kept = replace(own, shared_reference=True)
    skipped = {"compile": "not asked for: --compile", "graph": "not asked for: --compile"}
    packaged: dict[str, EagerPasses] = {}
    if compile:
        packaged, skipped = compiled_passes(engine, replace(work, config=work.config.changed(drag_end_step=1)))
    bars += [
        Bar(name, own, EngineCode(packaged[name], kept=False) if name in packaged else None, skipped.get(name, ""))
        for name in ("compile", "graph")
    ]
    best = packaged.get("graph", packaged.get("compile", EagerPasses(engine)))
    bars.append(Bar("reference", kept, EngineCode(best, kept=True)))
    bars.append(Bar("batch", kept, EngineCode(best, kept=True, edits=batch)))
    return bars


def compiled_passes(model: Model, work: Work) -> tuple[dict[str, EagerPasses], dict[str, str]]:
    """Passes with packages, made where they are missing: plain and, on CUDA, replayed as graphs; else why not."""
    store, cuda = ArtefactStore(cache_dir()), model.device.type == "cuda"
    made: dict[str, EagerPasses] = {}
    try:
        capture = _run_as_it_is if cuda else None
        plain = CompiledPasses(model, store=store, building=True, capture=capture)
        work.first(EngineCode(plain, kept=False))  # builds; the graphs find the packages there
        made["compile"] = plain
        if not cuda:
            return made, {"graph": "graphs are CUDA's"}
        made["graph"] = CompiledPasses(model, store=store, building=True)
    except BackendUnavailable as error:
        return made, {name: str(error) for name in ("compile", "graph") if name not in made}
    return made, {}


def _run_as_it_is(body: Callable[[], None]) -> Callable[[], None]:
    """In place of a CUDA graph's capture."""
    return body


def run(
    output: Path,
    *,
    shape: str = "embedded",
    device: torch.device | str = "cpu",
    half: torch.dtype | None = None,
    config: DirectDragConfig | None = None,
    updates: int | None = None,
    compile: bool = False,
    batch: int = 4,
    rounds: int = 5,
    progress: bool = False,
) -> dict[str, Any]:
    """Measure all bars and write them to `output` as JSON.

    half: what the engine computes in; None is float32. updates: about so many an edit, for a shorter run. rounds:
    samples of each bar. Raises InputError, and DDEngineError after writing if a bar is not equal (it has no times).
    """
    device = torch.device(device)
    if shape not in SHAPES:
        raise InputError(f"shape {shape!r} is unknown; use one of {', '.join(SHAPES)}")
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device {device} cannot be timed; use 'cpu' or 'cuda'")
    if output.parent != Path():
        make_folder(output.parent)
    check_writable(output)
    with working(device, one_thread=shape == "embedded"):
        whole, engine = make_models(shape, device, half)
        work = make_work(engine, settings(config, updates))
        bars = make_bars(whole, engine, work, compile=compile, batch=batch)
        facts: dict[str, Any] = {
            "machine": machine(device),
            "device": str(device),
            "shape": shape,
            "size": list(work.image.shape[-2:]),
            "dtype": str(engine.dtype).removeprefix("torch."),
            "updates": work.updates,
            "config": work.config.to_dict(),
            "batch": batch,
            "load": [],
        }
        gpu = named(torch.cuda.get_device_name(device)) if device.type == "cuda" and shape == "sd15" else None
        facts["floor"] = None if gpu is None else floors(work, gpu)
        for facts["bars"] in measure(engine, work, bars, rounds, progress=progress):
            facts["load"] += [round(os.getloadavg()[0], 1)] if hasattr(os, "getloadavg") else []
            # After every round: what was measured stays, whatever ends the run.
            atomic_write(output, (json.dumps(facts, indent=1) + "\n").encode())
    if unequal := [row["name"] for row in facts["bars"] if row.get("gate") and not row["gate"]["equal"]]:
        raise DDEngineError(f"not equal to the eager engine: {', '.join(unequal)}; {output} has the differences")
    return facts


def measure(
    engine: Model, work: Work, bars: Sequence[Bar], rounds: int, *, progress: bool = False
) -> Iterator[list[dict[str, Any]]]:
    """The rows of all bars: after equality was looked at, and after every round of edits in turns."""
    short = replace(work, config=work.config.changed(drag_end_step=1))
    rows = {bar.name: described(bar) for bar in bars}
    gate = make_gate(engine, short)
    for bar in tqdm(bars, disable=not progress, desc="equality"):
        if bar.code is not None:
            rows[bar.name] |= examine(bar.code, short, gate)
    yield list(rows.values())
    running = [bar for bar in bars if rows[bar.name].get("gate", {}).get("equal")]
    samples: dict[str, list[Sample]] = {bar.name: [] for bar in running}
    for _ in tqdm(range(rounds), disable=not progress, desc="rounds"):
        ends = {}
        for bar in running:
            sample, ends[bar.name] = take(bar, work)
            samples[bar.name].append(sample)
        for bar in running:
            rows[bar.name] |= summed(samples[bar.name], samples.get("published", []), Clock(work.image.device).name)
            rows[bar.name] |= drift(ends[bar.name], ends.get("reference"))
        yield list(rows.values())


def described(bar: Bar) -> dict[str, Any]:
    """What a bar is, before anything is known of it."""
    made = [name for name, is_made in asdict(bar.structure).items() if is_made]
    facts = {"name": bar.name, "doc": DOCS[bar.name], "edits": bar.edits, "kept": bar.kept, "savings": made}
    return facts | ({"skipped": bar.skipped} if bar.code is None else {})


def make_gate(engine: Model, short: Work) -> Gate:
    """The eager engine's first drag step."""
    passes = EagerPasses(engine)
    seen: list[Update] = []
    short.first(EngineCode(passes, kept=False), seen.append)
    prepared = prepare(passes, short.image, short.config, kv_budget=0)
    return Gate(passes, prepared, short.handles_yx, short.targets_yx, short.config, seen)


def examine(code: PublishedCode | EngineCode, short: Work, gate: Gate) -> dict[str, Any]:
    """Equality of a code's first drag step; on CUDA also its memory and how long its host keeps the device waiting."""
    device, seen = short.image.device, list[Update]()
    try:
        short.first(code, seen.append)
    except BackendUnavailable as error:  # nothing could be compiled for so many edits at once
        return {"skipped": str(error)}
    facts: dict[str, Any] = {"gate": gate.compare(seen, code.edits if isinstance(code, EngineCode) else 1).facts()}
    if device.type != "cuda" or not facts["gate"]["equal"]:
        return facts
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    started = time.perf_counter()
    short.first(code)
    torch.cuda.synchronize(device)
    wall = time.perf_counter() - started
    # An upper bound: the weights in the other precision and what other bars keep are there too.
    facts["peak_bytes"] = torch.cuda.max_memory_allocated(device)
    facts["host_gap"] = max(0.0, 1 - device_seconds(lambda: short.first(code)) / wall)
    return facts


def device_seconds(call: Callable[[], object]) -> float:
    """How long a call keeps the CUDA device busy: the union of what its profile shows there."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in found.events() or ()
        if event.device_type.name == "CUDA" and not getattr(event, "is_user_annotation", False)
    ]
    return union(spans) * 1e-6


def union(spans: Iterable[tuple[float, float]]) -> float:
    """The length of some intervals together, overlaps counted once."""
    total, end = 0.0, -math.inf
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total


@dataclass(frozen=True)
class Sample:
    """Seconds of one round: a first edit, the next one of the same picture, an update; edits of a batch each.

    host: the first and the next by the host's clock.
    """

    first: float
    next: float
    step: float
    host: tuple[float, float]
    stages: Mapping[str, float]


def take(bar: Bar, work: Work) -> tuple[Sample, Outcome]:
    """One first edit and, where it kept anything, the next; elsewhere the next is another first."""
    code = bar.code
    assert code is not None
    clock = Clock(work.image.device)
    first = _timed(lambda: work.first(code), clock)
    later = first
    if isinstance(code, EngineCode) and code.kept:
        engine = code
        later = _timed(lambda: work.next(engine), clock)
    step = (first.outcome.dragging + later.outcome.dragging) / (2 * work.updates)
    first_s, next_s, step_s, *host = (
        value / bar.edits for value in (first.seconds, later.seconds, step, first.host, later.host)
    )
    return Sample(first_s, next_s, step_s, (host[0], host[1]), first.outcome.seconds), first.outcome


class _Timed(NamedTuple):
    seconds: float
    host: float
    outcome: Outcome


def _timed(call: Callable[[], Outcome], clock: Clock) -> _Timed:
    started, host = clock.now(), time.perf_counter()
    outcome = call()
    return _Timed(clock.now() - started, time.perf_counter() - host, outcome)


def summed(samples: Sequence[Sample], against: Sequence[Sample], clock: str) -> dict[str, Any]:
    """Medians and percentiles in seconds, and how many times as fast as `against`, round by round."""
    facts: dict[str, Any] = {"ratio": {}}
    for name in ("first", "next", "step"):
        values = [getattr(sample, name) for sample in samples]
        facts[name] = asdict(summary(values, clock))
        pairs = [getattr(other, name) / value for value, other in zip(values, against, strict=False)]
        if pairs:
            found = summary(pairs, "")
            facts["ratio"][name] = {"median": found.median, "p20": found.p20, "p80": found.p80}
    hosts = ([one.host[place] for one in samples] for place in (0, 1))
    facts["host"] = dict(zip(("first", "next"), (summary(values, "").median for values in hosts), strict=True))
    stages = samples[0].stages
    facts["stages"] = {stage: summary([one.stages[stage] for one in samples], "").median for stage in stages}
    return facts


def drift(outcome: Outcome, end: Outcome | None) -> dict[str, Any]:
    """Where a whole edit ended, and how far from the engine's: for information, since trajectories fork."""
    facts: dict[str, Any] = {"handles": outcome.handles_yx.tolist()}
    if end is not None:
        facts["latent_apart"] = float((outcome.latent - end.latent).abs().mean() / end.latent.abs().mean())
    return facts


def floors(work: Work, gpu: Device) -> dict[str, Any]:
    """The least milliseconds that the engine's step and edits could take on a GPU, at the sd15 shape."""
    height, width = work.image.shape[-2:]
    account = Account(sd15(), (height, width), work.config)
    return {
        "gpu": gpu.name,
        "step": floor(account.cost("supervise") + account.cost("backward"), gpu).ms,
        "first": floor_ms(account.edit(), gpu),
        "next": floor_ms(account.edit(prepared=True), gpu),
    }
