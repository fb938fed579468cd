"""The inner loop of AIDD at one time: drag until the handles have arrived, nothing moves, or the count is full."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ddengine.backends.passes import Passes, Size
from ddengine.config import DirectDragConfig
from ddengine.directdrag.adam import adam_table
from ddengine.directdrag.motion import reference_patches, refuse_outside
from ddengine.directdrag.readout import skipped_updates
from ddengine.directdrag.run import Run
from ddengine.directdrag.step import HANDLES, RAN, Goal, Observe, Rules, State, look, step
from ddengine.directdrag.track import templates
from ddengine.models.network import Observation
from ddengine.schedule import Schedule, coefficients


@dataclass(frozen=True)
class StepShape:
    """The sizes of a batch of drag steps: edits, pairs of points an edit, latent cells (rows, columns), channels of the
    drag feature, [P,g,g'] of the readout maps (None without them) and the network's dtype.
    """

    edits: int
    pairs: int
    latent_hw: tuple[int, int]
    channels: int
    appearance: tuple[int, int, int] | None
    dtype: torch.dtype


class Unit(Protocol):
    """A drag step as a backend carries it out.

    name: what it is, for the result's account. reads: whether the host may look at the state after every iteration
    without holding the device up. fixed: whether it wants the same shapes again, edits that are no longer dragged
    included and points padded to a power of two. rounding: as of `Passes`, what it adds to theirs.
    """

    name: str
    reads: bool
    fixed: bool
    rounding: float

    def step(self, state: State, goal: Goal, k: int, skip: int, run: Run) -> State:
        """Iteration `k`, of which the first `skip` move no latent."""
        ...

    def look(self, state: State, goal: Goal, run: Run) -> State:
        """What follows the last iteration: see `step.look`."""
        ...


class PlainUnit:
    """The step's functions called as they are: the behaviour every other unit is held to."""

    reads, fixed, rounding = True, False, 0.0

    def __init__(self, passes: Passes, rules: Rules, reason: str = "") -> None:
        """reason: why it is not another unit."""
        self._passes, self._rules = passes, rules
        self.name = f"eager ({reason})" if reason else ""
        self._seen: tuple[Tensor, Tensor, Observation] | None = None

    def step(self, state: State, goal: Goal, k: int, skip: int, run: Run) -> State:
        after = step(self._observer(run, self._rules.readout_hw), state, goal, self._rules, k, skip)
        if after.latent is not state.latent:
            run.count("drag", backward=1)
            self._seen = None  # and with it the graph
        return after

    def look(self, state: State, goal: Goal, run: Run) -> State:
        with torch.no_grad():
            after = look(self._observer(run, None), state, goal, self._rules)
        self._seen = None
        return after

    def _observer(self, run: Run, readout_hw: Size | None) -> Observe:
        """One network call, and none for a latent that has not changed since the last."""

        def observe(latent: Tensor, timestep: Tensor) -> tuple[Tensor, Observation]:
            if self._seen is None or self._seen[0] is not latent:
                leaf = latent.detach().requires_grad_()
                run.count("drag", forward=1)
                self._seen = latent, leaf, self._passes.supervise(leaf, timestep, readout_hw=readout_hw)
            return self._seen[1:]

        return observe


def make_goal(
    schedule: Schedule,
    t: int,
    spacing: int,
    *,
    latent: Tensor,
    first_handles_yx: Tensor,
    targets_yx: Tensor,
    valid: Tensor,
    features: Sequence[Tensor],
    before: Tensor,
    after: Tensor,
    background: Tensor,
    appearance: Sequence[Tensor],
    rules: Rules,
    rounding: float,
) -> Goal:
    """The `Goal` of one time for a batch of edits that enter it with `latent` [B,4,h,w].

    features, appearance: maps [1,...] of the unedited pictures at this time, one an edit; before, after: their latents
    [B,4,h,w] at this time and the next. rounding: see `Passes`.
    """
    config, feature_hw, device = rules.config, rules.feature_hw, latent.device
    scale, shift = coefficients(schedule.alpha(t), schedule.alpha(t - spacing))
    pairs = [*zip(features, first_handles_yx.split(1), strict=True)]
    guided = rules.readout_hw is not None
    span = latent.flatten(1).amax(dim=1) - latent.flatten(1).amin(dim=1)
    skip = torch.zeros(len(latent), dtype=torch.int64, device=device)
    if config.amp_skip != "none":  # read by the host once a time, in the configurations that need it
        skip = torch.tensor([skipped_updates(config, value, guided) for value in span.tolist()], device=device)
    return Goal(
        timestep=torch.tensor([t], device=device),
        ddim=torch.tensor([scale, shift], dtype=latent.dtype, device=device),
        targets_yx=targets_yx,
        valid=valid,
        patches=torch.cat([reference_patches(feature, points, feature_hw, config) for feature, points in pairs]),
        template=torch.cat([templates(feature, points, feature_hw) for feature, points in pairs]),
        reference_latent=after,
        background=background,
        appearance=torch.cat(list(appearance)) if guided else latent.new_zeros(0),
        latent_range=span,
        skip=skip,
        # ε = (O − A y)/B, so this is `rounding` of the largest |ε|, as the next latent feels it.
        tolerance=rounding * (after - scale * before).abs().amax(),
        corrections=adam_table(config.latent_lr, iterations(config)).to(device, latent.dtype),
    )


def iterations(config: DirectDragConfig) -> int:
    """The most latent updates of one drag step."""
    return config.track_per_step * config.max_drag_per_track


def drag(
    unit: Unit,
    state: State,
    goal: Goal,
    rules: Rules,
    run: Run,
    *,
    first_handles_yx: Tensor,
    number: int = 0,
    report: Callable[[State, int, int], None] | None = None,
) -> State:
    """Drag at one time, from `begin` to the state that denoising goes on from.

    number: of the drag step, for `report`, which is told the state and the iterations done out of all. Where the
    network has seen the final latents its noise is `fresh`. Raises what `report` raises, and InputError where a patch
    leaves the grid and the configuration refuses that.
    """
    config, count = rules.config, iterations(rules.config)
    skip = int(goal.skip.min()) if config.amp_skip != "none" else 0
    for k in range(count):
        state = unit.step(state, goal, k, skip, run)
        stopped = unit.reads and not bool(state.active.any())
        if config.ms_border == "refuse":
            _refuse(state, k, goal, first_handles_yx, rules)
        if report is not None and not (stopped and not bool(state.history[k, :, RAN].any())):
            report(state, number * count + k + 1, config.drag_end_step * count)
        if stopped:
            break
    if not config.track_lag and not bool(state.fresh.all()):
        state = unit.look(state, goal, run)
    return state


def _refuse(state: State, k: int, goal: Goal, first_handles_yx: Tensor, rules: Rules) -> None:
    for edit, valid in enumerate(goal.valid):
        used = state.history[k, edit, HANDLES:].view(-1, 2)[valid]
        if bool(state.history[k, edit, RAN]):
            first, targets = first_handles_yx[edit][valid], goal.targets_yx[edit][valid]
            refuse_outside(used, first, targets, rules.feature_hw, rules.config)
