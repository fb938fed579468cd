"""The same edit in the published code's structure, to be run and timed: what bench/savings.py counts.

Written from the method's description, on this package's own modules. A drag step enlarges the feature map to the
feature grid and slices patches and tracking windows from it, enlarges the readout's inputs before they are read,
reads the reference again for every update, and sends gradients to every weight, where they add up; warp and mask are
loops; then both pictures, unedited and edited, are denoised at batch 2. Nothing is kept for the next edit.

Left out, in its favour: models loaded anew for every edit, the allocator emptied in every forward, per-cell reads of
the device in the warp (the loops run on host copies), a gradient scaler.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ddengine.bench import loop_form
from ddengine.bench.clock import Clock
from ddengine.bench.published_maps import EnlargedMaps, Maps, NativeMaps
from ddengine.bench.published_networks import Networks, mutual
from ddengine.bench.savings import Structure
from ddengine.config import DirectDragConfig
from ddengine.directdrag.decode import decode
from ddengine.directdrag.edit import Record
from ddengine.directdrag.mask import REFERENCE_GRID, edit_mask, latent_mask
from ddengine.directdrag.readout import readout_grid, readout_loss, skipped_updates, uses_readout
from ddengine.directdrag.run import Run
from ddengine.directdrag.track import arrived
from ddengine.directdrag.warp import warp
from ddengine.errors import InputError
from ddengine.models.load import Model
from ddengine.models.unet import UNetOutput
from ddengine.schedule import coefficients, ddim_step, invert_step

# What the loops and slices are written for: whole positions, and the published forms of warp and mask.
SETTINGS: dict[str, Any] = {
    "round_points": True,
    "warp_reach": "picture",
    "warp_handle_cell": "lost",
    "warp_holes": "zero",
    "warp_fill": "sequential",
    "mask_form": "truncated",
    "mask_epsilon": 1e-6,
}
# Savings that change how an edit runs and are made here; the rest are the configuration's or the engine's own.
MADE = (
    *("frozen", "cast_once", "half", "on_device", "targets_once", "native_readout"),
    *("constant_cross", "time_table"),
)


@dataclass(frozen=True)
class Update:
    """One latent update about to be made: drag step, its number, latent [1,4,h,w], handles [n,2], losses, gradient.

    losses: of the drag, the background, the readout, and their weighted sum. edit: which of a batch.
    """

    step: int
    number: int
    latent: Tensor
    handles_yx: Tensor
    losses: tuple[float, float, float, float]
    gradient: Tensor
    edit: int = 0


@dataclass(frozen=True)
class Outcome:
    """An edit by some bar's code.

    latent: final [1,4,h,w]; unedited: the same of no edit, where it is kept apart. pictures: decoded, the edit's first.
    calls: how often each pass ran, by the (stage, call) of bench/savings.py. seconds: by stage. gradients: how many
    weights hold one at the end. dragging: seconds of the drag by the bench's clock.
    """

    latent: Tensor
    unedited: Tensor | None
    pictures: tuple[Tensor, ...]
    handles_yx: Tensor
    history: tuple[Record, ...]
    calls: Counter[tuple[str, str]]
    seconds: dict[str, float]
    gradients: int
    dragging: float


class PublishedCode:
    """Edits of one model in the published structure, with some savings made."""

    def __init__(
        self,
        model: Model,
        structure: Structure | None = None,
        *,
        half: torch.dtype | None = None,
        kernels: bool = False,
    ) -> None:
        """model: its weights get gradients during an edit, unless `structure` freezes them.

        half: the precision of drag and denoising where the model is in float32 and casts its weights in every call;
        None computes everything in the model's own. kernels: this engine's operators in place of loops and slices,
        which takes `on_device`. Raises InputError for a saving that is not made here.
        """
        self.model, self.structure, self.kernels = model, structure or Structure(), kernels
        wrong = [
            item.name for item in fields(Structure) if getattr(self.structure, item.name) and item.name not in MADE
        ]
        if wrong or (kernels and not self.structure.on_device):
            raise InputError(
                f"the published structure is not run with {', '.join(wrong) or 'kernels alone'}; ask for "
                f"{', '.join(MADE)}, and for kernels with on_device"
            )
        self.networks = Networks(model, self.structure, half)

    def edit(
        self,
        image: Tensor,
        handles_yx: Tensor,
        targets_yx: Tensor,
        config: DirectDragConfig,
        *,
        watch: Callable[[Update], None] | None = None,
    ) -> Outcome:
        """A whole edit of an image [1,3,H,W] in −1..1, points [n,2] on its feature grid; `watch` sees every update.

        Raises InputError for settings that loops and slices do not have (`SETTINGS`).
        """
        check_settings(config)
        with self.networks.as_loaded():
            return _Edit(self, image, handles_yx.cpu(), targets_yx.cpu(), config, watch).run()


def check_settings(config: DirectDragConfig) -> None:
    """InputError for settings that the published structure cannot run."""
    wrong = {name: value for name, value in SETTINGS.items() if getattr(config, name) != value}
    if config.track_pad == "clamp":
        wrong["track_pad"] = "slice"
    if wrong:
        needed = ", ".join(f"{name}={value}" for name, value in wrong.items())
        raise InputError(f"the published structure has no other form of these settings; set {needed}")


class _Edit:
    """One edit on its way."""

    def __init__(
        self,
        code: PublishedCode,
        image: Tensor,
        handles_yx: Tensor,
        targets_yx: Tensor,
        config: DirectDragConfig,
        watch: Callable[[Update], None] | None,
    ) -> None:
        self.networks, self.structure, self.kernels = code.networks, code.structure, code.kernels
        self.config, self.watch = config, watch
        self.image, self.first_yx, self.handles_yx, self.targets_yx = image, handles_yx, handles_yx, targets_yx
        schedule = code.model.schedule
        self.schedule, self.spacing = schedule, schedule.spacing(config.n_inference_step)
        self.times = schedule.timesteps(config.n_inference_step, config.inversion_strength)
        height, width = image.shape[-2:]
        self.work_hw, self.feature_hw = (height, width), (height // 2, width // 2)
        self.guided = uses_readout(config, self.networks.passes)
        self.still, self.dragging = 0, True
        self.calls: Counter[tuple[str, str]] = Counter()
        self.history: list[Record] = []
        self.timing, self.clock, self.dragged = Run(code.model.device), Clock(code.model.device), 0.0

    def run(self) -> Outcome:
        networks, config, stage = self.networks, self.config, self.timing.stage
        with torch.no_grad():
            with stage("encode"):
                encoded = self.count("encode", "encode", networks.passes.encode(self.image))
            with stage("invert"):
                inverted, last = self.invert(encoded)
            with stage("reference"):
                self.reference(inverted, last)
            with stage("warp"):
                latent = self.warped(inverted)
                self.background = 1 - latent_mask(self.mask(), self.latent_hw).to(latent)
        unedited = inverted
        for number, t in enumerate(self.times):
            drags = number < config.drag_end_step and self.dragging and self.still != config.max_track_no_change
            if drags:
                with stage("drag"):
                    started = self.clock.now()
                    latent = self.drag(latent, number, t)
                    self.dragged += self.clock.now() - started
            with stage("denoise"), torch.no_grad():
                alone = drags or not config.mutual_attention
                with nullcontext() if alone else mutual(networks.model.unet):
                    noise = networks.walk(torch.cat([unedited, latent]), t).noise
                self.count("denoise", "forward at batch 2")
                assert noise is not None
                rows = ddim_step(self.schedule, noise.to(latent), t, torch.cat([unedited, latent]), self.spacing)
                unedited, latent = rows.split(1)
        with stage("decode"), torch.no_grad():
            ends = (latent, unedited) if config.preserve else (latent,)
            pictures = tuple(self.count("decode", "decode", decode(networks.passes, end, self.work_hw)) for end in ends)
        found = self.handles_yx, tuple(self.history), self.calls, self.timing.seconds
        return Outcome(latent, unedited, pictures, *found, networks.gradients(), self.dragged)

    def count(self, stage: str, call: str, result: Any = None) -> Any:
        self.calls[stage, call] += 1
        return result

    def invert(self, latent: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The inverted latent, and what the readout can read of the last call."""
        self.latent_hw = latent.shape[-2], latent.shape[-1]
        taps: tuple[Tensor, ...] = ()
        for t in reversed(self.times):
            out = self.networks.walk(latent, t, taps=self.guided, early=True)
            self.count("invert", "forward")
            taps = out.taps
            assert out.noise is not None
            latent = invert_step(self.schedule, out.noise.to(latent), t, latent, self.spacing)
        return latent, taps

    def reference(self, latent: Tensor, last: tuple[Tensor, ...]) -> None:
        """Latents, features and taps of the unedited trajectory; one step more than the drag will read."""
        config = self.config
        view = NativeMaps if self.structure.on_device else EnlargedMaps
        self.maps: Maps = view(config, self.feature_hw, self.first_yx, latent.device, kernels=self.kernels)
        self.features, self.latents, self.taps = [], [], []
        for t in self.times[: config.drag_end_step + 1]:
            out = self.networks.walk(latent, t, taps=self.guided, early=True)
            self.count("reference", "forward")
            assert out.noise is not None
            latent = ddim_step(self.schedule, out.noise.to(latent), t, latent, self.spacing)
            self.features.append(self.maps.keep(out.feature))
            self.latents.append(latent)
            self.taps.append(out.taps if config.rg_reference == "same_t" else last)

    def warped(self, latent: Tensor) -> Tensor:
        config = self.config
        if not config.latent_warpage:
            return latent
        handles, targets = self.first_yx.float(), self.targets_yx.float()
        if self.kernels:
            return warp(latent, handles.to(latent.device), targets.to(latent.device), self.feature_hw, config)
        ends = handles + config.latent_warpage_ratio * (targets - handles)
        if config.warp_grid == "corner":
            handles, ends = handles / 4, ends / 4
        else:
            scale = handles.new_tensor(self.latent_hw) / handles.new_tensor(self.feature_hw)
            handles, ends = ((point + 0.5) * scale - 0.5 for point in (handles, ends))
        return loop_form.warp(latent.cpu(), handles, ends - handles).to(latent)

    def mask(self) -> Tensor:
        config, device = self.config, self.image.device
        starts, ends = self.first_yx.float(), self.targets_yx.float()
        if self.kernels or not config.soft_mask:
            return edit_mask(starts.to(device), ends.to(device), self.feature_hw, config)
        sigma = config.soft_mask_sigma * (max(self.feature_hw) / REFERENCE_GRID if config.mask_unit == "grid" else 1)
        # The loops read rows as columns.
        if not config.mask_transposed:
            starts, ends = starts.flip(1), ends.flip(1)
        return loop_form.mask(starts, ends, self.feature_hw, sigma).to(device)

    def drag(self, latent: Tensor, number: int, t: int) -> Tensor:
        """The drag at one time: every update a forward, losses, a backward to the latent and what is not frozen."""
        config = self.config
        leaf = latent.detach().clone().requires_grad_()
        optimiser = torch.optim.Adam([leaf], lr=config.latent_lr)
        span = float(latent.max() - latent.min())
        skip, grid = skipped_updates(config, span, self.guided), readout_grid(config, latent)
        reference = self.maps.at(self.features[number])
        once = self.targets(number, t, grid) if self.structure.targets_once and self.guided else None
        a, b = coefficients(self.schedule.alpha(t), self.schedule.alpha(t - self.spacing))
        for k in range(config.track_per_step * config.max_drag_per_track):
            out, seen = self.look(leaf, t)
            due = k % config.max_drag_per_track == 0
            if due and ((k == 0 and config.track_at_start) or (k > 0 and not config.track_lag)):
                self.follow(reference, seen, counted=k > 0)
            if due and self.arrived():
                self.dragging = False
            if not self.dragging:
                return leaf.detach()
            drag = self.maps.loss(reference, seen, self.handles_yx, self.targets_yx, self.fetched)
            assert out.noise is not None
            difference = (a * leaf + b * out.noise.to(leaf) - self.latents[number]).abs()
            background = (self.background * difference).sum()
            readout = drag.new_zeros(())
            if self.guided:
                observed = self.count("drag", "readout", self.networks.read(out.taps, t, grid))
                target = self.targets(number, t, grid) if once is None else once
                readout = readout_loss(observed, target, span, config.rg_loss).sum()
            total = drag + config.lam * background + config.readout_weight * readout
            # As many waits for the device as there are numbers to print.
            losses = (drag.item(), background.item(), readout.item(), total.item())
            optimiser.zero_grad()
            total.backward()
            self.count("drag", "backward")
            if self.guided:
                self.count("drag", "readout backward")
                self.calls["drag", "readout target backward"] += not self.structure.frozen
            if self.watch is not None:
                assert leaf.grad is not None
                gradient = leaf.grad.clone()
                self.watch(Update(number, k, leaf.detach().clone(), self.handles_yx, losses, gradient))
            if k >= skip:
                optimiser.step()
            points = tuple((y, x) for y, x in self.handles_yx.tolist())
            self.history.append(Record(number, t, *losses, points, k >= skip))
            if config.track_lag and (k + 1) % config.max_drag_per_track == 0:
                self.follow(reference, seen, counted=True)
                if not self.dragging:
                    return leaf.detach()
        if not config.track_lag:
            with torch.no_grad():
                self.follow(reference, self.look(leaf, t)[1], counted=True)
        return leaf.detach()

    def look(self, latent: Tensor, t: int) -> tuple[UNetOutput, Tensor]:
        """A forward, and its feature map as the losses and the tracking see it."""
        out = self.count("drag", "forward", self.networks.walk(latent, t, taps=self.guided))
        return out, self.maps.see(out.feature)

    def targets(self, number: int, t: int, grid: tuple[int, int]) -> Tensor:
        """The readout of the unedited picture; only with frozen weights is there nothing to send a gradient to."""
        return self.count("drag", "readout target", self.networks.read(self.taps[number], t, grid))

    def follow(self, reference: Any, seen: Tensor, *, counted: bool) -> None:
        config = self.config
        found = self.maps.track(reference, seen.detach(), self.handles_yx, self.fetched)
        if counted:
            self.still = self.still + 1 if torch.equal(found, self.handles_yx) else 0
            if config.early_stop == "inner_ge" and self.still >= config.max_track_no_change:
                self.dragging = False
        self.handles_yx = found

    def arrived(self) -> bool:
        valid = torch.ones(len(self.handles_yx), dtype=torch.bool)
        return bool(arrived(self.handles_yx, self.targets_yx, self.config.reach, valid))

    def fetched(self) -> None:
        self.count("drag", "fetch a feature map")
