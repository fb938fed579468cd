"""Patches: against the published code, and against building the whole enlarged map."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ddengine.errors import InputError
from ddengine.kernels.dispatch import interpreted
from ddengine.kernels.sample_patches import sample_patches

FEW = interpreted()  # the interpreter takes a quarter of a second a launch
CHECKS = {"test_utils": ("test_schema", "test_faketensor")} if FEW else {}  # the others do not look into the kernel
PHASES = (Phase.explicit, Phase.generate) if FEW else tuple(Phase)
SIDES = st.tuples(st.integers(1, 9), st.integers(1, 9))
PLACES = st.lists(st.tuples(st.floats(-0.3, 1.3), st.floats(-0.3, 1.3)), min_size=1, max_size=3 if FEW else 64)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def over_the_border(border: str) -> dict:
    places = [(-0.06, 1.03), (0.97, 0.4), (0.5, -0.1)]
    sizes = {"native": (3, 2), "ratio": (4, 3), "rest": (0, 1)}
    return sizes | {"places": places, "again": True, "radius": 2, "border": border}


def gradient(patches: Tensor, weight: Tensor, feature: Tensor) -> Tensor:
    return torch.autograd.grad((patches * weight).sum(), feature, retain_graph=True)[0]


def test_golden_patches_and_gradients(golden: Path, kernels: str, device: str) -> None:
    stored = np.load(golden / "units" / "interpolate_feature_patch.npz")
    patches, points, weight, expected = (
        torch.from_numpy(stored[name]).to(device) for name in ("patches", "points_yx", "weight", "grad_feat")
    )
    feature = torch.from_numpy(stored["feat"]).to(device).requires_grad_()
    for i in range(0, len(points), 5 if FEW else 1):
        patch = sample_patches(feature, points[i, None], int(stored["r"]), (40, 48), kernels=kernels)
        found = gradient(patch, weight, feature)
        assert (patch - patches[i]).abs().max() < 1e-5 * patches[i].abs().max()
        assert (found - expected[i]).abs().max() < 1e-5 * expected[i].abs().max()


@settings(max_examples=2 if FEW else 30, phases=PHASES)
@example(**over_the_border("zero"))
@example(**over_the_border("clamp"))
@given(
    native=SIDES,
    ratio=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    rest=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    places=PLACES,
    again=st.booleans(),
    radius=st.integers(0, 3 if FEW else 5),
    border=st.sampled_from(["clamp", "zero"]),
)
def test_patches_equal_enlarging_first(
    kernels, device, enlarged_first, native, ratio, rest, places, again, radius, border
) -> None:
    """In float64 exactly; in float32 value and gradient as well as float32 can, and the same bits each time."""
    size = tuple(n * r + extra for n, r, extra in zip(native, ratio, rest, strict=True))
    centres = (torch.tensor(places, dtype=torch.float64) * torch.tensor(size)).float().double()
    centres = torch.cat([centres, centres[:1]]) if again else centres
    feature, side = drawn(1, 3, *native).requires_grad_(), 2 * radius + 1
    weight = drawn(len(centres), 3, side, side, seed=1)
    exact = enlarged_first(feature, centres, radius, size, border)
    exact_gradient = gradient(exact, weight, feature)
    if kernels == "reference":
        found = sample_patches(feature, centres, radius, size, border=border)
        assert torch.allclose(found, exact, atol=1e-12)
        assert torch.allclose(gradient(found, weight, feature), exact_gradient, atol=1e-12)
    single, points = feature.detach().float().to(device).requires_grad_(), centres.float().to(device)
    found = sample_patches(single, points, radius, size, border=border, kernels=kernels)
    found_gradient = gradient(found, weight.float().to(device), single)
    assert (found.cpu() - exact).abs().max() < 4e-6
    assert (found_gradient.cpu() - exact_gradient).abs().max() < 1e-6 * (1 + weight.abs().sum())
    if again:
        assert torch.equal(gradient(found, weight.float().to(device), single), found_gradient)


def test_float32_is_as_good_as_enlarging_first(kernels, device, enlarged_first) -> None:
    """At most twice the error of the plain way in float32, value and gradient."""
    native, size, radius = ((9, 11), (36, 45), 2) if FEW else ((64, 64), (256, 256), 12)
    feature = drawn(1, 4 if FEW else 16, *native).requires_grad_()
    centres = torch.tensor([[0.47, 0.82], [0.51, 0.77]]).float() * torch.tensor(size)
    weight = drawn(2, feature.shape[1], 2 * radius + 1, 2 * radius + 1, seed=1)
    exact = enlarged_first(feature, centres.double(), radius, size, "clamp")
    exact_gradient = gradient(exact, weight, feature)
    single = feature.detach().float().requires_grad_()
    plain = enlarged_first(single, centres, radius, size, "clamp")
    plain_gradient = gradient(plain, weight.float(), single)
    there = single.detach().to(device).requires_grad_()
    found = sample_patches(there, centres.to(device), radius, size, kernels=kernels)
    found_gradient = gradient(found, weight.float().to(device), there)
    assert (found.cpu() - exact).abs().max() <= 2 * (plain - exact).abs().max()
    assert (found_gradient.cpu() - exact_gradient).abs().max() <= 2 * (plain_gradient - exact_gradient).abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_pictures_strides_and_half_precision(kernels, device, dtype) -> None:
    """Any layout of a half-precision map gives what its float32 copy gives, picture by picture; none is widened."""
    feature = drawn(2, 3, 5, 7).to(dtype).to(device, memory_format=torch.channels_last).requires_grad_()
    centres, weight = drawn(2, 2, 2).float().to(device) * 4 + 9, drawn(2, 2, 3, 3, 3, seed=1).float().to(device)
    patches = sample_patches(feature, centres, 1, (20, 28), kernels=kernels)
    found = gradient(patches, weight, feature)
    assert patches.dtype == torch.float32 and found.dtype == dtype
    for i in range(2):
        plain = feature[i : i + 1].detach().float().contiguous().requires_grad_()
        patch = sample_patches(plain, centres[i], 1, (20, 28), kernels=kernels)
        assert torch.allclose(patches[i], patch, rtol=1e-6, atol=1e-6)
        expected = gradient(patch, weight[i], plain)
        assert (found[i].float() - expected[0]).abs().max() <= torch.finfo(dtype).eps * expected.abs().max()


def test_more_points_change_no_bit_of_the_others(kernels, device) -> None:
    """And a point that is no number reads within the map."""
    feature = drawn(1, 3, 6, 5).float().to(device)
    centres = drawn(3, 2).float().to(device) * 6 + 10
    padded = torch.cat([centres, centres.new_tensor([[float("nan"), 1e30]])])
    found = sample_patches(feature, padded, 2, (24, 20), kernels=kernels)
    assert torch.equal(found[:3], sample_patches(feature, centres, 2, (24, 20), kernels=kernels))
    assert found[3].isnan().all()


def test_offsets_beyond_32_bits(kernels, device) -> None:
    """A map whose last channel lies 2³¹ values after the first, though no stride is that long."""
    try:
        storage = torch.empty(2**31 + 12, dtype=torch.float16, device=device)  # pages nobody writes cost nothing
    except (RuntimeError, MemoryError):
        pytest.skip("no 4 GiB of address space")
    feature = storage.as_strided((1, 5, 4, 3), (2**31, 2**29, 3, 1))
    feature.copy_(drawn(1, 5, 4, 3))
    centres = torch.tensor([[3.2, 5.1]], device=device)
    found = sample_patches(feature, centres, 1, (8, 9), kernels=kernels)
    assert torch.equal(found, sample_patches(feature.contiguous(), centres, 1, (8, 9), kernels=kernels))


def test_the_operators_keep_their_promises(kernels, device) -> None:
    feature = drawn(2, 2, 3, 4).float().to(device).requires_grad_()
    centres = torch.tensor([[[3.2, 5.1]], [[-1.0, 9.4]]], device=device)
    torch.library.opcheck(torch.ops.ddengine.sample_patches, (feature, centres, 1, 6, 9, "zero"), **CHECKS)
    patches = drawn(2, 1, 2, 3, 3).float().to(device).requires_grad_()
    arguments = patches, centres, 1, 3, 4, 6, 9, "clamp"
    torch.library.opcheck(torch.ops.ddengine.sample_patches_backward, arguments, **CHECKS)


def test_gradients_of_gradients() -> None:
    feature, centres = drawn(1, 2, 3, 4).requires_grad_(), torch.tensor([[3.2, 5.1], [-1.0, 9.4]]).double()
    torch.autograd.gradcheck(lambda x: sample_patches(x, centres, 1, (6, 9), border="zero"), feature)
    torch.autograd.gradgradcheck(lambda x: sample_patches(x, centres, 1, (6, 9), border="zero"), feature)


@pytest.mark.parametrize(
    ("shape", "points", "size", "border", "named"),
    [
        ((3, 4, 5), (2, 2), (8, 10), "clamp", "[3, 4, 5]"),
        ((2, 3, 4, 5), (2, 2), (8, 10), "clamp", "[1, 2, 2]"),
        ((1, 3, 4, 5), (0, 2), (8, 10), "clamp", "at least one point"),
        ((1, 3, 4, 5), (2, 2), (8, 4), "clamp", "8 x 4"),
        ((1, 3, 4, 5), (2, 2), (8, 10), "slice", "clamp, zero"),
    ],
)
def test_refusals(shape, points, size, border, named) -> None:
    with pytest.raises(InputError) as refused:
        sample_patches(torch.zeros(shape), torch.zeros(points), 1, size, border=border)
    assert named in str(refused.value)
