"""The timer that every bench shares: CUDA events on a cold cache, launched or replayed from a graph; a CPU's clock.

What is compared takes turns, call by call, so that whatever else the machine does falls on each alike.
"""

from __future__ import annotations

import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddengine.bench.devices import named
from ddengine.bench.nvml import Nvml
from ddengine.errors import BackendUnavailable

Call = Callable[[], object]
COMMIT = "DDENGINE_COMMIT"  # names the commit where the sources travel without their history

SHORTEST = 1e-3  # seconds that one sample of a CPU's clock lasts at least, by repeating the call
FLUSH = 256 << 20  # bytes written between calls: several times the second-level cache of any GPU so far


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median, the 20th and the 80th percentile of so many samples, by which clock."""

    median: float
    p20: float
    p80: float
    samples: int
    clock: str

    def __str__(self) -> str:
        return f"{readable(self.median)} ({readable(self.p20)} to {readable(self.p80)})"


def measure(
    calls: Mapping[str, Call],
    device: torch.device | str = "cpu",
    *,
    replay: bool = False,
    seconds: float = 2.0,
    fewest: int = 5,
    most: int = 200,
    processor: bool = False,
) -> dict[str, Timing]:
    """Time calls in turns; `seconds` is about how long all of it may take, `fewest` to `most` samples of each.

    On CUDA each sample starts with a cold second-level cache and is taken by events; `replay` captures each call in a
    CUDA graph first, which leaves the launches of Python and the driver out. On a CPU the host's clock times as many
    calls in a row as last a millisecond, on warm caches, and `replay` is refused with ValueError. `processor` counts
    the process's own time on the processor there, which other programs do not lengthen: for calls of one thread.
    """
    if torch.device(device).type == "cuda":
        return _by_events(calls, torch.device(device), replay, seconds, fewest, most)
    if replay:
        raise ValueError("only CUDA calls can be replayed from a graph; leave replay off on a CPU")
    clock = time.process_time if processor else time.perf_counter
    return _by_clock(calls, clock, "processor time" if processor else "host", seconds, fewest, most)


def _by_clock(
    calls: Mapping[str, Call], clock: Callable[[], float], name_of_clock: str, seconds: float, fewest: int, most: int
) -> dict[str, Timing]:
    def took(call: Call, repeats: int) -> float:
        started = clock()
        for _ in range(repeats):
            call()
        return clock() - started

    repeats = {}
    spent = 1e-9
    for name, call in calls.items():
        call()  # the first call pays for imports and caches
        once = took(call, 1)
        repeats[name] = math.ceil(SHORTEST / max(once, 1e-9))
        spent += once * repeats[name]
    rounds = min(max(int(seconds / spent), fewest), most)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(took(call, repeats[name]) / repeats[name])
    return {name: summary(values, name_of_clock) for name, values in samples.items()}


def _by_events(
    calls: Mapping[str, Call], device: torch.device, replay: bool, seconds: float, fewest: int, most: int
) -> dict[str, Timing]:
    with torch.cuda.device(device):
        runs = {name: _captured(call) if replay else call for name, call in calls.items()}
        flush = torch.empty(FLUSH // 4, dtype=torch.int32, device=device)
        for run in runs.values():
            for _ in range(3):
                run()
        torch.cuda.synchronize()
        pairs: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in runs}
        started = time.perf_counter()
        for taken in range(most):
            if taken >= fewest and time.perf_counter() - started > seconds:
                break
            for name, run in runs.items():
                first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                flush.zero_()  # and while the GPU writes, the host gets ahead of it
                first.record()
                run()
                last.record()
                pairs[name].append((first, last))
            torch.cuda.synchronize()
        clock = "CUDA events, graph replay, cold L2" if replay else "CUDA events, launched, cold L2"
        return {
            name: summary([first.elapsed_time(last) / 1e3 for first, last in taken], clock)
            for name, taken in pairs.items()
        }


def _captured(call: Call) -> Call:
    """The call's kernels as a CUDA graph; what it allocates stays alive with the graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles, tunes and fills the caches that a capture may not fill
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()

    def replay(graph: torch.cuda.CUDAGraph = graph, kept: object = kept) -> None:
        graph.replay()

    return replay


def summary(samples: list[float], clock: str) -> Timing:
    """Median and spread of samples in seconds."""
    p20, median, p80 = (float(np.percentile(samples, q)) for q in (20, 50, 80))
    return Timing(median, p20, p80, len(samples), clock)


def bandwidth(device: torch.device | str) -> dict[str, float | None]:
    """Bytes a second of a CUDA device: the data sheet's peak (None if its name is not known) and a large copy's."""
    known = named(torch.cuda.get_device_name(device))
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    goal = torch.empty_like(source)
    taken = measure({"copy": lambda: goal.copy_(source)}, device, seconds=0.5)["copy"].median
    return {
        "peak": known.bandwidth * 1e12 if known else None,
        "copy": 2 * source.numel() / taken,
    }


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What a number was measured on: processor, GPU, versions, the sources' commit and whether they differ from it."""
    facts: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "tensorrt": _first("tensorrt", "tensorrt-cu13", "tensorrt-rtx-cu13"),
        "onnxruntime": _first("onnxruntime-gpu", "onnxruntime"),
        **driver(device),
        **_sources(),
    }
    if torch.device(device).type == "cuda":
        about = torch.cuda.get_device_properties(device)
        facts["gpu"] = {
            "name": about.name,
            "capability": f"sm_{about.major}{about.minor}",
            "memory_bytes": about.total_memory,
            "multiprocessors": about.multi_processor_count,
            "cuda": torch.version.cuda,
            "bandwidth": bandwidth(device),
        }
    return facts


def driver(device: torch.device | str = "cpu") -> dict[str, Any]:
    """The GPU's driver, power limit and clocks beside the processor's, as they are now; None where nobody tells."""
    facts: dict[str, Any] = {"driver": None, "clocks_mhz": {"processor": _processor_mhz()}}
    if torch.device(device).type != "cuda":
        return facts
    try:
        told = Nvml(device).facts()
    except BackendUnavailable as error:
        return {**facts, "driver_unknown": str(error)}
    return {**told, "clocks_mhz": facts["clocks_mhz"] | told["clocks_mhz"]}


def _sources() -> dict[str, Any]:
    """The commit of the sources these files lie in and whether they differ from it; None where nobody knows."""
    named = os.environ.get(COMMIT)
    if named:
        return {"commit": named, "dirty": None}
    root = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    if git("ls-files", "--error-unmatch", "pyproject.toml") is None:  # installed, or in somebody else's repository
        return {"commit": None, "dirty": None}
    return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _processor_mhz() -> float | None:
    """The mean over all cores as Linux reports it now; in a virtual machine often what the host promises."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        found = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
    except (OSError, ValueError):
        found = []
    return round(sum(found) / len(found)) if found else None


def _first(*packages: str) -> str | None:
    """Name and version of the first of some packages that is installed."""
    known = ((package, _version(package)) for package in packages)
    return next((f"{package} {version}" for package, version in known if version), None)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def readable(seconds: float) -> str:
    """A duration to three digits with its unit."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"
