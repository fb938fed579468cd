"""Engines from graphs: what the builder is told, checked against both libraries' interfaces, and real engines."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from ddengine.backends.tensorrt.flavour import Flavour, flavour_of, load_flavour
from ddengine.errors import BackendUnavailable, Cancelled, InputError, ModelError
from ddengine.export.graph import read_graph
from ddengine.export.quality_gate import GateResult, image_quality_gate
from ddengine.export.to_tensorrt import BuildOptions, Port, Profile, build_engine

FULL = ["tensorrt 10.16.1.11", "tensorrt 11.4.0.106"]
ALL = [*FULL, "tensorrt_rtx 1.7.1.116"]
TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16, "fp32": TensorProto.FLOAT}
SIZES = Profile({"x": (1, 4, 8, 8)}, {"x": (1, 4, 16, 16)}, {"x": (2, 4, 32, 32)})


def save(graph: onnx.GraphProto, path: Path, opset: int = 20) -> Path:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    model.ir_version = 10
    onnx.save(model, path)
    return path


def scaled(path: Path, shape: tuple[object, ...] = (1, 4, 16, 16), dtype: int = TensorProto.FLOAT) -> Path:
    """y = x * w: what the recording library can run."""
    x, y = (helper.make_tensor_value_info(name, dtype, shape) for name in "xy")
    weight = helper.make_tensor("w", dtype, [1], [3.0])
    return save(helper.make_graph([helper.make_node("Mul", ["x", "w"], ["y"])], "g", [x, y][:1], [y], [weight]), path)


def small_network(path: Path, precision: str, shape: tuple[object, ...] = (1, 4, 16, 16)) -> Path:
    """Convolution, SiLU, self-attention over the cells, convolution: the kinds of node a pass is made of."""
    random = np.random.default_rng(0)

    def weight(name: str, *sides: int) -> onnx.TensorProto:
        values = 0.1 * random.standard_normal(sides).astype(np.float32)
        return helper.make_tensor(name, TYPES[precision], sides, values.reshape(-1))

    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Sigmoid", ["c"], ["s"]),
        helper.make_node("Mul", ["c", "s"], ["m"]),
        helper.make_node("Reshape", ["m", "flat"], ["cells"]),
        helper.make_node("Transpose", ["cells"], ["tokens"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["tokens", "q"], ["query"]),
        helper.make_node("MatMul", ["query", "cells"], ["scores"]),
        helper.make_node("Softmax", ["scores"], ["share"], axis=-1),
        helper.make_node("MatMul", ["share", "tokens"], ["mixed"]),
        helper.make_node("Transpose", ["mixed"], ["back"], perm=[0, 2, 1]),
        helper.make_node("Shape", ["m"], ["size"]),
        helper.make_node("Reshape", ["back", "size"], ["grid"]),
        helper.make_node("Conv", ["grid", "w2"], ["y"], pads=[1, 1, 1, 1]),
    ]
    flat = numpy_helper.from_array(np.array([0, 8, -1]), "flat")
    weights = [weight("w1", 8, 4, 3, 3), weight("b1", 8), weight("q", 8, 8), weight("w2", 4, 8, 3, 3), flat]
    x, y = (helper.make_tensor_value_info(name, TYPES[precision], shape) for name in "xy")
    return save(helper.make_graph(nodes, "g", [x], [y], weights), path)


@pytest.fixture(params=ALL)
def fake(request, fake_tensorrt):
    return fake_tensorrt.FakeTensorRT(request.param)


@pytest.fixture
def recorded(fake) -> Flavour:
    return flavour_of(fake)


def test_the_builder_is_told_what_was_asked(tmp_path, fake, recorded):
    options = BuildOptions(optimization_level=5, workspace=1 << 30, refittable=True, detailed=True)
    told = []
    built = build_engine(scaled(tmp_path / "g.onnx"), flavour=recorded, options=options, progress=told.append)
    assert fake.arguments("IBuilderConfig", "builder_optimization_level") == [(5,)]
    assert fake.arguments("IBuilderConfig", "set_memory_pool_limit") == [(fake.MemoryPoolType.WORKSPACE, 1 << 30)]
    assert fake.arguments("IBuilderConfig", "set_flag") == [(fake.BuilderFlag.REFIT,)]
    assert fake.arguments("IBuilderConfig", "clear_flag") == [(fake.BuilderFlag.TF32,)]
    assert fake.arguments("IBuilderConfig", "profiling_verbosity") == [(fake.ProfilingVerbosity.DETAILED,)]
    assert fake.arguments("OnnxParser", "parse_from_file") == [(str(tmp_path / "g.onnx"),)]
    assert len(fake.arguments("Builder", "build_serialized_network")) == 1
    facts = built.facts
    assert (facts.flavour, facts.version) == (fake.__name__, fake.__version__)
    assert facts.inputs == {"x": Port("FLOAT", (1, 4, 16, 16))} and facts.outputs == {
        "y": Port("FLOAT", (1, 4, 16, 16))
    }
    assert (facts.precision, facts.layers, facts.profiles, facts.plan_bytes) == ("fp32", 1, 0, len(built.plan))
    assert facts.as_json()["options"]["workspace"] == 1 << 30
    steps = [at.step for at in told]
    assert {(at.stage, at.total) for at in told} == {("build", 1000)}
    assert steps == sorted(set(steps)) and steps[-1] == 1000 and len(steps) > 3


def test_nothing_is_told_that_was_not_asked(tmp_path, fake, recorded):
    build_engine(scaled(tmp_path / "g.onnx"), flavour=recorded, options=BuildOptions(tf32=True))
    said = set(fake.names("IBuilderConfig"))
    assert said <= {"builder_optimization_level", "create_timing_cache", "set_timing_cache", "get_timing_cache"}


def test_profiles_reach_the_builder(tmp_path, fake, recorded):
    graph = scaled(tmp_path / "g.onnx", ("b", 4, "h", "w"))
    one = Profile.exactly({"x": (1, 4, 64, 64)})
    assert build_engine(graph, flavour=recorded, profiles=[SIZES, one]).facts.profiles == 2
    assert fake.arguments("IOptimizationProfile", "set_shape") == [
        ("x", (1, 4, 8, 8), (1, 4, 16, 16), (2, 4, 32, 32)),
        ("x", (1, 4, 64, 64), (1, 4, 64, 64), (1, 4, 64, 64)),
    ]
    assert len(fake.names("IBuilderConfig")) >= 2


@pytest.mark.parametrize(
    ("profiles", "says"),
    [
        ([], "no profile"),
        ([Profile({}, {}, {})], "no sizes for input 'x'"),
        ([Profile.exactly({"x": (1, 5, 8, 8)})], "must not decrease"),
        ([Profile.exactly({"x": (1, 4, 8)})], "must not decrease"),
        ([Profile(SIZES.most, SIZES.best, SIZES.least)], "must not decrease"),
    ],
)
def test_profiles_that_do_not_fit_are_refused_before_building(tmp_path, fake, recorded, profiles, says):
    with pytest.raises(InputError, match=says):
        build_engine(scaled(tmp_path / "g.onnx", ("b", 4, "h", "w")), flavour=recorded, profiles=profiles)
    with pytest.raises(InputError, match="no dynamic input"):
        build_engine(scaled(tmp_path / "s.onnx"), flavour=recorded, profiles=[SIZES])
    assert fake.names("Builder") == []


@pytest.mark.parametrize("version", FULL)
def test_the_timing_cache_is_used_and_given_back(tmp_path, fake_tensorrt, version):
    fake = fake_tensorrt.FakeTensorRT(version)
    flavour, graph = flavour_of(fake), scaled(tmp_path / "g.onnx")
    first = build_engine(graph, flavour=flavour)
    again = build_engine(graph, flavour=flavour, timing_cache=first.timing_cache)
    assert (first.timing_cache, again.timing_cache) == (b"+", b"++")
    assert {ignore for _, ignore in fake.arguments("IBuilderConfig", "set_timing_cache")} == {False}
    assert build_engine(graph, flavour=flavour, timing_cache=b"foreign").timing_cache == b"+"


def test_rtx_has_no_timing_cache_and_takes_targets(tmp_path, fake_tensorrt):
    """Its timing cache is deprecated and does nothing."""
    fake = fake_tensorrt.FakeTensorRT(ALL[2])
    flavour, graph = flavour_of(fake), scaled(tmp_path / "g.onnx")
    built = build_engine(graph, flavour=flavour, options=BuildOptions(target=89))
    assert built.timing_cache is None and "create_timing_cache" not in fake.names("IBuilderConfig")
    assert fake.arguments("IBuilderConfig", "set_compute_capability") == [(fake.ComputeCapability.SM89, 0)]
    build_engine(graph, flavour=flavour, has_gpu=True)
    current = fake.arguments("IBuilderConfig", "set_compute_capability")[-1]
    assert current == (fake.ComputeCapability.CURRENT, 0)
    with pytest.raises(InputError, match=r"cannot build for 90.*75, 80"):
        build_engine(graph, flavour=flavour, options=BuildOptions(target=90))


@pytest.mark.parametrize("version", FULL)
def test_full_tensorrt_builds_for_the_gpu_at_hand_only(tmp_path, fake_tensorrt, version):
    with pytest.raises(InputError, match="GPU at hand"):
        build_engine(
            scaled(tmp_path / "g.onnx"),
            flavour=flavour_of(fake_tensorrt.FakeTensorRT(version)),
            options=BuildOptions(target=89),
        )


def test_a_parser_tells_all_its_errors(tmp_path, fake, recorded):
    fake.parse_errors = [(3, "Attention", "n3", "no such input"), (-1, "", "", "bad model"), (7, "Foo", "", "unknown")]
    with pytest.raises(ModelError) as refused:
        build_engine(scaled(tmp_path / "g.onnx"), flavour=recorded)
    for part in ("node 3 (Attention 'n3'): no such input", "the model: bad model", "node 7 (Foo): unknown", "again"):
        assert part in str(refused.value)


def test_a_failed_build_tells_why_and_whose_fault_it_is(tmp_path, fake, recorded):
    graph = scaled(tmp_path / "g.onnx")
    fake.build_fails = ["Could not find any implementation", "out of workspace"]
    with pytest.raises(ModelError, match=r"any implementation; out of workspace; try another"):
        build_engine(graph, flavour=recorded)
    fake.build_fails = ["Error Code 1: Cuda Runtime (driver version is insufficient)"]
    with pytest.raises(BackendUnavailable, match="without a GPU"):
        build_engine(graph, flavour=recorded)
    with pytest.raises(ModelError, match="insufficient"):
        build_engine(graph, flavour=recorded, has_gpu=True)


@pytest.mark.parametrize("error", [Cancelled, KeyboardInterrupt])
def test_progress_can_stop_a_build(tmp_path, recorded, error):
    def stop(at):
        if at.step > 200:
            raise error

    with pytest.raises(error):
        build_engine(scaled(tmp_path / "g.onnx"), flavour=recorded, progress=stop)


def test_precision_is_the_graphs_own(tmp_path, recorded):
    for precision, dtype in TYPES.items():
        graph = scaled(tmp_path / "g.onnx", dtype=dtype)
        assert build_engine(graph, flavour=recorded, precision=precision).facts.precision == precision
        for other in TYPES.keys() - {precision}:
            with pytest.raises(ModelError, match=f"a graph in {precision}, not {other}"):
                build_engine(graph, flavour=recorded, precision=other)


def fp8_network(path: Path) -> Path:
    """A product whose operands go through fp8."""
    half, fp8 = TensorProto.FLOAT16, TensorProto.FLOAT8E4M3FN
    nodes = []
    for name in "xw":
        nodes += [
            helper.make_node("QuantizeLinear", [name, "scale", "zero"], [f"{name}q"]),
            helper.make_node("DequantizeLinear", [f"{name}q", "scale", "zero"], [f"{name}d"]),
        ]
    nodes.append(helper.make_node("MatMul", ["xd", "wd"], ["y"]))
    weights = [
        helper.make_tensor("w", half, [64, 64], np.linspace(-1, 1, 64 * 64)),
        helper.make_tensor("scale", half, [], [0.01]),
        helper.make_tensor("zero", fp8, [], [0.0]),
    ]
    x, y = (helper.make_tensor_value_info(name, half, [32, 64]) for name in "xy")
    return save(helper.make_graph(nodes, "g", [x], [y], weights), path)


def test_fp8_needs_a_passed_gate_of_the_same_graph(tmp_path, recorded):
    graph = fp8_network(tmp_path / "g.onnx")
    digest = read_graph(graph).digest
    with pytest.raises(ModelError, match="measure it first"):
        build_engine(graph, flavour=recorded)
    for gate, says in (
        (GateResult(digest, (50.0, 45.0, 39.9, 60.0)), "39.9 dB, 40.0 are needed"),
        (GateResult(digest, (50.0,) * 3), "3 pictures were measured"),
        (GateResult("0" * 64, (50.0,) * 4), "another graph"),
    ):
        with pytest.raises(ModelError, match=says):
            build_engine(graph, flavour=recorded, fp8_gate=gate)
    assert build_engine(graph, flavour=recorded, fp8_gate=GateResult(digest, (40.0,) * 4)).plan


def test_the_gate_measures_pictures():
    random = np.random.default_rng(0)
    pictures = [random.integers(0, 255, (6, 7, 3), dtype=np.uint8) for _ in range(4)]
    worse = [picture.copy() for picture in pictures]
    worse[2] = np.where(worse[2] > 127, worse[2] - 2, worse[2] + 2).astype(np.uint8)  # every value off by two
    result = image_quality_gate("g", pictures, worse)
    assert result.decibels[0] == np.inf and result.decibels[2] == pytest.approx(20 * np.log10(255 / 2))
    assert result.passed and not image_quality_gate("g", pictures, worse, limit=42.2).passed
    with pytest.raises(InputError, match="pairs"):
        image_quality_gate("g", pictures, worse[1:])
    with pytest.raises(InputError, match="one size"):
        image_quality_gate("g", pictures, [picture[1:] for picture in worse])


def test_graphs_tell_their_weights_files(tmp_path, recorded):
    model = onnx.load(small_network(tmp_path / "g.onnx", "fp16"))
    onnx.save(model, tmp_path / "e.onnx", save_as_external_data=True, location="e.data", size_threshold=0)
    facts = read_graph(tmp_path / "e.onnx")
    assert [path.name for path in facts.files] == ["e.onnx", "e.data"] and facts.opset == 20
    assert facts.precision == "fp16" and facts.inputs["x"].shape == (1, 4, 16, 16)
    before = facts.digest
    with open(tmp_path / "e.data", "r+b") as data:
        data.write(b"\1")
    assert read_graph(tmp_path / "e.onnx").digest != before
    (tmp_path / "e.data").unlink()
    (tmp_path / "no.onnx").write_bytes(b"not a graph")
    for name, says in (("e.onnx", "e.data, which is not beside it"), ("no.onnx", "as ONNX"), ("none.onnx", "as ONNX")):
        with pytest.raises(ModelError, match=says):
            build_engine(tmp_path / name, flavour=recorded)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [({"optimization_level": 6}, "0 .fast build. to 5"), ({"workspace": 1000}, "1 MiB")],
)
def test_options_are_checked(wrong, says):
    with pytest.raises(InputError, match=says):
        BuildOptions(**wrong)


# Engines that are really built; TensorRT-RTX does it without a GPU.


@pytest.fixture(scope="module")
def rtx() -> Flavour:
    pytest.importorskip("tensorrt_rtx")
    return load_flavour("tensorrt_rtx")


@pytest.mark.parametrize("precision", TYPES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_rtx_builds_every_precision_static_and_dynamic(tmp_path, rtx, precision, dynamic):
    graph = small_network(tmp_path / "g.onnx", precision, ("b", 4, "h", "w") if dynamic else (1, 4, 16, 16))
    profiles = [SIZES, Profile.exactly({"x": (1, 4, 64, 64)})] if dynamic else []
    told = []
    built = build_engine(graph, flavour=rtx, precision=precision, profiles=profiles, progress=told.append)
    name = {"fp16": "HALF", "bf16": "BF16", "fp32": "FLOAT"}[precision]
    side = -1 if dynamic else 16
    shape = (-1 if dynamic else 1, 4, side, side)
    assert built.facts.inputs == {"x": Port(name, shape)} and built.facts.outputs == {"y": Port(name, shape)}
    assert built.facts.profiles == len(profiles) and built.facts.layers > 5
    assert len(built.plan) == built.facts.plan_bytes > 10_000
    assert told[-1].step == 1000 and len(told) > 10


def test_rtx_builds_fp8_for_gpus_that_have_it(tmp_path, rtx):
    graph = fp8_network(tmp_path / "g.onnx")
    gate = GateResult(read_graph(graph).digest, (50.0,) * 4)
    assert build_engine(graph, flavour=rtx, options=BuildOptions(target=89), fp8_gate=gate).plan


def test_rtx_says_what_it_cannot_parse(tmp_path, rtx):
    model = onnx.load(small_network(tmp_path / "g.onnx", "fp16"))
    model.graph.node[1].op_type, model.graph.node[1].domain = "NoSuchNode", "nowhere"
    model.opset_import.append(helper.make_opsetid("nowhere", 1))
    onnx.save(model, tmp_path / "b.onnx")
    with pytest.raises(ModelError, match=r"node 1 \(NoSuchNode\): .*lugin"):
        build_engine(tmp_path / "b.onnx", flavour=rtx)


def test_rtx_stops_when_told(tmp_path, rtx):
    def stop(at):
        raise Cancelled("enough")

    with pytest.raises(Cancelled, match="enough"):
        build_engine(small_network(tmp_path / "g.onnx", "fp16"), flavour=rtx, progress=stop)
