"""The drag step as one unit of device work: compiled ahead of time, and on CUDA replayed as a graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from ddengine.backends.aot import Compiled, compiled
from ddengine.backends.compiled import ROUNDING, CompiledPasses, parameters_of
from ddengine.backends.passes import Passes
from ddengine.backends.replay import Replayed
from ddengine.directdrag.adam import adam_table
from ddengine.directdrag.drag import PlainUnit, StepShape, Unit, iterations
from ddengine.directdrag.run import Run
from ddengine.directdrag.step import Goal, Rules, State, begin, look, step
from ddengine.errors import BackendUnavailable
from ddengine.models.network import Observation

UNITS = {"drag step": step, "drag look": look}
# Settings that the step does not read: edits that differ in them alone share a package.
_ELSEWHERE = (
    "n_inference_step", "inversion_strength", "drag_end_step", "soft_mask", "readout_guidance", "latent_warpage",
    "mutual_attention", "preserve", "latent_lr", "soft_mask_sigma", "latent_warpage_ratio", "resize", "round_points",
    "clamp_margin", "clamp_swapped", "mask_form", "mask_epsilon", "mask_unit", "mask_transposed", "warp_reach",
    "warp_grid", "warp_handle_cell", "warp_holes", "warp_fill", "rg_reference", "rg_grid", "amp_skip",
    "output_rounding",
)  # fmt: skip


def unit_for(passes: Passes, rules: Rules, shape: StepShape) -> Unit:
    """What carries out the drag steps of edits of this shape: packages where the backend compiles, else the plain step.

    Raises BackendUnavailable where the backend was named and has no package for the shape, with the remedy.
    """
    passes = getattr(passes, "base", passes)  # engines leave the drag to the passes that they stand on
    if not isinstance(passes, CompiledPasses):
        return PlainUnit(passes, rules)
    if rules not in passes.units:
        passes.units[rules] = CompiledUnit(passes, rules)
    unit: CompiledUnit = passes.units[rules]
    missing = unit.open(shape, make=passes.building)
    if not missing:
        return unit
    if passes.strict:
        raise BackendUnavailable(f"{missing}; {passes.remedy(shape)}")
    return PlainUnit(passes, rules, reason=missing)


class CompiledUnit:
    """A `Unit` whose step and look are packages, for one network and one set of rules.

    There is a package for each shape of batch and points. On CUDA a package runs as a replayed graph on buffers of this
    object, and the states are these buffers: copy what shall outlive the next step. Weights are read where the network
    has them.
    """

    fixed = True

    def __init__(self, passes: CompiledPasses, rules: Rules) -> None:
        self._network, self._rules, self._store = passes.network, rules, passes.store
        self._plain = PlainUnit(passes, rules)
        self._names, self._weights = parameters_of(passes.network)
        self._capture, self._graphed = passes.capture, passes.packaged
        self._functions: dict[tuple[Any, ...], Compiled] = {}
        self._replays: dict[tuple[Any, ...], Replayed] = {}
        self._loaded: dict[tuple[Any, ...], Goal] = {}
        self.reads, self.rounding = not self._graphed, ROUNDING[passes.network.dtype]
        self.name = "compile (one package a step" + (", replayed as a CUDA graph)" if self._graphed else ")")

    def open(self, shape: StepShape, *, make: bool) -> str:
        """Load, or with `make` compile, all that drag steps of a shape run; otherwise says what is missing."""
        state, goal = example(shape, self._rules, self._weights[0].device)
        for name, function in UNITS.items():
            key = (name, *_shapes(state, goal))
            if key in self._functions:
                continue
            package = compiled(
                name,
                self._traced(function),
                self._weights,
                (state, goal),
                facts=self._facts(),
                store=self._store,
                make=make,
            )
            if package is None:
                height, width = (8 * cells for cells in shape.latent_hw)
                points = "1 point" if shape.pairs == 1 else f"{shape.pairs} points"
                edits = "an edit" if shape.edits == 1 else f"{shape.edits} edits"
                return f"no compiled {name} for {width} x {height} pixels, {edits} of {points}"
            self._functions[key] = package
        return ""

    def step(self, state: State, goal: Goal, k: int, skip: int, run: Run) -> State:
        """One iteration, which knows its number from the state; those that move no latent need no gradient."""
        if k < skip:
            return self._plain.step(state, goal, k, skip, run)
        run.count("drag", forward=1, backward=1)
        return self._call("drag step", state, goal)

    def look(self, state: State, goal: Goal, run: Run) -> State:
        """A forward alone: the last tracking, and the noise of the latents as they are."""
        run.count("drag", forward=1)
        return self._call("drag look", state, goal)

    def _call(self, name: str, state: State, goal: Goal) -> State:
        key = (name, *_shapes(state, goal))
        function = self._functions[key]
        if not self._graphed:
            return State(*function(self._weights, state, goal))
        if key not in self._replays:

            def body(given: Sequence[Tensor], constants: Sequence[Tensor]) -> Sequence[Tensor]:
                return function(self._weights, State(*given), Goal(*constants))

            self._replays[key] = Replayed(body, state, goal, self._capture)
        replayed = self._replays[key]
        replayed.load(state, () if self._loaded.get(key) is goal else goal)
        self._loaded[key] = goal
        replayed.replay()
        return State(*replayed.state)

    def _traced(self, function: Callable[..., State]) -> Callable[..., State]:
        def flat(weights: Sequence[Tensor], state: State, goal: Goal) -> State:
            named = dict(zip(self._names, weights, strict=True))

            def observe(latent: Tensor, timestep: Tensor) -> tuple[Tensor, Observation]:
                leaf = latent.detach().requires_grad_()
                computed = leaf.to(self._network.dtype)
                options = {"readout_hw": self._rules.readout_hw}
                out = functional_call(self._network, named, (computed, timestep), options)
                return leaf, out._replace(noise=out.noise.to(leaf.dtype))

            return function(observe, state, goal, self._rules)

        return flat

    def _facts(self) -> dict[str, Any]:
        """All that the traced functions depend on but tensors: settings, grids, the modules and their constants."""
        config = {name: value for name, value in self._rules.config.to_dict().items() if name not in _ELSEWHERE}
        return {
            "config": config,
            "feature_hw": list(self._rules.feature_hw),
            "readout_hw": list(self._rules.readout_hw or ()),
            "network": str(self._network),
            "names": self._names,
        }


def example(shape: StepShape, rules: Rules, device: torch.device) -> tuple[State, Goal]:
    """A state and a goal of the right shapes and dtypes, all zeros."""
    config, (edits, pairs) = rules.config, (shape.edits, shape.pairs)
    side, (h, w) = 2 * config.r1 + 1, shape.latent_hw

    def zeros(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(sizes, dtype=dtype, device=device)

    latent, points, whole = zeros(edits, 4, h, w), zeros(edits, pairs, 2), zeros(edits, dtype=torch.int64)
    goal = Goal(
        timestep=zeros(1, dtype=torch.int64),
        ddim=zeros(2),
        targets_yx=points,
        valid=zeros(edits, pairs, dtype=torch.bool),
        patches=zeros(edits, pairs, shape.channels, side, side),
        template=zeros(edits, pairs, shape.channels),
        reference_latent=latent,
        background=zeros(edits, 1, h, w),
        appearance=zeros(edits, *shape.appearance, dtype=shape.dtype) if shape.appearance else zeros(0),
        latent_range=zeros(edits),
        skip=whole,
        tolerance=zeros(),
        corrections=adam_table(config.latent_lr, iterations(config)).to(device),
    )
    return begin(latent, points, whole, whole.bool(), iterations(config)), goal


def _shapes(state: State, goal: Goal) -> tuple[Any, ...]:
    return tuple((tuple(tensor.shape), tensor.dtype) for tensor in (*state, *goal))
