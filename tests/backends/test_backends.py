"""Every pass by every backend that runs here, a whole edit by both, the choice between them, and the commands."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor

import ddengine.backends as backends
from ddengine.backends import auto_backend, create_passes, make_ready, select_backend, what_ran
from ddengine.backends.build import build_command, build_programs
from ddengine.backends.eager import EagerPasses
from ddengine.backends.engines import EnginePasses, wanted_passes
from ddengine.backends.graphs import PASSES, PassShape
from ddengine.backends.passes import Passes
from ddengine.backends.sizes import parse_size
from ddengine.cli import main
from ddengine.config import DirectDragConfig
from ddengine.engine import Engine
from ddengine.errors import BackendUnavailable, InputError
from ddengine.models.load import Model, load_model
from ddengine.store import ArtefactStore

HW, GRID = (128, 128), (16, 16)
ARROW = ((40, 60), (60, 60))


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model("embedded", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def store(model: Model, tmp_path_factory: pytest.TempPathFactory) -> ArtefactStore:
    """The embedded model's passes at its own size, as `ddengine build` makes them."""
    store, told = ArtefactStore(tmp_path_factory.mktemp("store")), []
    built = build_programs(model, "onnxruntime", wanted_passes(HW, readout_hw=GRID), store, progress=told.append)
    assert {one.name for one in built} == set(PASSES) and all(one.made for one in built)
    steps = [at.step for at in told]
    assert steps == sorted(steps) and steps[-1] == told[-1].total == 100 * len(built)
    return store


@pytest.fixture
def cached(store: ArtefactStore, monkeypatch: pytest.MonkeyPatch) -> ArtefactStore:
    """The same as the user's cache."""
    monkeypatch.setenv("DDENGINE_CACHE", str(store.root))
    return store


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def close(found: Tensor, wanted: Tensor, share: float = 1e-5) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=share * float(wanted.abs().max()))


def everything(passes: Passes, name: str, generator: torch.Generator) -> list[Tensor]:
    """All that a pass gives for two inputs and times."""
    found: list[Tensor] = []
    for time in (741, 21):
        image = torch.rand(1, 3, *HW, generator=generator) * 2 - 1
        latent, other = (torch.randn(1, 4, 16, 16, generator=generator) for _ in range(2))
        if name == "encode":
            found.append(passes.encode(image))
        elif name == "decode":
            found.append(passes.decode(latent))
        elif name == "predict":
            found.append(passes.predict(latent, time))
        else:
            out = passes.reference(other, time, readout_hw=GRID if name == "reference" else None)
            flat = [tensor for pair in out.kv for tensor in pair]
            if name == "reference":
                found += [out.noise, out.feature, *out.appearance, *flat]
            else:
                found.append(passes.denoise(latent, time, out.kv))
    return found


@pytest.mark.parametrize("name", PASSES)
@pytest.mark.parametrize("backend", ["onnxruntime", "auto"])
def test_every_pass_is_the_eager_one(backend: str, name: str, model: Model, store: ArtefactStore) -> None:
    passes = create_passes(backend, model, store=store)
    found = everything(passes, name, torch.Generator().manual_seed(0))
    wanted = everything(EagerPasses(model), name, torch.Generator().manual_seed(0))
    assert len(found) == len(wanted) > 0
    for mine, theirs in zip(found, wanted, strict=True):
        close(mine, theirs)
        if name in ("predict", "denoise"):
            close(mine, theirs, passes.rounding)
    ran = what_ran(passes, select_backend(backend), editing=name in ("predict", "denoise", "decode"))
    assert any(told.startswith("onnxruntime (") for told in ran.values())


def test_what_has_no_program_is_eager_and_says_why(model: Model, store: ArtefactStore) -> None:
    passes, eager = create_passes("onnxruntime", model, store=store), EagerPasses(model)
    latent = torch.randn(1, 4, 16, 16)
    leaf = latent.clone().requires_grad_()
    out = passes.supervise(leaf, 741, readout_hw=GRID)
    assert torch.equal(out.noise, eager.supervise(leaf, 741, readout_hw=GRID).noise) and out.noise.requires_grad
    told = passes.reference(latent, 741, readout_hw=GRID, readout_times=[1, 21])
    assert torch.equal(
        told.appearance[1], eager.reference(latent, 741, readout_hw=GRID, readout_times=[1, 21]).appearance[1]
    )
    passes.predict(latent, 741)
    assert isinstance(passes, EnginePasses)
    ran = passes.account(editing=False)
    assert "1 x eager (the head is told other times than the pass's own)" in ran["invert"]
    assert "1 x onnxruntime (as asked)" in ran["invert"]
    assert passes.account(editing=False) == {}
    passes.supervise(leaf, 741)
    assert passes.account(editing=True) == {"drag": "eager (no engine has gradients)"}


def test_a_missing_program_is_named_with_its_command_or_left_to_eager(model: Model, store: ArtefactStore) -> None:
    def remedy(backend: str, shape: PassShape) -> str:
        return build_command(["--model", "my model"], backend, shape)

    latent = torch.randn(1, 4, 8, 10)
    strict = create_passes("onnxruntime", model, store=store, remedy=remedy)
    command = r"ddengine build --model 'my model' --backend onnxruntime --size 80x64"
    with pytest.raises(BackendUnavailable, match=f"cannot run predict: nothing is built for 80 x 64; {command}"):
        strict.predict(latent, 1)
    with pytest.raises(BackendUnavailable, match=f"cannot run encode: .*{command}"):
        make_ready(strict, wanted_passes((64, 80)))
    auto = create_passes("auto", model, store=store, remedy=remedy)
    make_ready(auto, wanted_passes((64, 80)))
    assert auto.rounding == 0.0  # all of it is eager
    assert torch.equal(auto.predict(latent, 1), EagerPasses(model).predict(latent, 1))
    ran = what_ran(auto, select_backend("auto"), editing=False)
    assert ran["invert"] == f"eager (nothing is built for 80 x 64; {remedy('onnxruntime', PassShape((64, 80)))})"


def test_the_rule_of_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert auto_backend(cpu, torch.float32).name == "onnxruntime"
    for device, dtype in ((cpu, torch.float16), (cpu, torch.bfloat16), (torch.device("mps"), torch.float32)):
        chosen = auto_backend(device, dtype)
        assert chosen.name == "eager" and "nothing faster" in chosen.reason
    monkeypatch.setattr(backends, "_tensorrt", lambda: backends.Backend("tensorrt", True, "runs"))
    assert auto_backend(cuda, torch.float16).name == "tensorrt"
    monkeypatch.setattr(backends, "_tensorrt", lambda: backends.Backend("tensorrt", False, "no driver"))
    assert auto_backend(cuda, torch.float16) == backends.Backend("eager", True, "auto: no driver")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else real(name))
    assert "pip install 'ddengine[onnx]'" in auto_backend(cpu, torch.float32).reason
    with pytest.raises(BackendUnavailable, match=r"pip install 'ddengine\[onnx\]'"):
        select_backend("onnxruntime")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_tensorrt_without_a_gpu_says_what_it_takes() -> None:
    with pytest.raises(BackendUnavailable, match=r"NVIDIA.*pip install 'ddengine\[tensorrt\]'.*backend='eager'"):
        Engine.load(backend="tensorrt")


def picture() -> Image.Image:
    rows, columns = np.mgrid[0:128, 0:128]
    blob = 200 * np.exp(-((rows - 60) ** 2 + (columns - 40) ** 2) / 300)
    return Image.fromarray(np.stack([rows, columns, blob], -1).astype(np.uint8))


def edited(backend: str, **changes: object):
    config = DirectDragConfig.preset("preview", **changes)
    return Engine.load(backend=backend).edit(picture(), [ARROW], config=config)


def difference(a: Image.Image, b: Image.Image) -> np.ndarray:
    return np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16))


def test_without_a_drag_the_picture_is_within_one_level(cached: ArtefactStore) -> None:
    """Encode, invert, reference, denoise and decode by engines; no loop that makes much of rounding."""
    changes = {"drag_end_step": 0, "preserve": False, "latent_warpage": False}
    mine, theirs = edited("onnxruntime", **changes), edited("eager", **changes)
    assert difference(mine.image, theirs.image).max() <= 1
    assert mine.backend["invert"] == mine.backend["denoise"] == "onnxruntime (as asked)"


def test_a_whole_edit_is_the_eager_one(cached: ArtefactStore) -> None:
    """The drag loop makes much of rounding: what is held is where the points end, and the picture on the whole."""
    mine, theirs, auto = edited("onnxruntime"), edited("eager"), edited("auto")
    cell = 2.0  # pixels of a feature cell
    for a, b in zip(mine.handles, theirs.handles, strict=True):
        assert max(abs(a[0] - b[0]), abs(a[1] - b[1])) <= cell
    assert difference(mine.image, theirs.image).mean() < 0.1
    assert mine.image.tobytes() == auto.image.tobytes()
    for stage in ("encode", "invert", "reference", "denoise", "decode"):
        assert mine.backend[stage] == "onnxruntime (as asked)"
        assert auto.backend[stage] == "onnxruntime (auto: built for this size)"
        assert theirs.backend[stage].startswith("eager (")
    assert mine.backend["drag"].startswith("eager (no ")


def test_an_edit_never_builds_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDENGINE_CACHE", str(tmp_path))
    command = r"run `ddengine build --model embedded --backend onnxruntime --size 128`.*build=True \(--build\)"
    told: list[object] = []
    with pytest.raises(BackendUnavailable, match=command):
        Engine.load(backend="onnxruntime").edit(picture(), [ARROW], progress=told.append)
    assert told == [] and not (tmp_path / "onnx").exists()
    asked: list[tuple[str, PassShape]] = []

    def build(self: object, name: str, shape: PassShape, progress: Callable[[object], object]) -> None:
        asked.append((name, shape))
        raise BackendUnavailable("asked to build")

    monkeypatch.setattr("ddengine.backends.ort.OnnxRuntimePrograms.build", build)
    with pytest.raises(BackendUnavailable, match="asked to build"):
        Engine.load(backend="onnxruntime", build=True).edit(picture(), [ARROW])
    assert asked == [("encode", PassShape(HW))]


def test_the_passes_that_edits_want() -> None:
    wanted = wanted_passes((83, 70), readout_hw=(10, 8), prompt_tokens=3)
    whole = PassShape((80, 64), prompt_tokens=3)
    assert wanted[:2] == (
        ("encode", PassShape((83, 70))),
        ("reference", PassShape((80, 64), readout_hw=(10, 8), prompt_tokens=3)),
    )
    assert set(wanted[2:]) == {
        ("reference", whole),
        ("predict", whole),
        ("denoise", whole),
        ("decode", PassShape((80, 64))),
    }
    assert len(wanted_passes(HW)) == 5


def test_the_command_for_a_shape() -> None:
    shape = PassShape((344, 512), 2, (64, 64), 77)
    words = ["--model", "m", "--lora", "a b"]
    command = build_command(words, "tensorrt", shape)
    parts = "--size 512x344 --batch 2 --prompt --readout-grid 64"
    assert command == f"ddengine build --model m --lora 'a b' --backend tensorrt {parts}"
    assert build_command([], "onnxruntime", PassShape((64, 64), readout_hw=(8, 8))).endswith("onnxruntime --size 64")
    assert parse_size("512") == (512, 512) and parse_size("768X512") == (512, 768)
    for text in ("", "x", "12", "512x", "5000", "1x2x3", "-512"):
        with pytest.raises(InputError, match="for example 512, 768x512"):
            parse_size(text)


def call(*words: str) -> dict:
    done = CliRunner().invoke(main, [*words, "--json"])
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


def test_building_again_makes_nothing_and_info_lists_what_is_there(cached: ArtefactStore) -> None:
    programs = call("build", "--model", "embedded")["programs"]
    assert len(programs) == 6 and not any(one["made"] for one in programs)
    assert all(Path(one["folder"]).parent.parent == cached.root for one in programs)
    text = CliRunner().invoke(main, ["build"]).stdout
    assert text.count("there  ") == 6 and "with a readout map" in text and "--backend onnxruntime" in text
    entries = call("info")["cache"]["entries"]
    assert sorted(one["what"].split()[0] for one in entries if one["kind"] == "onnx") == sorted([*PASSES, "reference"])
    assert "decode 128 x 128 float32" in CliRunner().invoke(main, ["info"]).stdout


def test_clearing_the_cache(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "data").write_bytes(b"12345")

    ArtefactStore(tmp_path).make("onnx", {"pass": "encode"}, write)
    found = call("cache", "clear", "--cache", str(tmp_path))
    assert (found["entries"], found["busy"]) == (1, 0) and found["bytes"] > 5
    assert ArtefactStore(tmp_path).entries() == []


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["build", "--size", "12"], "for example 512, 768x512"),
        (["build", "--precision", "int8"], "int8"),
        (["build", "--precision", "bfloat16", "--device", "cpu"], "use dtype='float32'"),
        (["build", "--model", "no/such/folder"], "no/such/folder"),
    ],
)
def test_build_refuses_in_one_line(words: list[str], says: str) -> None:
    done = CliRunner().invoke(main, words)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("ddengine: ") and done.stderr.count("\n") == 1
    assert says in done.stderr
