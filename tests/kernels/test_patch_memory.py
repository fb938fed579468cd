"""No tensor larger than the native map: every allocation of the operators on patches, at SD 1.5's size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddengine.kernels import drag_loss as drag_loss_file
from ddengine.kernels import sample_patches as sample_patches_file
from ddengine.kernels import taps
from ddengine.kernels import track as track_file
from ddengine.kernels.drag_loss import drag_loss
from ddengine.kernels.sample_patches import sample_patches
from ddengine.kernels.track import track

SIZE = (256, 256)
MAP = 640 * 64 * 64 * 4  # bytes of the native map in float32; enlarged it has 16 times as many


class Allocations(TorchDispatchMode):
    """Bytes of every storage that an operation made, each once."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[int] = []
        self._seen: list[Any] = []  # kept, so that no address comes twice

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **kwargs or {})
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in given:
                self.made.append(leaf.untyped_storage().nbytes())
        return result


@contextmanager
def profiled(found: list[int]) -> Iterator[None]:
    """Adds the size in bytes of every allocation within, scratch of single operations included; frees are negative."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        yield
    found += [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]


def calls(points: int, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Each operator on a map of 640 x 64 x 64, with gradients where it has them."""
    generator = torch.Generator().manual_seed(0)
    feature = torch.randn(1, 640, 64, 64, generator=generator).to(dtype).requires_grad_()
    centres = torch.rand(1, points, 2, generator=generator) * 256
    reference = torch.randn(1, points, 640, 9, 9, generator=generator)
    template = torch.randn(1, points, 640, generator=generator)
    moving = torch.ones(1, points, dtype=torch.bool)

    def sample() -> Tensor:
        with torch.no_grad():
            return sample_patches(feature, centres, 4, SIZE)

    def differentiate() -> Tensor:
        patches = sample_patches(feature, centres, 4, SIZE)
        return torch.autograd.grad(patches, feature, reference)[0]

    def loss() -> Tensor:
        return torch.autograd.grad(drag_loss(feature, centres, reference, moving, 81, 4, SIZE).sum(), feature)[0]

    def search() -> Tensor:
        return track(feature.detach(), template, centres, 12, SIZE, valid=moving)

    return {"sample": sample, "differentiate": differentiate, "loss": loss, "track": search}


@pytest.mark.parametrize("points", [16, 64])
@pytest.mark.parametrize("name", ["sample", "differentiate", "loss", "track"])
def test_nothing_is_larger_than_the_native_map(name: str, points: int) -> None:
    """But the patches that `sample_patches` was asked for, if they are: 81 positions of more than 50 points."""
    asked = points * 640 * 81 * 4 if name in ("sample", "differentiate") else 0
    for dtype in (torch.float32, torch.bfloat16):
        call, events = calls(points, dtype)[name], []
        with Allocations() as allocations:
            call()
        with profiled(events):
            call()
        for made in (allocations.made, [size for size in events if size > 0]):
            assert made and sorted(made)[-2] <= MAP and max(made) <= max(MAP, asked)
        # Together: the gradient and either it times what arrives, in float32 and in the map's type, or pieces.
        held = int(torch.tensor(events).cumsum(0).max())
        assert held <= asked + 3 * MAP, f"{held / MAP:.2f} maps"


@pytest.mark.parametrize("points", [16, 64])
def test_the_kernels_are_given_nothing_larger(points: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the Triton versions allocate, without running them."""
    for file in (taps, sample_patches_file, drag_loss_file, track_file):
        monkeypatch.setattr(file, "launch", lambda *_: None)
    feature, centres = torch.zeros(1, 640, 64, 64, dtype=torch.float16), torch.zeros(1, points, 2)
    reference, moving = torch.zeros(1, points, 640, 9, 9), torch.ones(1, points, dtype=torch.bool)
    template = torch.zeros(1, points, 640)
    if taps.triton is None:
        pytest.skip("Triton is not installed")
    for file, arguments, result in (
        (sample_patches_file, (feature, centres, 4, *SIZE, "clamp"), reference.nbytes),
        (drag_loss_file, (feature, centres, reference, moving, 81.0, 4, *SIZE, "clamp"), 0),
        (track_file, (feature, template, centres, moving, 12, *SIZE, "slice"), 0),
    ):
        with Allocations() as allocations:
            file._launch(*arguments)
        assert allocations.made and max((size for size in allocations.made if size != result), default=0) <= MAP
    with Allocations() as allocations:
        sample_patches_file._backward_launch(reference, centres, 4, 64, 64, *SIZE, "clamp")
    assert max(allocations.made) <= MAP


def test_a_larger_allocation_is_seen() -> None:
    events: list[int] = []
    with profiled(events), Allocations() as allocations:
        torch.zeros(MAP // 4 + 1).add_(1)
    assert max(allocations.made) == MAP + 4 and max(events) >= MAP + 4
