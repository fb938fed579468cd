"""The same edit in the published code's structure, and what each saving removes on the way to this engine's.

Published, at every denoising step of the drag: an update is a forward, a readout of the edit and one of the reference,
and a backward that goes to every weight; then both rows, edit and unedited, are denoised at batch 2. The UNet's weights
are float32, and every call of drag and denoising casts them; feature maps, float32 at half the picture's size, lie in
the host's memory and are fetched for every loss and every tracking.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ddengine.bench.account import Account, Line, total
from ddengine.bench.counting import Cost, Counter
from ddengine.directdrag.readout import skipped_updates
from ddengine.models.load import Model
from ddengine.models.unet import UNetOutput, time_embedding, time_terms, unet_forward


@dataclass(frozen=True)
class Structure:
    """Which savings an edit makes, in the order in which the table makes them; the default makes none."""

    frozen: bool = False
    cast_once: bool = False
    half: bool = False
    on_device: bool = False
    targets_once: bool = False
    native_readout: bool = False
    constant_cross: bool = False
    time_table: bool = False
    shared_reference: bool = False
    tracks_updated: bool = False
    reuses_noise: bool = False
    skips: bool = False
    decodes_unedited: bool = False


SAVINGS = {
    "frozen": "weights are frozen: the only gradient is the latent's",
    "cast_once": "weights are cast to half precision once, not in every call",
    "half": "inversion and reference run in half precision too",
    "on_device": "features stay on the device at their own resolution",
    "targets_once": "readout targets are read once a timestep, not once an update",
    "native_readout": "the readout's 1x1 convolutions run before the resize",
    "constant_cross": "keys and values of the fixed prompt are constants",
    "time_table": "time embeddings and their projections are a table",
    "shared_reference": "the reference is walked once and its keys and values kept: denoising at batch 1",
    "tracks_updated": "handles are tracked on the updated latent's features",
    "reuses_noise": "that forward's noise denoises the step",
    "skips": "updates that the gradient scaler skips are not computed",
    "decodes_unedited": "the unedited latent is decoded too, to keep the input's own pixels",
}
CHOICES = ("tracks_updated", "reuses_noise", "skips", "decodes_unedited")  # the configuration asks for them or does not


@dataclass(frozen=True)
class Saving:
    """A row of the table: what an edit costs after it."""

    name: str
    doc: str
    cost: Cost


class Published:
    """Edits of the published code's structure, with none or some of the savings made."""

    def __init__(self, account: Account, trainable: Model) -> None:
        """account: of this engine's edits. trainable: another copy of its model, whose weights now get gradients."""
        self.account, self._trainable = account, trainable
        self._latent = account.latent.to(account.model.dtype)
        modules = {"unet": trainable.unet.requires_grad_(True)}
        if trainable.readout is not None:
            modules["readout"] = trainable.readout.requires_grad_(True)
        self._counter = Counter(**modules)
        with torch.no_grad():
            self._embedding = time_embedding(account.model.unet, 1, self._latent)
        self._known: dict[tuple[object, ...], tuple[Cost, ...]] = {}

    def full(self, latent_range: float = 0.0) -> Structure:
        """Every saving that there is with the account's configuration: this engine's own structure."""
        config, guided = self.account.config, self.account.guided
        made = {name: True for name in SAVINGS if name not in CHOICES}
        made |= dict.fromkeys(("tracks_updated", "reuses_noise"), not config.track_lag)
        made |= dict.fromkeys(("targets_once", "native_readout"), guided)
        made["skips"] = skipped_updates(config, latent_range, guided) > 0
        return Structure(**made, decodes_unedited=config.preserve)

    def savings(self, latent_range: float = 0.0) -> tuple[Saving, ...]:
        """The published structure, then a row for each saving made on top of those before it."""
        structure, full = Structure(), self.full(latent_range)
        rows = [Saving("published", "the published structure", total(self.edit(structure)))]
        for name, doc in SAVINGS.items():
            if getattr(full, name):
                structure = replace(structure, **{name: True})
                rows.append(Saving(name, doc, total(self.edit(structure, latent_range))))
        return tuple(rows)

    def forward(self) -> dict[str, Cost]:
        """One walk of the UNet before and after each folding: what the fixed prompt and the times' table remove."""
        structures = {"published": Structure()}
        structures["constant_cross"] = Structure(constant_cross=True)
        structures["time_table"] = Structure(constant_cross=True, time_table=True)
        return {name: self._walk(structure) for name, structure in structures.items()} | {
            "kept_kv": self._walk(structures["time_table"], kept=True)
        }

    def edit(self, structure: Structure, latent_range: float = 0.0) -> tuple[Line, ...]:
        """The lines of a first edit. latent_range: of the latent that enters a drag step."""
        account, config, steps = self.account, self.account.config, self.account.steps
        drags, per_step = config.drag_end_step, config.track_per_step * config.max_drag_per_track
        skipped = skipped_updates(config, latent_range, account.guided) if structure.skips else 0
        updates = drags * (per_step - min(per_step, skipped))
        states = updates + (drags if structure.tracks_updated else 0)
        targets = drags if structure.targets_once else updates
        walk = self._walk(structure)
        read, read_back, target, target_back = self._read(structure)
        # What costs no arithmetic: copies of the weights, 2 bytes a value in half precision, and of feature maps.
        half = 2 * walk.parameters
        cast = Cost() if structure.cast_once else Cost(handed=3 * half)  # float32 read, half precision written
        wide = Cost() if structure.half else Cost(handed=half)
        gradients = Cost() if structure.frozen else Cost(handed=4 * half)  # read and written in float32
        lines = [
            Line("encode", "encode", 1, account.cost("encode")),
            Line("invert", "forward", steps, walk + wide),
            *self._rows(structure, cast, wide),
            Line("drag", "forward", states, walk + cast),
            Line("drag", "readout", states, read),
            Line("drag", "readout target", targets, target),
            Line("drag", "backward", updates, self.backward(structure.frozen) + gradients),
            Line("drag", "readout backward", updates, read_back),
            Line("drag", "readout target backward", 0 if structure.frozen else targets, target_back),
            Line("decode", "decode", 1 + structure.decodes_unedited, account.cost("decode")),
        ]
        if not structure.on_device:
            fetched = drags * (per_step + config.track_per_step + 1)
            lines.append(Line("drag", "fetch a feature map", fetched, Cost(host=4 * self._feature_values())))
        return tuple(line for line in lines if line.count)

    def _rows(self, structure: Structure, cast: Cost, wide: Cost) -> list[Line]:
        """Reference trajectory and denoising: the unedited row, the edit, or both at once."""
        account, steps, drags = self.account, self.account.steps, self.account.config.drag_end_step
        if not structure.shared_reference:
            return [
                Line(
                    "reference", "forward", min(drags + 1, steps), self._walk(structure) + wide
                ),  # the last is never read
                Line("denoise", "forward at batch 2", steps, self._walk(structure, batch=2) + cast),
            ]
        calls = account.calls()
        walked = sum(count for (stage, _), count in calls.items() if stage == "reference")
        mutual, again = calls.get(("denoise", "denoise"), 0), calls.get(("denoise", "reference"), 0)
        own = steps - mutual - (drags if structure.reuses_noise else 0)
        return [
            Line("reference", "forward", walked, self._walk(structure)),
            Line("denoise", "forward", own + again, self._walk(structure)),
            Line("denoise", "forward with kept keys and values", mutual, self._walk(structure, kept=True)),
        ]

    def _walk(self, structure: Structure, batch: int = 1, kept: bool = False) -> Cost:
        kv = self.account.kv if kept else None

        def count() -> tuple[Cost, ...]:
            latent = self._latent.expand(batch, -1, -1, -1)
            call = self._call(replace(structure, frozen=True))
            with torch.no_grad():
                return (self.account.counter.forward(call, latent, reference_kv=kv)[1],)

        return self._once(("walk", structure.constant_cross, structure.time_table, batch, kept), count)[0]

    def readout(self, structure: Structure) -> Cost:
        """One forward of the readout head on the UNet's taps."""
        return self._read(structure)[0]

    def backward(self, frozen: bool) -> Cost:
        """From noise, feature and taps to the latent and, unless they are frozen, to all of the UNet's weights."""

        def count() -> tuple[Cost, ...]:
            leaf, call = self._latent.clone().requires_grad_(), self._call(Structure(frozen))
            weights = () if frozen else tuple(self._trainable.unet.parameters())
            counter = self.account.counter if frozen else self._counter
            return (counter.both(lambda x: call(x, taps=True), leaf, wrt=weights)[1],)

        return self._once(("backward", frozen), count)[0]

    def _call(self, structure: Structure) -> Callable[..., UNetOutput]:
        model = self.account.model if structure.frozen else self._trainable
        time = time_terms(model.unet, self._embedding) if structure.time_table else None
        context = self.account.passes.network.cross_kv() if structure.constant_cross else model.empty_context

        def call(latent: Tensor, **options: Any) -> UNetOutput:
            rows = context.expand(len(latent), -1, -1) if isinstance(context, Tensor) else context
            return unet_forward(model.unet, latent, 1, rows, time=time, **options)

        return call

    def _read(self, structure: Structure) -> tuple[Cost, ...]:
        """The head's forward and backward on the edit's taps, then on the reference's."""
        head, grid = (self.account.model if structure.frozen else self._trainable).readout, self.account.grid
        if head is None or grid is None:
            return (Cost(),) * 4
        counter = self.account.counter if structure.frozen else self._counter
        with torch.no_grad():
            terms = head.time_terms(self._embedding) if structure.time_table else None

        def call(*taps: Tensor) -> Tensor:
            return head.read(taps, terms, grid) if terms else head(taps, self._embedding, grid)

        def count() -> tuple[Cost, ...]:
            taps = self._seen.taps
            if not structure.native_readout:  # a resize costs no arithmetic that is counted
                taps = tuple(tap.new_empty(*tap.shape[:2], *grid) for tap in taps)
            leaves = [tap.clone().requires_grad_() for tap in taps]
            weights = () if structure.frozen else tuple(head.parameters())
            edit = counter.both(call, *leaves, wrt=weights)
            if structure.frozen:
                return *edit, counter.forward(call, *taps)[1], Cost()
            return *edit, *counter.both(call, *taps, wrt=weights)

        return self._once(("read", structure.frozen, structure.native_readout, structure.time_table), count)

    @cached_property
    def _seen(self) -> UNetOutput:
        """Shapes of what one walk yields."""
        with torch.no_grad():
            return self._call(Structure(frozen=True))(self._latent, taps=True)

    def _feature_values(self) -> int:
        """Values of the drag feature as the published code keeps it, at half the picture's size."""
        height, width = self.account.size_hw
        return self._seen.feature.shape[1] * (height // 2) * (width // 2)

    def _once(self, key: tuple[object, ...], count: Callable[[], tuple[Cost, ...]]) -> tuple[Cost, ...]:
        if key not in self._known:
            self._known[key] = count()
        return self._known[key]
