"""Engines in the cache: which one is found, built once, and refused with the reason and the remedy."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import helper, load, save

from ddengine.backends.gpu import Gpu
from ddengine.backends.tensorrt.cache import PLAN, EngineCache, EngineRequest
from ddengine.backends.tensorrt.flavour import flavour_of, load_flavour
from ddengine.backends.tensorrt.runner import EngineRunner, torch_scratch
from ddengine.errors import BackendUnavailable, Cancelled, EngineMismatch, ModelError
from ddengine.export.to_tensorrt import BuildOptions, Profile
from ddengine.store import ArtefactStore

FULL, RTX = "tensorrt 10.16.1.11", "tensorrt_rtx 1.7.1.116"
GPU = Gpu(0, "NVIDIA H200", 90, 140 << 30, "580.95.05", "13.0")
REQUEST = EngineRequest("denoise", "a" * 64, {"x": (2, 4), "y": (2, 4)}, "fp32", {"opset": 20})


@pytest.fixture
def graph(tmp_path) -> Path:
    x, y = (helper.make_tensor_value_info(name, 1, (2, 4)) for name in "xy")
    weight = helper.make_tensor("w", 1, [1], [3.0])
    model = helper.make_model(helper.make_graph([helper.make_node("Mul", ["x", "w"], ["y"])], "g", [x], [y], [weight]))
    model.ir_version = 10
    save(model, tmp_path / "g.onnx")
    return tmp_path / "g.onnx"


@pytest.fixture
def make(tmp_path, fake_tensorrt):
    """Makes the cache of a machine: a library's version and a GPU; all share one folder."""
    fakes = {}

    def cache(version: str = FULL, gpu: Gpu | None = GPU) -> EngineCache:
        fake = fakes.setdefault(version, fake_tensorrt.FakeTensorRT(version))
        return EngineCache(ArtefactStore(tmp_path / "cache"), _flavour(fake), gpu)

    return cache


def _flavour(fake):
    if not hasattr(fake, "flavour"):
        fake.flavour = flavour_of(fake)
    return fake.flavour


def run(cache: EngineCache, request: EngineRequest = REQUEST) -> float:
    runner = EngineRunner(cache.load(request, torch_scratch("cpu")), "cpu")
    return float(runner.run({"x": torch.ones(2, 4)})["y"][0, 0])


def test_built_once_found_and_run(make, graph):
    cache = make()
    assert cache.find(REQUEST) is None and cache.load(REQUEST, torch_scratch("cpu")) is None
    asked = []
    built = cache.build(REQUEST, lambda: asked.append(1) or graph)
    again = cache.build(REQUEST, lambda: asked.append(1) or graph)
    assert built.key == again.key and asked == [1]
    assert run(cache) == 3.0
    assert built.about["plan_bytes"] == len(built.read(PLAN)) and built.about["version"] == "10.16.1.11"
    assert built.facts["gpu"] == "NVIDIA H200" and built.facts["driver"] == "580" and built.facts["sm"] == 90
    cache.build(REQUEST, lambda: asked.append(1) or graph, replace=True)
    assert asked == [1, 1]


def test_another_machine_version_or_model_is_refused_with_what_differs(make, graph):
    make().build(REQUEST, lambda: graph)
    for gpu, says in (
        (dataclasses.replace(GPU, name="NVIDIA A100", sm=80), "gpu is NVIDIA H200, not NVIDIA A100; sm is 90, not 80"),
        (dataclasses.replace(GPU, driver="590.1"), "driver is 580, not 590"),
        (dataclasses.replace(GPU, cuda="13.1"), r"cuda is 13\.0, not 13\.1"),
    ):
        with pytest.raises(EngineMismatch, match=rf"denoise is for another machine: {says}; build it here"):
            make(gpu=gpu).load(REQUEST, torch_scratch("cpu"))
    make(gpu=dataclasses.replace(GPU, driver="580.105", memory=1)).find(REQUEST)  # the same branch
    with pytest.raises(EngineMismatch, match=r"version is 10\.16\.1\.11, not 11\.4\.0\.106"):
        make("tensorrt 11.4.0.106").find(REQUEST)
    with pytest.raises(EngineMismatch, match="flavour is tensorrt, not tensorrt_rtx"):
        make(RTX).find(REQUEST)
    for change in (
        {"weights": "b" * 64},
        {"sizes": {"x": (1, 4), "y": (1, 4)}},
        {"precision": "fp16"},
        {"graph": {"opset": 23}},
        {"name": "decode"},
    ):
        assert make().find(dataclasses.replace(REQUEST, **change)) is None


def test_one_engine_for_several_batches_is_found_for_each_and_no_other(make, graph, tmp_path):
    model = load(graph)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    save(model, tmp_path / "open.onnx")
    profiles = [Profile.exactly({"x": (2, 4)}), Profile({"x": (4, 4)}, {"x": (4, 4)}, {"x": (8, 4)})]
    wanted = dataclasses.replace(REQUEST, sizes={"x": (-1, 4), "y": (-1, 4)}, profiles=profiles)
    cache = make()
    several = cache.build(wanted, lambda: tmp_path / "open.onnx", options=BuildOptions(optimization_level=5))
    for batch in (2, 4, 7):
        one = dataclasses.replace(REQUEST, sizes={"x": (batch, 4), "y": (batch, 4)})
        assert cache.find(one).key == several.key
        runner = EngineRunner(cache.load(one, torch_scratch("cpu")), "cpu")
        x = torch.randn(batch, 4)
        assert torch.equal(runner.run({"x": x})["y"], 3 * x)
    for sizes in ((3, 4), (2, 5), (2, 4, 1)):
        assert cache.find(dataclasses.replace(REQUEST, sizes={"x": sizes, "y": sizes})) is None
    alone = cache.build(REQUEST, lambda: graph)  # for batch 2 alone, which is preferred
    assert alone.key != several.key and cache.find(REQUEST).key == alone.key


def test_every_difference_is_another_key(make, graph):
    requests = [
        REQUEST,
        dataclasses.replace(REQUEST, weights="b" * 64),
        dataclasses.replace(REQUEST, name="predict"),
        dataclasses.replace(REQUEST, sizes={"x": (1, 4), "y": (2, 4)}),
    ]
    keys = {make().build(request, lambda: graph).key for request in requests}
    gpus = [
        dataclasses.replace(GPU, **change) for change in ({"name": "A"}, {"sm": 89}, {"driver": "1"}, {"cuda": "12"})
    ]
    keys |= {make(gpu=gpu).build(REQUEST, lambda: graph).key for gpu in gpus}
    keys |= {make(version).build(REQUEST, lambda: graph).key for version in (RTX, "tensorrt 11.4.0.106")}
    options = [BuildOptions(optimization_level=1), BuildOptions(refittable=True), BuildOptions(workspace=1 << 30)]
    keys |= {make().build(REQUEST, lambda: graph, options=option).key for option in options}
    assert len(keys) == 4 + 4 + 2 + 3


def test_of_several_builds_the_most_optimised_is_taken(make, graph):
    cache = make()
    keys = {}
    for level, refittable in ((1, False), (5, True), (5, False), (3, False)):
        options = BuildOptions(optimization_level=level, refittable=refittable)
        keys[level, refittable] = cache.build(REQUEST, lambda: graph, options=options).key
    assert cache.find(REQUEST).key == keys[5, False]


def test_rtx_engines_for_any_gpu_are_found_everywhere_and_its_own_first(make, graph):
    anywhere = make(RTX, None).build(REQUEST, lambda: graph)
    assert (anywhere.facts["gpu"], anywhere.facts["sm"]) == ("any", 0)
    assert make(RTX).find(REQUEST).key == anywhere.key and run(make(RTX)) == 3.0
    here = make(RTX).build(REQUEST, lambda: graph)
    assert here.key != anywhere.key and make(RTX).find(REQUEST).key == here.key


def test_damaged_engines_are_never_tried(make, graph, fake_tensorrt):
    cache = make()
    folder = cache.build(REQUEST, lambda: graph).folder
    fake = cache.flavour.trt
    os.truncate(folder / PLAN, 20)
    with pytest.raises(EngineMismatch, match=r"20 bytes.*ddengine cache clear"):
        cache.load(REQUEST, torch_scratch("cpu"))
    cache.build(REQUEST, lambda: graph)  # who builds repairs
    data = (folder / PLAN).read_bytes()
    (folder / PLAN).write_bytes(data.replace(b"3.0", b"4.0"))
    with pytest.raises(EngineMismatch, match="not what was written"):
        cache.load(REQUEST, torch_scratch("cpu"))
    assert "deserialize_cuda_engine" not in fake.names("Runtime")
    cache.build(REQUEST, lambda: graph)
    assert run(cache) == 3.0


def test_a_failed_or_stopped_build_leaves_nothing(make, graph, tmp_path):
    cache = make()

    def stop(at):
        raise Cancelled

    with pytest.raises(Cancelled):
        cache.build(REQUEST, lambda: graph, progress=stop)
    with pytest.raises(ModelError, match="not fp16"):
        cache.build(dataclasses.replace(REQUEST, precision="fp16"), lambda: graph)
    assert cache.store.entries() == []
    assert [path for path in (tmp_path / "cache").rglob("*") if path.suffix == ".making"] == []


def test_builds_learn_from_each_other_and_rtx_keeps_its_kernels(make, graph):
    cache = make()
    for name in ("denoise", "predict", "encode"):
        cache.build(dataclasses.replace(REQUEST, name=name), lambda: graph)
    fake = cache.flavour.trt
    assert [data for data, *_ in fake.arguments("IBuilderConfig", "create_timing_cache")] == [b"", b"+", b"++"]
    assert [entry.kind for entry in cache.store.entries()].count("timing") == 1
    rtx = make(RTX)
    rtx.build(REQUEST, lambda: graph)
    for _ in range(2):
        rtx.keep_kernels(REQUEST, rtx.load(REQUEST, torch_scratch("cpu")))
    assert rtx.flavour.trt.arguments("IRuntimeCache", "deserialize") == [(b"kernels",)]
    kept = next(entry for entry in cache.store.entries() if entry.kind == "kernels")
    (kept.folder / "data").write_bytes(b"changed")  # costs time, no more
    rtx.load(REQUEST, torch_scratch("cpu"))
    assert len(rtx.flavour.trt.arguments("IRuntimeCache", "deserialize")) == 1


def test_other_weights_are_put_into_a_refittable_engine(make, graph, tmp_path):
    """A fused LoRA: the same graph, other numbers."""
    cache, options = make(), BuildOptions(refittable=True)
    first = cache.build(REQUEST, lambda: graph, options=options)
    model = load(graph)
    model.graph.initializer[0].float_data[0] = -2.0
    save(model, tmp_path / "fused.onnx")
    fused = dataclasses.replace(REQUEST, weights="b" * 64)
    second = cache.build(fused, lambda: tmp_path / "fused.onnx", options=options)
    fake = cache.flavour.trt
    assert len(fake.arguments("Builder", "build_serialized_network")) == 1
    assert second.about["refitted_from"] == first.key and second.key != first.key
    assert (run(cache), run(cache, fused)) == (3.0, -2.0)
    # Where refitting fails the engine is built; where it was not asked for, too.
    fake.refit_fails = True
    another = dataclasses.replace(REQUEST, weights="c" * 64)
    third = cache.build(another, lambda: tmp_path / "fused.onnx", options=options)
    assert "refitted_from" not in third.about
    fake.refit_fails = False
    cache.build(dataclasses.replace(REQUEST, weights="d" * 64), lambda: graph)
    assert len(fake.arguments("Builder", "build_serialized_network")) == 3
    assert run(cache, another) == -2.0


def test_rtx_really_builds_through_the_cache(tmp_path, graph):
    pytest.importorskip("tensorrt_rtx")
    cache = EngineCache(ArtefactStore(tmp_path / "cache"), load_flavour("tensorrt_rtx"), None)
    told = []
    built = cache.build(REQUEST, lambda: graph, progress=told.append)
    assert len(built.read(PLAN)) > 1000 and told[-1].step == 1000
    assert cache.find(REQUEST).key == built.key == cache.build(REQUEST, lambda: 1 / 0).key
    assert np.isclose(built.about["seconds"], built.about["seconds"]) and built.about["inputs"]["x"]["shape"] == [2, 4]
    from ddengine.backends.gpu import gpus

    if not gpus():
        with pytest.raises(BackendUnavailable, match="no NVIDIA driver"):
            cache.load(REQUEST, torch_scratch("cpu"))
