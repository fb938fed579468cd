"""The soft mask's operator against the published code and against its formula written out."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddengine.errors import InputError
from ddengine.kernels.dispatch import interpreted, launch
from ddengine.kernels.gaussian_mask import BLUR, DRAW, gaussian_mask, gaussian_matrix, rasterise_paths

SIZE = (24, 40)
POINT = st.tuples(st.integers(0, SIZE[0] - 1), st.integers(0, SIZE[1] - 1))
PATHS = st.lists(st.tuples(POINT, POINT), min_size=1, max_size=3)
# Whole, half and quarter cells, at the border and beyond it, on a small map.
SIDE, NEAR = st.integers(1, 24), st.integers(-24, 120).map(lambda quarters: quarters / 4)
PAIR = st.tuples(st.tuples(NEAR, NEAR), st.tuples(NEAR, NEAR))
FORMS = st.fixed_dictionaries(
    {"truncated": st.booleans(), "transposed": st.booleans(), "epsilon": st.sampled_from([0.0, 1e-6])}
)


def as_points(paths: list, dtype: torch.dtype = torch.float64, device: str = "cpu") -> tuple[Tensor, Tensor]:
    points = torch.tensor(paths, dtype=dtype, device=device).reshape(-1, 2, 2)
    return points[:, 0], points[:, 1]


def path_pixels(start: tuple, end: tuple, kind: type = np.float64) -> set[tuple[int, int]]:
    """The pixels of a path, sample by sample, in one precision throughout."""
    start, end = (np.round(np.array(point, kind)) for point in (start, end))
    count = int(abs(end - start).max()) + 1
    samples = (np.round(start + kind(k) / kind(max(count - 1, 1)) * (end - start)) for k in range(count))
    return {(int(row), int(column)) for row, column in samples}


def drawn(paths: list, size_hw: tuple[int, int], kind: type = np.float64) -> Tensor:
    expected = torch.zeros(size_hw)
    for row, column in set().union(*(path_pixels(*path, kind) for path in paths)):
        if 0 <= row < size_hw[0] and 0 <= column < size_hw[1]:
            expected[row, column] = 1
    return expected


def test_golden_masks(golden: Path, kernels: str, device: str) -> None:
    stored = np.load(golden / "units" / "soft_mask.npz")
    # In Triton's interpreter one oblong map: each takes seconds there.
    for case in (5,) if interpreted() else range(int(stored["n_cases"])):
        starts, ends, size, sigma, mask, latent_mask = (
            torch.from_numpy(stored[f"c{case}_{name}"])
            for name in ("handles_yx", "targets_yx", "shape_hw", "sigma", "mask", "interp_mask")
        )
        published = {"truncated": True, "epsilon": 1e-6, "transposed": True}
        starts, ends = starts.to(device), ends.to(device)
        found = gaussian_mask(starts, ends, tuple(size.tolist()), float(sigma), kernels=kernels, **published).cpu()
        assert (found - mask[0, 0]).abs().max() < 2e-6
        assert (F.interpolate(found[None, None], latent_mask.shape[-2:]) - latent_mask).abs().max() < 2e-6


@settings(max_examples=100)
@given(st.lists(PAIR, min_size=1, max_size=5), SIDE, SIDE)
def test_paths_are_their_samples(paths: list, height: int, width: int) -> None:
    for dtype, kind in ((torch.float32, np.float32), (torch.float64, np.float64)):
        found = rasterise_paths(*as_points(paths, dtype), (height, width))
        assert found.dtype == dtype and torch.equal(found.float(), drawn(paths, (height, width), kind))


def test_every_short_path_is_its_samples() -> None:
    """Among them all whose samples fall on halves, where a product rounded otherwise picks another pixel."""
    paths = [((20, 20), (20 + row, 20 + column)) for row in range(-20, 20) for column in range(0, 20, 3)]
    for path in paths:
        assert torch.equal(
            rasterise_paths(*as_points([path], torch.float32), (40, 40)), drawn([path], (40, 40), np.float32)
        )


@settings(max_examples=25)
@given(st.lists(PAIR, min_size=1, max_size=5), SIDE, SIDE)
def test_a_narrow_blur_shows_the_paths(kernels: str, device: str, paths: list, height: int, width: int) -> None:
    found = gaussian_mask(*as_points(paths, torch.float32, device), (height, width), 0.1, kernels=kernels)
    assert torch.equal((found > 0.5).float().cpu(), drawn(paths, (height, width), np.float32))


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


@settings(max_examples=20)
@given(st.lists(PAIR, min_size=1, max_size=64), SIDE, SIDE, st.floats(0.5, 12), FORMS)
def test_float32_against_float64(
    kernels: str, device: str, paths: list, height: int, width: int, sigma: float, form: dict
) -> None:
    starts, ends = as_points(paths)
    exact = gaussian_mask(starts, ends, (height, width), sigma, kernels="reference", **form)
    starts, ends = starts.float(), ends.float()
    eager = gaussian_mask(starts, ends, (height, width), sigma, kernels="reference", **form)
    found = gaussian_mask(starts.to(device), ends.to(device), (height, width), sigma, kernels=kernels, **form).cpu()
    assert found.dtype == torch.float32
    # One unit in the last place where eager happens to hit the exact value.
    assert (found - exact).abs().max() <= max(2 * (eager - exact).abs().max(), torch.finfo(torch.float32).eps)
    assert (eager - exact).abs().max() < 2e-6 and found.min() >= 0
    assert found.max() <= 1 if form["epsilon"] else found.max() in (0, 1)


@settings(max_examples=10)
@given(st.lists(PAIR, min_size=0, max_size=64), SIDE, SIDE, FORMS)
def test_padding_changes_no_bit(kernels: str, device: str, paths: list, height: int, width: int, form: dict) -> None:
    size = (height, width)
    starts, ends = as_points(paths, torch.float32, device)
    padded = [F.pad(points, (0, 0, 0, 64 - len(paths)), value=float("nan")) for points in (starts, ends)]
    padded[0][len(paths) :: 2] = 3.0  # pairs that would draw a line if they counted, and pairs that are no numbers
    padded[1][len(paths) :: 2] = 9.0
    valid = torch.arange(64, device=device) < len(paths)
    found = gaussian_mask(*padded, size, 3.0, valid=valid, kernels=kernels, **form)
    assert torch.equal(found, gaussian_mask(starts, ends, size, 3.0, kernels=kernels, **form))
    assert not gaussian_mask(*padded, size, 3.0, valid=valid & False, kernels=kernels, **form).any()


@pytest.mark.parametrize("sigma", [1.0, 3.7])
def test_the_truncated_matrix_is_a_mirrored_convolution(sigma: float) -> None:
    x = torch.randn(1, 1, 33, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    radius = (int(4 * sigma) | 1) // 2
    taps = torch.exp(-(torch.arange(-radius, radius + 1).double() ** 2) / (2 * sigma**2))
    expected = F.conv1d(F.pad(x, (radius, radius), mode="reflect"), (taps / taps.sum())[None, None])
    assert torch.allclose(gaussian_matrix(33, sigma, truncated=True, like=x) @ x[0, 0], expected[0, 0], atol=1e-12)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_a_kernel_wider_than_the_map_is_mirrored_again_and_again(size: int) -> None:
    sigma, radius = 5.0, 10
    weights = [np.exp(-(tap**2) / (2 * sigma**2)) for tap in range(-radius, radius + 1)]
    expected = torch.zeros(size, size, dtype=torch.float64)
    for cell in range(size):
        for tap, weight in zip(range(-radius, radius + 1), weights, strict=True):
            place = cell + tap
            while size > 1 and not 0 <= place < size:
                place = -place if place < 0 else 2 * (size - 1) - place
            expected[cell, place if size > 1 else 0] += weight / sum(weights)
    found = gaussian_matrix(size, sigma, truncated=True, like=expected)
    assert torch.allclose(found, expected, atol=1e-12)


def test_transposing_mirrors_and_drops_what_lies_outside(kernels: str, device: str) -> None:
    starts, ends = as_points([((5.0, 30.0), (12.0, 8.0))], torch.float32, device)
    square = gaussian_mask(starts, ends, (40, 40), 4, kernels=kernels)
    assert torch.allclose(
        gaussian_mask(starts, ends, (40, 40), 4, transposed=True, kernels=kernels), square.T, atol=1e-6
    )
    outside = gaussian_mask(starts, starts, (24, 40), 4, transposed=True, kernels=kernels)  # row 30 of 24
    assert not outside.any()


def test_the_epsilon_lowers_the_peak() -> None:
    points = torch.tensor([[128.0, 128.0]])
    assert gaussian_mask(points, points, (256, 256), 30).max() == 1
    lowered = gaussian_mask(points, points, (256, 256), 30, truncated=True, epsilon=1e-6).max()
    assert float(lowered) == pytest.approx(0.9949, abs=1e-4)


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives back."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor))])
        return out


@pytest.mark.parametrize("truncated", [False, True])
def test_no_value_decides_a_shape_and_no_tensor_exceeds_the_blur(truncated: bool) -> None:
    """Tensors without values: `.item()` or a shape that depends on them would raise.

    The largest is the map or, with a mirrored border of 60 cells on both sides, the matrix before it is folded.
    """
    with FakeTensorMode(), Largest() as largest:
        points, valid = torch.empty(64, 2), torch.empty(64, dtype=torch.bool)
        mask = gaussian_mask(points, points, (512, 512), 30, valid=valid, truncated=truncated, kernels="reference")
    assert mask.shape == (512, 512) and largest.elements <= 512 * (512 + 120 * truncated) + 1


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
    """A map 2²⁷ cells wide, of which the first 64 columns are looked at: a 32-bit offset would leave the memory."""
    if not interpreted():
        pytest.skip("a GPU has no memory that costs nothing")
    height, width = 24, 2**27
    paths = far_apart(height * width, torch.float32)
    starts, ends = torch.tensor([[0.0, 3.0], [20.0, 1.0]]), torch.tensor([[23.0, 3.0], [20.0, 40.0]])
    valid = torch.ones(2, dtype=torch.bool)
    launch(DRAW, (1, 1), starts, ends, valid, paths, 2, height, width, 0)
    expected = rasterise_paths(starts, ends, (height, 64))
    assert all(at(paths, row * width, 64).tolist() == expected[row].tolist() for row in range(height))
    goal = torch.zeros(32, height)
    peak = torch.zeros(1, dtype=torch.int32)
    launch(BLUR[False, True], (1, 1), paths, goal, peak, height, width, 2 * 3.0**2, 0, 1.0, 1, 0)
    matrix = gaussian_matrix(height, 3.0, truncated=False, like=goal)
    assert torch.allclose(goal.T, matrix @ expected[:, :32], atol=1e-6)
    assert peak.view(torch.float32) == goal.max()


@pytest.mark.parametrize("padded", [False, True])
def test_the_registered_operator(kernels: str, device: str, padded: bool) -> None:
    starts, ends = as_points([((2.0, 3.0), (7.0, 5.0)), ((9.0, 9.0), (1.0, 1.0))], torch.float32, device)
    valid = torch.tensor([True, False], device=device) if padded else None
    operator = torch.ops.ddengine.gaussian_mask.default
    arguments = (starts, ends, valid, 12, 9, 2.0, True, 1e-6, False)
    torch.library.opcheck(operator, arguments)
    expected = gaussian_mask(starts, ends, (12, 9), 2, valid=valid, truncated=True, epsilon=1e-6, kernels=kernels)
    assert torch.equal(operator(*arguments), expected)


def test_there_is_no_gradient(kernels: str, device: str) -> None:
    starts = torch.tensor([[2.0, 3.0]], requires_grad=True, device=device)
    assert not gaussian_mask(starts, starts, (9, 9), 2, kernels=kernels).requires_grad
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.ops.ddengine.gaussian_mask(starts, starts, None, 9, 9, 2.0, False, 0.0, False).sum().backward()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"starts": torch.zeros(3, 3)}, r"\[n,2\]"),
        ({"ends": torch.zeros(2, 2)}, r"\[n,2\]"),
        ({"starts": torch.zeros(3, 2).long(), "ends": torch.zeros(3, 2).long()}, "float32"),
        ({"ends": torch.zeros(3, 2).double()}, "float32"),
        ({"valid": torch.ones(3)}, r"bool \[3\]"),
        ({"valid": torch.ones(2, dtype=torch.bool)}, r"bool \[3\]"),
        ({"size_hw": (0, 8)}, "0 x 8"),
        ({"sigma": 0.0}, "sigma"),
        ({"sigma": float("nan")}, "sigma"),
        ({"epsilon": -1.0}, "epsilon"),
        ({"kernels": "cuda"}, "reference, triton"),
    ],
)
def test_what_is_refused(changes: dict, said: str) -> None:
    arguments = {"starts": torch.zeros(3, 2), "ends": torch.zeros(3, 2), "size_hw": (8, 8), "sigma": 2.0}
    with pytest.raises(InputError, match=said):
        gaussian_mask(**(arguments | changes))
