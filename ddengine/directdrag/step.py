"""One drag step as one function of tensors: forward, tracking, losses, gradient to the latent, Adam, stop flags.

No value is read by the host: shapes are fixed and every decision is a mask, so that a compiler may take the whole step
as a unit and a CUDA graph may replay it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from ddengine.config import DirectDragConfig
from ddengine.directdrag.adam import adam_update
from ddengine.directdrag.motion import supervision_loss
from ddengine.directdrag.readout import readout_loss
from ddengine.directdrag.track import arrived, track_handles
from ddengine.models.network import Observation

# (latent, timestep [1]) -> the latent as a leaf with a gradient, and what the network sees of it
Observe: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Observation]]
Flag: TypeAlias = "bool | Tensor"  # known to the host, or a bool scalar on the device

RAN, MOVED, HANDLES = 4, 5, 6  # where a history row says so; its first numbers are the losses


class Goal(NamedTuple):
    """What the edits of a batch are held to at one time, B edits of n pairs each; constant during the drag step.

    timestep int64 [1]; ddim [2]: coefficients of latent and noise in the move to the next time. targets_yx [B,n,2] on
    the feature grid, valid bool [B,n]. patches [B,n,C,P,P] and template [B,n,C]: the unedited features at the first
    handles. reference_latent O_t [B,4,h,w]: the unedited latent after this time. background: weight 1 − M
    [B,1,h,w]. appearance: readout maps [B,P,g,g'], empty where the term is off. latent_range [B]: max − min of the
    latent that enters. skip int64 [B]: updates left out at the start. tolerance: difference to O_t that is rounding.
    corrections [K + 1,2]: `adam_table`.
    """

    timestep: Tensor
    ddim: Tensor
    targets_yx: Tensor
    valid: Tensor
    patches: Tensor
    template: Tensor
    reference_latent: Tensor
    background: Tensor
    appearance: Tensor
    latent_range: Tensor
    skip: Tensor
    tolerance: Tensor
    corrections: Tensor


class State(NamedTuple):
    """Where the edits of a batch stand.

    latent and Adam's moments first, second [B,4,h,w] float32; noise: the last prediction, that of `latent` where fresh
    bool [B]. handles_yx [B,n,2]. iteration int64 []: of this drag step. updates int64 [B]: Adam's. still int64 [B]:
    tracking events in a row that moved nothing. active bool [B]: still dragged at this time; finished bool [B]: for
    good. history [K,B,6 + 2n]: see `record`.
    """

    latent: Tensor
    first: Tensor
    second: Tensor
    noise: Tensor
    fresh: Tensor
    handles_yx: Tensor
    iteration: Tensor
    updates: Tensor
    still: Tensor
    active: Tensor
    finished: Tensor
    history: Tensor


class Losses(NamedTuple):
    """The terms of one iteration, unweighted, and their weighted sum, [B] each."""

    drag: Tensor
    background: Tensor
    readout: Tensor
    total: Tensor


@dataclass(frozen=True)
class Rules:
    """What does not change during an edit and may be compiled in: settings, grids and whether terms run at all."""

    config: DirectDragConfig
    feature_hw: tuple[int, int]
    readout_hw: tuple[int, int] | None


def begin(latent: Tensor, handles_yx: Tensor, still: Tensor, active: Tensor, count: int) -> State:
    """The state that enters a drag step of `count` iterations, with a fresh Adam."""
    zeros, edits = torch.zeros_like(latent), latent.shape[0]
    whole = torch.zeros(edits, dtype=torch.int64, device=latent.device)
    nobody = whole.bool()
    return State(
        latent=latent.detach(),
        first=zeros,
        second=zeros,
        noise=zeros,
        fresh=nobody,
        handles_yx=handles_yx,
        iteration=whole.new_zeros(()),
        updates=whole,
        still=still,
        active=active,
        finished=nobody,
        history=latent.new_zeros(count, edits, HANDLES + 2 * handles_yx.shape[1]),
    )


def losses(out: Observation, latent: Tensor, handles_yx: Tensor, goal: Goal, rules: Rules) -> Losses:
    """The loss of AIDD, differentiable with respect to the latent that `out` was computed from.

    L = L_drag + λ Σ (1 − M) |DDIM(ε, t, e) − O_t| + w L_readout                     (DirectDrag; sum, not mean)
    """
    config = rules.config
    patches = None if config.ms_reference == "current" else goal.patches
    drag = supervision_loss(
        out.feature, patches, handles_yx, goal.targets_yx, rules.feature_hw, config, valid=goal.valid
    )
    difference = (goal.ddim[0] * latent + goal.ddim[1] * out.noise - goal.reference_latent).abs()
    # Below the tolerance a difference has the sign of its rounding, which Adam's first step would make a whole step of.
    difference = torch.where(difference <= goal.tolerance, 0, difference)
    background = (goal.background * difference).sum(dim=(1, 2, 3))
    readout = torch.zeros_like(drag)
    if rules.readout_hw is not None:
        readout = readout_loss(out.appearance[0], goal.appearance, goal.latent_range, config.rg_loss)
    return Losses(drag, background, readout, drag + config.lam * background + config.readout_weight * readout)


def step(observe: Observe, state: State, goal: Goal, rules: Rules, k: int | None = None, skip: int = 0) -> State:
    """One iteration: look, track where it is due, and move the latents that are still dragged.

    k: the iteration's number where the host knows it (work that is not due is then left out, and so are gradients of
    the first `skip` iterations); None reads it from the state.
    """
    config = rules.config
    number: int | Tensor = state.iteration if k is None else k
    due: Flag = number % config.max_drag_per_track == 0
    latent = state.latent
    leaf, out = observe(latent, goal.timestep)
    feature = out.feature.detach()
    state = state._replace(noise=out.noise.detach(), fresh=torch.ones_like(state.fresh))
    if config.track_lag:
        state = follow(state, feature, goal, rules, (number == 0) & config.track_at_start, counted=False)
    else:
        state = follow(state, feature, goal, rules, due & ((number > 0) | config.track_at_start), counted=number > 0)
    if due is not False:
        there = state.active & arrived(state.handles_yx, goal.targets_yx, config.reach, goal.valid) & due
        state = state._replace(active=state.active & ~there, finished=state.finished | there)
        if k is not None and not bool(state.active.any()):
            return state

    terms = losses(out, leaf, state.handles_yx, goal, rules)
    moves = state.active & (number >= goal.skip)
    state = state._replace(history=record(state, terms, moves, number))
    if k is None or k >= skip:
        (gradient,) = torch.autograd.grad(terms.total.sum(), leaf)
        updates = state.updates + moves
        moved = adam_update(latent, gradient, state.first, state.second, goal.corrections[updates])
        keep = moves[:, None, None, None]
        latent, first, second = (
            torch.where(keep, new, old) for new, old in zip(moved, (latent, state.first, state.second), strict=True)
        )
        state = state._replace(latent=latent, first=first, second=second, updates=updates, fresh=state.fresh & ~moves)
    if config.track_lag:
        state = follow(state, feature, goal, rules, (number + 1) % config.max_drag_per_track == 0, counted=True)
    return state._replace(iteration=state.iteration + 1)


def look(observe: Observe, state: State, goal: Goal, rules: Rules) -> State:
    """The network's view of the latents as the last iteration left them: the last tracking, and noise for denoising."""
    _, out = observe(state.latent, goal.timestep)
    state = follow(state, out.feature.detach(), goal, rules, due=True, counted=True)
    return state._replace(noise=out.noise.detach(), fresh=torch.ones_like(state.fresh))


def follow(state: State, feature: Tensor, goal: Goal, rules: Rules, due: Flag, counted: Flag) -> State:
    """Track the handles of the edits that are still dragged, where that is `due`.

    counted: a tracking that moved nothing counts, and enough of them in a row end the drag (early_stop "inner_ge").
    """
    if due is False:
        return state
    config = rules.config
    tracked = track_handles(feature, goal.template, state.handles_yx, rules.feature_hw, config, valid=goal.valid)
    applies = state.active & due
    handles = torch.where(applies[:, None, None], tracked, state.handles_yx)
    counts = applies & counted
    same = (handles == state.handles_yx).flatten(1).all(dim=1)
    still = torch.where(counts, torch.where(same, state.still + 1, 0), state.still)
    state = state._replace(handles_yx=handles, still=still)
    if config.early_stop == "inner_ge":
        given_up = counts & (still >= config.max_track_no_change)
        state = state._replace(active=state.active & ~given_up, finished=state.finished | given_up)
    return state


def record(state: State, terms: Losses, moves: Tensor, number: int | Tensor) -> Tensor:
    """The history with this iteration's row: drag, background, readout and total loss, whether it ran, whether it
    moved the latent, and the handles that it used.
    """
    numbers = torch.stack([*(term.detach() for term in terms), state.active, moves], dim=1)
    row = torch.cat([numbers, state.handles_yx.flatten(1)], dim=1).to(state.history.dtype)
    here = torch.arange(state.history.shape[0], device=row.device) == number
    return torch.where(here[:, None, None], row, state.history)
