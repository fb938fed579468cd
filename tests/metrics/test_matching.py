"""Matching without the enlarged maps: equal to the published form, which builds them, and small."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ddengine.drags import Drag
from ddengine.errors import DDEngineError, InputError
from ddengine.metrics.matching import distances, match


def naive(source: Tensor, result: Tensor, handle: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """The published form in float64, [H,W]: enlarge both maps, then the cosine of one vector with every pixel."""
    enlarged = [F.interpolate(each.double(), size[::-1], mode="bilinear") for each in (source, result)]
    vector = enlarged[0][0, :, handle[1], handle[0]].reshape(1, -1, 1, 1)
    return torch.nn.CosineSimilarity(dim=1)(vector, enlarged[1])[0]


def maps(seed: int, channels: int, h: int, w: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    one, other = torch.randn(2, 1, channels, h, w, generator=generator)
    return one, 0.5 * other + torch.roll(one, 1, 3)


@settings(max_examples=40)
@given(
    st.integers(0, 10_000),
    st.integers(1, 6),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.tuples(st.integers(5, 40), st.integers(5, 40)),
    st.data(),
)
def test_the_published_form(
    seed: int, channels: int, native: tuple[int, int], size: tuple[int, int], data: st.DataObject
) -> None:
    source, result = maps(seed, channels, *native)
    handle = (data.draw(st.integers(0, size[0] - 1)), data.draw(st.integers(0, size[1] - 1)))
    ((x, y),) = match(source, result, [handle], size)
    cosine = naive(source, result, handle, size)
    # The argmax itself, up to what rounding makes of pixels that hold the same vector: of those, the first.
    assert cosine[y, x] >= cosine.max() - 1e-11
    first = int((cosine >= cosine.max() - 1e-11).flatten().nonzero()[0])
    assert y * size[0] + x == first or float(cosine.flatten()[first]) < float(cosine[y, x])


def test_many_handles() -> None:
    source, result = maps(3, 320, 6, 5)
    handles = [(0, 0), (79, 95), (17, 40), (64, 3)]
    found = match(source, result, handles, (80, 96))
    assert len(set(found)) == 4
    for (x, y), handle in zip(found, handles, strict=True):
        cosine = naive(source, result, handle, (80, 96))
        assert y * 80 + x == int(cosine.argmax()) or cosine[y, x] >= cosine.max() - 1e-12


@settings(max_examples=20)
@given(st.integers(0, 1000), st.integers(4, 75), st.integers(4, 59))
def test_a_picture_matches_itself_and_a_shift_is_found(seed: int, x: int, y: int) -> None:
    torch.manual_seed(seed)
    source = torch.randn(1, 16, 8, 10)
    assert match(source, source, [(x, y)], (80, 64)) == [(x, y)]
    moved = torch.roll(source, (1, 2), (2, 3))  # by one cell of 8 pixels down and two to the right
    drag = Drag((x, y), (x + 16 + 3, y + 8 + 4))
    if x < 60 and y < 52:
        assert distances(source, moved, [drag], (80, 64)) == [5.0]


def test_distances_go_by_x_and_y_and_targets_are_taken_as_they_are() -> None:
    source = torch.randn(1, 16, 4, 8, generator=torch.Generator().manual_seed(0))
    drags = [Drag((20, 10), (20, 10)), Drag((20.4, 9.6), (23, 14)), Drag((50, 9), (70.5, 9))]
    assert distances(source, source, drags, (64, 32)) == [0.0, 5.0, 20.5]


def test_of_equal_pixels_the_first_counts() -> None:
    """Half a cell along the border holds one vector: rounding must not choose among its pixels."""
    source = torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(1))
    for handle, expected in (((0, 0), (0, 0)), ((63, 63), (56, 56)), ((3, 60), (0, 56)), ((63, 30), (56, 30))):
        assert match(source, source, [handle], (64, 64)) == [expected]
    flat = torch.ones(1, 8, 4, 4)
    assert match(source, flat, [(9, 9)], (64, 64)) == [(0, 0)]
    assert match(torch.zeros(1, 8, 4, 4), source, [(9, 9)], (64, 64)) == [(0, 0)]


def test_what_cannot_be_matched_is_refused() -> None:
    source = torch.ones(1, 4, 4, 4)
    for handle in ((-1, 0), (0, -1), (32, 0), (0, 32)):
        with pytest.raises(InputError, match="outside the picture of 32 x 32"):
            match(source, source, [handle], (32, 32))
    with pytest.raises(InputError, match="4 and 3 channels"):
        match(source, source[:, :3], [(1, 1)], (32, 32))
    with pytest.raises(DDEngineError, match="not finite"):
        match(source, source.log() * torch.inf, [(1, 1)], (32, 32))


class Largest(TorchDispatchMode):
    """The most values that any tensor made inside holds."""

    values = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for each in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(each, Tensor):
                self.values = max(self.values, each.numel())
        return made


def test_the_enlarged_maps_are_never_built() -> None:
    """At 512 x 512 nothing made on the way holds more values than the native map: 1/256 of the enlarged one."""
    source, result = maps(0, 640, 32, 32)
    with Largest() as largest:
        match(source, result, [(200, 300), (5, 500)], (512, 512))
    assert largest.values == max(source.numel(), 512 * 512)
    with Largest() as seen:  # and building them would be seen
        naive(source[:, :3], result[:, :3], (200, 300), (512, 512))
    assert seen.values == 3 * 512 * 512


def test_the_result_is_the_same_for_half_precision_maps_of_equal_values() -> None:
    source, result = (each.half() for each in maps(5, 32, 6, 6))
    assert match(source, result, [(10, 20)], (48, 48)) == match(source.float(), result.float(), [(10, 20)], (48, 48))
    assert np.isfinite(distances(source, result, [Drag((10, 20), (30, 30))], (48, 48))).all()
