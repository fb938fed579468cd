"""Latent warpage against the published code, and against its rules written as plain loops."""

from __future__ import annotations

import ctypes
import itertools
import mmap
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddengine.errors import InputError
from ddengine.kernels import warpage
from ddengine.kernels.dispatch import interpreted
from ddengine.kernels.warpage import CHUNK, FILLS, HOLES, warp_latent, warpage_field

SIZE = (11, 14)
POINT = st.tuples(st.floats(0, SIZE[0] - 1), st.floats(0, SIZE[1] - 1))
DRAGS = st.lists(st.tuples(POINT, POINT), min_size=1, max_size=3)
SIDE, SEED = st.integers(1, 24), st.integers(0, 999)
# Points on the quarter grid that feature points have on the latent, at the border and just beyond it.
QUARTERS = st.integers(-4, 96).map(lambda quarters: quarters / 4)
PAIRS = st.lists(st.tuples(st.tuples(QUARTERS, QUARTERS), st.tuples(QUARTERS, QUARTERS)), min_size=1, max_size=64)


def dtypes(kernels: str) -> tuple[torch.dtype, ...]:
    return (torch.float32,) if kernels == "triton" else (torch.float32, torch.float64)


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(device: str, seed: int = 0, channels: int = 4) -> Tensor:
    return torch.randn(1, channels, *SIZE, generator=random(seed)).to(device)


def field_of(drags: list, device: str, **options: object) -> Tensor:
    points = torch.tensor(drags, device=device)
    return warpage_field(points[:, 0], points[:, 1] - points[:, 0], SIZE, **options)


def test_golden_warps(golden: Path, kernels: str, device: str) -> None:
    stored = np.load(golden / "units" / "latent_warpage.npz")
    # In Triton's interpreter a single drag, a pair and an oblong latent: each takes a second there.
    cases = (0, 5, 8) if interpreted() else range(int(stored["n_cases"]))
    for case, dtype in itertools.product(cases, dtypes(kernels)):
        latent, handles, shortened, unfilled, filled = (
            torch.from_numpy(stored[f"c{case}_{name}"]).to(device)
            for name in ("latent", "handles_yx", "scaled_targets_yx", "moved_unfilled", "out")
        )
        handles, shortened = handles.to(dtype) / 4, shortened.to(dtype) / 4
        size = latent.shape[-2:]
        field = warpage_field(handles, shortened - handles, size, handle_cell="lost", kernels=kernels)
        for fill, expected in (("none", unfilled), ("sequential", filled)):
            assert torch.equal(warp_latent(latent, field, fill=fill, holes="zero", kernels=kernels), expected)


@settings(max_examples=15)
@given(DRAGS)
def test_the_field_is_the_weighted_stretched_drag(drags: list) -> None:
    points = torch.tensor(drags, dtype=torch.float64)
    field = warpage_field(points[:, 0], points[:, 1] - points[:, 0], SIZE)
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


@settings(max_examples=25)
@given(PAIRS, st.integers(3, 24), st.integers(3, 24), st.sampled_from(["moves", "lost"]), st.booleans())
def test_a_float32_field_against_float64(
    kernels: str, device: str, pairs: list, height: int, width: int, handle_cell: str, confined: bool
) -> None:
    points = torch.tensor(pairs, dtype=torch.float64)
    area = torch.zeros(height, width, dtype=torch.bool)
    area[height // 3 :, : width - width // 4] = area[1, 1] = True
    low = torch.tensor([1.0 if height // 3 > 1 else height // 3, 0.0]) if confined else torch.zeros(2)
    high = torch.tensor([height - 1.0, width - width // 4 - 1.0 if confined else width - 1.0])
    # Outside the circle, rays that just touch it may go either way in either precision.
    centre, radius = (low + high) / 2, (high - low).norm() / 2
    points = points[(points[:, 0] - centre).norm(dim=1) < radius - 0.1]
    assume(len(points))

    def field(points: Tensor, area: Tensor, kernels: str) -> Tensor:
        moves = points[:, 1] - points[:, 0]
        options = {"area": area if confined else None, "handle_cell": handle_cell, "kernels": kernels}
        return warpage_field(points[:, 0], moves, (height, width), **options).cpu()

    exact, eager = field(points, area, "reference"), field(points.float(), area, "reference")
    found = field(points.float().to(device), area.to(device), kernels)
    assert found.dtype == torch.float32 and torch.equal(found.isnan(), exact.isnan())
    assert handle_cell == "lost" or not exact.isnan().any()
    error, bound = ((values - exact).nan_to_num(0).abs().max() for values in (found, eager))
    assert error <= 2 * bound + torch.finfo(torch.float32).eps * exact.nan_to_num(0).abs().max()
    assert bound < 2e-4 * (1 + exact.nan_to_num(0).abs().max())


@settings(max_examples=8)
@given(PAIRS, st.integers(1, 12), st.integers(1, 12), st.sampled_from(["moves", "lost"]))
def test_padding_changes_no_bit_of_the_field(
    kernels: str, device: str, pairs: list, height: int, width: int, handle_cell: str
) -> None:
    points = torch.tensor(pairs[:15], device=device)
    count, handles, moves = len(points), points[:, 0], points[:, 1] - points[:, 0]
    padded = [F.pad(values, (0, 0, 0, 16 - count), value=float("nan")) for values in (handles, moves)]
    for values in padded:
        values[count::2] = 1.0  # on a cell
    valid = torch.arange(16, device=device) < count
    options = {"handle_cell": handle_cell, "kernels": kernels}
    found = warpage_field(*padded, (height, width), valid=valid, **options)
    expected = warpage_field(handles, moves, (height, width), **options)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(0), expected.nan_to_num(0))


def test_without_a_pair_nothing_moves(kernels: str, device: str) -> None:
    handles = torch.tensor([[4.0, 5.0], [float("nan"), 1.0]], device=device)
    none = torch.zeros(2, dtype=torch.bool, device=device)
    for cell in ("moves", "lost"):
        options = {"handle_cell": cell, "kernels": kernels}
        assert torch.equal(
            warpage_field(handles, handles, SIZE, valid=none, **options), torch.zeros(*SIZE, 2, device=device)
        )
        assert torch.equal(
            warpage_field(handles[:0], handles[:0], SIZE, **options), torch.zeros(*SIZE, 2, device=device)
        )


def test_coinciding_drags_are_one(kernels: str, device: str) -> None:
    handle, move = torch.tensor([[4.25, 6.5]], device=device), torch.tensor([[3.0, -2.0]], device=device)
    one = warpage_field(handle, move, SIZE, kernels=kernels)
    many = warpage_field(handle.expand(64, 2), move.expand(64, 2), SIZE, kernels=kernels)
    assert torch.allclose(one, many, atol=1e-5)


def test_a_cell_exactly_at_a_handle(kernels: str, device: str) -> None:
    handle = torch.tensor([[4.0, 5.0], [8.0, 8.0]], device=device)
    move = torch.tensor([[2.0, 3.0], [0.0, 1.0]], device=device)
    field = warpage_field(handle, move, SIZE, kernels=kernels)
    assert torch.allclose(field[4, 5], move[0], atol=1e-3)
    lost = warpage_field(handle, move, SIZE, handle_cell="lost", kernels=kernels)
    assert lost[4, 5].isnan().all() and lost.isnan().any(-1).sum() == 2
    keep = ~lost.isnan()
    assert torch.equal(field[keep], lost[keep])


def test_a_handle_beyond_the_circle_moves_no_more_than_its_drag(kernels: str, device: str) -> None:
    handle, move = torch.tensor([[-4.0, -4.0]], device=device), torch.tensor([[2.0, -3.0]], device=device)
    field = warpage_field(handle, move, SIZE, kernels=kernels)
    assert field.isfinite().all() and (field.abs() <= move.abs() + 1e-5).all()


def arrivals(field: Tensor, area: Tensor | None = None) -> dict[tuple[int, int], tuple[int, int]]:
    """Where the cell of each destination came from, first come, first served."""
    height, width = field.shape[:2]
    taken: dict[tuple[int, int], tuple[int, int]] = {}
    for row in range(height):
        for column in range(width):
            moved = [float(start + move) for start, move in zip((row, column), field[row, column].cpu(), strict=True)]
            if area is not None and not area[row, column]:
                taken[row, column] = (row, column)
                continue
            if any(np.isnan(moved)):
                continue
            goal = [round(min(max(value, -1e6), 1e6)) for value in moved]
            goal = tuple(min(max(value, 0), size - 1) for value, size in zip(goal, (height, width), strict=True))
            if area is None or area[goal]:
                taken.setdefault(goal, (row, column))
    return taken


@settings(max_examples=15)
@given(DRAGS, SEED)
def test_first_come_first_served(kernels: str, device: str, drags: list, seed: int) -> None:
    latent, field = noise(device, seed), field_of(drags, device)
    expected = torch.zeros_like(latent)
    for goal, source in arrivals(field).items():
        expected[0, :, goal[0], goal[1]] = latent[0, :, source[0], source[1]]
    assert torch.equal(warp_latent(latent, field, fill="none", kernels=kernels), expected)


@settings(max_examples=15)
@given(SIDE, SIDE, SEED, st.booleans())
def test_any_field_is_obeyed(kernels: str, device: str, height: int, width: int, seed: int, confined: bool) -> None:
    """Fields with halves, moves out of the picture, infinite and lost ones; areas of any shape, empty ones too."""
    draw = random(seed)
    field = torch.randint(-6, 7, (height, width, 2), generator=draw) / 2
    far = torch.tensor([float("nan"), float("inf"), -float("inf"), 1e9])
    chosen = torch.randint(0, 40, (height, width, 2), generator=draw)
    field = torch.where(chosen < 4, far[chosen.clamp_max(3)], field).to(device)
    area = torch.rand(height, width, generator=draw) < seed % 10 / 8 if confined else None
    latent = torch.randn(1, 3, height, width, generator=draw).to(device)
    expected = torch.zeros_like(latent)
    for goal, source in arrivals(field, area).items():
        expected[0, :, goal[0], goal[1]] = latent[0, :, source[0], source[1]]
    area = None if area is None else area.to(device)
    assert torch.equal(warp_latent(latent, field, area=area, fill="none", kernels=kernels), expected)
    if area is not None and not area.any():
        assert torch.equal(expected, latent)


@settings(max_examples=9)
@given(DRAGS, st.sampled_from(["parallel", "sequential", "keep"]))
def test_fills_leave_moved_cells_alone_and_no_hole(kernels: str, device: str, drags: list, fill: str) -> None:
    latent, field = noise(device) + 10, field_of(drags, device)
    moved = warp_latent(latent, field, fill="none", kernels=kernels)
    filled = warp_latent(latent, field, fill=fill, kernels=kernels)
    holes = moved[0, 0] == 0
    assert torch.equal(filled[..., ~holes], moved[..., ~holes])
    assert (filled > 0).all()
    if fill == "keep":
        assert torch.equal(filled[..., holes], latent[..., holes])
    else:  # an average of cells stays within their range
        assert filled.max() <= latent.max() + 1e-5 and filled.min() >= latent.min() - 1e-5


def neighbours(row: int, column: int, taken: Tensor) -> list[tuple[int, int, int]]:
    """The nearest taken cells to the left, right, above and below, each with its distance."""
    found = []
    for down, right in ((0, -1), (0, 1), (-1, 0), (1, 0)):
        k, y, x = 1, row + down, column + right
        while 0 <= y < taken.shape[0] and 0 <= x < taken.shape[1] and not taken[y, x]:
            k, y, x = k + 1, y + down, x + right
        if 0 <= y < taken.shape[0] and 0 <= x < taken.shape[1]:
            found.append((y, x, k))
    return found


@settings(max_examples=9)
@given(DRAGS)
def test_the_parallel_fill_reads_moved_cells_alone(kernels: str, device: str, drags: list) -> None:
    """Each hole is the mean of the nearest moved cells on its four sides, weighted by 1/distance; no order matters."""
    latent, field = noise(device), field_of(drags, device)
    holes = warp_latent(torch.ones_like(latent), field, fill="none", kernels=kernels)[0, 0].cpu() == 0
    moved = warp_latent(latent, field, fill="none", kernels=kernels).cpu()
    filled = warp_latent(latent, field, kernels=kernels).cpu()
    for row, column in holes.nonzero().tolist():
        near = neighbours(row, column, ~holes)
        if near:
            expected = sum(moved[0, :, y, x] / k for y, x, k in near) / sum(1 / k for *_, k in near)
            assert torch.allclose(filled[0, :, row, column], expected, atol=1e-5)
        else:
            assert torch.equal(filled[0, :, row, column], latent[0, :, row, column].cpu())


def sequential(latent: Tensor) -> Tensor:
    """The published fill, hole by hole: cells whose channel 0 is zero, in raster order, filled ones counting too."""
    values = latent[0].permute(1, 2, 0).clone()
    for row, column in (values[..., 0] == 0).nonzero().tolist():
        near = neighbours(row, column, values[..., 0] != 0)
        if near:
            values[row, column] = sum(values[y, x] * (1 / k) for y, x, k in near) / sum(1 / k for *_, k in near)
    return values.permute(2, 0, 1)[None]


@settings(max_examples=20)
@given(
    st.integers(1, 16),
    st.integers(1, 16),
    SEED,
    st.sampled_from(["noise", "whole"]),
    st.sampled_from([0.1, 0.5, 0.9, 1.0]),
)
def test_the_sequential_fill_is_the_published_one_to_the_bit(
    kernels: str, device: str, height: int, width: int, seed: int, values: str, holes: float
) -> None:
    """Whole numbers give averages of exactly zero, which are holes to those that follow; 1.0 leaves nothing at all."""
    draw = random(seed)
    latent = torch.randn(1, 4, height, width, generator=draw)
    latent = latent.round() if values == "whole" else latent
    latent[0, 0].masked_fill_(torch.rand(height, width, generator=draw) < holes, 0)
    still = torch.zeros(height, width, 2)
    for dtype in dtypes(kernels):
        options = {"fill": "sequential", "holes": "zero", "kernels": kernels}
        found = warp_latent(latent.to(device, dtype), still.to(device, dtype), **options)
        assert torch.equal(found.cpu(), sequential(latent.to(dtype)))


def test_a_true_zero_is_a_hole_only_in_the_published_reading(kernels: str, device: str) -> None:
    latent, still = noise(device) + 10, torch.zeros(*SIZE, 2, device=device)
    latent[0, 0, 3, 4] = 0
    assert torch.equal(warp_latent(latent, still, kernels=kernels), latent)
    published = warp_latent(latent, still, fill="sequential", holes="zero", kernels=kernels)
    assert (published != latent).any(1).nonzero().tolist() == [[0, 3, 4]]


@settings(max_examples=15)
@given(
    st.tuples(SIDE, SIDE, st.integers(1, 5)),
    SEED,
    st.sampled_from(FILLS),
    st.sampled_from(HOLES),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
)
def test_every_version_and_dtype_warps_alike(
    kernels: str, device: str, size: tuple, seed: int, fill: str, holes: str, confined: bool, dtype: torch.dtype
) -> None:
    """Against float64 within a rounding of each sum, and Triton as the reference of the same dtype, to the bit."""
    (height, width, channels), draw = size, random(seed)
    latent = torch.randn(1, channels, height, width, generator=draw).to(dtype)
    field = torch.randn(height, width, 2, generator=draw) * 3
    area = torch.rand(height, width, generator=draw) < 0.7 if confined else None
    options = {"fill": fill, "holes": holes}
    exact = warp_latent(latent.double(), field, area=area, kernels="reference", **options)
    eager = warp_latent(latent, field, area=area, kernels="reference", **options)
    area = None if area is None else area.to(device)
    found = warp_latent(latent.to(device), field.to(device), area=area, kernels=kernels, **options).cpu()
    assert found.dtype == eager.dtype == dtype and found.shape == latent.shape
    spacing = torch.finfo(dtype).eps * latent.abs().max()
    if fill != "sequential":  # whose rounding errors are handed on from hole to hole
        assert ((eager - exact).abs() <= spacing).all()
    if interpreted() and dtype == torch.bfloat16:  # the interpreter cuts bfloat16 off instead of rounding
        assert fill == "sequential" or ((found - exact).abs() <= 2 * spacing).all()
    else:
        assert torch.equal(found, eager)


def test_an_area_confines_the_warp(kernels: str, device: str) -> None:
    area = torch.zeros(SIZE, dtype=torch.bool, device=device)
    area[2:8, 3:10] = True
    handles, moves = torch.tensor([[4.0, 5.5]], device=device), torch.tensor([[0.0, 3.0]], device=device)
    field = warpage_field(handles, moves, SIZE, area=area, kernels=kernels)
    assert not field[~area].any() and field[4, 5, 1] > 2
    latent = noise(device)
    warped = warp_latent(latent, field, area=area, kernels=kernels)
    assert (warped != latent)[..., area].any() and torch.equal(warped[..., ~area], latent[..., ~area])


def test_an_empty_area_moves_nothing(kernels: str, device: str) -> None:
    area = torch.zeros(SIZE, dtype=torch.bool, device=device)
    handles, moves = torch.tensor([[4.0, 5.5]], device=device), torch.tensor([[0.0, 3.0]], device=device)
    field = warpage_field(handles, moves, SIZE, area=area, kernels=kernels)
    assert not field.any() and torch.equal(warp_latent(noise(device), field, area=area, kernels=kernels), noise(device))


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives back."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor))])
        return out


def far_apart(elements: int, dtype: torch.dtype) -> Tensor:
    """The start of a stretch of memory so long that offsets need 64 bits; what is not touched costs nothing."""
    size = elements * dtype.itemsize
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0))
    return torch.frombuffer(memory, dtype=dtype, count=64)


def at(start: Tensor, offset: int, count: int) -> np.ndarray:
    """`count` numbers that begin `offset` after the first."""
    address = start.data_ptr() + offset * start.itemsize
    kind = torch.empty(0, dtype=start.dtype).numpy().dtype
    return np.ctypeslib.as_array((ctypes.c_byte * (count * start.itemsize)).from_address(address)).view(kind)


@pytest.mark.parametrize("kernels", ["triton"], indirect=True)
def test_offsets_of_64_bits(kernels: str, device: str) -> None:
    """Four channels of 2³⁰ cells, of which six are looked at: a 32-bit offset would leave the memory."""
    if not interpreted():
        pytest.skip("a GPU has no memory that costs nothing")
    count, (height, width) = 2**30, (2, 3)
    latent, moved, filled = (far_apart(4 * count, torch.float16) for _ in range(3))
    owner = torch.tensor([1, 0, count, 3, 4, 5], dtype=torch.int32)
    for channel in range(4):
        at(latent, channel * count, 6)[:] = np.arange(1, 7) + 10 * channel
    options = (owner, moved, owner, 1, 6, count, 4, 0, 0)
    warpage.launch(warpage.GATHER["plain", torch.float16], (1,), latent, *options)
    ahead = far_apart(count + 64, torch.int32)
    at(ahead, 0, 6)[:], at(ahead, count, 6)[:] = -1, 0
    at(ahead, 2, 1)[:], at(ahead, count + 2, 1)[:] = 0, 1  # the hole: nothing to its right, a cell below
    in_order = warpage._in_order(torch.float16, 64, 4)
    warpage.launch(in_order, (1,), moved, ahead, filled, height, width, count, 4)
    for channel in range(4):
        assert at(moved, channel * count, 6).tolist() == [
            2 + 10 * channel,
            1 + 10 * channel,
            0,
            *(np.arange(4, 7) + 10 * channel),
        ]
        mean = (1 + 6) / 2 + 10 * channel  # of the cell to the left and the one below
        assert at(filled, channel * count, 3).tolist() == [2 + 10 * channel, 1 + 10 * channel, mean]


@pytest.mark.parametrize("fill", FILLS)
def test_no_value_decides_a_shape_and_memory_is_bounded(fill: str) -> None:
    """Tensors without values: `.item()`, a boolean index or a shape that depends on them would raise."""
    with FakeTensorMode():
        handles, valid = torch.empty(64, 2), torch.empty(64, dtype=torch.bool)
        area = torch.empty(128, 128, dtype=torch.bool)
        with Largest() as largest:
            field = warpage_field(handles, handles, (128, 128), area=area, valid=valid, kernels="reference")
        assert field.shape == (128, 128, 2) and largest.elements <= CHUNK
        latent, area, field = torch.empty(1, 4, 24, 32), area[:24, :32], field[:24, :32]
        with Largest() as largest:
            warped = warp_latent(latent, field, area=area, fill=fill, kernels="reference")
        assert warped.shape == latent.shape and largest.elements <= 2 * latent.numel()


@pytest.mark.parametrize("given", [False, True])
def test_the_registered_operators(kernels: str, device: str, given: bool) -> None:
    draw = random(0)
    handles, moves = (torch.rand(2, 2, generator=draw, device="cpu").to(device) * 6 for _ in range(2))
    latent = torch.randn(1, 2, 9, 7, generator=draw).to(device)
    area = (torch.rand(9, 7, generator=draw) < 0.8).to(device) if given else None
    valid = torch.tensor([False, True], device=device) if given else None
    operator = torch.ops.ddengine.warpage_field.default
    arguments = (handles, moves, valid, area, 9, 7, "moves")
    torch.library.opcheck(operator, arguments)
    field = warpage_field(handles, moves, (9, 7), area=area, valid=valid, kernels=kernels)
    assert torch.equal(operator(*arguments), field)
    operator = torch.ops.ddengine.warp_latent.default
    # A latent with another order in memory: what the operator promises of its result must hold all the same.
    fill = "sequential" if given else "keep"
    arguments = (latent.contiguous(memory_format=torch.channels_last), field, area, fill, "zero")
    torch.library.opcheck(operator, arguments)
    expected = warp_latent(latent, field, area=area, fill=fill, holes="zero", kernels=kernels)
    assert torch.equal(operator(*arguments), expected)


def test_there_is_no_gradient(kernels: str, device: str) -> None:
    latent, still = noise(device).requires_grad_(), torch.zeros(*SIZE, 2, device=device)
    assert not warp_latent(latent, still, kernels=kernels).requires_grad
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.ops.ddengine.warp_latent(latent, still, None, "parallel", "zero").sum().backward()
    points = torch.ones(1, 2, requires_grad=True, device=device)
    assert not warpage_field(points, points, SIZE, kernels=kernels).requires_grad
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.ops.ddengine.warpage_field(points, points, None, None, 3, 3, "moves").sum().backward()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"handles": torch.zeros(3)}, r"\[n,2\]"),
        ({"displacements": torch.zeros(2, 2)}, r"\[n,2\]"),
        ({"displacements": torch.zeros(3, 2).half()}, "float32"),
        ({"valid": torch.ones(3)}, r"bool \[3\]"),
        ({"area": torch.ones(8, 9)}, r"bool \[8,8\]"),
        ({"size_hw": (0, 8)}, "0 x 8"),
        ({"handle_cell": "stays"}, "moves, lost"),
        ({"kernels": "cuda"}, "reference, triton"),
    ],
)
def test_a_field_that_is_refused(changes: dict, said: str) -> None:
    arguments = {"handles": torch.zeros(3, 2), "displacements": torch.zeros(3, 2), "size_hw": (8, 8)}
    with pytest.raises(InputError, match=said):
        warpage_field(**(arguments | changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"latent": torch.zeros(2, 4, 8, 8)}, r"\[1,C,h,w\]"),
        ({"latent": torch.zeros(1, 4, 8, 8).long()}, r"\[1,C,h,w\]"),
        ({"field": torch.zeros(8, 9, 2)}, r"\[8,8,2\]"),
        ({"area": torch.ones(8, 8)}, r"bool \[8,8\]"),
        ({"fill": "smooth"}, "none, keep, parallel, sequential"),
        ({"holes": "any"}, "unclaimed, zero"),
    ],
)
def test_a_warp_that_is_refused(changes: dict, said: str) -> None:
    arguments = {"latent": torch.zeros(1, 4, 8, 8), "field": torch.zeros(8, 8, 2)}
    with pytest.raises(InputError, match=said):
        warp_latent(**(arguments | changes))
