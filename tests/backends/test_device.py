"""The GPU without PyTorch, over a driver whose GPU is the host: the real bindings, contexts, memory and copies."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from ddengine.backends.device import open_device
from ddengine.backends.gpu import find_gpu, gpus
from ddengine.errors import BackendUnavailable, InputError

HERE = Path(__file__).parent
COMPILER = shutil.which("cc") or shutil.which("gcc")
PACKAGES = {"pycuda": "pycuda", "cuda-bindings": "cuda.bindings"}

# PyCUDA asks the driver for some hundred functions when it is loaded; those it never calls need not be there.
START = """
import os, sys
sys.setdlopenflags(os.RTLD_LAZY)
import gc
import numpy as np
from ddengine.backends.device import open_device
from ddengine.backends.gpu import find_gpu, gpus
from ddengine.errors import BackendUnavailable, InputError
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Path:
    """A folder with the driver, compiled."""
    if COMPILER is None or not sys.platform.startswith("linux"):
        pytest.skip("no C compiler to make the driver with")
    folder = tmp_path_factory.mktemp("driver")
    options = ["-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(folder / "libcuda.so.1")]
    subprocess.run([COMPILER, *options, str(HERE / "fake_driver.c"), "-ldl"], check=True)
    return folder


@pytest.fixture
def on_host_gpu(driver, tmp_path):
    """Runs code in a process that finds that driver; returns what it prints and the driver's calls."""

    def run(code: str, gpu_count: int = 1) -> tuple[list[str], list[str]]:
        log = tmp_path / "log"
        log.write_text("")
        environment = {
            **os.environ,
            "LD_LIBRARY_PATH": str(driver),
            "FAKE_DRIVER_LOG": str(log),
            "FAKE_DRIVER_GPUS": str(gpu_count),
        }
        command = [sys.executable, "-c", START + code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines(), log.read_text().splitlines()

    return run


def needs(layer: str) -> None:
    name = PACKAGES[layer]
    try:
        found = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        found = None
    if found is None:
        pytest.skip(f"{layer} is not installed")


def test_the_driver_tells_its_gpus(on_host_gpu):
    printed, _ = on_host_gpu(
        "print(gpus()); print(find_gpu().driver_major == '')\n"
        "try: find_gpu(1)\nexcept BackendUnavailable as error: print(error)\n"
    )
    assert printed == [
        "(Gpu(index=0, name='Host pretending', sm=89, memory=1073741824, driver='', cuda='13.0'),)",
        "True",
        "there is no GPU 1: the driver offers 1; use cuda:0 or set CUDA_VISIBLE_DEVICES",
    ]
    printed, _ = on_host_gpu(
        "print(gpus())\ntry: find_gpu()\nexcept BackendUnavailable as error: print(error)\n", gpu_count=0
    )
    assert printed[0] == "()" and "offers no GPU" in printed[1]


@pytest.mark.skipif(bool(gpus()), reason="there is a GPU")
def test_without_a_driver_it_says_so():
    with pytest.raises(BackendUnavailable, match=r"no NVIDIA driver .*another backend"):
        find_gpu()
    with pytest.raises(BackendUnavailable, match="no NVIDIA driver"):
        open_device()
    with pytest.raises(InputError, match="auto, pycuda, cuda-bindings"):
        open_device(layer="cupy")


@pytest.mark.parametrize("layer", PACKAGES)
def test_memory_copies_and_events(on_host_gpu, layer):
    needs(layer)
    printed, calls = on_host_gpu(f"""
with open_device(0, {layer!r}) as device:
    memory = device.allocate(48)
    source, back = device.pinned((3, 4), "float32"), device.pinned((3, 4), "float32")
    view = source[1:]  # keeps the page-locked memory
    source[:] = np.arange(12).reshape(3, 4)
    first = device.event()
    device.upload(memory, source)
    device.download(back, memory)
    last = device.event()
    device.synchronize()
    print(device.layer, device.gpu.sm, (back == source).all(), memory.address % 256, device.milliseconds(first, last))
    for array, size in ((np.zeros(13, "f4"), 48), (np.zeros((4, 4), "f4").T[:2], 48)):
        try:
            device.upload(memory, array)
        except InputError as error:
            print(error)
    try:
        device.allocate(2 << 30)
    except BackendUnavailable as error:
        print(error)
    device.free(memory)
    device.free(memory)
    device.allocate(0)
    del source, back
    gc.collect()
    print(view.sum())
    del view, first, last
    gc.collect()
device.close()
""")
    assert printed[0] == f"{layer} 89 True 0 1.5"
    assert all("must be contiguous" in line for line in printed[1:3]) and "2048 MiB left" in printed[3]
    assert printed[4] == "60.0"
    names = [line.split()[0] for line in calls]
    assert names.index("retain") < names.index("push") < names.index("stream")
    stream = next(line.split()[1] for line in calls if line.startswith("stream "))
    assert {line.split()[1] for line in calls if line.split()[0] in {"upload", "download", "wait"}} == {stream}
    count = Counter(names)
    assert count["alloc"] == count["free"] == 2 and count["host_alloc"] == count["host_free"] == 2
    assert count["stream_end"] == count["release"] == 1 and calls[-1] == "release 0"


@pytest.mark.parametrize("layer", PACKAGES)
def test_engines_run_without_pytorch(on_host_gpu, tmp_path, layer):
    """The whole runner: an engine of the recording library computes at the addresses that the device layer gave it."""
    needs(layer)
    fake = HERE / "fake_tensorrt.py"
    printed, calls = on_host_gpu(f"""
import importlib.util, json
from ddengine.backends.tensorrt.flavour import flavour_of
from ddengine.backends.tensorrt.session import Session
from ddengine.backends.tensorrt.standalone import StandaloneRunner, device_scratch
spec = importlib.util.spec_from_file_location("fake_tensorrt", {str(fake)!r})
module = sys.modules["fake_tensorrt"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
flavour = flavour_of(module.FakeTensorRT(module.VERSIONS[0]))
profile = {{"x": [[1, 4], [2, 4], [3, 4]]}}
plan = json.dumps(dict(
    inputs=[["x", "HALF", [-1, 4]]], outputs=[["y", "FLOAT", [-1, 4]]], profiles=[profile], weights={{"w": 3.0}},
    weight_type="HALF", refittable=False,
)).encode()
with open_device(0, {layer!r}) as device:
    runner = StandaloneRunner(Session(plan, flavour, device_scratch(device)), device)
    for rows in (2, 2, 3):
        x = np.arange(4 * rows).reshape(rows, 4).astype("float16")
        print((runner.run({{"x": x}})["y"] == 3 * x.astype("float32")).all())
    try:
        runner.run({{"x": x.astype("float32")}})
    except InputError as error:
        print(error)
    runner.close()
print("torch" in sys.modules)
""")
    assert printed == ["True", "True", "True", "engine: x is float32, it must be float16", "False"]
    count = Counter(line.split()[0] for line in calls)
    assert count["alloc"] == count["free"] == 6  # two buffers for each of two sizes, and the scratch that grew
    assert count["upload"] == count["download"] == 3
