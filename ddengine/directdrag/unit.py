"""The drag step as one unit of device work: compiled ahead of time, and on CUDA replayed as a graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.func import functional_call

from ddengine.backends.aot import Compiled, compiled
from ddengine.backends.compiled import parameters_of
from ddengine.backends.passes import Passes
from ddengine.backends.replay import Capture, Replayed
from ddengine.directdrag.drag import PlainUnit
from ddengine.directdrag.run import Run
from ddengine.directdrag.step import Goal, Rules, State, look, step
from ddengine.models.network import Network, Observation
from ddengine.store import ArtefactStore

UNITS = {"drag step": step, "drag look": look}
# Settings that the step does not read: edits that differ in them alone share a package.
_ELSEWHERE = (
    "n_inference_step", "inversion_strength", "drag_end_step", "soft_mask", "readout_guidance", "latent_warpage",
    "mutual_attention", "preserve", "latent_lr", "soft_mask_sigma", "latent_warpage_ratio", "resize", "round_points",
    "clamp_margin", "clamp_swapped", "mask_form", "mask_epsilon", "mask_unit", "mask_transposed", "warp_reach",
    "warp_grid", "warp_handle_cell", "warp_holes", "warp_fill", "rg_reference", "rg_grid", "amp_skip",
    "output_rounding",
)  # fmt: skip


class CompiledUnit:
    """A `Unit` whose step and look are packages, for one network and one set of rules.

    There is a package for each shape of batch and points; a missing one is compiled, which takes minutes, once. On CUDA
    a package runs as a replayed graph on buffers of this object, and the states are these buffers: copy what shall
    outlive the next step. Weights are read where the network has them.
    """

    fixed = True

    def __init__(
        self,
        passes: Passes,
        network: Network,
        rules: Rules,
        store: ArtefactStore,
        *,
        capture: Capture | None = None,
    ) -> None:
        """capture: replays on any device what it captured (tests), else a CUDA graph on CUDA and nothing on a CPU."""
        self._network, self._rules, self._store = network, rules, store
        self._plain = PlainUnit(passes, rules)
        self._names, self._weights = parameters_of(network)
        self._graphed = capture is not None or self._weights[0].is_cuda
        self._capture = capture
        self._functions: dict[tuple[Any, ...], Compiled] = {}
        self._replays: dict[tuple[Any, ...], Replayed] = {}
        self._loaded: dict[tuple[Any, ...], Goal] = {}
        self.reads = not self._graphed

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

    def prepare(self, state: State, goal: Goal) -> None:
        """Load or compile what edits of these shapes need."""
        for name in UNITS:
            self._function(name, state, goal)

    def _call(self, name: str, state: State, goal: Goal) -> State:
        function = self._function(name, state, goal)
        if not self._graphed:
            return State(*function(self._weights, state, goal))
        key = (name, *_shapes(state, goal))
        if key not in self._replays:

            def body(given: Sequence[Tensor], constants: Sequence[Tensor]) -> Sequence[Tensor]:
                return function(self._weights, State(*given), Goal(*constants))

            self._replays[key] = Replayed(body, state, goal, self._capture)
        replayed = self._replays[key]
        replayed.load(state, () if self._loaded.get(key) is goal else goal)
        self._loaded[key] = goal
        replayed.replay()
        return State(*replayed.state)

    def _function(self, name: str, state: State, goal: Goal) -> Compiled:
        key = (name, *_shapes(state, goal))
        if key not in self._functions:
            function = compiled(
                name,
                self._traced(UNITS[name]),
                self._weights,
                (state, goal),
                facts=self._facts(),
                store=self._store,
            )
            self._functions[key] = function
        return self._functions[key]

    def _traced(self, function: Callable[..., State]) -> Callable[..., State]:
        def flat(weights: Sequence[Tensor], state: State, goal: Goal) -> State:
            named = dict(zip(self._names, weights, strict=True))

            def observe(latent: Tensor, timestep: Tensor) -> tuple[Tensor, Observation]:
                leaf = latent.detach().requires_grad_()
                computed = leaf.to(self._network.time_table.dtype)
                out = functional_call(
                    self._network, named, (computed, timestep), {"readout_hw": self._rules.readout_hw}
                )
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


def _shapes(state: State, goal: Goal) -> tuple[Any, ...]:
    return tuple((tuple(tensor.shape), tensor.dtype) for tensor in (*state, *goal))
