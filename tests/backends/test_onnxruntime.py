"""The ONNX Runtime backend: the golden model's passes within 1e-4, on the caller's memory, and what it refuses."""

from __future__ import annotations

import logging
import tracemalloc
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor

from ddengine.backends.eager import EagerPasses, prompt_context
from ddengine.backends.engines import EnginePasses, wanted_passes
from ddengine.backends.graphs import PassShape
from ddengine.backends.ort import ROUNDING, OnnxRuntimePrograms, providers
from ddengine.errors import BackendUnavailable, EngineMismatch, ModelError
from ddengine.export.to_onnx import GRAPH
from ddengine.models.load import Model, load_model
from ddengine.store import ArtefactStore

HW, GRID, TOKENS = (64, 48), (8, 6), 77


@pytest.fixture(scope="module")
def model(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    head = golden / "tiny-readout-appearance.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DDENGINE_CACHE", str(tmp_path_factory.mktemp("cache")))
        return load_model(golden / "tiny-sd", device="cpu", dtype="float32", readout=head)


@pytest.fixture(scope="module")
def eager(model: Model) -> EagerPasses:
    return EagerPasses(model)


@pytest.fixture(scope="module")
def prompted(model: Model) -> EagerPasses:
    """The oracle under a prompt."""
    return EagerPasses(model, prompt_context(model, "the cat and dog"))


@pytest.fixture(scope="module")
def programs(model: Model, eager: EagerPasses, tmp_path_factory: pytest.TempPathFactory) -> OnnxRuntimePrograms:
    """Everything built: encode and decode, and the walks for a prompt, whose keys and values are inputs."""
    store = ArtefactStore(tmp_path_factory.mktemp("store"))
    made = OnnxRuntimePrograms(store, model, eager.network)
    for name, shape in wanted_passes(HW, readout_hw=GRID, prompt_tokens=TOKENS):
        made.build(name, shape)
    return made


@pytest.fixture
def passes(prompted: EagerPasses, programs: OnnxRuntimePrograms) -> EnginePasses:
    return EnginePasses(prompted, prompted.network, programs, prompted=True, strict=True)


def close(found: Tensor, wanted: Tensor, share: float = 1e-4) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=share * float(wanted.abs().max()))


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("time", [1, 421, 999])
def test_every_pass_of_the_golden_model_is_the_eager_one(
    passes: EnginePasses, prompted: EagerPasses, time: int
) -> None:
    image, latent = noise(time, 1, 3, *HW).tanh(), noise(time, 1, 4, 8, 6)
    close(passes.encode(image), prompted.encode(image))
    close(passes.decode(latent), prompted.decode(latent))
    found, wanted = (one.reference(latent, time, readout_hw=GRID) for one in (passes, prompted))
    for mine, theirs in zip(
        (found.noise, found.feature, *found.appearance, *(t for pair in found.kv for t in pair)),
        (wanted.noise, wanted.feature, *wanted.appearance, *(t for pair in wanted.kv for t in pair)),
        strict=True,
    ):
        close(mine, theirs)
    plain = passes.reference(latent, torch.tensor(time))
    close(plain.noise, wanted.noise)
    assert plain.appearance == () and len(plain.kv) == len(wanted.kv)
    other = latent.flip(-1)
    close(passes.denoise(other, time, wanted.kv), prompted.denoise(other, time, wanted.kv))
    # What `rounding` promises, with a margin.
    limit = passes.rounding / 2
    assert 0 < limit < 1e-4
    close(found.noise, wanted.noise, limit)
    close(passes.predict(latent, time), prompted.predict(latent, time), limit)
    ran = passes.account(editing=True)
    assert ran["denoise"] == ran["decode"] == "onnxruntime (as asked)"


def test_a_prompt_is_an_input(passes: EnginePasses, eager: EagerPasses) -> None:
    latent = noise(0, 1, 4, 8, 6)
    assert (passes.predict(latent, 621) - eager.predict(latent, 621)).abs().max() > 1e-3


def test_any_dtype_and_layout_goes_in_and_the_latents_comes_out(passes: EnginePasses, prompted: EagerPasses) -> None:
    latent = noise(0, 1, 4, 6, 8).transpose(-1, -2).double().requires_grad_()
    found = passes.predict(latent, 621)
    assert found.dtype == torch.float64 and not found.requires_grad
    close(found, prompted.predict(latent.detach(), 621))
    kept = passes.reference(latent, 621)
    before = kept.feature.clone()
    passes.reference(latent * 0.5, 1)
    assert torch.equal(kept.feature, before)  # what an edit keeps is never written again


def test_a_program_writes_where_it_is_told_and_allocates_nothing(programs: OnnxRuntimePrograms) -> None:
    program = programs.find("reference", PassShape(HW, prompt_tokens=TOKENS))
    assert program is not None
    inputs = [noise(0, *one.shape) if one.dtype != torch.int64 else torch.tensor([421]) for one in program.spec.inputs]
    outputs = [torch.full(one.shape, torch.nan) for one in program.spec.outputs]
    program.run(inputs, outputs)
    assert all(tensor.isfinite().all() for tensor in outputs)
    first = outputs[0].clone()
    inputs[0].mul_(0.5)  # read where they lie: the next run sees it
    tracemalloc.start()
    for _ in range(5):
        program.run(inputs, outputs)
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert not torch.equal(outputs[0], first)
    assert size < 1 << 14
    with pytest.raises(AssertionError):
        program.run(inputs, [outputs[0].double(), *outputs[1:]])


def test_sessions_take_pytorchs_threads(programs: OnnxRuntimePrograms, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    monkeypatch.setattr(
        onnxruntime, "InferenceSession", lambda path, options, providers: taken.append((options, providers))
    )
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    programs._session(Path("graph.onnx"))
    [(options, where)] = taken
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (3, 1)
    assert where == ["CPUExecutionProvider"]


def damaged(programs: OnnxRuntimePrograms) -> Path:
    """Change a byte of a built graph, keeping its size."""
    artefact = programs.built("encode", PassShape(HW))
    assert artefact is not None
    path = artefact.folder / GRAPH
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    return path


def test_a_graph_that_was_changed_is_refused_and_can_be_built_again(
    programs: OnnxRuntimePrograms, prompted: EagerPasses, caplog: pytest.LogCaptureFixture
) -> None:
    image = noise(0, 1, 3, *HW).tanh()
    damaged(programs)
    options = {"prompted": True, "remedy": lambda shape: f"run this for {shape.image_hw}"}
    strict = EnginePasses(prompted, prompted.network, programs, strict=True, **options)
    with pytest.raises(EngineMismatch, match=r"not what was written.*run this for \(64, 48\)"):
        strict.ready([("encode", PassShape(HW))])
    auto = EnginePasses(prompted, prompted.network, programs, **options)
    with caplog.at_level(logging.WARNING):
        auto.ready([("encode", PassShape(HW))])
    assert "not what was written" in caplog.text
    assert torch.equal(auto.encode(image), prompted.encode(image))
    assert "not what was written" in auto.account(editing=False)["encode"]
    building = EnginePasses(prompted, prompted.network, programs, strict=True, building=True, **options)
    told = []
    building.ready([("encode", PassShape(HW))], lambda at: told.append((at.stage, at.step, at.total)))
    assert told[0] == ("build", 0, 100) and told[-1] == ("build", 100, 100)
    close(building.encode(image), prompted.encode(image))
    assert building.account(editing=False) == {"encode": "onnxruntime (as asked)"}


def test_a_graph_that_differs_from_pytorch_is_not_kept(
    programs: OnnxRuntimePrograms, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "rounding", 1e-12)
    with pytest.raises(ModelError, match=r"differs from PyTorch in encode's latent by .*at most 1e-11"):
        programs.build("encode", PassShape((32, 32)))
    assert programs.built("encode", PassShape((32, 32))) is None


def test_a_file_that_onnx_runtime_refuses_is_a_mismatch(programs: OnnxRuntimePrograms, tmp_path: Path) -> None:
    (tmp_path / GRAPH).write_bytes(b"no graph")
    with pytest.raises(EngineMismatch, match=r"refuses .*ddengine cache clear"):
        programs._session(tmp_path / GRAPH)


def test_where_it_cannot_compute_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 1)
    for dtype in (torch.bfloat16, torch.float64):
        with pytest.raises(BackendUnavailable, match="use dtype='float32', or backend='eager'"):
            providers(cpu, dtype)
    with pytest.raises(BackendUnavailable, match=r"no provider for cuda, only .*pip install onnxruntime-gpu"):
        providers(cuda, torch.float16)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    stream = type("Stream", (), {"cuda_stream": 7})
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    options = {"device_id": 1, "user_compute_stream": "7"}
    assert providers(cuda, torch.float16) == [("CUDAExecutionProvider", options)]
    assert providers(cpu, torch.float32) == ["CPUExecutionProvider"]
    assert set(ROUNDING) == {torch.float32, torch.float16}
