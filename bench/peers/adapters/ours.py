"""This engine, timed like its peers: a first edit of a picture, and the next one of the same picture."""

from __future__ import annotations

from typing import Any

NAME = "ddengine"
NEEDS: dict[str, str] = {}
PUBLISHED: dict[str, Any] = {}

_kept: dict[str, Any] = {}


def prepare(host: Any) -> None:
    """Load the model once, as a process that serves edits does; its seconds are the `load` of the report."""
    from ddengine.config import DirectDragConfig
    from ddengine.engine import Engine

    job = host.job
    config = DirectDragConfig.preset(job["preset"]).changed_from_strings(job["changes"])
    times, tracks, group = host.updates(config.drag_end_step, config.track_per_step, config.max_drag_per_track)
    config = config.changed(drag_end_step=times, track_per_step=tracks, max_drag_per_track=group)
    host.publish(preset=job["preset"], **config.to_dict())
    with host.stage("load"):
        engine = Engine.load(
            "weights", backend=job["backend"], device=job["device"], dtype=job["dtype"], readout=job["readout"],
            size=max(job["size"]),
        )  # fmt: skip
    _kept.update(engine=engine, config=config)


def edit(host: Any) -> Any:
    return _edit(host, host.picture())


def edit_next(host: Any) -> Any:
    """An edit of a picture that is prepared: that is paid for in no stage."""
    if "source" not in _kept:
        with host.stage("prepared before"):
            _kept["source"] = _kept["engine"].prepare(host.picture(), config=_kept["config"])
        del host.seconds["prepared before"]
    return _edit(host, _kept["source"])


def _edit(host: Any, image: Any) -> Any:
    import numpy as np

    from ddengine.bench.clock import Clock
    from ddengine.bench.latency_meter import stages_by

    drags = [((x0, y0), (x1, y1)) for x0, y0, x1, y1 in host.job["drags"]]
    with stages_by(Clock(host.device)), host.stage("edit"):
        result = _kept["engine"].edit(image, drags, config=_kept["config"], prompt=host.job["prompt"])
    whole = host.seconds.pop("edit")
    told = {name: spent for name, spent in result.timings.items() if name != "total" and spent}
    for name, spent in told.items():
        host.seconds[name] += spent
    host.seconds["other"] += whole - sum(told.values())
    host.counts["updates"] = sum(bool(step["updated"]) for step in result.history)
    host.counts["forwards"] = sum(calls.get("forward", 0) for calls in result.passes.values())
    host.counts["backwards"] = sum(calls.get("backward", 0) for calls in result.passes.values())
    host.note("backend: " + ", ".join(sorted({what.split(" ")[0] for what in result.backend.values()} - {"prepared"})))
    return np.asarray(result.image)
