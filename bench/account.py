"""What an edit of this engine runs: how often it calls every pass, and what a call costs.

The numbers of calls follow from the configuration and hold for an edit that no early stop shortens. The costs are
counted from the passes themselves over a model on the meta device, where nothing is computed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ddengine.backends.eager import EagerPasses
from ddengine.bench.counting import Cost, Counter
from ddengine.config import DirectDragConfig
from ddengine.directdrag.memory import kv_bytes
from ddengine.directdrag.readout import readout_grid, skipped_updates, uses_readout
from ddengine.models.load import Model
from ddengine.models.unet import KeyValue

FORWARD = ("predict", "reference", "reference and readout", "last inversion", "denoise", "supervise")


@dataclass(frozen=True)
class Line:
    """`count` calls of one pass in one stage of an edit, at a cost each."""

    stage: str
    call: str
    count: int
    cost: Cost

    @property
    def total(self) -> Cost:
        return self.cost * self.count


def total(lines: Iterable[Line]) -> Cost:
    """The cost of all lines together."""
    return sum((line.total for line in lines), Cost())


def edit_calls(
    config: DirectDragConfig,
    steps: int,
    *,
    guided: bool = True,
    kept: bool = True,
    prepared: bool = False,
    latent_range: float = 0.0,
) -> dict[tuple[str, str], int]:
    """How often an edit that never stops early calls each pass, by (stage, pass).

    steps: times of the trajectory (`Schedule.timesteps`). guided: the readout term runs. kept: the keys and values of
    the whole reference trajectory have a place. prepared: the picture was prepared before. latent_range: of the
    latent that enters a drag step; it decides how many updates `amp_skip="emulate"` skips (0: none).
    """
    drags, per_step = config.drag_end_step, config.track_per_step * config.max_drag_per_track
    updates = per_step - min(per_step, skipped_updates(config, latent_range, guided))
    # A forward for every state of the latent that something reads. Tracking on the features of before the update leaves
    # the last state of a drag step to the denoising; else tracking has read it, and its noise is at hand.
    lags = config.track_lag and updates > 0
    mutual = steps - drags if config.mutual_attention else 0
    if config.mutual_attention:  # without a place, the first step is walked to learn how much would have to be kept
        walked, again = (steps, 0) if kept else (max(drags, 1), mutual)
    else:
        walked, again = steps if config.preserve else drags, 0
    late = guided and config.rg_reference == "last_inversion"
    read = drags if guided and not late else 0
    first = {
        ("encode", "encode"): 1,
        ("invert", "predict"): steps - late,
        ("invert", "last inversion"): int(late),
        ("reference", "reference and readout"): read,
        ("reference", "reference"): walked - read,
    }
    then = {
        ("drag", "supervise"): drags * (updates + (not lags)),
        ("drag", "backward"): drags * updates,
        ("denoise", "predict"): steps - mutual - (0 if lags else drags),
        ("denoise", "denoise"): mutual,
        ("denoise", "reference"): again,
        ("decode", "decode"): 2 if config.preserve else 1,
    }
    calls = then if prepared else {**first, **then}
    return {key: count for key, count in calls.items() if count}


def unet_passes(calls: Mapping[tuple[str, str], int]) -> dict[str, dict[str, int]]:
    """UNet forwards and backwards by stage, as an edit's result reports them."""
    found: dict[str, dict[str, int]] = {}
    for (stage, call), count in calls.items():
        direction = "forward" if call in FORWARD else "backward" if call == "backward" else None
        if direction:
            found.setdefault(stage, {"forward": 0, "backward": 0})[direction] += count
    return found


class Account:
    """This engine's edits of a picture of some size with some configuration, every pass priced once."""

    def __init__(self, model: Model, size_hw: tuple[int, int], config: DirectDragConfig, *, kept: bool = True) -> None:
        """model: on the meta device. size_hw: working height and width in pixels, multiples of 8.

        kept: whether the reference trajectory's keys and values (`kv_bytes`) have a place.
        """
        self.model, self.size_hw, self.config, self.kept = model, size_hw, config, kept
        self.passes = EagerPasses(model)
        networks = {"unet": model.unet, "vae": model.vae, "readout": model.readout, "constants": self.passes.network}
        self.counter = Counter(**{role: module for role, module in networks.items() if module is not None})
        self.guided = uses_readout(config, self.passes)
        self.steps = len(model.schedule.timesteps(config.n_inference_step, config.inversion_strength))
        self.latent = torch.empty(1, 4, size_hw[0] // 8, size_hw[1] // 8, device="meta")
        self.grid = readout_grid(config, self.latent) if self.guided else None
        self._costs: dict[str, Cost] = {}

    def cost(self, name: str) -> Cost:
        """What one call of a pass costs in the model's precision; the passes are those of `edit_calls`."""
        if name not in self._costs:
            self._costs.update(self._count(name))
        return self._costs[name]

    def _count(self, name: str) -> dict[str, Cost]:
        passes, latent, count = self.passes, self.latent, self.counter.forward
        if name == "encode":
            return {name: count(passes.encode, torch.empty(1, 3, *self.size_hw, device="meta"))[1]}
        if name in ("supervise", "backward"):
            leaf = latent.clone().requires_grad_()
            forward, backward = self.counter.both(lambda x: passes.supervise(x, 1, readout_hw=self.grid), leaf)
            return {"supervise": forward, "backward": backward}
        if name == "denoise":
            return {name: count(passes.denoise, latent, 1, self.kv)[1]}
        if name in ("predict", "decode"):
            return {name: count(getattr(passes, name), latent, *([1] if name == "predict" else []))[1]}
        options: dict[str, Any] = {} if name == "reference" else {"readout_hw": self.grid}
        if name == "last inversion":  # which times the head is told does not matter, how many does
            options["readout_times"] = range(self.config.drag_end_step)
        return {name: count(passes.reference, latent, 1, **options)[1]}

    @cached_property
    def kv(self) -> tuple[KeyValue, ...]:
        """Keys and values that one step of the reference trajectory yields."""
        return self.passes.reference(self.latent, 1).kv

    @property
    def kv_bytes(self) -> int:
        """Bytes of the whole reference trajectory's keys and values, if the edit needs them."""
        return kv_bytes(self.kv) * self.steps if self.config.mutual_attention else 0

    def calls(self, *, prepared: bool = False, latent_range: float = 0.0) -> dict[tuple[str, str], int]:
        """`edit_calls` of this size and configuration."""
        return edit_calls(
            self.config,
            self.steps,
            guided=self.guided,
            kept=self.kept,
            prepared=prepared,
            latent_range=latent_range,
        )

    def edit(self, *, prepared: bool = False, latent_range: float = 0.0) -> tuple[Line, ...]:
        """The lines of a first edit, or of the next one of a prepared picture."""
        calls = self.calls(prepared=prepared, latent_range=latent_range)
        return tuple(Line(stage, call, count, self.cost(call)) for (stage, call), count in calls.items())
