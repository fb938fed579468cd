"""DirectDrag from a prepared picture to the edited latent: warp, drag, denoise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ddengine.backends.passes import Passes
from ddengine.config import DirectDragConfig
from ddengine.directdrag.denoise import ReferenceRow, predict_noise
from ddengine.directdrag.drag import Goal, Iteration, drag_step
from ddengine.directdrag.mask import edit_mask, feature_mask, latent_mask
from ddengine.directdrag.prepare import Prepared
from ddengine.directdrag.readout import uses_readout
from ddengine.directdrag.run import Run, Step
from ddengine.directdrag.warp import warp
from ddengine.schedule import ddim_step, predicted_image


@dataclass(frozen=True)
class Record:
    """One latent update: drag step, time, unweighted losses, weighted total, handles used, whether carried out."""

    step: int
    t: int
    drag_loss: float
    background_loss: float
    readout_loss: float
    total_loss: float
    handles_yx: tuple[tuple[float, float], ...]
    updated: bool


@dataclass(frozen=True)
class Edited:
    """The outcome of an edit.

    latent: final [1,4,h,w], to be decoded. unedited: the same of no edit, None where `preserve` is off. handles_yx:
    tracked handles [n,2] on the feature grid. mask: [Hs,Ws] in 0..1. history: one record per latent update. passes,
    timings: cost by stage. readout: whether its term ran.
    """

    latent: Tensor
    unedited: Tensor | None
    handles_yx: Tensor
    mask: Tensor
    history: tuple[Record, ...]
    passes: dict[str, dict[str, int]]
    timings: dict[str, float]
    readout: bool


def edit(
    passes: Passes,
    prepared: Prepared,
    handles_yx: Tensor,
    targets_yx: Tensor,
    config: DirectDragConfig,
    *,
    user_mask: Tensor | None = None,
    progress: Callable[[Step], None] | None = None,
) -> Edited:
    """Drag handles to targets, [n,2] as (row, column) on the feature grid, in a prepared picture.

    user_mask: bool or 0..1, at the working or feature size, 1 where the picture may change; replaces the automatic soft
    mask and confines the warp. Raises InputError for settings the source was not prepared with or a mask of another
    size, and whatever `progress` raises; `prepared` is never changed. (DirectDrag, the main loop of AIDD.)
    """
    run = Run(passes.device, progress)
    guided = uses_readout(config, passes)
    prepared.check(config, guided)
    feature_hw, times, reference = prepared.feature_hw, prepared.times, prepared.reference
    handles_yx, targets_yx = (points.to(passes.device, torch.float32) for points in (handles_yx, targets_yx))
    if user_mask is not None:
        user_mask = feature_mask(user_mask.to(passes.device), prepared.work_hw, feature_hw)

    latent = prepared.inverted
    with run.stage("warp"):
        if config.latent_warpage:
            latent = warp(latent, handles_yx, targets_yx, feature_hw, config, user_mask=user_mask)
        mask = edit_mask(handles_yx, targets_yx, feature_hw, config, user_mask=user_mask)
        held = 1 - latent_mask(mask, (latent.shape[-2], latent.shape[-1])).to(latent.dtype)
        background = held if bool(held.any()) else None
        run.report("warp", 1, 1, points_yx=handles_yx)

    first_handles_yx, row = handles_yx, ReferenceRow(passes, reference, prepared.spacing, run)
    iterations: list[Iteration] = []
    dragging, mutual, still = True, False, 0
    for step, t in enumerate(times):
        noise = None
        if step < config.drag_end_step and dragging and still != config.max_track_no_change:
            goal = Goal(
                t=t,
                spacing=prepared.spacing,
                first_handles_yx=first_handles_yx,
                targets_yx=targets_yx,
                feature_hw=feature_hw,
                reference_feature=reference.features[step],
                reference_latent=reference.latents[step + 1],
                background=background,
                appearance=reference.appearance[step] if guided and reference.appearance else None,
                latent_range=float(latent.max() - latent.min()),
            )
            with run.stage("drag"):
                dragged = drag_step(passes, latent, handles_yx, goal, config, run, step=step, still=still)
            latent, handles_yx, noise, still = dragged.latent, dragged.handles_yx, dragged.noise, dragged.still
            dragging = not dragged.finished
            iterations += dragged.iterations
        else:
            mutual = config.mutual_attention
        with run.stage("denoise"), torch.no_grad():
            if noise is None:
                kv = row.key_value(step, t) if mutual else None
                noise = predict_noise(passes, latent, t, run, reference_kv=kv)
            preview = predicted_image(passes.schedule, noise, t, latent)
            latent = ddim_step(passes.schedule, noise, t, latent, prepared.spacing)
        run.report("denoise", step + 1, len(times), points_yx=handles_yx, latent=preview)
    unedited = None
    if config.preserve:
        with run.stage("denoise"), torch.no_grad():
            unedited = row.end(times)
    return Edited(latent, unedited, handles_yx, mask, _records(iterations), run.passes, run.seconds, guided)


def _records(iterations: list[Iteration]) -> tuple[Record, ...]:
    """Plain numbers of all iterations: read from the device once, after the edit, not once per update."""
    records = []
    for it in iterations:
        drag, background, readout, total = it.losses.tolist()
        handles_yx = tuple((row, column) for row, column in it.handles_yx.tolist())
        records.append(Record(it.step, it.t, drag, background, readout, total, handles_yx, it.updated))
    return tuple(records)
