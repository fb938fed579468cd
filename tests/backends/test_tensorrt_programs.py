"""The passes as TensorRT engines: a library that checks every call, and PyTorch computing at its addresses."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, save

from ddengine.backends.eager import EagerPasses
from ddengine.backends.engines import EnginePasses, wanted_passes
from ddengine.backends.gpu import Gpu
from ddengine.backends.graphs import PASSES, PassShape, pass_graph
from ddengine.backends.tensorrt import programs as module
from ddengine.backends.tensorrt.cache import EngineCache
from ddengine.backends.tensorrt.flavour import flavour_of, load_flavour
from ddengine.backends.tensorrt.programs import TensorRTProgram, TensorRTPrograms, open_programs
from ddengine.errors import BackendUnavailable, EngineMismatch
from ddengine.export.to_tensorrt import BuildOptions
from ddengine.models.load import load_model
from ddengine.store import ArtefactStore

VERSION = "tensorrt 11.4.0.106"
GPU = Gpu(0, "NVIDIA H200", 90, 140 << 30, "580.95.05", "13.0")
SIZE = (32, 48)
TYPES = {torch.float32: TensorProto.FLOAT, torch.int64: TensorProto.INT64}


@pytest.fixture(scope="module")
def model():
    return load_model("embedded", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def eager(model):
    return EagerPasses(model)


_graph = functools.cache(pass_graph)


class Bench:
    """One machine: its store, its library, and graphs that are only names; PyTorch's own pass is what computes."""

    def __init__(self, root: Path, library, model, eager, monkeypatch) -> None:
        self.store, self.fake, self.flavour = ArtefactStore(root), library, flavour_of(library)
        self.model, self.eager, self.exported, self.error = model, eager, [], 0.0
        monkeypatch.setattr(module, "stored_graph", self._stored_graph)
        library.compute = self._compute

    def programs(self, gpu: Gpu | None = GPU, **options: object) -> TensorRTPrograms:
        cache = EngineCache(self.store, self.flavour, gpu)
        return TensorRTPrograms(cache, self.model, self.eager.network, **options)

    def passes(self, **options: object) -> EnginePasses:
        return EnginePasses(self.eager, self.eager.network, self.programs(), strict=True, **options)

    def _stored_graph(self, store, model, network, name, shape, *, opset, dynamic_batch, progress):
        self.exported.append(name)
        spec = _graph(name, model, network, shape).spec

        def write(folder: Path) -> None:
            sides = lambda one: ["b", *one.shape[1:]] if dynamic_batch and one.dtype != torch.int64 else one.shape  # noqa: E731
            ports = [[helper.make_tensor_value_info(one.name, TYPES[one.dtype], sides(one)) for one in side]
                     for side in (spec.inputs, spec.outputs)]  # fmt: skip
            weight = helper.make_tensor("w", TensorProto.FLOAT, [1], [1.0])
            save(helper.make_model(helper.make_graph([], name, *ports, [weight])), folder / "graph.onnx")

        return store.make("onnx", {"name": name, "shape": str(shape), "open": dynamic_batch}, write)

    def _compute(self, title, inputs, outputs):
        height, width = outputs["image"].shape[-2:] if title == "decode" else next(iter(inputs.values())).shape[-2:]
        scale = 1 if title in ("encode", "decode") else 8
        batch = next(iter(inputs.values())).shape[0]
        grid = outputs["appearance"].shape[-2:] if "appearance" in outputs else None
        tokens = inputs["cross_key_0"].shape[1] if "cross_key_0" in inputs else None
        shape = PassShape((scale * height, scale * width), batch, grid, tokens)
        graph = _graph(title, self.model, self.eager.network, shape)
        with torch.no_grad():
            found = graph(*(torch.from_numpy(inputs[one.name].copy()) for one in graph.spec.inputs))
        for one, tensor in zip(graph.spec.outputs, found, strict=True):
            values = tensor.numpy()
            outputs[one.name][...] = values + self.error * np.abs(values).max() * (np.arange(values.size) % 2).reshape(
                values.shape
            )


@pytest.fixture
def bench(fake_tensorrt, tmp_path, model, eager, monkeypatch):
    return Bench(tmp_path / "cache", fake_tensorrt.FakeTensorRT(VERSION), model, eager, monkeypatch)


def test_every_pass_runs_in_its_engine_and_equals_pytorch(bench, eager):
    passes = bench.passes(building=True)
    grid = (4, 4)
    passes.ready(wanted_passes(SIZE, readout_hw=grid))
    bench.fake.calls.clear()
    latent, image = torch.randn(1, 4, SIZE[0] // 8, SIZE[1] // 8), torch.rand(1, 3, *SIZE) * 2 - 1
    assert torch.equal(passes.encode(image), eager.encode(image))
    assert torch.equal(passes.decode(latent), eager.decode(latent))
    assert torch.equal(passes.predict(latent, 421), eager.predict(latent, 421))
    mine, theirs = (one.reference(latent, 421, readout_hw=grid) for one in (passes, eager))
    for a, b in zip(
        (mine.noise, mine.feature, *mine.appearance), (theirs.noise, theirs.feature, *theirs.appearance), strict=True
    ):
        assert torch.equal(a, b)
    assert all(torch.equal(a, b) for x, y in zip(mine.kv, theirs.kv, strict=True) for a, b in zip(x, y, strict=True))
    assert torch.equal(passes.denoise(latent, 401, mine.kv), eager.denoise(latent, 401, mine.kv))
    assert len(bench.fake.arguments("IExecutionContext", "execute_async_v3")) == 5
    assert bench.programs().find("predict", PassShape((64, 64))) is None


def test_what_is_built_is_exported_and_built_once(bench):
    programs = bench.programs(options=BuildOptions(optimization_level=4))
    first = programs.build("encode", PassShape(SIZE))
    assert programs.build("encode", PassShape(SIZE)).key == first.key and bench.exported == ["encode"]
    assert first.facts["pass"] == "encode" and first.facts["weights"] == bench.model.digest
    assert first.facts["sizes"] == {"image": [1, 3, 32, 48], "latent": [1, 4, 4, 6]}
    assert first.facts["options"]["optimization_level"] == 4
    programs.build("encode", PassShape(SIZE), replace=True)
    assert bench.exported == ["encode"] * 2


def test_one_engine_serves_several_batches(bench, eager):
    several = bench.programs().build("predict", PassShape(SIZE), batches=(1, 3))
    passes = bench.passes()
    for batch in (1, 3):
        latent = torch.randn(batch, 4, 4, 6)
        assert torch.equal(passes.predict(latent, 7), eager.predict(latent, 7))
    assert len(several.facts["profiles"]) == 2 and several.facts["sizes"]["timestep"] == [1]
    with pytest.raises(BackendUnavailable, match=r"batch 2.*ddengine build"):
        passes.predict(torch.randn(2, 4, 4, 6), 7)


def test_rounding_is_measured_and_a_wrong_engine_is_refused(bench):
    programs = bench.programs()
    programs.build("predict", PassShape(SIZE))
    assert programs.find("predict", PassShape(SIZE)) is not None and programs.rounding == 0
    bench.error = 0.01
    programs.find("predict", PassShape(SIZE))
    assert programs.rounding == pytest.approx(0.02, rel=1e-3)
    for error in (0.2, float("nan")):
        bench.error = error
        with pytest.raises(EngineMismatch, match=r"differs from PyTorch in noise .*cache clear"):
            programs.find("predict", PassShape(SIZE))


def test_engines_of_other_machines_are_not_taken(bench):
    bench.programs().build("predict", PassShape(SIZE))
    other = bench.programs(Gpu(0, "NVIDIA A100", 80, 1, "580.1", "13.0"))
    with pytest.raises(EngineMismatch, match="gpu is NVIDIA H200, not NVIDIA A100"):
        other.find("predict", PassShape(SIZE))
    passes = EnginePasses(bench.eager, bench.eager.network, other, strict=False)
    latent = torch.randn(1, 4, 4, 6)
    assert torch.equal(passes.predict(latent, 7), bench.eager.predict(latent, 7))
    assert "execute_async_v3" not in bench.fake.names("IExecutionContext")


def test_a_captured_program_copies_in_and_out(bench, monkeypatch):
    """On the CPU nothing can be captured: the graph is the run itself."""
    from ddengine.backends.tensorrt import runner as runners

    monkeypatch.setattr(
        runners.EngineRunner, "capture", lambda self, inputs, outputs=None: lambda: self.run(inputs, outputs)
    )
    programs = bench.programs()
    programs.build("predict", PassShape(SIZE))
    plain = programs.find("predict", PassShape(SIZE))
    captured = TensorRTProgram(plain.runner, plain.spec, captured=True)
    bench.fake.calls.clear()
    for _ in range(2):
        inputs = [torch.randn(1, 4, 4, 6), torch.tensor([9])]
        out = torch.empty(1, 4, 4, 6)
        captured.run(inputs, [out])
        assert torch.equal(out, bench.eager.predict(inputs[0], 9))
    bound = {name for name, _ in bench.fake.arguments("IExecutionContext", "set_tensor_address")}
    # At most once each over both runs: a buffer that the allocator put where one was bound before needs no call.
    assert len(bench.fake.arguments("IExecutionContext", "set_tensor_address")) == len(bound) <= 3


def test_where_tensorrt_cannot_run_it_says_so(tmp_path, model, eager):
    with pytest.raises(BackendUnavailable, match=r"the model is on cpu; use device='cuda'.*onnxruntime"):
        open_programs(ArtefactStore(tmp_path), model, eager.network)
    halves = copy.copy(model)
    wide = EngineCache(ArtefactStore(tmp_path), None, None)
    programs = TensorRTPrograms(wide, halves, eager.network)
    monkey = copy.deepcopy(model.vae).double()
    object.__setattr__(halves, "vae", monkey)
    with pytest.raises(BackendUnavailable, match="no float64"):
        programs.build("encode", PassShape(SIZE))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", PASSES)
def test_rtx_really_builds_every_pass_of_the_embedded_model(tmp_path, dtype, name):
    """Without a GPU, for any that the library lists: one engine for one batch, one for several."""
    pytest.importorskip("tensorrt_rtx")
    model = load_model("embedded", device="cpu", dtype=dtype)
    part = model.vae if name in ("encode", "decode") else model.unet
    wanted = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[next(part.parameters()).dtype]
    network = EagerPasses(model).network
    programs = open_programs(ArtefactStore(tmp_path), model, network, flavour="tensorrt_rtx", building=True)
    for batches in ((), (1, 2)):
        engine = programs.build(name, PassShape((128, 128)), batches=batches)
        assert len(engine.read("engine.plan")) > 1_000_000 and engine.about["profiles"] == len(batches)
        assert engine.about["precision"] == wanted
    assert load_flavour("tensorrt_rtx") is programs.cache.flavour


@pytest.mark.slow
@pytest.mark.parametrize("name", PASSES)
def test_rtx_really_builds_every_pass_of_stable_diffusion(tmp_path, name):
    """At 512 x 512 in half precision with random weights; minutes and 8 GB each."""
    pytest.importorskip("tensorrt_rtx")
    from ddengine.bench.shapes import sd15

    torch.manual_seed(0)
    model = sd15("cpu", torch.float16)
    programs = open_programs(ArtefactStore(tmp_path), model, EagerPasses(model).network, building=True)
    engine = programs.build(name, PassShape((512, 512), readout_hw=(64, 64)))
    assert engine.about["precision"] == "fp16" and engine.size > 60_000_000
    print(name, engine.about)
