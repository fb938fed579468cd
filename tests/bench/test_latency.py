"""Latency: what is timed is what users call, equality comes first, and the page says what was measured."""

from __future__ import annotations

import csv
import json
import math
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from ddengine import engine as engine_module
from ddengine.backends import Backend
from ddengine.backends.eager import EagerPasses
from ddengine.bench import latency, latency_plot, latency_view, latency_work, limits, nvml
from ddengine.bench.clock import Clock
from ddengine.bench.devices import DEVICES
from ddengine.bench.latency import Plan
from ddengine.bench.latency_gate import Equality
from ddengine.bench.latency_meter import Meter, Sample, stages_by
from ddengine.bench.latency_rows import KINDS, PROVENANCE, Lane, summed
from ddengine.bench.latency_work import Candidate, drags, make_model, picture, shortened
from ddengine.bench.memory import PeakMemory
from ddengine.bench.roofline import floor
from ddengine.cli import main
from ddengine.config import DirectDragConfig
from ddengine.directdrag import run as run_module
from ddengine.engine import Engine
from ddengine.errors import BackendUnavailable, DDEngineError, InputError
from ddengine.models.load import Model, load_model

SHORT = {"n_inference_step": 3, "drag_end_step": 1, "track_per_step": 2, "max_drag_per_track": 2}
SET = [part for name, value in SHORT.items() for part in ("--set", f"{name}={value}")]
WHERE = ("device", "driver", "clocks_mhz", "torch", "triton", "tensorrt", "onnxruntime", "commit", "dirty")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model("embedded", device="cpu", dtype="float32", size=64)


def short(model: Model, **changes: Any) -> Plan:
    config = shortened(DirectDragConfig.preset("default", **SHORT), 4)
    return replace(Plan(model, config, points=(2,), edits=2), **changes)


def by_name(passes: type[EagerPasses], model: Model, name: str = "compile") -> Candidate:
    """An engine under a backend's name that runs some passes."""
    engine = Engine(model, "eager")
    engine._passes[model.digest] = ("", passes(model))
    return Candidate(name, engine)


class Wrong(EagerPasses):
    """Off by what no rounding does."""

    def predict(self, latent: Tensor, timestep: int | Tensor) -> Tensor:
        return 1.02 * super().predict(latent, timestep)


class WrongGradient(EagerPasses):
    """Right in everything but the slope of its forward."""

    def supervise(self, latent: Tensor, timestep: int | Tensor, **options: Any) -> Any:
        return super().supervise(0.9 * latent + (0.1 * latent).detach(), timestep, **options)


def test_the_command_measures_what_users_call(tmp_path: Path) -> None:
    """First and next edits at two numbers of points: a file, a table and a picture with all provenance."""
    path, table, drawn = tmp_path / "new" / "l.json", tmp_path / "l.csv", tmp_path / "l.png"
    options = ["--device", "cpu", "--size", "64", "--backend", "eager", "--backend", "tensorrt", "--edits", "2", *SET]
    options += ["--points", "1", "--points", "4", "--updates", "4", "-o", str(path), "--csv", str(table)]
    done = CliRunner().invoke(main, ["bench", "latency", *options, "--plot", str(drawn), "--json"])
    assert done.exit_code == 0, done.output
    facts = json.loads(path.read_text())
    assert facts == json.loads(done.stdout) and facts["plan"]["size"] == [64, 64] and drawn.stat().st_size > 10_000
    timed = latency_view.timed(facts)
    assert [(row["points"], row["edit"]) for row in timed] == [(n, kind) for n in (1, 4) for kind in KINDS]
    for row in timed:
        ms, stages = row["ms"], row["stages"]
        assert row["edits"] == 2 and row["gate"]["equal"] and row["updates"] == {"least": 4, "most": 4}
        assert all(0 < found["p20"] <= found["p50"] <= found["p80"] for found in ms.values())
        assert ms["point"]["p50"] == pytest.approx(ms["edit"]["p50"] / row["points"])
        assert ms["step"]["p50"] == pytest.approx(stages["drag"]["p50"] / 4)
        parts = sum(found["p50"] for found in stages.values())
        assert set(stages) == {*engine_module.STAGES, "rest"} and parts == pytest.approx(ms["edit"]["p50"], rel=0.02)
        again = row["edit"] == "next"
        assert all((stages[stage]["p50"] == 0) == again for stage in ("encode", "invert", "reference"))
        assert row["passes"]["drag"] == {"forward": 5, "backward": 4} and ("invert" in row["passes"]) != again
        assert row["limit"]["gpu"] is None and "no peaks for a CPU" in row["limit"]["why"]
        assert row["joules"] is None and row["memory_bytes"] > 1e8
    for row in facts["rows"]:
        assert {*WHERE} <= {*row["on"]} and row["on"]["torch"] == torch.__version__ and row["on"]["device"]
    skipped = [row for row in facts["rows"] if "skipped" in row]
    assert {row["backend"] for row in skipped} == {"tensorrt"} and "ms" not in skipped[0]
    shown = latency_view.text(facts, terminal=False)
    assert "tensorrt was not run: " in shown and "NVML knows NVIDIA GPUs" in shown and "| 4 | eager | next |" in shown

    with table.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(facts["rows"])
    for line, row in zip(lines, facts["rows"], strict=True):
        for name, value in latency_view.flat(row).items():
            assert line[name] == ("" if value is None else str(value)), name
        assert line["on.commit"] == str(row["on"]["commit"] or "")
    assert float(lines[0]["ms.edit.p50"]) == facts["rows"][0]["ms"]["edit"]["p50"]


def test_percentiles_are_numpys() -> None:
    drawn = np.random.default_rng(0).uniform(0.5, 3.0, (25, 3))
    samples = [
        Sample(a, a + b, {"drag": c, "denoise": 0.1, "rest": 0.0}, (8, 8), 6 * a, round(1e6 * b), 0.5)
        for a, b, c in drawn
    ]
    lane = Lane({"points": 4, "batch": 2, "edit": "first"}, list, {}, samples=samples)
    about = dict.fromkeys(PROVENANCE) | {"processor": "p"}
    row = summed(lane, Meter(CPU), "none here", about)
    for name, values in {
        "edit": drawn[:, 0] / 2,
        "point": drawn[:, 0] / 8,
        "step": drawn[:, 2] / 16,
        "wall": (drawn[:, 0] + drawn[:, 1]) / 2,
    }.items():
        for percent in (20, 50, 80):
            assert math.isclose(row["ms"][name][f"p{percent}"], 1e3 * np.percentile(values, percent)), name
    assert row["stages"]["drag"]["p80"] == pytest.approx(500 * np.percentile(drawn[:, 2], 80))
    assert row["joules"]["p20"] == pytest.approx(3 * np.percentile(drawn[:, 0], 20))
    assert row["memory_bytes"] == max(s.peak_bytes or 0 for s in samples) and row["edits"] == 25


@pytest.mark.parametrize(
    ("passes", "words"),
    [(Wrong, "a picture that nothing moved is off by"), (WrongGradient, "first drag step's gradient off by")],
)
def test_a_wrong_backend_gets_no_time(
    model: Model, passes: type[EagerPasses], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, wrong = by_name(EagerPasses, model, "eager"), by_name(passes, model)
    monkeypatch.setattr(latency, "candidates", lambda *_, **__: [right, wrong])
    facts = latency.run(tmp_path / "l.json", short(model, edits=1))
    assert [row["backend"] for row in latency_view.timed(facts)] == ["eager", "eager"]
    (failed,) = (row for row in facts["rows"] if row["backend"] == "compile")
    assert words in failed["failed"] and not failed["gate"]["equal"] and not {"ms", "stages", "joules"} & {*failed}
    assert json.loads((tmp_path / "l.json").read_text()) == facts
    for terminal in (False, True):
        shown = latency_view.text(facts, terminal=terminal, width=80)
        (line,) = (one for one in shown.splitlines() if "no time" in one and "not equal" in one and words not in one)
        assert "compile" in line and not re.search(r"\d{2}", re.sub("\x1b.*?m", "", line))
        assert f"compile has no time at 2 points: {failed['failed']}" in shown
    with pytest.raises(DDEngineError, match=f"not timed: compile at 2 points .*{words}"):
        latency.refuse(facts)


def test_the_file_is_whole_after_every_round_and_can_be_resumed(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stops(EagerPasses):
        edits = 0

        def decode(self, latent: Tensor) -> Tensor:
            Stops.edits += 1
            if Stops.edits > 6:
                raise KeyboardInterrupt
            return super().decode(latent)

    path, plan = tmp_path / "l.json", short(model, edits=2)
    plan = replace(plan, config=plan.config.changed(preserve=False))
    monkeypatch.setattr(latency, "candidates", lambda *_, **__: [by_name(Stops, model, "eager")])
    with pytest.raises(KeyboardInterrupt):  # two edits to warm up, one and a step to compare, then a whole round
        latency.run(path, plan)
    assert [row["edits"] for row in json.loads(path.read_text())["rows"]] == [1, 1]

    Stops.edits = -100
    facts = latency.run(path, plan, resume=True)
    assert [row["edits"] for row in facts["rows"]] == [2, 2]
    made = Stops.edits
    more = latency.run(path, replace(plan, points=(2, 1)), resume=True)
    assert [(row["points"], row["edits"]) for row in more["rows"]] == [(1, 2), (1, 2), (2, 2), (2, 2)]
    assert more["rows"][2:] == facts["rows"] and Stops.edits - made == made + 100  # as many again, for one point
    with pytest.raises(InputError, match="config differ; name another file"):
        latency.run(path, replace(plan, config=plan.config.changed(lam=0.2)), resume=True)

    whole = json.loads(path.read_text())
    for name, where in (("commit", whole["rows"][0]["on"]), ("threads", whole["machine"]), ("clock", whole)):
        known, where[name] = where[name], "another"
        path.write_text(json.dumps(whole))
        with pytest.raises(InputError, match=f"its {name} differ; name another file"):
            latency.run(path, plan, resume=True)
        where[name] = known
    for broken in ([], {**whole, "plan": 3}, {**whole, "rows": [3]}, {**whole, "rows": [{"on": {}, "ms": {}}]}):
        path.write_text(json.dumps(broken))
        with pytest.raises(InputError, match="it is no latency run"):
            latency.run(path, plan, resume=True)


def test_a_batch_is_told_by_the_edit(model: Model, tmp_path: Path) -> None:
    facts = latency.run(tmp_path / "l.json", short(model, batch=2, edits=1), ["eager"])
    first, later = latency_view.timed(facts)
    for row in (first, later):
        assert row["batch"] == 2 and row["updates"] == {"least": 4, "most": 4}
        assert sum(found["p50"] for found in row["stages"].values()) == pytest.approx(
            row["ms"]["edit"]["p50"], rel=0.05
        )
        assert row["ms"]["step"]["p50"] == pytest.approx(row["stages"]["drag"]["p50"] / 4)
        again = row["edit"] == "next"  # else each edit of the batch prepares a picture of its own
        assert all((row["stages"][stage]["p50"] == 0) == again for stage in ("encode", "invert", "reference"))
        assert row["passes"].get("invert") == (None if again else {"forward": 2 * 2, "backward": 0})
        assert row["gate"]["drag"]["updates"] == 4
    assert "batch of 2" in latency_view.conditions(facts)


class WrongLater(EagerPasses):
    """Right in the first edit of a batch alone."""

    def decode(self, latent: Tensor) -> Tensor:
        WrongLater.pictures += 1
        return super().decode(latent) + (0.1 if WrongLater.pictures % 2 == 0 else 0.0)

    pictures = 0


class WrongGradientLater(EagerPasses):
    """Its slope is right in the first edit of a batch alone."""

    def supervise(self, latent: Tensor, timestep: int | Tensor, **options: Any) -> Any:
        later = 0.9 * latent[1:] + (0.1 * latent[1:]).detach()
        return super().supervise(torch.cat((latent[:1], later)), timestep, **options)


@pytest.mark.parametrize("passes", [WrongLater, WrongGradientLater])
def test_every_edit_of_a_batch_is_looked_at(model: Model, passes: type[EagerPasses]) -> None:
    plan = short(model)
    equality = Equality(model, picture(), drags(2), plan.config)
    (right, wrong) = (by_name(kind, model).engine for kind in (EagerPasses, passes))
    assert right is not None and wrong is not None
    assert equality.judge(right, 2)["equal"] and equality.judge(wrong, 1)["equal"]
    WrongLater.pictures = 0
    verdict = equality.judge(wrong, 2)
    assert not verdict["picture" if passes is WrongLater else "drag"]["equal"], verdict


def test_stages_are_read_from_the_clock_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        clock = Clock(CPU)
        run = run_module.Run(CPU)
        with stages_by(clock), run.stage("drag"):
            time.sleep(0.05)  # no time of the process's own
        assert clock.own and run.seconds["drag"] < 0.04
        assert run_module.time is time and engine_module.time is time
    finally:
        torch.set_num_threads(before)


def test_the_drags_are_nested_and_inside() -> None:
    width, height = picture().size
    for count in (1, 2, 4, 8, 16, 64):
        found = drags(count)
        assert len({drag.handle for drag in found}) == count and found[0] == drags(1)[0]
        assert count > 16 or drags(16)[:count] == found
        for drag in found:
            assert all(0 < x < width - 1 and 0 < y < height - 1 for x, y in (drag.handle, drag.target))
            moved = (drag.target[0] - drag.handle[0], drag.target[1] - drag.handle[1])
            assert moved == (found[0].target[0] - found[0].handle[0], found[0].target[1] - found[0].handle[1])


def test_backends_that_do_not_run_here_are_named(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    known = (Backend("eager", True, ""), Backend("onnxruntime", False, "get it"), Backend("compile", True, ""))
    monkeypatch.setattr(latency_work, "available_backends", lambda: known)
    found = {one.name: one for one in latency_work.candidates(model, ["auto", "onnxruntime", "eager"])}
    assert list(found) == ["eager", "onnxruntime", "auto"]  # eager first: the others are held to it
    assert found["onnxruntime"].engine is None and found["onnxruntime"].skipped == "get it"
    with pytest.raises(InputError, match="'jax' is unknown; use one of eager, compile"):
        latency_work.candidates(model, ["jax"])
    for options, words in (
        (["--shape", "sd15", "--readout", "r.safetensors"], "has random weights"),
        (["--plot", "l.gif"], ".png or .svg"),
        (["--points", "0"], "1<=x<=64"),
    ):
        done = CliRunner().invoke(main, ["bench", "latency", "--device", "cpu", *options])
        assert done.exit_code == 2 and words in done.stderr, done.stderr


def test_our_share_of_the_limit_counts_the_passes_that_ran(model: Model) -> None:
    """On shapes without memory: the embedded network's own costs, times what a result reports."""
    plan, gpu = short(model), DEVICES["h200"]
    found = limits.Limits(model, (64, 64), plan.config, gpu)
    cost = found._account.cost
    assert all(tensor.is_meta for tensor in found._account.model.unet.parameters())
    assert not any(tensor.is_meta for tensor in model.unet.parameters())
    step = floor(cost("supervise") + cost("backward"), gpu)
    assert found.step_ms() == step.ms and found.step_ms(batch=4) == step.arithmetic
    ran = {"drag": {"forward": 5, "backward": 4}, "denoise": {"forward": 2, "backward": 0}}
    parts = {"supervise": 5, "backward": 4, "denoise": 2, "decode": 2}
    assert found.edit_ms(ran) == pytest.approx(sum(n * floor(cost(name), gpu).ms for name, n in parts.items()))
    first = {**ran, "invert": {"forward": 3, "backward": 0}, "reference": {"forward": 3, "backward": 0}}
    parts = {"encode": 1, "predict": 3, "reference": 3}
    more = sum(n * floor(cost(name), gpu).ms for name, n in parts.items())
    assert found.edit_ms(first) - found.edit_ms(ran) == pytest.approx(more)
    told = limits.shares(found, {"step": 4 * step.ms, "edit": 0.0}, {"step": step.ms, "edit": 1.0})
    assert told["gpu"] == "H200 SXM" and told["step_share"] == pytest.approx(0.25)
    assert told["edit_share"] is None and "name the GPU" in told["why"]  # faster than the floor is no share
    assert (
        limits.limits_of(model, (64, 64), plan.config) == "there are no peaks for a CPU, so no limit to have a share of"
    )


def test_peak_memory_is_set_back() -> None:
    peak = PeakMemory(CPU)
    if "since it started" in peak.what:
        pytest.skip("this system does not let a process set its peak back")
    peak.reset()
    before = peak.read()
    held = np.ones(64 << 20, np.uint8)
    above = peak.read()
    del held
    peak.reset()
    assert above - before > 60 << 20 and peak.read() < above - (30 << 20)


def test_energy_is_told_or_the_reason_why_not() -> None:
    with pytest.raises(BackendUnavailable, match="NVML knows NVIDIA GPUs; this is cpu"):
        nvml.Nvml("cpu")
    assert Meter(CPU).no_energy == "NVML knows NVIDIA GPUs; this is cpu"


def test_the_driver_is_asked_by_the_gpus_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refused(Exception):
        pass

    def memory_clock(_: str, kind: int) -> int:
        if kind == 2:
            raise Refused("not supported")
        return 1980

    driver = SimpleNamespace(
        NVMLError=Refused,
        NVML_CLOCK_SM=1,
        NVML_CLOCK_MEM=2,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetClockInfo=lambda _, kind: 1755 if kind == 1 else 2619,
        nvmlDeviceGetMaxClockInfo=memory_clock,
        nvmlDeviceGetPowerManagementLimit=lambda _: 700_000,
        nvmlSystemGetDriverVersion=lambda: "590.1",
        nvmlDeviceGetTotalEnergyConsumption=lambda handle: 12_500 if handle == "GPU-ab-cd" else 0,
    )
    monkeypatch.setitem(sys.modules, "pynvml", driver)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(name="H", uuid="ab-cd"))
    found = nvml.Nvml("cuda:1")
    assert found.joules() == 12.5
    clocks = {"sm": 1755, "memory": 2619, "sm_max": 1980, "memory_max": None}
    assert found.facts() == {"driver": "590.1", "clocks_mhz": clocks, "power_limit_watts": 700.0}
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(BackendUnavailable, match=r"pip install 'ddengine\[bench\]'"):
        nvml.Nvml("cuda:1")


def test_the_page_has_the_numbers_of_the_results() -> None:
    words = latency_view.PAGE.read_text(encoding="utf-8")
    shown = {(match[2], match[3]) for match in latency_view.PLACE.finditer(words)}
    assert shown == {(view, "cpu") for view in ("times", "stages", "notes", "conditions")}
    assert latency_view.page(words) == words, "run `python -m ddengine.bench.latency_view`"
    stale = words.replace("| eager | first | ", "| eager | first | 9", 1)
    assert stale != words and latency_view.page(stale) == words
    facts = json.loads((latency_view.RESULTS / "latency-cpu.json").read_text(encoding="utf-8"))
    rows = latency_view.timed(facts)
    assert all({*WHERE} <= {*row["on"]} and row["gate"]["equal"] for row in rows)
    found = {(row["points"], row["backend"], row["edit"]): row for row in rows}
    for (points, backend, kind), row in found.items():  # what the page says in words
        plain = found[points, "eager", kind]
        if backend != "eager":
            assert (
                0.6 < row["ms"]["step"]["p50"] / plain["ms"]["step"]["p50"] < 0.75 and "compile" in row["ran"]["drag"]
            )
        if backend in ("onnxruntime", "auto") and kind == "first":
            share = [row["stages"][stage]["p50"] / plain["stages"][stage]["p50"] for stage in ("invert", "reference")]
            assert all(0.4 < one < 0.6 for one in share), (points, backend, share)
        assert row["ms"]["step"]["p50"] < 1.5 * found[1, backend, kind]["ms"]["step"]["p50"]
    first, built, later = (
        found[1, backend, kind]["ms"]["edit"]["p50"] / 1e3
        for backend, kind in (("eager", "first"), ("auto", "first"), ("auto", "next"))
    )
    readme = " ".join((latency_view.ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"A first edit of 30 updates takes {first:.1f} s" in readme
    assert f"{built:.1f} s with what `ddengine build` builds" in readme and f"picture {later:.1f} s;" in readme
    for part in words.split("](")[1:]:
        path = part.partition(")")[0].partition("#")[0]
        assert not path or "://" in path or (latency_view.PAGE.parent / path).exists(), path


@pytest.mark.slow
def test_the_sd15_shape_needs_no_weights(tmp_path: Path) -> None:
    found = make_model(shape="sd15", device="cpu", dtype="float32", size=64)
    assert found.size == 64 and sum(p.numel() for p in found.unet.parameters()) == 859_520_964
    assert found.digest != "0" * 64
    config = shortened(DirectDragConfig.preset("default", **{**SHORT, "track_per_step": 1}), 2)
    facts = latency.run(tmp_path / "l.json", Plan(found, config, points=(1,), edits=1), ["eager"])
    first, later = latency_view.timed(facts)
    assert first["ms"]["edit"]["p50"] > later["ms"]["edit"]["p50"] > 0 and facts["plan"]["model"] == "sd15"


@pytest.mark.gpu
def test_a_gpu_tells_its_gap_and_its_energy(tmp_path: Path) -> None:
    found = load_model("embedded", device="cuda", dtype="float16")
    facts = latency.run(tmp_path / "l.json", Plan(found, DirectDragConfig.preset("preview"), (1,), edits=2), ["eager"])
    for row in latency_view.timed(facts):
        assert row["gap"]["p50"] < row["ms"]["wall"]["p50"] and 1e6 < row["memory_bytes"] < 1e11
        assert (row["joules"] is None) == (facts["energy"] != "joules counted by the driver")


def test_a_plot_without_times_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no backend has times"):
        latency_plot.plot({"rows": []}, tmp_path / "l.png")
