"""The compiled backend's passes: replayed on buffers of their own, they are the eager ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddengine.backends.compiled import ROUNDING, CompiledPasses
from ddengine.backends.eager import EagerPasses
from ddengine.models.load import Model, load_model
from ddengine.store import ArtefactStore


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model("embedded", device="cpu")


@pytest.fixture
def made(model: Model, tmp_path: Path) -> tuple[CompiledPasses, list[str]]:
    """Passes on a CPU with the compiler and the CUDA graph left out, and the names of what was compiled."""
    names: list[str] = []

    def compile(name: str, function: Callable[..., Sequence[Tensor]], *_: Any, **__: Any) -> Any:
        names.append(name)
        return function

    def capture(body: Callable[[], None]) -> Callable[[], None]:
        body()
        return body

    return CompiledPasses(model, store=ArtefactStore(tmp_path), capture=capture, compile=compile), names


def test_every_pass_is_the_eager_one(model: Model, made: tuple[CompiledPasses, list[str]]) -> None:
    (passes, names), eager = made, EagerPasses(model)
    generator = torch.Generator().manual_seed(0)
    image, latent = (torch.randn(1, *shape, generator=generator) for shape in ((3, 64, 96), (4, 8, 12)))
    found, wanted = [], []
    for t in (741, torch.tensor([1])):  # the second round replays with other values
        for one, out in ((passes, found), (eager, wanted)):
            seen = one.reference(latent, t, readout_hw=(8, 12))
            out += [seen.noise, seen.feature, *seen.appearance, *(tensor for pair in seen.kv for tensor in pair)]
            out += [one.predict(latent, t), one.denoise(latent, t, seen.kv), one.encode(image), one.decode(latent)]
        latent, image = latent * 0.5, image.flip(-1)
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, atol=1e-5 * float(b.abs().max()))
    assert names == [f"pass {name}" for name in ("reference", "predict", "denoise", "encode", "decode")]


def test_what_has_no_package_is_eager(model: Model, made: tuple[CompiledPasses, list[str]], tmp_path: Path) -> None:
    passes, names = made
    latent = torch.randn(2, 4, 8, 8)
    told = passes.reference(latent, 741, readout_hw=(8, 8), readout_times=[1, 21])
    assert len(told.appearance) == 2
    one = passes.reference(latent[:1], 741)
    shared = passes.denoise(latent, 741, one.kv)  # keys and values of one picture for two edits of it
    assert torch.allclose(shared, EagerPasses(model).denoise(latent, 741, one.kv), atol=1e-5)
    assert names == ["pass reference", "pass denoise"]
    plain = CompiledPasses(model, store=ArtefactStore(tmp_path))  # a CPU without a capture
    assert torch.equal(plain.predict(latent, 741), EagerPasses(model).predict(latent, 741))
    assert plain.rounding == 0 < passes.rounding == ROUNDING[torch.float32]
