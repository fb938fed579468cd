"""Prepare and edit as a whole, on a tiny random model: what runs, what is counted, reported, refused and left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ddengine.backends.eager import EagerPasses
from ddengine.config import DirectDragConfig
from ddengine.directdrag.decode import decode
from ddengine.directdrag.edit import Edited, edit
from ddengine.directdrag.motion import reference_patches, supervision_loss
from ddengine.directdrag.prepare import Prepared, prepare
from ddengine.directdrag.readout import readout_loss
from ddengine.directdrag.run import Step
from ddengine.directdrag.track import templates, track_handles
from ddengine.errors import Cancelled, DDEngineError, InputError, ModelError

SHORT = {
    "n_inference_step": 8, "drag_end_step": 2, "track_per_step": 2, "max_drag_per_track": 2, "r2": 3, "reach": 0.5,
    "latent_warpage_ratio": 0.5,  # at 0.15 drags as short as these would not move a latent cell
}  # fmt: skip
HANDLES, TARGETS = torch.tensor([[20.0, 12.25], [11.5, 30.0]]), torch.tensor([[20.0, 24.25], [22.5, 30.0]])


def config(preset: str = "default", **changes: Any) -> DirectDragConfig:
    return DirectDragConfig.preset(preset, **{**SHORT, "max_track_no_change": 100, **changes})


def picture(height: int = 64, width: int = 96) -> Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(3)) * 2 - 1


@pytest.fixture(scope="module")
def prepared(tiny_passes: EagerPasses) -> Prepared:
    return prepare(tiny_passes, picture(), config())


def same(a: Edited, b: Edited) -> bool:
    return torch.equal(a.latent, b.latent) and torch.equal(a.handles_yx, b.handles_yx) and a.history == b.history


def test_what_an_edit_gives(tiny_passes: EagerPasses, prepared: Prepared) -> None:
    edited = edit(tiny_passes, prepared, HANDLES, TARGETS, config())
    assert edited.latent.shape == prepared.inverted.shape and edited.latent.isfinite().all()
    assert edited.mask.shape == (32, 48) and edited.mask.max() == 1 and edited.readout
    assert [(record.step, record.t) for record in edited.history] == [(0, 626)] * 4 + [(1, 501)] * 4
    lam, weight = config().lam, config().readout_weight
    for record in edited.history:
        assert record.updated and record.drag_loss > 0 and record.readout_loss > 0
        weighted = record.drag_loss + lam * record.background_loss + weight * record.readout_loss
        assert record.total_loss == pytest.approx(weighted, rel=1e-5)
    assert set(edited.timings) == {"load", "warp", "drag", "denoise"} and min(edited.timings.values()) >= 0


def test_what_is_counted(tiny_passes: EagerPasses, prepared: Prepared) -> None:
    assert prepared.passes == {"invert": {"forward": 6, "backward": 0}, "reference": {"forward": 6, "backward": 0}}
    # Tracking after each update needs one forward more a step, whose noise then serves the denoising step.
    fresh = edit(tiny_passes, prepared, HANDLES, TARGETS, config())
    assert fresh.passes == {"drag": {"forward": 10, "backward": 8}, "denoise": {"forward": 4, "backward": 0}}
    lagging = edit(tiny_passes, prepared, HANDLES, TARGETS, config(track_lag=True))
    assert lagging.passes == {"drag": {"forward": 8, "backward": 8}, "denoise": {"forward": 6, "backward": 0}}
    skipping = edit(tiny_passes, prepared, HANDLES, TARGETS, config(track_lag=True, amp_skip=3))
    assert skipping.passes["drag"] == {"forward": 2, "backward": 2}
    assert [record.updated for record in skipping.history] == [False, False, False, True] * 2


def test_keys_and_values_made_again_give_the_same_edit(tiny_passes: EagerPasses, prepared: Prepared) -> None:
    frugal = prepare(tiny_passes, picture(), config(), kv_budget=0)
    assert frugal.reference.kv is None and frugal.passes["reference"]["forward"] == 2
    assert prepared.reference.kv is not None
    again = edit(tiny_passes, frugal, HANDLES, TARGETS, config())
    kept = edit(tiny_passes, prepared, HANDLES, TARGETS, config())
    assert same(kept, again) and torch.equal(kept.unedited, again.unedited)
    assert again.passes["denoise"]["forward"] == 8  # four steps, two rows
    # Also when dragging ends early and the recorded steps must be walked again.
    arrived = [edit(tiny_passes, source, HANDLES, HANDLES + 0.1, config()) for source in (prepared, frugal)]
    assert same(*arrived) and not arrived[0].history
    # What `preserve` compares with is the same picture without mutual attention too, and is not made without need.
    plain = edit(tiny_passes, frugal, HANDLES, TARGETS, config(mutual_attention=False))
    assert torch.equal(plain.unedited, prepared.reference.latents[-1])
    assert edit(tiny_passes, frugal, HANDLES, TARGETS, config(preserve=False)).unedited is None


def test_reaching_the_target_ends_the_drag(tiny_passes: EagerPasses, prepared: Prepared) -> None:
    still = config(latent_warpage=False)
    edited = edit(tiny_passes, prepared, HANDLES, HANDLES + 0.1, still)
    assert edited.history == ()
    # One forward finds it; its noise is the first step's, and the four steps in between the second and last are mutual.
    assert edited.passes == {"drag": {"forward": 1, "backward": 0}, "denoise": {"forward": 5, "backward": 0}}
    assert torch.allclose(edited.latent, edited.unedited, atol=1e-4)


@pytest.mark.parametrize("early_stop", ["inner_ge", "outer_eq"])
def test_early_stops(tiny_passes: EagerPasses, prepared: Prepared, early_stop: str) -> None:
    # Nothing ever moves.
    frozen = {"latent_lr": 0, "soft_mask": False, "latent_warpage": False, "early_stop": early_stop}
    edited = edit(tiny_passes, prepared, HANDLES, TARGETS, config(**frozen, max_track_no_change=1))
    assert len(edited.history) == (2 if early_stop == "inner_ge" else 8)  # between steps the count is 2, not 1
    edited = edit(tiny_passes, prepared, HANDLES, TARGETS, config(**frozen, max_track_no_change=2))
    assert len(edited.history) == 4


def test_stages_are_independent(tiny_passes: EagerPasses, prepared: Prepared) -> None:
    off = {"soft_mask": False, "readout_guidance": "auto", "latent_warpage": False}
    bare = edit(tiny_passes, prepared, HANDLES, TARGETS, config(**off))
    assert (bare.mask == 1).all() and all(record.background_loss == 0 for record in bare.history)
    masked = edit(tiny_passes, prepared, HANDLES, TARGETS, config(**{**off, "soft_mask": True}))
    assert masked.mask.min() < 1 and masked.history[1].background_loss > 0
    warped = edit(tiny_passes, prepared, HANDLES, TARGETS, config(**{**off, "latent_warpage": True}))
    assert warped.history[0].drag_loss != bare.history[0].drag_loss
    unguided = config(**{**off, "readout_guidance": False})
    assert prepare(tiny_passes, picture(), unguided).reference.appearance is None
    baseline = edit(tiny_passes, prepared, HANDLES, TARGETS, unguided)
    assert not baseline.readout and all(record.readout_loss == 0 for record in baseline.history)
    assert len({tuple(e.latent.flatten().tolist()) for e in (bare, masked, warped, baseline)}) == 4


def test_a_model_without_a_head(make_tiny_model: Callable[..., Any]) -> None:
    passes = EagerPasses(make_tiny_model(readout=False))
    source = prepare(passes, picture(), config())
    assert not edit(passes, source, HANDLES, TARGETS, config()).readout
    with pytest.raises(ModelError, match=r"no readout head.*readout="):
        prepare(passes, picture(), config(readout_guidance=True))


@pytest.mark.parametrize("size", [(64, 96), (32, 48)], ids=["working size", "feature grid"])
def test_a_user_mask_rules(tiny_passes: EagerPasses, prepared: Prepared, size: tuple[int, int]) -> None:
    mask = torch.zeros(size, dtype=torch.bool)
    mask[: size[0] // 2] = True
    edited = edit(tiny_passes, prepared, HANDLES[1:], TARGETS[1:], config(), user_mask=mask)
    assert torch.equal(edited.mask[:16], torch.ones(16, 48)) and not edited.mask[16:].any()
    for wrong, message in ((torch.ones(5, 7), "mask is .5, 7.*64, 96"), (torch.full(size, 3.0), "0 to 1")):
        with pytest.raises(InputError, match=message):
            edit(tiny_passes, prepared, HANDLES, TARGETS, config(), user_mask=wrong)


@pytest.mark.parametrize("preset", ["default", "paper", "authors", "gooddrag"])
@pytest.mark.parametrize("size", [(80, 56), (75, 101)], ids=["snapped", "any"])
def test_any_size_and_preset(tiny_passes: EagerPasses, preset: str, size: tuple[int, int]) -> None:
    settings = config(preset, rg_grid=8, ms_border="clamp")
    source = prepare(tiny_passes, picture(*size), settings)
    assert source.feature_hw == (size[0] // 2, size[1] // 2)
    handles, targets = torch.tensor([[14.0, 12.0]]), torch.tensor([[26.0, 16.0]])
    edited = edit(tiny_passes, source, handles, targets, settings)
    assert edited.latent.shape[-2:] == (size[0] // 8, size[1] // 8) and edited.latent.isfinite().all()
    assert edited.history


def test_many_points_at_the_border(tiny_passes: EagerPasses, prepared: Prepared) -> None:
    generator = torch.Generator().manual_seed(5)
    ends = torch.rand(2, 64, 2, generator=generator) * torch.tensor([31.0, 47.0])
    edited = edit(tiny_passes, prepared, ends[0], ends[1], config())
    assert edited.latent.isfinite().all() and edited.handles_yx.shape == (64, 2)
    limits = torch.tensor([31.5, 47.5])
    assert ((edited.handles_yx >= -0.5) & (edited.handles_yx <= limits)).all()
    with pytest.raises(InputError, match=r"leaves the feature grid.*ms_border"):
        edit(tiny_passes, prepared, torch.zeros(1, 2), ends[1, :1], config(ms_border="refuse"))


def test_progress_is_told_at_every_step(tiny_passes: EagerPasses) -> None:
    told: list[Step] = []
    source = prepare(tiny_passes, picture(), config(), told.append)
    assert [(at.stage, at.step, at.total) for at in told] == (
        [("encode", 1, 1)] + [("invert", k, 6) for k in range(1, 7)] + [("reference", k, 6) for k in range(1, 7)]
    )
    told.clear()
    edit(tiny_passes, source, HANDLES, TARGETS, config(), progress=told.append)
    stages = [at.stage for at in told]
    assert stages == ["warp"] + (["drag"] * 4 + ["denoise"]) * 2 + ["denoise"] * 4
    assert [at.step for at in told if at.stage == "drag"] == list(range(1, 9)) and told[1].total == 8
    for at in told[1:]:
        assert at.points_yx.shape == (2, 2) and at.latent.shape == source.inverted.shape
        assert not at.latent.requires_grad


@pytest.mark.parametrize("stage", ["encode", "invert", "reference", "warp", "drag", "denoise"])
def test_cancelling_stops_within_a_step_and_harms_nothing(
    tiny_passes: EagerPasses, prepared: Prepared, stage: str
) -> None:
    seen: list[str] = []

    def stop(at: Step) -> None:
        seen.append(at.stage)
        if at.stage == stage:
            raise Cancelled("enough")

    before = edit(tiny_passes, prepared, HANDLES, TARGETS, config())
    with pytest.raises(Cancelled, match="enough"):
        edit(tiny_passes, prepare(tiny_passes, picture(), config(), stop), HANDLES, TARGETS, config(), progress=stop)
    assert seen.count(stage) == 1 and seen[-1] == stage
    assert same(edit(tiny_passes, prepared, HANDLES, TARGETS, config()), before)


def test_another_trajectory_is_refused(tiny_passes: EagerPasses, prepared: Prepared) -> None:
    for changes in ({"n_inference_step": 10}, {"drag_end_step": 3}, {"rg_grid": 5}, {"rg_reference": "last_inversion"}):
        (name,) = changes
        with pytest.raises(InputError, match=rf"prepared with .*{name}.* asks for .*{name}.*prepare the picture again"):
            edit(tiny_passes, prepared, HANDLES, TARGETS, config(**changes))
    unguided = prepare(tiny_passes, picture(), config(readout_guidance=False))
    with pytest.raises(InputError, match="prepared without readout guidance"):
        edit(tiny_passes, unguided, HANDLES, TARGETS, config())


def test_everything_else_may_differ_from_the_preparation(tiny_passes: EagerPasses, prepared: Prepared) -> None:
    changes = {"drag_end_step": 1, "readout_guidance": False, "mutual_attention": False, "lam": 1, "track_lag": True}
    fresh = prepare(tiny_passes, picture(), config(**changes))
    edits = [edit(tiny_passes, source, HANDLES, TARGETS, config(**changes)) for source in (prepared, fresh)]
    assert same(*edits) and len(edits[0].history) == 4


def test_half_precision_features_are_summed_in_float32() -> None:
    """Features of 8 bits are read as they are: losses and tracked points are those of a float64 computation on them."""
    settings = config(ms_reference="initial")
    generator = torch.Generator().manual_seed(1)
    feature, reference = (torch.randn(1, 320, 8, 12, generator=generator).bfloat16() for _ in range(2))
    for handles in (torch.rand(2, 2, generator=generator) * 30 for _ in range(10)):
        drag = [
            supervision_loss(
                feature.to(dtype),
                reference_patches(reference.to(dtype), HANDLES, (32, 48), settings),
                handles,
                TARGETS,
                (32, 48),
                settings,
            )
            for dtype in (torch.bfloat16, torch.float64)
        ]
        assert float(drag[0]) == pytest.approx(float(drag[1]), rel=1e-5)
        points = [
            track_handles(
                feature.to(dtype), templates(reference.to(dtype), HANDLES, (32, 48)), handles, (32, 48), settings
            )
            for dtype in (torch.bfloat16, torch.float64)
        ]
        assert torch.equal(*points)
    for kind in ("l2", "cosine_range2"):
        appearance = [
            readout_loss(feature.to(dtype), reference.to(dtype), 3.0, kind) for dtype in (torch.bfloat16, torch.float64)
        ]
        assert float(appearance[0]) == pytest.approx(float(appearance[1]), rel=1e-5)


def test_a_half_precision_model_edits_in_float32_latents(make_tiny_model: Callable[..., Any]) -> None:
    model = make_tiny_model()
    for module in (model.unet, model.readout):
        module.to(torch.bfloat16)
    passes = EagerPasses(model)
    edited = edit(passes, prepare(passes, picture(), config()), HANDLES, TARGETS, config())
    assert edited.latent.dtype == torch.float32 and edited.latent.isfinite().all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_latent_that_is_not_finite_makes_no_picture(tiny_passes: EagerPasses, value: float) -> None:
    latent = torch.zeros(1, 4, 8, 12)
    latent[0, 0, 3, 4] = value
    with pytest.raises(DDEngineError, match=r"not finite.*dtype='float32'"):
        decode(tiny_passes, latent, (64, 96))
