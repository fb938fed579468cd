"""Running, choosing and refitting engines, with libraries that check each call and compute on the host."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, save

from ddengine.backends.gpu import Gpu
from ddengine.backends.tensorrt import flavour as flavours
from ddengine.backends.tensorrt import session as sessions
from ddengine.backends.tensorrt.flavour import Flavour, flavour_of, installed, load_flavour
from ddengine.backends.tensorrt.refit import refit_engine, refit_plan
from ddengine.backends.tensorrt.runner import CapturedEngine, EngineRunner, torch_scratch
from ddengine.backends.tensorrt.session import Scratch, Session
from ddengine.errors import BackendUnavailable, EngineMismatch, InputError, ModelError
from ddengine.export.to_tensorrt import BuildOptions, Profile, build_engine

ALL = ["tensorrt 10.16.1.11", "tensorrt 11.4.0.106", "tensorrt_rtx 1.7.1.116"]
H200 = Gpu(0, "NVIDIA H200", 90, 140 << 30, "580.95.05", "13.0")
RTX = Gpu(0, "NVIDIA GeForce RTX 4090", 89, 24 << 30, "580.95.05", "13.0")


def graph(path: Path, shape: tuple[object, ...] = (2, 4), outputs: int = 1, weights: dict[str, float] | None = None):
    """y_i = x times all weights, in float32."""
    weights = weights or {"w": 3.0}
    ports = [helper.make_tensor_value_info(n, 1, shape) for n in ("x", *(f"y{i}" for i in range(outputs)))]
    nodes = [helper.make_node("Mul", ["x", name], [f"y{i}"]) for i in range(outputs) for name in list(weights)[:1]]
    held = [helper.make_tensor(name, TensorProto.FLOAT, [1], [value]) for name, value in weights.items()]
    model = helper.make_model(helper.make_graph(nodes, "g", ports[:1], ports[1:], held))
    model.ir_version = 10
    save(model, path)
    return path


@pytest.fixture(params=ALL)
def fake(request, fake_tensorrt):
    return fake_tensorrt.FakeTensorRT(request.param)


@pytest.fixture
def flavour(fake) -> Flavour:
    return flavour_of(fake)


@pytest.fixture
def on_a_gpu(monkeypatch):
    monkeypatch.setattr(sessions, "find_gpu", lambda: RTX)


def plan_of(flavour: Flavour, path: Path, **options: object) -> bytes:
    profiles = options.pop("profiles", ())
    return build_engine(path, flavour=flavour, profiles=profiles, options=BuildOptions(**options)).plan


def runner_of(flavour: Flavour, plan: bytes, scratch: Scratch | None = None) -> EngineRunner:
    return EngineRunner(Session(plan, flavour, scratch or torch_scratch("cpu"), name="denoise"), "cpu")


def test_it_reads_and_writes_the_very_tensors_it_is_given(tmp_path, fake, flavour):
    runner = runner_of(flavour, plan_of(flavour, graph(tmp_path / "g.onnx", outputs=2)))
    x, y = torch.arange(8.0).reshape(2, 4), torch.empty(2, 4)
    out = runner.run({"x": x}, {"y1": y})
    assert out["y1"] is y and torch.equal(y, 3 * x) and torch.equal(out["y0"], 3 * x)
    bound = dict(fake.arguments("IExecutionContext", "set_tensor_address"))
    assert bound == {"x": x.data_ptr(), "y1": y.data_ptr(), "y0": out["y0"].data_ptr()}
    x += 1
    again = runner.run({"x": x}, {"y1": y})
    assert again["y0"] is out["y0"] and torch.equal(y, 3 * x)
    # Steady state: nothing is said twice, only run.
    names = fake.names("IExecutionContext")
    assert names.count("set_tensor_address") == 3 and names.count("set_input_shape") == 1
    assert names.count("set_device_memory") == 1 and names.count("execute_async_v3") == 2
    own = runner.run({"x": x})
    assert torch.equal(own["y1"], 3 * x) and own["y1"] is not y


def test_all_engines_share_one_scratch_of_the_largest_need(tmp_path, fake, flavour):
    scratch = torch_scratch("cpu")
    plan = plan_of(flavour, graph(tmp_path / "g.onnx"))
    small = runner_of(flavour, plan, scratch)
    x = torch.ones(2, 4)
    small.run({"x": x})
    first = scratch.address
    fake.scratch = 5000
    large = runner_of(flavour, plan, scratch)
    large.run({"x": x})
    assert (scratch.size, scratch.generation) == (5000, 2)
    assert torch.equal(small.run({"x": x})["y0"], 3 * x)
    given = fake.arguments("IExecutionContext", "set_device_memory")
    assert given == [(first, 1000), (scratch.address, 5000), (scratch.address, 5000)]
    assert all(address % 64 == 0 for address, _ in given)
    strategy = fake.arguments("IRuntimeConfig", "set_execution_context_allocation_strategy")
    assert set(strategy) == {(fake.ExecutionContextAllocationStrategy.USER_MANAGED,)}


def test_dynamic_sizes_choose_their_profile(tmp_path, fake, flavour):
    profiles = [Profile({"x": (1, 4)}, {"x": (2, 4)}, {"x": (4, 4)}), Profile.exactly({"x": (8, 16)})]
    plan = plan_of(flavour, graph(tmp_path / "g.onnx", ("b", "n")), profiles=profiles)
    fake.scratch = 7  # of static sizes: dynamic ones ask anew
    runner = runner_of(flavour, plan)
    for shape in ((2, 4), (8, 16), (3, 4)):
        x = torch.randn(shape)
        assert torch.equal(runner.run({"x": x})["y0"], 3 * x)
    assert fake.arguments("IExecutionContext", "set_optimization_profile_async") == [(1, 0), (0, 0)]
    assert runner.session.scratch.size == 128
    for shape in ((5, 4), (8, 4), (8,)):
        with pytest.raises(InputError, match=r"built for x \[1, 4\] to \[4, 4\], x \[8, 16\] to \[8, 16\]"):
            runner.run({"x": torch.ones(shape)})
    assert torch.equal(runner.run({"x": torch.ones(3, 4)})["y0"], torch.full((3, 4), 3.0))


@pytest.mark.parametrize(
    ("inputs", "outputs", "says"),
    [
        ({"x": torch.ones(2, 4, dtype=torch.float16)}, {}, "x is torch.float16, it must be float32"),
        ({"x": torch.ones(4, 2).T}, {}, "x is not contiguous"),
        ({"x": torch.ones(2, 4, device="meta")}, {}, "x lies on meta, it must be on cpu"),
        ({"x": torch.ones(2, 5)}, {}, r"does not take x of shape \[2, 5\]; it was built for x \[2, 4\]"),
        ({}, {}, "x missing or unknown"),
        ({"x": torch.ones(2, 4), "z": torch.ones(1)}, {}, "z missing or unknown"),
        ({"x": torch.ones(2, 4)}, {"z": torch.ones(1)}, "has no output z, only y0"),
        ({"x": torch.ones(2, 4)}, {"y0": torch.ones(8)}, r"y0 is \[8\], it must be \[2, 4\]"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_and_nothing_runs(tmp_path, fake, flavour, inputs, outputs, says):
    runner = runner_of(flavour, plan_of(flavour, graph(tmp_path / "g.onnx")))
    with pytest.raises(InputError, match=says):
        runner.run(inputs, outputs)
    assert "execute_async_v3" not in fake.names("IExecutionContext")


def test_a_run_that_fails_says_why(tmp_path, fake, flavour, monkeypatch):
    runner = runner_of(flavour, plan_of(flavour, graph(tmp_path / "g.onnx")))

    def fails(thing, stream):
        fake._error("misaligned address")
        return False

    monkeypatch.setattr(fake, "IExecutionContext_execute_async_v3", fails)
    with pytest.raises(BackendUnavailable, match=r"denoise did not run on tensorrt\w*: misaligned address"):
        runner.run({"x": torch.ones(2, 4)})


@pytest.mark.usefixtures("on_a_gpu")
def test_engines_the_library_refuses_are_told_apart_from_machines_without_a_gpu(tmp_path, fake, flavour, monkeypatch):
    plan = plan_of(flavour, graph(tmp_path / "g.onnx"))
    fake.refused = ["VERSION_MISMATCH", "UNSUPPORTED_CC"]
    with pytest.raises(EngineMismatch, match=r"refuses denoise: VERSION_MISMATCH; UNSUPPORTED_CC; build it again"):
        runner_of(flavour, plan)
    monkeypatch.undo()
    monkeypatch.setattr(sessions, "find_gpu", lambda: (_ for _ in ()).throw(BackendUnavailable("no NVIDIA driver")))
    with pytest.raises(BackendUnavailable, match="no NVIDIA driver"):
        runner_of(flavour, plan)
    if flavour.kernel_cache:
        assert "deserialize_cuda_engine" not in fake.names("Runtime")  # asked first, from the header


def test_rtx_keeps_the_kernels_it_compiled(tmp_path, fake_tensorrt):
    fake = fake_tensorrt.FakeTensorRT(ALL[2])
    flavour = flavour_of(fake)
    plan = plan_of(flavour, graph(tmp_path / "g.onnx"))
    session = Session(plan, flavour, torch_scratch("cpu"))
    kept = session.kernels()
    assert kept == b"kernels" and fake.arguments("IRuntimeCache", "deserialize") == []
    Session(plan, flavour, torch_scratch("cpu"), kernels=kept)
    Session(plan, flavour, torch_scratch("cpu"), kernels=b"foreign")  # costs time, no more
    assert fake.arguments("IRuntimeCache", "deserialize") == [(b"kernels",), (b"foreign",)]
    assert len(fake.arguments("IRuntimeConfig", "set_runtime_cache")) == 3
    eager = fake.DynamicShapesKernelSpecializationStrategy.EAGER
    assert set(fake.arguments("IRuntimeConfig", "dynamic_shapes_kernel_specialization_strategy")) == {(eager,)}
    session.close()
    session.close()
    assert session.kernels() is None


class FakeGraphs:
    """PyTorch's CUDA graphs and streams as lists of what was done."""

    def __init__(self, monkeypatch) -> None:
        self.log: list[str] = []
        outer = self

        class Quiet:
            def __init__(self, *_: object, **__: object) -> None:
                pass

            def __enter__(self) -> None:
                outer.log.append("enter " + type(self).__name__)

            def __exit__(self, *_: object) -> None:
                outer.log.append("leave " + type(self).__name__)

            def wait_stream(self, other: object) -> None:
                outer.log.append("wait")

            def replay(self) -> None:
                outer.log.append("replay")

        for name in ("Stream", "stream", "CUDAGraph", "graph"):
            monkeypatch.setattr(torch.cuda, name, type(name, (Quiet,), {}))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: Quiet())


def test_a_run_is_captured_once_and_again_when_the_scratch_moves(tmp_path, fake, flavour, monkeypatch):
    graphs = FakeGraphs(monkeypatch)
    runner = runner_of(flavour, plan_of(flavour, graph(tmp_path / "g.onnx")))
    x = torch.ones(2, 4)
    captured = runner.capture({"x": x})
    assert isinstance(captured, CapturedEngine)
    out = captured()
    steps = ["wait", "enter stream", "leave stream", "wait", "enter graph", "leave graph", "replay"]
    assert graphs.log == steps and torch.equal(out["y0"], 3 * x)
    assert fake.names("IExecutionContext").count("execute_async_v3") == 2
    assert captured()["y0"] is out["y0"] and graphs.log == [*steps, "replay"]
    runner.session.scratch.reserve(10_000)
    assert captured()["y0"] is out["y0"] and graphs.log == [*steps, "replay", *steps]
    # The captured outputs are the graph's own: what else the runner does leaves them alone.
    other = runner.run({"x": 2 * x})
    assert other["y0"] is not captured.outputs["y0"] and torch.equal(captured.outputs["y0"], 3 * x)


@pytest.mark.parametrize("way", ["weights", "onnx"])
def test_refitting_changes_the_weights_and_stays_possible(tmp_path, fake, flavour, way):
    plan = plan_of(flavour, graph(tmp_path / "g.onnx", weights={"w": 3.0, "v": 1.0}), refittable=True)
    for value in (5.0, -2.0):
        if way == "weights":
            plan = refit_plan(plan, flavour, {"w": np.array([value], np.float32)})
        else:
            other = graph(tmp_path / "other.onnx", weights={"w": value, "v": 1.0})
            plan = refit_plan(plan, flavour, onnx_path=other)
        x = torch.randn(2, 4)
        assert torch.equal(runner_of(flavour, plan).run({"x": x})["y0"], value * x)


def test_refitting_refuses_what_does_not_fit_and_changes_nothing(tmp_path, fake, flavour):
    plan = plan_of(flavour, graph(tmp_path / "g.onnx", weights={"w": 3.0, "v": 1.0}), refittable=True)
    engine = fake.Runtime(flavour.logger).deserialize_cuda_engine(plan)
    one = np.ones(1, np.float32)
    for weights, says in (
        ({"w": one, "z": one}, "no weights z; it has 2, as v, w"),
        ({"w": np.ones(2, np.float32)}, "2 numbers of FLOAT, the engine has 1 of FLOAT"),
        ({"w": one.astype(np.float16)}, "1 numbers of HALF"),
        ({"w": one.astype(np.float64)}, "1 numbers of float64"),
    ):
        with pytest.raises(ModelError, match=says):
            refit_engine(engine, flavour, weights)
    fake.needs_together = ("v", "w")
    with pytest.raises(ModelError, match="others that go with them, v"):
        refit_engine(engine, flavour, {"w": 5 * one})
    fake.needs_together = ()
    fake.refit_fails = True
    with pytest.raises(EngineMismatch, match="refit failed"):
        refit_engine(engine, flavour, {"w": 5 * one})
    assert engine.held["weights"] == {"w": 3.0, "v": 1.0}
    fake.refit_fails = False
    with pytest.raises(ModelError, match="not the engine's"):
        refit_plan(plan, flavour, onnx_path=graph(tmp_path / "o.onnx", weights={"u": 1.0}))
    fixed = plan_of(flavour, graph(tmp_path / "f.onnx"))
    with pytest.raises(EngineMismatch, match="refittable=True"):
        refit_plan(fixed, flavour, {"w": one})
    with pytest.raises(ValueError, match="either"):
        refit_plan(plan, flavour)


def test_layers_are_reported_on_request(tmp_path, flavour):
    session = Session(plan_of(flavour, graph(tmp_path / "g.onnx"), detailed=True), flavour, torch_scratch("cpu"))
    assert json.loads(session.inspect()) == {}


# Which library: what is installed, what suits the GPU.


@pytest.fixture
def shelf(fake_tensorrt, monkeypatch):
    """Set which libraries are installed."""

    def stock(*versions: str) -> None:
        modules = {version.split()[0]: fake_tensorrt.FakeTensorRT(version) for version in versions}
        find = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda n: n in modules or (n not in flavours.NAMES and find(n)) or None
        )
        load = importlib.import_module
        monkeypatch.setattr(importlib, "import_module", lambda n: modules.get(n) or load(n))
        flavours._load.cache_clear()

    yield stock
    monkeypatch.undo()
    flavours._load.cache_clear()


@pytest.mark.parametrize(
    ("there", "gpu", "chosen"),
    [
        (ALL[0:1], H200, "tensorrt"),
        (ALL[1:], H200, "tensorrt"),
        (ALL[1:], RTX, "tensorrt"),
        (ALL[2:], RTX, "tensorrt_rtx"),
        (ALL[1:], None, "tensorrt_rtx"),
    ],
)
def test_auto_takes_what_is_installed_and_suits_the_gpu(shelf, there, gpu, chosen):
    shelf(*there)
    assert load_flavour("auto", gpu).name == chosen


@pytest.mark.parametrize(
    ("there", "gpu", "says"),
    [
        ([], RTX, "tensorrt is not installed; pip install tensorrt-cu13; tensorrt_rtx is not installed"),
        (ALL[2:], H200, r"not made for NVIDIA H200 \(sm_90\); DDENGINE_TENSORRT=tensorrt_rtx tries"),
        (ALL[:1], None, "tensorrt_rtx is not installed; pip install tensorrt-rtx-cu13"),
    ],
)
def test_auto_says_what_is_missing(shelf, there, gpu, says):
    shelf(*there)
    with pytest.raises(BackendUnavailable, match=says):
        load_flavour("auto", gpu)
    with pytest.raises(InputError, match="auto, tensorrt, tensorrt_rtx"):
        load_flavour("trt", gpu)


def test_the_environment_can_name_it(shelf, monkeypatch):
    shelf(*ALL[1:])
    monkeypatch.setenv("DDENGINE_TENSORRT", "tensorrt_rtx")
    assert load_flavour("auto", H200).name == "tensorrt_rtx" and load_flavour("tensorrt", H200).name == "tensorrt"
    monkeypatch.setenv("DDENGINE_TENSORRT", "rtx")
    with pytest.raises(InputError, match="'rtx' is unknown"):
        load_flavour("auto", H200)


def test_old_and_broken_installations_are_named(shelf, fake_tensorrt, monkeypatch):
    shelf(ALL[2])
    assert load_flavour("tensorrt_rtx", H200).name == "tensorrt_rtx"  # by name, on any GPU
    assert installed() == {
        "tensorrt": "tensorrt is not installed; pip install tensorrt-cu13",
        "tensorrt_rtx": "1.7.1.116",
    }
    old = fake_tensorrt.FakeTensorRT(ALL[0])
    old.__version__ = "10.9.0.34"
    with pytest.raises(BackendUnavailable, match=r"10\.9\.0\.34, 10\.14 is the oldest"):
        flavour_of(old)

    def broken(name):
        raise ImportError("libnvinfer.so.10: cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", broken)
    flavours._load.cache_clear()
    with pytest.raises(BackendUnavailable, match=r"libnvinfer.so.10.*pip install tensorrt-rtx-cu13 again"):
        load_flavour("tensorrt_rtx")


def test_the_library_logs_into_logging(fake, flavour, caplog):
    levels = fake.ILogger.Severity
    with caplog.at_level(logging.DEBUG, "ddengine"), flavour.listening() as errors:
        for level in levels:
            flavour.logger.log(level, f"about {level.name} ")
    assert list(errors) == ["about INTERNAL_ERROR", "about ERROR"]
    assert "about WARNING" in caplog.text and "about VERBOSE" not in caplog.text


@pytest.mark.parametrize("version", ALL)
def test_the_recorded_interface_is_the_real_one(version, fake_tensorrt):
    """Read again from what is installed; a member we use and the table lacks is found here too."""
    name, number = version.split()
    module = pytest.importorskip(name)
    if module.__version__ != number:
        pytest.skip(f"{name} {module.__version__} is installed, not {number}")
    spec = importlib.util.spec_from_file_location("api", Path(fake_tensorrt.__file__).with_name("tensorrt_api.py"))
    api = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(api)
    index = fake_tensorrt.VERSIONS.index(version)
    recorded = {
        kind: {m: row["is"] for m, rows in members.items() for row in rows if index in row["in"]}
        for kind, members in fake_tensorrt.TABLE["classes"].items()
    }
    assert {kind: members for kind, members in recorded.items() if members} == {
        kind: members for kind, members in api.read_api(module, api.used_names()).items() if members
    }
