"""DirectDrag from prepared pictures to edited latents: warp, drag, denoise. One edit, or several in one batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from ddengine.backends.passes import Passes
from ddengine.config import DirectDragConfig
from ddengine.directdrag.denoise import ReferenceRow, predict_noise
from ddengine.directdrag.drag import StepShape, Unit, drag, iterations, make_goal
from ddengine.directdrag.late import Newest
from ddengine.directdrag.mask import edit_mask, feature_mask, latent_mask
from ddengine.directdrag.prepare import Prepared
from ddengine.directdrag.readout import readout_grid, uses_readout
from ddengine.directdrag.run import Run, Step
from ddengine.directdrag.step import HANDLES, MOVED, RAN, Rules, State, begin
from ddengine.directdrag.unit import unit_for
from ddengine.directdrag.warp import warp
from ddengine.errors import InputError
from ddengine.models.unet import KeyValue
from ddengine.schedule import ddim_step, predicted_image

MakeUnit: TypeAlias = Callable[[Passes, Rules, StepShape], Unit]


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
    timings: cost by stage, of the whole batch. readout: whether its term ran. unit: what carried the drag steps out,
    empty for the passes' own.
    """

    latent: Tensor
    unedited: Tensor | None
    handles_yx: Tensor
    mask: Tensor
    history: tuple[Record, ...]
    passes: dict[str, dict[str, int]]
    timings: dict[str, float]
    readout: bool
    unit: str = ""


@dataclass(frozen=True)
class Task:
    """One edit of a batch: handles and targets [n,2] as (row, column) on the feature grid of a prepared picture.

    user_mask: bool or 0..1, at the working or feature size, 1 where the picture may change; replaces the automatic soft
    mask and confines the warp.
    """

    prepared: Prepared
    handles_yx: Tensor
    targets_yx: Tensor
    user_mask: Tensor | None = None


def edit(
    passes: Passes,
    prepared: Prepared,
    handles_yx: Tensor,
    targets_yx: Tensor,
    config: DirectDragConfig,
    *,
    user_mask: Tensor | None = None,
    progress: Callable[[Step], None] | None = None,
    unit: MakeUnit = unit_for,
) -> Edited:
    """`edit_batch` of a single `Task`."""
    task = Task(prepared, handles_yx, targets_yx, user_mask)
    (edited,) = edit_batch(passes, [task], config, progress=progress, unit=unit)
    return edited


def edit_batch(
    passes: Passes,
    tasks: Sequence[Task],
    config: DirectDragConfig,
    *,
    progress: Callable[[Step], None] | None = None,
    unit: MakeUnit = unit_for,
) -> tuple[Edited, ...]:
    """Drag handles to targets in prepared pictures of one size, all in one batch. (DirectDrag, the main loop of AIDD.)

    Each edit comes out as it would alone, up to rounding. Raises InputError for settings a source was not prepared
    with, a mask of another size or pictures of several sizes, and whatever `progress` raises; what is prepared is never
    changed. `progress` is told points and latents of a single edit, and of several only how far they are. unit: makes
    what carries the drag steps out.
    """
    run = Run(passes.device, progress)
    guided = uses_readout(config, passes)
    like = _checked(tasks, config, guided)
    times, spacing = like.times, like.spacing
    rules = Rules(config, like.feature_hw, readout_grid(config, like.inverted) if guided else None)

    most = max(len(task.handles_yx) for task in tasks)
    with run.stage("load"):  # a compiled step is read from the disk once an engine
        drags = unit(passes, rules, _step_shape(like, len(tasks), most, guided))
    with run.stage("warp"):
        starts = [_start(passes, task, config) for task in tasks]
        latent = torch.cat([start.latent for start in starts])
        background = torch.cat([start.background for start in starts])
        handles_yx, targets_yx, valid = padded(
            [(start.handles_yx, start.targets_yx) for start in starts], to_power_of_two=drags.fixed
        )
        first_handles_yx, alone = handles_yx, len(tasks) == 1
        counts = [len(task.handles_yx) for task in tasks]
        run.report("warp", 1, 1, points_yx=starts[0].handles_yx if alone else None)

    unedited = _UneditedRows(passes, tasks, run)
    still = torch.zeros(len(tasks), dtype=torch.int64, device=passes.device)
    finished = torch.zeros_like(still, dtype=torch.bool)
    newest = Newest()
    records: list[list[Record]] = [[] for _ in tasks]

    def tell(state: State, done: int, total: int) -> None:
        if progress is not None:
            seen = predicted_image(passes.schedule, state.noise, t, state.latent) if alone else None
            points = (state.handles_yx if drags.reads else newest(state.handles_yx))[0, : counts[0]]
            run.report("drag", done, total, points_yx=points if alone else None, latent=seen)

    for number, t in enumerate(times):
        # Once a time the host looks which edits are still dragged; the others go on with mutual attention.
        dragged: list[int] = []
        if number < config.drag_end_step:
            dragged = (~finished & (still != config.max_track_no_change)).nonzero().flatten().tolist()
        noise: dict[int, Tensor] = {}
        if dragged:
            who = list(range(len(tasks))) if drags.fixed else dragged
            references = [tasks[edit].prepared.reference for edit in who]
            active = torch.tensor([edit in dragged for edit in who], device=latent.device)
            with run.stage("drag"):
                goal = make_goal(
                    passes.schedule,
                    t,
                    spacing,
                    latent=latent[who],
                    first_handles_yx=first_handles_yx[who],
                    targets_yx=targets_yx[who],
                    valid=valid[who],
                    features=[reference.features[number] for reference in references],
                    before=torch.cat([reference.latents[number] for reference in references]),
                    after=torch.cat([reference.latents[number + 1] for reference in references]),
                    background=background[who],
                    appearance=[reference.appearance[number] for reference in references if reference.appearance],
                    rules=rules,
                    rounding=max(passes.rounding, drags.rounding),
                )
                state = begin(latent[who], handles_yx[who], still[who], active, iterations(config))
                first = first_handles_yx[who]
                state = drag(drags, state, goal, rules, run, first_handles_yx=first, number=number, report=tell)
            places = torch.tensor(who, device=latent.device)
            latent, handles_yx, still, finished = (
                whole.index_copy(0, places, part)
                for whole, part in (
                    (latent, state.latent),
                    (handles_yx, state.handles_yx),
                    (still, state.still),
                    (finished, state.finished | finished[who]),
                )
            )
            history, fresh = state.history.tolist(), state.fresh.tolist()
            for place, edit in enumerate(who):
                records[edit] += _records([row[place] for row in history], number, t, counts[edit])
                if fresh[place] and edit in dragged:
                    noise[edit] = state.noise[place : place + 1].clone()
        with run.stage("denoise"), torch.no_grad():
            settled = [edit for edit in range(len(tasks)) if edit not in dragged and config.mutual_attention]
            plain = [edit for edit in range(len(tasks)) if edit not in noise and edit not in settled]
            for members, mutual in ((plain, False), (settled, True)):
                for group in _groups(members, passes.any_batch):
                    kv = unedited.key_value(group, number, t) if mutual else None
                    found = predict_noise(passes, latent[group], t, run, reference_kv=kv)
                    noise.update(zip(group, found.split(1), strict=True))
            predicted = torch.cat([noise[edit] for edit in range(len(tasks))])
            preview = predicted_image(passes.schedule, predicted, t, latent) if alone else None
            latent = ddim_step(passes.schedule, predicted, t, latent, spacing)
        points = handles_yx[0, : counts[0]] if alone else None
        run.report("denoise", number + 1, len(times), points_yx=points, latent=preview)

    ends: list[Tensor | None] = [None] * len(tasks)
    if config.preserve:
        with run.stage("denoise"), torch.no_grad():
            ends = [unedited.end(edit, times) for edit in range(len(tasks))]
    return tuple(
        Edited(
            latent[edit : edit + 1],
            ends[edit],
            handles_yx[edit][valid[edit]],
            start.mask,
            tuple(records[edit]),
            run.passes,
            run.seconds,
            guided,
            drags.name,
        )
        for edit, start in enumerate(starts)
    )


@dataclass(frozen=True)
class _Start:
    """Where one edit begins: warped latent and held-still weight 1 − M [1,1,h,w], points on the device, its mask."""

    latent: Tensor
    background: Tensor
    handles_yx: Tensor
    targets_yx: Tensor
    mask: Tensor


def _start(passes: Passes, task: Task, config: DirectDragConfig) -> _Start:
    prepared, feature_hw = task.prepared, task.prepared.feature_hw
    handles_yx, targets_yx = (points.to(passes.device, torch.float32) for points in (task.handles_yx, task.targets_yx))
    user_mask = task.user_mask
    if user_mask is not None:
        user_mask = feature_mask(user_mask.to(passes.device), prepared.work_hw, feature_hw)
    latent = prepared.inverted
    if config.latent_warpage:
        latent = warp(latent, handles_yx, targets_yx, feature_hw, config, user_mask=user_mask)
    mask = edit_mask(handles_yx, targets_yx, feature_hw, config, user_mask=user_mask)
    held = 1 - latent_mask(mask, (latent.shape[-2], latent.shape[-1])).to(latent.dtype)
    return _Start(latent, held, handles_yx, targets_yx, mask)


def padded(pairs: Sequence[tuple[Tensor, Tensor]], *, to_power_of_two: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Handles and targets of several edits, [n_b,2] each, as [B,n,2] with n the largest, and which are valid [B,n]."""
    most = max(len(handles) for handles, _ in pairs)
    if to_power_of_two:
        most = 1 << (most - 1).bit_length()
    filled = [[F.pad(points, (0, 0, 0, most - len(points))) for points in pair] for pair in pairs]
    handles, targets = (torch.stack(points) for points in zip(*filled, strict=True))
    counts = torch.tensor([len(points) for points, _ in pairs], device=handles.device)
    return handles, targets, torch.arange(most, device=handles.device) < counts[:, None]


class _UneditedRows:
    """The unedited pictures beside a batch; edits of the same prepared picture share one row."""

    def __init__(self, passes: Passes, tasks: Sequence[Task], run: Run) -> None:
        rows: dict[int, ReferenceRow] = {}
        for task in tasks:
            made = task.prepared
            if id(made) not in rows:
                rows[id(made)] = ReferenceRow(passes, made.reference, made.spacing, run)
        self._rows = [rows[id(task.prepared)] for task in tasks]
        self._step, self._found = -1, dict[int, tuple[KeyValue, ...]]()

    def key_value(self, edits: Sequence[int], number: int, t: int) -> tuple[KeyValue, ...]:
        """Keys and values [B or 1,tokens,C] of denoising step `number` at time t for some of the edits."""
        if number != self._step:
            self._step, self._found = number, {}
        rows = [self._rows[edit] for edit in edits]
        for row in rows:
            if id(row) not in self._found:
                self._found[id(row)] = row.key_value(number, t)
        if len({id(row) for row in rows}) == 1:
            return self._found[id(rows[0])]
        pairs = zip(*(self._found[id(row)] for row in rows), strict=True)
        return tuple((torch.cat([k for k, _ in pair]), torch.cat([v for _, v in pair])) for pair in pairs)

    def end(self, edit: int, times: Sequence[int]) -> Tensor:
        """The final latent [1,4,h,w] of no edit."""
        return self._rows[edit].end(times)


def _groups(members: list[int], together: bool) -> list[list[int]]:
    """Members that go through a pass at once."""
    if not members:
        return []
    return [members] if together else [[member] for member in members]


def _step_shape(prepared: Prepared, edits: int, pairs: int, guided: bool) -> StepShape:
    reference, inverted = prepared.reference, prepared.inverted
    feature = reference.features[0] if reference.features else inverted
    maps = reference.appearance[0].shape[1:] if guided and reference.appearance else None
    return StepShape(
        edits,
        1 << (pairs - 1).bit_length(),
        (inverted.shape[-2], inverted.shape[-1]),
        feature.shape[1],
        None if maps is None else (maps[0], maps[1], maps[2]),
        feature.dtype,
    )


def _checked(tasks: Sequence[Task], config: DirectDragConfig, guided: bool) -> Prepared:
    """The first task's source, if all can be edited with `config` in one batch."""
    if not tasks:
        raise InputError("a batch of no edits was given; give at least one")
    first = tasks[0].prepared
    for task in tasks:
        task.prepared.check(config, guided)
        if task.prepared.work_hw != first.work_hw:
            raise InputError(
                f"a batch has pictures of working sizes {first.work_hw} and {task.prepared.work_hw} (rows, columns); "
                f"edit pictures of one size together"
            )
    return first


def _records(rows: list[list[float]], number: int, t: int, pairs: int) -> list[Record]:
    """What a drag step's history says of one edit, in plain numbers."""
    found = []
    for row in rows:
        drag, background, readout, total = row[:RAN]
        points = tuple((row[at], row[at + 1]) for at in range(HANDLES, HANDLES + 2 * pairs, 2))
        if row[RAN]:
            found.append(Record(number, t, drag, background, readout, total, points, bool(row[MOVED])))
    return found
