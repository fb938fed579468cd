"""The service under load: latency and throughput by clients, what is turned away, memory over many edits.

Bounded and on loopback alone. Edits are short ones (`EDIT`): what is measured is the service, not the method.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ddengine.artifacts import atomic_write
from ddengine.bench.service import Running, running
from ddengine.client import Client, ServiceError

# About half a second of one core: enough that edits overlap, little enough for 200 of them.
EDIT: dict[str, Any] = {
    "config": "preview",
    "settings": {"n_inference_step": 4, "drag_end_step": 1, "track_per_step": 2, "max_drag_per_track": 1},
}
CLIENTS = (1, 2, 4, 8)
QUEUE = 4  # so that eight clients are too many
KEPT = 8  # outcomes that the service keeps: by default so many that they alone would grow for longer than this lasts
WARM = 20  # edits before which memory is not looked at: caches fill
Say = Callable[[str], object]


def run(
    output: Path, *, edits: int = 200, ray: bool = True, faults: bool = True, say: Say = lambda _: None
) -> dict[str, Any]:
    """Measure `--no-ray` with `edits` edits and, with `ray`, Ray with one and two workers; write JSON and return it."""
    from ddengine.bench import faults as faulty
    from ddengine.bench.timer import machine

    facts: dict[str, Any] = {
        "edit": EDIT,
        "queue": QUEUE,
        "kept": KEPT,
        "machine": machine(),
        "load_average": {"before": os.getloadavg()[0]},
    }
    few = max(edits // 10, 2)
    steps: list[tuple[str, Callable[[], dict[str, Any]]]] = [
        ("process", lambda: measure({1: edits, **dict.fromkeys(CLIENTS[1:], 2 * few)}, say=say))
    ]
    if ray:
        steps.append(("ray", lambda: measure({1: 2 * few, 4: 3 * few}, ray=True, say=say)))
        steps.append(("ray of two", lambda: measure({1: few, 4: few}, ray=True, workers=2, say=say)))
    if faults:
        steps.append(("faults", lambda: {"process": faulty.measure(say=say)}))
        if ray:
            steps.append(("faults", lambda: {**facts["faults"], "ray": faulty.measure(ray=True, say=say)}))
    for name, step in steps:
        facts[name] = step()
        facts["load_average"]["after"] = os.getloadavg()[0]
        atomic_write(output, json.dumps(facts, indent=1).encode() + b"\n")  # what there is, should the next one fail
    return facts


def measure(plan: dict[int, int], *, ray: bool = False, workers: int = 1, say: Say = lambda _: None) -> dict[str, Any]:
    """Load one service by `plan`, edits by number of clients; every result is compared with the first of its kind."""
    options = ("--queue", str(QUEUE), "--jobs", str(KEPT), "--concurrency", str(workers))
    with running(*options, ray=ray) as service:
        say(f"{'ray' if ray else 'process'}, {workers} workers: started in {service.started_s:.0f} s")
        memory, digests = _Memory(service), _Digests()
        for job in range(len(JOBS)):
            digests.add(job, _edit(service.client(), job))  # and warm up
        before, rows = service.processor_s(), []
        for clients, edits in plan.items():
            rows.append(_closed_loop(service, clients, edits, memory if clients == 1 else None, digests))
            say(f"  {clients} clients: {rows[-1]}")
        spent = (service.processor_s() - before) / sum(row["edits"] for row in rows)
        found = {
            "workers": workers,
            "started_s": service.started_s,
            "rows": rows,
            "processor_s": spent,
            "burst": _burst(service, workers),
            "source": _sources(service),
            "memory": memory.facts(),
            "pss_bytes": service.pss(),
            "equal": digests.equal,
        }
        found["exit_code"] = service.stop()
    return found


# One of the examples, dragged four ways.
JOBS = (((194, 74), (209, 54)), ((194, 74), (180, 60)), ((120, 100), (128, 96)), ((60, 60), (70, 66)))


def picture() -> Image.Image:
    """The picture that is edited."""
    with resources.as_file(resources.files("ddengine.examples") / "cat.png") as path, Image.open(path) as image:
        return image.convert("RGB")


def _edit(client: Client, job: int) -> bytes:
    with client:
        return client.edit(picture(), [JOBS[job]], seed=job, **EDIT).image.tobytes()


class _Digests:
    """Whether every edit of a kind gave the pixels of the first, who made it and beside whom."""

    def __init__(self) -> None:
        self._first: dict[int, str] = {}
        self.equal = True

    def add(self, job: int, pixels: bytes) -> None:
        digest = hashlib.sha256(pixels).hexdigest()
        self.equal = self._first.setdefault(job, digest) == digest and self.equal


class _Memory:
    """Bytes resident in a service's workers after each edit of one client, so that nothing but their number grows."""

    def __init__(self, service: Running) -> None:
        self._service = service
        self.samples: list[int] = []

    def look(self) -> None:
        self.samples.append(self._service.rss())

    def facts(self) -> dict[str, Any]:
        """Least squares over the edits after the first ones; those of a service that has made few are all counted."""
        late = np.array(self.samples[WARM:] if len(self.samples) > 2 * WARM else self.samples, float)
        return {
            "edits": len(self.samples),
            "every_tenth_bytes": self.samples[::10],
            "first_bytes": int(late[0]),
            "last_bytes": int(late[-1]),
            "slope_bytes_an_edit": float(np.polyfit(np.arange(len(late)), late, 1)[0]) if len(late) > 1 else 0.0,
        }


def _closed_loop(
    service: Running, clients: int, edits: int, memory: _Memory | None, digests: _Digests
) -> dict[str, Any]:
    """So many clients, each of which sends its next edit when the last one is answered or turned away."""
    lock, seconds = threading.Lock(), list[float]()
    refused: list[str] = []
    left = deque(range(edits))

    def work() -> None:
        with service.client() as client:
            while True:
                with lock:
                    if not left:
                        return
                    number = left.popleft()
                began, job = time.perf_counter(), number % len(JOBS)
                try:
                    pixels = client.edit(picture(), [JOBS[job]], seed=job, **EDIT).image.tobytes()
                except ServiceError as error:
                    with lock:
                        refused.append(error.code)
                        left.append(number)
                    time.sleep(0.25)
                    continue
                with lock:
                    seconds.append(time.perf_counter() - began)
                    digests.add(job, pixels)
                    if memory is not None:
                        memory.look()

    began = time.perf_counter()
    threads = [threading.Thread(target=work) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    whole = time.perf_counter() - began
    p50, p95 = (float(np.percentile(seconds, q)) for q in (50, 95))
    codes = {code: refused.count(code) for code in sorted(set(refused))}
    return {
        "clients": clients, "edits": len(seconds), "p50_s": p50, "p95_s": p95,
        "edits_a_s": len(seconds) / whole, "refused": codes,
    }  # fmt: skip


def _burst(service: Running, workers: int) -> dict[str, Any]:
    """Twice as many requests at once as there are places: how many are turned away, and how soon they know."""
    places = workers + QUEUE
    answers: list[tuple[str, float]] = []

    def work() -> None:
        began = time.perf_counter()
        try:
            _edit(service.client(), 0)
            answers.append(("ok", time.perf_counter() - began))
        except ServiceError as error:
            answers.append((error.code, time.perf_counter() - began))

    threads = [threading.Thread(target=work) for _ in range(2 * places)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    late = [seconds for code, seconds in answers if code != "ok"]
    return {
        "requests": 2 * places,
        "places": places,
        "answers": {code: sum(one == code for one, _ in answers) for code in sorted({one for one, _ in answers})},
        "refused_within_s": max(late, default=0.0),
    }


def _sources(service: Running, edits: int = 5) -> dict[str, float]:
    """Medians of an edit of a picture and of the same one prepared, in turns."""
    whole: list[float] = []
    prepared: list[float] = []
    with service.client() as client:
        source = client.prepare(picture(), **EDIT)
        for _ in range(edits):
            for image, seconds in ((picture(), whole), (source, prepared)):
                began = time.perf_counter()
                client.edit(image, [JOBS[0]], **EDIT)
                seconds.append(time.perf_counter() - began)
    return {"picture_s": float(np.median(whole)), "prepared_s": float(np.median(prepared))}


def text(facts: dict[str, Any]) -> str:
    """The figures as Markdown tables, a blank line between them; docs/service.md holds the same."""
    names = {"process": "`--no-ray`", "ray": "Ray, 1 worker", "ray of two": "Ray, 2 workers"}
    lines = ["| service | clients | edits | p50, s | p95, s | edits/s | turned away |", "| --- " * 7 + "|"]
    for key, name in names.items():
        for row in facts.get(key, {}).get("rows", ()):
            codes = ", ".join(f"{number} {code}" for code, number in row["refused"].items()) or "0"
            lines.append(
                f"| {name} | {row['clients']} | {row['edits']} | {row['p50_s']:.2f} | {row['p95_s']:.2f} | "
                f"{row['edits_a_s']:.2f} | {codes} |"
            )
    lines += ["", "| | " + " | ".join(names[key] for key in names if key in facts) + " |"]
    lines.append("| --- " * (1 + sum(key in facts for key in names)) + "|")
    lines += [
        f"| {name} | " + " | ".join(cells) + " |" for name, cells in _totals([facts[k] for k in names if k in facts])
    ]
    if "faults" in facts:
        from ddengine.bench import faults_view

        lines += ["", faults_view.text(facts["faults"])]
    return "\n".join(lines)


def _totals(found: Sequence[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    def burst(one: dict[str, Any]) -> str:
        codes = ", ".join(f"{number} {code}" for code, number in one["burst"]["answers"].items())
        return f"{codes}; refusals within {one['burst']['refused_within_s'] * 1e3:.0f} ms"

    def growth(one: dict[str, Any]) -> str:
        memory = one["memory"]
        slope, whole = memory["slope_bytes_an_edit"] / 1024, f"{memory['last_bytes'] / 2**20:.0f} MiB"
        return f"{whole}; {slope:+.1f} KiB an edit over {memory['edits']}" if memory["edits"] > 5 * WARM else whole

    return [
        ("results equal, alone and beside others", ["yes" if one["equal"] else "NO" for one in found]),
        ("processor time of an edit", [f"{one['processor_s']:.2f} s" for one in found]),
        ("an edit of a prepared source : of its picture",
         [f"{one['source']['prepared_s'] / one['source']['picture_s']:.2f}" for one in found]),
        ("burst of twice the places", [burst(one) for one in found]),
        ("resident memory of the workers", [growth(one) for one in found]),
        ("memory of all its processes (PSS)", [f"{one['pss_bytes'] / 2**20:.0f} MiB" for one in found]),
        ("from start to first edit", [f"{one['started_s']:.0f} s" for one in found]),
        ("exit code after SIGTERM", [str(one["exit_code"]) for one in found]),
    ]  # fmt: skip
