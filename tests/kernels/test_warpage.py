"""Latent warpage against the published code, and against its rules written as plain loops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ddengine.kernels.warpage import warp_latent, warpage_field

SIZE = (11, 14)
POINT = st.tuples(st.floats(0, SIZE[0] - 1), st.floats(0, SIZE[1] - 1))
DRAGS = st.lists(st.tuples(POINT, POINT), min_size=1, max_size=3)


def noise(seed: int = 0, channels: int = 4) -> Tensor:
    return torch.randn(1, channels, *SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def field_of(drags: list) -> Tensor:
    points = torch.tensor(drags, dtype=torch.float64)
    return warpage_field(points[:, 0], points[:, 1] - points[:, 0], SIZE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_golden_warps(golden: Path, dtype: torch.dtype) -> None:
    stored = np.load(golden / "units" / "latent_warpage.npz")
    for case in range(int(stored["n_cases"])):
        latent, handles, shortened, unfilled, filled = (
            torch.from_numpy(stored[f"c{case}_{name}"])
            for name in ("latent", "handles_yx", "scaled_targets_yx", "moved_unfilled", "out")
        )
        handles, shortened = handles.to(dtype) / 4, shortened.to(dtype) / 4
        field = warpage_field(handles, shortened - handles, latent.shape[-2:], handle_cell="lost")
        assert torch.equal(warp_latent(latent, field, fill="none", holes="zero"), unfilled)
        assert torch.equal(warp_latent(latent, field, fill="sequential", holes="zero"), filled)


@settings(max_examples=15)
@given(DRAGS)
def test_the_field_is_the_weighted_stretched_drag(drags: list) -> None:
    field = field_of(drags)
    centre, radius = (torch.tensor(SIZE) - 1).double() / 2, float((torch.tensor(SIZE) - 1).double().norm()) / 2
    for cell in ((0, 0), (3, 9), (10, 2)):
        at, total, weights = torch.tensor(cell, dtype=torch.float64), torch.zeros(2, dtype=torch.float64), 0.0
        for start, end in drags:
            handle, goal = torch.tensor(start).double(), torch.tensor(end).double()
            distance = float((at - handle).norm())
            if distance < 1e-6:
                return
            # March along the ray to the circle instead of solving for it.
            low, high = 0.0, 4 * radius
            for _ in range(80):
                middle = (low + high) / 2
                inside = float((handle + (at - handle) / distance * middle - centre).norm()) < radius
                low, high = (middle, high) if inside else (low, middle)
            weight = 1 / (distance + 1e-4)
            total += weight * abs(low - distance) / low * (goal - handle)
            weights += weight
        assert torch.allclose(field[cell], total / weights, atol=1e-4)  # the published radius carries a 1e-6


def test_a_cell_exactly_at_a_handle() -> None:
    handle, move = torch.tensor([[4.0, 5.0], [8.0, 8.0]]), torch.tensor([[2.0, 3.0], [0.0, 1.0]])
    field = warpage_field(handle, move, SIZE)
    assert torch.allclose(field[4, 5], move[0], atol=1e-3)
    lost = warpage_field(handle, move, SIZE, handle_cell="lost")
    assert lost[4, 5].isnan().all() and lost.isnan().any(-1).sum() == 2
    keep = ~lost.isnan()
    assert torch.equal(field[keep], lost[keep])


@settings(max_examples=15)
@given(DRAGS, st.integers(0, 9))
def test_first_come_first_served(drags: list, seed: int) -> None:
    latent, field = noise(seed), field_of(drags)
    expected, taken = torch.zeros_like(latent), set()
    for row in range(SIZE[0]):
        for column in range(SIZE[1]):
            goal = [round(float(start + move)) for start, move in zip((row, column), field[row, column], strict=True)]
            goal = tuple(min(max(value, 0), size - 1) for value, size in zip(goal, SIZE, strict=True))
            if goal not in taken:
                taken.add(goal)
                expected[..., goal[0], goal[1]] = latent[..., row, column]
    assert torch.equal(warp_latent(latent, field, fill="none"), expected)


@settings(max_examples=15)
@given(DRAGS, st.sampled_from(["parallel", "sequential", "keep"]))
def test_fills_leave_moved_cells_alone_and_no_hole(drags: list, fill: str) -> None:
    latent, field = noise() + 10, field_of(drags)
    moved = warp_latent(latent, field, fill="none")
    filled = warp_latent(latent, field, fill=fill)
    holes = moved[0, 0] == 0
    assert torch.equal(filled[..., ~holes], moved[..., ~holes])
    assert (filled > 0).all()
    if fill == "keep":
        assert torch.equal(filled[..., holes], latent[..., holes])
    else:  # an average of cells stays within their range
        assert filled.max() <= latent.max() and filled.min() >= latent.min()


@settings(max_examples=15)
@given(DRAGS)
def test_the_parallel_fill_reads_moved_cells_alone(drags: list) -> None:
    """Each hole is the mean of the nearest moved cells on its four sides, weighted by 1/distance; no order matters."""
    latent, field = noise(), field_of(drags)
    holes = warp_latent(torch.ones_like(latent), field, fill="none")[0, 0] == 0
    moved = warp_latent(latent, field, fill="none")
    filled = warp_latent(latent, field)
    for row, column in holes.nonzero().tolist():
        total, weights = torch.zeros(4, dtype=torch.float64), 0.0
        for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0)):
            k, y, x = 1, row + dy, column + dx
            while 0 <= y < SIZE[0] and 0 <= x < SIZE[1] and holes[y, x]:
                k, y, x = k + 1, y + dy, x + dx
            if 0 <= y < SIZE[0] and 0 <= x < SIZE[1]:
                total, weights = total + moved[0, :, y, x] / k, weights + 1 / k
        if weights:
            assert torch.allclose(filled[0, :, row, column], total / weights)


def test_a_true_zero_is_a_hole_only_in_the_published_reading() -> None:
    latent, still = noise() + 10, torch.zeros(*SIZE, 2, dtype=torch.float64)
    latent[0, 0, 3, 4] = 0
    assert torch.equal(warp_latent(latent, still), latent)
    published = warp_latent(latent, still, fill="sequential", holes="zero")
    assert (published != latent).any(1).nonzero().tolist() == [[0, 3, 4]]


def test_an_area_confines_the_warp() -> None:
    area = torch.zeros(SIZE, dtype=torch.bool)
    area[2:8, 3:10] = True
    handles, moves = torch.tensor([[4.0, 5.5]]).double(), torch.tensor([[0.0, 3.0]]).double()
    field = warpage_field(handles, moves, SIZE, area=area)
    assert not field[~area].any() and field[4, 5, 1] > 2
    latent = noise()
    warped = warp_latent(latent, field, area=area)
    assert (warped != latent)[..., area].any() and torch.equal(warped[..., ~area], latent[..., ~area])
