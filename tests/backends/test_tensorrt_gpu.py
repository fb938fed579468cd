"""What only a GPU can show of TensorRT: engines that run, captured and not, with and without PyTorch, and refitted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from ddengine.backends.device import LAYERS, open_device
from ddengine.backends.gpu import find_gpu, gpus
from ddengine.backends.tensorrt.flavour import NAMES, Flavour, load_flavour
from ddengine.backends.tensorrt.refit import refit_plan
from ddengine.backends.tensorrt.runner import EngineRunner, torch_scratch
from ddengine.backends.tensorrt.session import Session
from ddengine.backends.tensorrt.standalone import StandaloneRunner, device_scratch
from ddengine.errors import BackendUnavailable, EngineMismatch
from ddengine.export.to_tensorrt import BuildOptions, Profile, build_engine

pytestmark = pytest.mark.gpu
TYPES = {"float32": onnx.TensorProto.FLOAT, "float16": onnx.TensorProto.FLOAT16, "bfloat16": onnx.TensorProto.BFLOAT16}


@pytest.fixture(scope="module", params=NAMES)
def flavour(request) -> Flavour:
    if not gpus():
        pytest.skip("no GPU")
    try:
        return load_flavour(request.param)
    except BackendUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture
def runs(flavour) -> Flavour:
    """A library that says it is not made for this GPU may refuse every engine: the refusal is the result."""
    if not flavour.suits(find_gpu()):
        pytest.xfail(f"{flavour.name} {flavour.version} does not list sm_{find_gpu().sm}")
    return flavour


def network(path: Path, dtype: str, shape: tuple[object, ...], seed: int = 0) -> tuple[Path, torch.nn.Module]:
    """Convolution, SiLU, convolution, as a graph and as the same module."""
    torch.manual_seed(seed)
    module = torch.nn.Sequential(
        torch.nn.Conv2d(4, 32, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(32, 4, 3, padding=1)
    ).eval()
    names = {"0.weight": "w1", "0.bias": "b1", "2.weight": "w2", "2.bias": "b2"}
    weights = [
        helper.make_tensor(names[name], TYPES[dtype], tensor.shape, tensor.numpy().reshape(-1))
        for name, tensor in module.state_dict().items()
    ]
    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Sigmoid", ["c"], ["s"]),
        helper.make_node("Mul", ["c", "s"], ["m"]),
        helper.make_node("Conv", ["m", "w2", "b2"], ["y"], pads=[1, 1, 1, 1]),
    ]
    x, y = (helper.make_tensor_value_info(name, TYPES[dtype], shape) for name in "xy")
    model = helper.make_model(
        helper.make_graph(nodes, "g", [x], [y], weights), opset_imports=[helper.make_opsetid("", 22)]
    )
    model.ir_version = 10
    onnx.save(model, path)
    return path, module.to("cuda", getattr(torch, dtype))


def near(mine: torch.Tensor, module: torch.nn.Module, x: torch.Tensor) -> bool:
    """House rule: at most twice the error of PyTorch's own arithmetic in this precision, against float64."""
    with torch.no_grad():
        theirs = module(x).double()
        exact = module.double()(x.double())
        module.to(x.dtype)
    floor = 1e-6 * float(exact.abs().max())
    return float((mine.double() - exact).abs().max()) <= 2 * float((theirs - exact).abs().max()) + floor


def session_of(flavour: Flavour, plan: bytes) -> Session:
    return Session(plan, flavour, torch_scratch("cuda"))


def test_the_library_says_whether_it_takes_this_gpu(flavour, tmp_path):
    """On a GPU that the makers do not list either it runs or it says why not; both are answers."""
    graph, _ = network(tmp_path / "g.onnx", "float16", (1, 4, 16, 16))
    try:
        session_of(flavour, build_engine(graph, flavour=flavour, has_gpu=True).plan)
    except EngineMismatch as refusal:
        assert not flavour.suits(find_gpu())
        pytest.xfail(str(refusal))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("dynamic", [False, True])
def test_engines_compute_what_pytorch_does(runs, tmp_path, dtype, dynamic):
    shapes = [(1, 4, 16, 24), (2, 4, 32, 32)] if dynamic else [(1, 4, 16, 24)]
    graph, module = network(tmp_path / "g.onnx", dtype, ("b", 4, "h", "w") if dynamic else shapes[0])
    profiles = [Profile.exactly({"x": shape}) for shape in shapes] if dynamic else []
    runner = EngineRunner(
        session_of(runs, build_engine(graph, flavour=runs, profiles=profiles, has_gpu=True).plan), "cuda"
    )
    for shape in shapes:
        x = torch.randn(shape, device="cuda").to(getattr(torch, dtype))
        assert near(runner.run({"x": x})["y"], module, x)
    captured = runner.capture({"x": x})
    for _ in range(3):
        x.copy_(torch.randn(shape, device="cuda"))
        assert near(captured()["y"], module, x)


def test_nothing_is_allocated_in_steady_state(runs, tmp_path):
    graph, _ = network(tmp_path / "g.onnx", "float16", (1, 4, 64, 64))
    runner = EngineRunner(session_of(runs, build_engine(graph, flavour=runs, has_gpu=True).plan), "cuda")
    x = torch.randn(1, 4, 64, 64, device="cuda", dtype=torch.float16)
    runner.run({"x": x})
    torch.cuda.synchronize()
    before, free = torch.cuda.memory_stats()["allocation.all.allocated"], torch.cuda.mem_get_info()[0]
    for _ in range(10):
        runner.run({"x": x})
    torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before and torch.cuda.mem_get_info()[0] == free


@pytest.mark.parametrize("way", ["weights", "onnx"])
def test_refitted_engines_compute_with_the_new_weights(runs, tmp_path, way):
    shape = (1, 4, 16, 16)
    graph, _ = network(tmp_path / "g.onnx", "float32", shape)
    plan = build_engine(graph, flavour=runs, options=BuildOptions(refittable=True), has_gpu=True).plan
    other, module = network(tmp_path / "o.onnx", "float32", shape, seed=1)
    new = {weight.name: numpy_helper.to_array(weight).copy() for weight in onnx.load(other).graph.initializer}
    given = {"weights": new} if way == "weights" else {"onnx_path": other}
    x = torch.randn(shape, device="cuda")
    assert near(EngineRunner(session_of(runs, refit_plan(plan, runs, **given)), "cuda").run({"x": x})["y"], module, x)


@pytest.mark.parametrize("layer", LAYERS)
def test_engines_run_on_arrays_without_pytorch(runs, tmp_path, layer):
    graph, module = network(tmp_path / "g.onnx", "float32", (1, 4, 16, 16))
    plan = build_engine(graph, flavour=runs, has_gpu=True).plan
    try:
        device = open_device(0, layer)
    except BackendUnavailable as error:
        pytest.skip(str(error))
    with device:
        runner = StandaloneRunner(Session(plan, runs, device_scratch(device)), device)
        for _ in range(2):
            x = np.random.default_rng(0).standard_normal((1, 4, 16, 16)).astype(np.float32)
            y = runner.run({"x": x})["y"].copy()
        runner.close()
    assert near(torch.from_numpy(y).cuda(), module, torch.from_numpy(x).cuda())


def test_layers_are_told_in_detail(runs, tmp_path):
    graph, _ = network(tmp_path / "g.onnx", "float16", (1, 4, 16, 16))
    plan = build_engine(graph, flavour=runs, options=BuildOptions(detailed=True), has_gpu=True).plan
    assert json.loads(session_of(runs, plan).inspect())["Layers"]
