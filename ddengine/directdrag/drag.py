"""One drag step: at one time, move the latent until its features follow the drags (the inner loop of AIDD)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ddengine.backends.passes import Passes
from ddengine.config import DirectDragConfig
from ddengine.directdrag.adam import adam_update
from ddengine.directdrag.motion import supervision_loss
from ddengine.directdrag.readout import readout_grid, readout_loss, skipped_updates
from ddengine.directdrag.run import Run
from ddengine.directdrag.track import arrived, track_handles
from ddengine.models.network import Observation
from ddengine.schedule import ddim_step, predicted_image


@dataclass(frozen=True)
class Goal:
    """What one drag step is held to; constant during the step.

    reference_feature F*_t [1,C,h,w] and reference_latent O_t [1,4,h,w] are the unedited trajectory's, at this time and
    after its step; background: weight 1 − M [1,1,h,w], None where nothing is held still; appearance: the readout
    head's reference map, None where it is off; latent_range: max − min of the latent that enters the step.
    """

    t: int
    spacing: int
    first_handles_yx: Tensor
    targets_yx: Tensor
    feature_hw: tuple[int, int]
    reference_feature: Tensor
    reference_latent: Tensor
    background: Tensor | None
    appearance: Tensor | None
    latent_range: float


class Losses(NamedTuple):
    """The terms of one iteration, unweighted, and their weighted sum (scalars)."""

    drag: Tensor
    background: Tensor
    readout: Tensor
    total: Tensor


class Iteration(NamedTuple):
    """One latent update: where it was, its losses as `Losses`, the handles it used, and whether it was carried out."""

    step: int
    t: int
    losses: Tensor
    handles_yx: Tensor
    updated: bool


@dataclass(frozen=True)
class Dragged:
    """The outcome of one drag step.

    noise: the prediction at the final latent where one is at hand (the denoising step needs no other), else None.
    still: tracking events in a row that moved nothing. finished: no further drag step shall run.
    """

    latent: Tensor
    handles_yx: Tensor
    noise: Tensor | None
    still: int
    finished: bool
    iterations: tuple[Iteration, ...]


def losses(
    passes: Passes, out: Observation, latent: Tensor, handles_yx: Tensor, goal: Goal, config: DirectDragConfig
) -> Losses:
    """The loss of AIDD, differentiable with respect to the latent that `out` was computed from.

    L = L_drag + λ Σ (1 − M) |DDIM(ε, t, e) − O_t| + w L_readout                     (DirectDrag; sum, not mean)
    """
    drag = supervision_loss(
        out.feature, goal.reference_feature, handles_yx, goal.first_handles_yx, goal.targets_yx, goal.feature_hw, config
    )
    background = readout = drag.new_zeros(())
    if goal.background is not None:
        after = ddim_step(passes.schedule, out.noise, goal.t, latent, goal.spacing)
        background = (goal.background * (after - goal.reference_latent).abs()).sum()
    if goal.appearance is not None:
        readout = readout_loss(out.appearance[0], goal.appearance, goal.latent_range, config.rg_loss)
    return Losses(drag, background, readout, drag + config.lam * background + config.readout_weight * readout)


def drag_step(
    passes: Passes,
    latent: Tensor,
    handles_yx: Tensor,
    goal: Goal,
    config: DirectDragConfig,
    run: Run,
    *,
    step: int = 0,
    still: int = 0,
) -> Dragged:
    """Drag the latent [1,4,h,w] at one time, in track_per_step x max_drag_per_track updates of a fresh Adam.

    handles_yx [n,2] on the feature grid; step: number of the drag step, for reports; still: count carried over from the
    step before. A network call is made only when the latent has changed since the last one.
    """
    per_step = config.track_per_step * config.max_drag_per_track
    skip = skipped_updates(config, goal.latent_range, goal.appearance is not None)
    latent, first, second = latent.detach(), torch.zeros_like(latent), torch.zeros_like(latent)
    iterations: list[Iteration] = []
    updates, finished, out = 0, False, None

    def call(value: Tensor) -> tuple[Tensor, Observation]:
        leaf = value.detach().requires_grad_()
        run.count("drag", forward=1)
        readout_hw = None if goal.appearance is None else readout_grid(config, latent)
        return leaf, passes.supervise(leaf, goal.t, readout_hw=readout_hw)

    def tracked(seen: Observation, points: Tensor) -> Tensor:
        return track_handles(
            seen.feature.detach(), goal.reference_feature, points, goal.first_handles_yx, goal.feature_hw, config
        )

    while len(iterations) < per_step:
        if out is None:
            latent, out = call(latent)
        if not iterations and config.track_at_start:
            handles_yx = tracked(out, handles_yx)
        if len(iterations) % config.max_drag_per_track == 0 and arrived(handles_yx, goal.targets_yx, config.reach):
            finished = True
            break
        terms = losses(passes, out, latent, handles_yx, goal, config)
        update = len(iterations) >= skip
        iterations.append(Iteration(step, goal.t, torch.stack(terms).detach(), handles_yx, update))
        seen = out
        if update:
            (gradient,) = torch.autograd.grad(terms.total, latent)
            run.count("drag", backward=1)
            updates += 1
            latent, first, second = adam_update(latent.detach(), gradient, first, second, updates, config.latent_lr)
            out = None
        run.report(
            "drag",
            step * per_step + len(iterations),
            config.drag_end_step * per_step,
            points_yx=handles_yx,
            latent=predicted_image(passes.schedule, seen.noise.detach(), goal.t, latent.detach()),
        )
        if len(iterations) % config.max_drag_per_track == 0:
            if not config.track_lag:
                if out is None:
                    latent, out = call(latent)
                seen = out
            moved = tracked(seen, handles_yx)
            still = still + 1 if torch.equal(moved, handles_yx) else 0
            handles_yx = moved
            if config.early_stop == "inner_ge" and still >= config.max_track_no_change:
                finished = True
                break
    noise = None if out is None else out.noise.detach()
    return Dragged(latent.detach(), handles_yx, noise, still, finished, tuple(iterations))
