"""This engine's own edits behind the same call as the published structure's, for the bars that come after it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ddengine.backends.passes import Passes
from ddengine.bench.clock import Clock
from ddengine.bench.published import Outcome, Update
from ddengine.config import DirectDragConfig
from ddengine.directdrag.decode import decode
from ddengine.directdrag.drag import StepShape, Unit
from ddengine.directdrag.edit import Edited, Task, edit_batch
from ddengine.directdrag.prepare import Prepared, prepare
from ddengine.directdrag.run import Run
from ddengine.directdrag.step import HANDLES, RAN, Goal, Rules, State
from ddengine.directdrag.unit import unit_for

BETA1 = 0.9  # of Adam: a first moment tells the gradient that went into it


class EngineCode:
    """Edits of this engine by some passes: a picture kept for the next edit or not, one edit at a time or several."""

    def __init__(self, passes: Passes, *, kept: bool, edits: int = 1) -> None:
        """kept: the prepared picture stays, with keys and values; else every edit walks the unedited row beside it."""
        self.passes, self.kept, self.edits = passes, kept, edits
        self._prepared: Prepared | None = None

    def edit(
        self,
        image: Tensor,
        handles_yx: Tensor,
        targets_yx: Tensor,
        config: DirectDragConfig,
        *,
        watch: Callable[[Update], None] | None = None,
    ) -> Outcome:
        """A first edit of an image [1,3,H,W] in −1..1, points [n,2] on its feature grid."""
        prepared = prepare(self.passes, image.to(self.passes.device), config, kv_budget=None if self.kept else 0)
        outcome = self._drag(prepared, handles_yx, targets_yx, config, watch)
        self._prepared = prepared if self.kept else None
        for stage, count in _calls(prepared.passes).items():
            outcome.calls[stage] += count
        return Outcome(**{**vars(outcome), "seconds": {**prepared.timings, **outcome.seconds}})

    def edit_next(self, handles_yx: Tensor, targets_yx: Tensor, config: DirectDragConfig) -> Outcome:
        """Another edit of the picture that was edited last; only where it was kept."""
        assert self._prepared is not None, "nothing was kept"
        return self._drag(self._prepared, handles_yx, targets_yx, config, None)

    def _drag(
        self,
        prepared: Prepared,
        handles_yx: Tensor,
        targets_yx: Tensor,
        config: DirectDragConfig,
        watch: Callable[[Update], None] | None,
    ) -> Outcome:
        clocked: list[Clocked] = []

        def unit(passes: Passes, rules: Rules, shape: StepShape) -> Unit:
            found = unit_for(passes, rules, shape)
            clocked.append(Clocked(found, passes.device))
            return clocked[0] if watch is None else Watched(clocked[0], len(handles_yx), watch)

        tasks = [Task(prepared, handles_yx, targets_yx)] * self.edits
        edits = edit_batch(self.passes, tasks, config, unit=unit)
        timing = Run(self.passes.device)
        with timing.stage("decode"):
            pictures = self._pictures(edits, prepared.work_hw)
        first = edits[0]
        return Outcome(
            first.latent,
            first.unedited,
            pictures,
            first.handles_yx,
            first.history,
            _calls(first.passes),
            {**first.timings, **timing.seconds},
            0,
            first.timings.get("drag", 0.0) if self.passes.device.type == "cuda" else clocked[0].seconds,
        )

    def _pictures(self, edits: Sequence[Edited], work_hw: tuple[int, int]) -> tuple[Tensor, ...]:
        """Every edit decoded, then the picture that none of them changed."""
        ends = [edit.latent for edit in edits]
        if edits[0].unedited is not None:  # one picture: one end
            ends.append(edits[0].unedited)
        return tuple(decode(self.passes, end, work_hw) for end in ends)


def _calls(passes: dict[str, dict[str, int]]) -> Counter[tuple[str, str]]:
    counts = ((stage, call, n) for stage, calls in passes.items() for call, n in calls.items())
    return Counter({(stage, call): n for stage, call, n in counts if n})


class Clocked:
    """A unit and the seconds of its calls; on CUDA it is not clocked, since the clock would wait for the device."""

    def __init__(self, unit: Unit, device: torch.device) -> None:
        self._unit, self._clock, self.seconds = unit, None if device.type == "cuda" else Clock(device), 0.0
        self.name, self.reads, self.fixed, self.rounding = unit.name, unit.reads, unit.fixed, unit.rounding

    def step(self, state: State, goal: Goal, k: int, skip: int, run: Run) -> State:
        return self._timed(lambda: self._unit.step(state, goal, k, skip, run))

    def look(self, state: State, goal: Goal, run: Run) -> State:
        return self._timed(lambda: self._unit.look(state, goal, run))

    def _timed(self, call: Callable[[], State]) -> State:
        if self._clock is None:
            return call()
        started = self._clock.now()
        after = call()
        self.seconds += self._clock.now() - started
        return after


class Watched:
    """A unit whose updates are told to somebody: copies, since a replayed graph's states are its buffers."""

    def __init__(self, unit: Unit, pairs: int, watch: Callable[[Update], None]) -> None:
        self._unit, self._pairs, self._watch = unit, pairs, watch
        self.name, self.reads, self.fixed, self.rounding = unit.name, unit.reads, unit.fixed, unit.rounding
        self._goal: Goal | None = None
        self._step = -1

    def step(self, state: State, goal: Goal, k: int, skip: int, run: Run) -> State:
        if goal is not self._goal:
            self._goal, self._step = goal, self._step + 1
        latent, first = state.latent.clone(), state.first.clone()
        after = self._unit.step(state, goal, k, skip, run)
        gradient = (after.first.clone() - BETA1 * first) / (1 - BETA1)
        for edit, row in enumerate(after.history[k].tolist()):
            if row[RAN]:
                handles = torch.tensor(row[HANDLES : HANDLES + 2 * self._pairs]).view(-1, 2)
                terms, of = (row[0], row[1], row[2], row[3]), slice(edit, edit + 1)
                self._watch(Update(self._step, k, latent[of], handles, terms, gradient[of], edit))
        return after

    def look(self, state: State, goal: Goal, run: Run) -> State:
        return self._unit.look(state, goal, run)
