"""The soft mask's operator against the published code and against its formula written out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ddengine.kernels.gaussian_mask import gaussian_mask, gaussian_matrix, rasterise_paths

SIZE = (24, 40)
POINT = st.tuples(st.integers(0, SIZE[0] - 1), st.integers(0, SIZE[1] - 1))
PATHS = st.lists(st.tuples(POINT, POINT), min_size=1, max_size=3)


def as_points(paths: list, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    points = torch.tensor(paths, dtype=dtype)
    return points[:, 0], points[:, 1]


def path_pixels(start: tuple[int, int], end: tuple[int, int]) -> set[tuple[int, int]]:
    count = max(abs(end[0] - start[0]), abs(end[1] - start[1])) + 1
    return {
        tuple(round(a + k / max(count - 1, 1) * (b - a)) for a, b in zip(start, end, strict=True)) for k in range(count)
    }


def test_golden_masks(golden: Path) -> None:
    stored = np.load(golden / "units" / "soft_mask.npz")
    for case in range(int(stored["n_cases"])):
        starts, ends, size, sigma, mask, latent_mask = (
            torch.from_numpy(stored[f"c{case}_{name}"])
            for name in ("handles_yx", "targets_yx", "shape_hw", "sigma", "mask", "interp_mask")
        )
        published = {"truncated": True, "epsilon": 1e-6, "transposed": True}
        found = gaussian_mask(starts, ends, tuple(size.tolist()), float(sigma), **published)
        assert (found - mask[0, 0]).abs().max() < 2e-6
        assert (F.interpolate(found[None, None], latent_mask.shape[-2:]) - latent_mask).abs().max() < 2e-6


@settings(max_examples=25)
@given(PATHS)
def test_paths_are_chebyshev_lines(paths: list) -> None:
    expected = torch.zeros(SIZE, dtype=torch.float64)
    for row, column in set().union(*(path_pixels(*path) for path in paths)):
        expected[row, column] = 1
    assert torch.equal(rasterise_paths(*as_points(paths), SIZE), expected)


@settings(max_examples=25)
@given(PATHS, st.floats(0.5, 30))
def test_the_closed_form_is_the_plain_sum_over_path_pixels(paths: list, sigma: float) -> None:
    rows, columns = torch.meshgrid(*(torch.arange(size).double() for size in SIZE), indexing="ij")
    blurred = sum(
        torch.exp(-((rows - row) ** 2 + (columns - column) ** 2) / (2 * sigma**2))
        for row, column in set().union(*(path_pixels(*path) for path in paths))
    )
    expected = blurred / blurred.max()
    assert torch.allclose(gaussian_mask(*as_points(paths), SIZE, sigma), expected, atol=1e-12)
    half = gaussian_mask(*as_points(paths, torch.float32), SIZE, sigma)
    assert half.dtype == torch.float32 and torch.allclose(half.double(), expected, atol=1e-6)


@pytest.mark.parametrize("sigma", [1.0, 3.7])
def test_the_truncated_matrix_is_a_mirrored_convolution(sigma: float) -> None:
    x = torch.randn(1, 1, 33, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    radius = (int(4 * sigma) | 1) // 2
    taps = torch.exp(-(torch.arange(-radius, radius + 1).double() ** 2) / (2 * sigma**2))
    expected = F.conv1d(F.pad(x, (radius, radius), mode="reflect"), (taps / taps.sum())[None, None])
    assert torch.allclose(gaussian_matrix(33, sigma, truncated=True, like=x) @ x[0, 0], expected[0, 0], atol=1e-12)


def test_transposing_mirrors_and_drops_what_lies_outside() -> None:
    starts, ends = torch.tensor([[5.0, 30.0]]), torch.tensor([[12.0, 8.0]])
    square = gaussian_mask(starts, ends, (40, 40), 4)
    assert torch.allclose(gaussian_mask(starts, ends, (40, 40), 4, transposed=True), square.T, atol=1e-7)
    outside = gaussian_mask(starts, starts, (24, 40), 4, transposed=True)  # row 30 of 24
    assert not outside.any()


def test_the_epsilon_lowers_the_peak() -> None:
    points = torch.tensor([[128.0, 128.0]])
    assert gaussian_mask(points, points, (256, 256), 30).max() == 1
    lowered = gaussian_mask(points, points, (256, 256), 30, truncated=True, epsilon=1e-6).max()
    assert float(lowered) == pytest.approx(0.9949, abs=1e-4)
