"""Patches, supervision loss and tracking: against the published code, and against building the whole enlarged map."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ddengine.kernels.drag_loss import drag_loss, supervision_step
from ddengine.kernels.sample_patches import sample_patches
from ddengine.kernels.track import track


def arrays(golden: Path, name: str) -> dict[str, Tensor]:
    return {key: torch.as_tensor(value) for key, value in np.load(golden / "units" / f"{name}.npz").items()}


def test_golden_patches_and_gradients(golden: Path) -> None:
    stored = arrays(golden, "interpolate_feature_patch")
    feature = stored["feat"].requires_grad_()
    for i, point in enumerate(stored["points_yx"]):
        patch = sample_patches(feature, point[None], int(stored["r"]), (40, 48))
        (gradient,) = torch.autograd.grad((patch * stored["weight"]).sum(), feature)
        assert (patch - stored["patches"][i]).abs().max() < 1e-5 * stored["patches"][i].abs().max()
        assert (gradient - stored["grad_feat"][i]).abs().max() < 1e-5 * stored["grad_feat"][i].abs().max()


def test_golden_motion_supervision(golden: Path) -> None:
    stored = arrays(golden, "motion_supervision")
    for case in range(int(stored["n_cases"])):
        part = {key.partition("_")[2]: value for key, value in stored.items() if key.startswith(f"c{case}_")}
        moving, latent = part["F1"].requires_grad_(), part["x_prev"].requires_grad_()
        step, active = supervision_step(part["handles_yx"], part["targets_yx"], float(stored["beta"]), 2)
        reference = sample_patches(part["F0"], part["handles_init_yx"], 4, (128, 128))
        drag = drag_loss(moving, part["handles_yx"] + step, reference, active, 64, 4, (128, 128))
        background = ((1 - part["interp_mask"]) * (latent - part["orig_prev"]).abs()).sum()
        total = drag + float(stored["lam"]) * background
        assert float(drag.detach()) == pytest.approx(float(part["drag_loss"]), rel=1e-5)
        assert float(total.detach()) == pytest.approx(float(part["loss"]), rel=1e-5)
        to_feature, to_latent = torch.autograd.grad(total, (moving, latent))
        y0, y1, x0, x1 = part["grad_nonzero_bbox_y0y1x0x1"].tolist()
        expected = torch.zeros_like(moving)
        expected[:, :, y0:y1, x0:x1] = part["grad_F1_bbox"]
        assert (to_feature - expected).abs().max() < 1e-5 * expected.abs().max()
        assert torch.equal(to_feature.sign(), expected.sign())
        assert torch.equal(to_latent, part["grad_x_prev"])


def test_golden_tracking(golden: Path) -> None:
    stored = arrays(golden, "point_tracking")
    for case in range(int(stored["n_cases"])):
        part = {key.partition("_")[2]: value for key, value in stored.items() if key.startswith(f"c{case}_")}
        feature = part.get("F1")
        if feature is None:
            feature = torch.full_like(stored["F0"], float(part["F1_constant"]))
        template = sample_patches(stored["F0"], part["handles_init_yx"], 0, (96, 112))[:, :, 0, 0]
        found = track(feature, template, part["handles_yx"], int(stored["r2"]), (96, 112), border="zero")
        assert torch.equal(found, part["out_yx"])


def plain_patch(feature: Tensor, centre: Tensor, radius: int, size_hw: tuple[int, int], border: str) -> Tensor:
    """The same patch from the whole enlarged map and four integer-shifted windows."""
    whole = F.interpolate(feature, size=size_hw, mode="bilinear", align_corners=False)
    pad = radius + 40
    whole = F.pad(whole, (pad,) * 4, **({"mode": "replicate"} if border == "clamp" else {}))
    low = centre.floor()
    (fy, fx), (y, x) = (centre - low).tolist(), (low.long() + pad - radius).tolist()
    side = 2 * radius + 1
    return sum(
        wy * wx * whole[0, :, y + dy : y + dy + side, x + dx : x + dx + side]
        for dy, wy in ((0, 1 - fy), (1, fy))
        for dx, wx in ((0, 1 - fx), (1, fx))
    )


@settings(max_examples=40)
@given(
    native=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    ratio=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    rest=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    place=st.tuples(st.floats(-0.2, 1.2), st.floats(-0.2, 1.2)),
    radius=st.integers(0, 5),
    border=st.sampled_from(["clamp", "zero"]),
    seed=st.integers(0, 99),
)
def test_patches_equal_enlarging_first(native, ratio, rest, place, radius, border, seed) -> None:
    size = tuple(n * r + extra for n, r, extra in zip(native, ratio, rest, strict=True))
    generator = torch.Generator().manual_seed(seed)
    feature = torch.randn(1, 3, *native, dtype=torch.float64, generator=generator).requires_grad_()
    weight = torch.randn(3, 2 * radius + 1, 2 * radius + 1, dtype=torch.float64, generator=generator)
    centre = torch.tensor(place, dtype=torch.float64) * torch.tensor(size)
    found = sample_patches(feature, centre[None], radius, size, border=border)[0]
    expected = plain_patch(feature, centre, radius, size, border)
    assert torch.allclose(found, expected, atol=1e-12)
    gradients = [torch.autograd.grad((patch * weight).sum(), feature)[0] for patch in (found, expected)]
    assert torch.allclose(*gradients, atol=1e-12)


def test_float32_is_as_good_as_enlarging_first() -> None:
    generator = torch.Generator().manual_seed(1)
    feature = torch.randn(1, 16, 64, 64, dtype=torch.float64, generator=generator)
    centre = torch.tensor([[117.3, 201.8]], dtype=torch.float64)
    exact = sample_patches(feature, centre, 12, (256, 256))
    single = sample_patches(feature.float(), centre.float(), 12, (256, 256))
    enlarged = plain_patch(feature.float(), centre[0].float(), 12, (256, 256), "clamp")
    assert (single - exact).abs().max() <= 2 * (enlarged - exact[0]).abs().max()


@settings(max_examples=40)
@given(st.tuples(st.floats(-9, 50), st.floats(-9, 50)), st.floats(0, 6), st.floats(0.1, 8))
def test_the_step_never_passes_the_target(target: tuple[float, float], reach: float, longest: float) -> None:
    handle, target_yx = torch.tensor([[20.0, 21.0]], dtype=torch.float64), torch.tensor([target], dtype=torch.float64)
    step, moving = supervision_step(handle, target_yx, longest, reach)
    distance = float((target_yx - handle).norm())
    assert float(step.norm()) == pytest.approx(min(longest, distance), abs=1e-9)
    assert bool(moving[0]) == (distance >= reach)
    if distance > 1e-6:
        assert float((step * (target_yx - handle)).sum()) == pytest.approx(float(step.norm()) * distance, rel=1e-9)


@pytest.mark.parametrize("border", ["slice", "clamp", "zero"])
def test_tracking_equals_a_plain_search(border: str) -> None:
    generator = torch.Generator().manual_seed(2)
    feature = torch.randint(0, 3, (1, 2, 12, 9), generator=generator).double()  # few levels: many ties
    handles = torch.tensor([[0.0, 1.0], [6.0, 4.0], [11.0, 8.0], [3.25, 2.5]], dtype=torch.float64)
    template = torch.zeros(4, 2, dtype=torch.float64)
    found = track(feature, template, handles, 3, (12, 9), border=border)
    limits = torch.tensor([11.0, 8.0])
    for handle, new in zip(handles, found, strict=True):
        best = None
        for dy in range(-3, 4):
            for dx in range(-3, 4):
                at = handle + torch.tensor([dy, dx])
                outside = bool(((at < 0) | (at > limits)).any())
                if border == "slice" and outside:
                    continue
                sampled = plain_patch(feature, at, 0, (12, 9), "zero" if border == "zero" else "clamp")
                distance = round(float(sampled.abs().sum()), 9)
                if best is None or distance < best[0]:
                    best = (distance, torch.minimum(at.clamp_min(0), limits) if border == "clamp" else at)
        assert torch.equal(new, best[1])


def test_zeros_beyond_the_border_can_win() -> None:
    feature = torch.full((1, 4, 32, 32), 50.0)
    handle, template = torch.tensor([[3.0, 4.0]]), torch.zeros(1, 4)
    assert track(feature, template, handle, 6, (32, 32), border="zero").tolist() == [[-3.0, -2.0]]
    assert track(feature, template, handle, 6, (32, 32), border="slice").tolist() == [[0.0, 0.0]]
    assert track(feature, template, handle, 6, (32, 32), border="clamp").tolist() == [[0.0, 0.0]]
