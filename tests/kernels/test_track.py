"""Tracking: against the published code and against a plain search."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ddengine.errors import InputError
from ddengine.kernels import windows
from ddengine.kernels.dispatch import interpreted
from ddengine.kernels.sample_patches import sample_patches
from ddengine.kernels.track import track

FEW = interpreted()  # the interpreter takes a quarter of a second a launch
CHECKS = {"test_utils": ("test_schema", "test_faketensor")} if FEW else {}  # the others do not look into the kernel
PHASES = (Phase.explicit, Phase.generate) if FEW else tuple(Phase)
BORDERS = ["slice", "clamp", "zero"]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_golden_tracking(golden: Path, kernels: str, device: str) -> None:
    stored = {name: torch.as_tensor(value) for name, value in np.load(golden / "units" / "point_tracking.npz").items()}
    for i in range(2, int(stored["n_cases"]), 2) if FEW else range(int(stored["n_cases"])):
        part = {name.partition("_")[2]: value.to(device) for name, value in stored.items() if name.startswith(f"c{i}_")}
        first = stored["F0"].to(device)
        feature = part.get("F1")
        if feature is None:
            feature = torch.full_like(first, float(part["F1_constant"]))
        template = sample_patches(first, part["handles_init_yx"], 0, (96, 112), kernels=kernels)[:, :, 0, 0]
        radius = int(stored["r2"])
        found = track(feature, template, part["handles_yx"], radius, (96, 112), border="zero", kernels=kernels)
        assert torch.equal(found, part["out_yx"])


def searched(feature: Tensor, template: Tensor, handle: Tensor, radius: int, size: tuple[int, int], border: str):
    """The search of one point, position by position, in float64."""
    limits, best = torch.tensor(size) - 1, None
    for dy in range(-radius, radius + 1):
        for dx in range(-radius, radius + 1):
            at = handle + torch.tensor([dy, dx])
            if border == "slice" and bool(((at < 0) | (at > limits)).any()):
                continue
            read = sample_patches(
                feature, at[None], 0, size, border="zero" if border == "zero" else "clamp", kernels="reference"
            )
            distance = round(float((read[0, :, 0, 0] - template).abs().sum()), 9)
            if best is None or distance < best[0]:
                best = (distance, torch.minimum(at.clamp_min(0), limits) if border == "clamp" else at)
    return handle if best is None else best[1]


@settings(max_examples=3 if FEW else 15, phases=PHASES)
@given(
    native=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    ratio=st.sampled_from([1, 2, 4]),
    border=st.sampled_from(BORDERS),
    points=st.integers(1, 3 if FEW else 20),
    radius=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_tracking_equals_a_plain_search(kernels, device, native, ratio, border, points, radius, seed) -> None:
    """Levels, positions and ratios are such that every sum is exact, so that ties are ties: many places are alike."""
    generator = torch.Generator().manual_seed(seed)
    size = (native[0] * ratio, native[1] * ratio)
    feature = torch.randint(0, 3, (1, 2, *native), generator=generator).double()
    template = torch.randint(0, 3, (points, 2), generator=generator).double()
    handles = (torch.rand(points, 2, generator=generator) * (torch.tensor(size) + 1) * 4).floor() / 4 - 0.5
    single = feature.float().to(device), template.float().to(device), handles.to(device)
    found = track(*single, radius, size, border=border, kernels=kernels).cpu()
    for i in range(points):
        expected = searched(feature, template[i], handles[i].double(), radius, size, border)
        assert torch.equal(found[i].double(), expected)
        assert torch.equal(
            found[i], track(feature, template[i, None], handles[i, None], radius, size, border=border)[0].float()
        )


def test_zeros_beyond_the_border_can_win(kernels, device) -> None:
    feature = torch.full((1, 4, 8, 8), 50.0, device=device)
    handle, template = torch.tensor([[2.0, 1.0]], device=device), torch.zeros(1, 4, device=device)
    for border, expected in (("zero", [-2.0, -3.0]), ("slice", [0.0, 0.0]), ("clamp", [0.0, 0.0])):
        assert track(feature, template, handle, 4, (8, 8), border=border, kernels=kernels).tolist() == [expected]


def test_each_picture_and_layout_is_tracked_alone(kernels, device) -> None:
    """Half precision is computed in float32, in any layout; what is not valid stays as it is and disturbs nobody."""
    feature = drawn(2, 3, 5, 6).to(torch.bfloat16).to(device, memory_format=torch.channels_last)
    handles, template = (drawn(2, 4, 2, seed=1) * 4 + 9).to(device), drawn(2, 4, 3, seed=2).to(device)
    valid = torch.tensor([[True, True, False, False], [True, False, True, False]], device=device)
    handles[0, 3] = float("nan")
    found = track(feature, template, handles, 2, (20, 24), valid=valid, kernels=kernels)
    assert torch.equal(found[~valid].nan_to_num(-1), handles[~valid].nan_to_num(-1))
    for i in range(2):
        rest = template[i][valid[i]], handles[i][valid[i]]
        alone = track(feature[i : i + 1].float().contiguous(), *rest, 2, (20, 24), kernels=kernels)
        assert torch.equal(found[i][valid[i]], alone)
        assert not torch.equal(alone, rest[1])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_window_without_a_finite_distance_moves_nothing(kernels, device, poison: float) -> None:
    feature = torch.full((1, 2, 4, 4), poison, device=device)
    handles, template = torch.tensor([[3.0, 5.0]], device=device), torch.zeros(1, 2, device=device)
    assert torch.equal(track(feature, template, handles, 1, (8, 8), kernels=kernels), handles)


def test_a_wide_window_is_searched_in_order(kernels, device) -> None:
    """More positions than one block of the kernel holds, and pieces of one point: a later equal never wins."""
    feature = torch.zeros(1, 1, 40, 40, device=device)
    handles, template = torch.tensor([[20.0, 20.0]], device=device), torch.ones(1, 1, device=device)
    assert track(feature, template, handles, 17, (40, 40), kernels=kernels).tolist() == [[3.0, 3.0]]
    feature[0, 0, 30:, 5] = 1.0
    assert track(feature, template, handles, 17, (40, 40), kernels=kernels).tolist() == [[30.0, 5.0]]


def test_pieces_find_the_same(kernels, device, monkeypatch) -> None:
    feature, handles = drawn(2, 3, 5, 6).to(device), (drawn(2, 3, 2, seed=1) * 4 + 9).to(device)
    template = drawn(2, 3, 3, seed=2).to(device)
    whole = track(feature, template, handles, 2, (20, 24), border="clamp", kernels=kernels)
    monkeypatch.setattr(windows, "SMALL", 1)
    assert torch.equal(track(feature, template, handles, 2, (20, 24), border="clamp", kernels=kernels), whole)


def test_offsets_beyond_32_bits(kernels, device) -> None:
    try:
        storage = torch.empty(2**31 + 12, dtype=torch.float16, device=device)  # pages nobody writes cost nothing
    except (RuntimeError, MemoryError):
        pytest.skip("no 4 GiB of address space")
    feature = storage.as_strided((1, 5, 4, 3), (2**31, 2**29, 3, 1))
    feature.copy_(drawn(1, 5, 4, 3))
    handles, template = torch.tensor([[3.0, 5.0]], device=device), drawn(1, 5, seed=1).to(device)
    found = track(feature, template, handles, 2, (8, 9), kernels=kernels)
    assert torch.equal(found, track(feature.contiguous(), template, handles, 2, (8, 9), kernels=kernels))


def test_the_operator_keeps_its_promises(kernels, device) -> None:
    feature, template, handles = drawn(1, 2, 3, 3).to(device), drawn(1, 1, 2).to(device), drawn(1, 1, 2).to(device)
    valid = torch.ones(1, 1, dtype=torch.bool, device=device)
    for rest in ((valid, 1, 6, 6, "clamp"), (None, 1, 6, 6, "slice")):
        torch.library.opcheck(torch.ops.ddengine.track, (feature, template, handles, *rest), **CHECKS)


def test_refusals() -> None:
    feature, handles = torch.zeros(1, 3, 4, 4), torch.zeros(2, 2)
    with pytest.raises(InputError, match=r"\[1, 2, 3\] and None or \[1, 2\]"):
        track(feature, torch.zeros(2, 4), handles, 1, (8, 8))
    with pytest.raises(InputError, match=r"\[1, 2\]"):
        track(feature, torch.zeros(2, 3), handles, 1, (8, 8), valid=torch.ones(3, dtype=torch.bool))
    with pytest.raises(InputError, match="slice, clamp, zero"):
        track(feature, torch.zeros(2, 3), handles, 1, (8, 8), border="refuse")
