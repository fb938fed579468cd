"""Feature maps as a drag step reads them: enlarged and sliced as in the published code, or at their own resolution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ddengine.config import DirectDragConfig
from ddengine.kernels.drag_loss import drag_loss, supervision_step
from ddengine.kernels.sample_patches import sample_patches
from ddengine.kernels.track import track


class Maps(Protocol):
    """Feature maps as losses and tracking read them; `fetched` is called for every map that comes from the host."""

    def keep(self, feature: Tensor) -> Tensor:
        """What is stored of an unedited map [1,C,h,w]."""
        ...

    def at(self, kept: Tensor) -> Any:
        """What a drag step holds on to of its time's map."""
        ...

    def see(self, feature: Tensor) -> Tensor:
        """The map of the current forward as it is read."""
        ...

    def loss(
        self, reference: Any, seen: Tensor, handles_yx: Tensor, targets_yx: Tensor, fetched: Callable[[], None]
    ) -> Tensor:
        """The drag loss, a scalar."""
        ...

    def track(self, reference: Any, seen: Tensor, handles_yx: Tensor, fetched: Callable[[], None]) -> Tensor:
        """New handles [n,2] on the host."""
        ...


class EnlargedMaps:
    """Maps enlarged to the feature grid in float32; those of the unedited picture lie in the host's memory."""

    def __init__(
        self,
        config: DirectDragConfig,
        feature_hw: tuple[int, int],
        first_yx: Tensor,
        device: torch.device,
        *,
        kernels: bool = False,
    ) -> None:
        self._config, self._feature_hw, self._first_yx, self._device = config, feature_hw, first_yx, device
        self._border = "zero" if config.ms_border == "zero" else "clamp"

    def keep(self, feature: Tensor) -> Tensor:
        return self.see(feature).cpu()

    def at(self, kept: Tensor) -> Tensor:
        return kept

    def see(self, feature: Tensor) -> Tensor:
        return F.interpolate(feature.float(), size=self._feature_hw, mode="bilinear", align_corners=False)

    def loss(
        self, reference: Tensor, seen: Tensor, handles_yx: Tensor, targets_yx: Tensor, fetched: Callable[[], None]
    ) -> Tensor:
        config, total = self._config, seen.new_zeros(())
        radius = config.r1
        scale = (2 * radius + 1) ** 2 if config.ms_scale == "positions" else (2 * radius) ** 2
        fetched()
        unedited = reference.to(self._device)
        steps, moving = supervision_step(handles_yx, targets_yx, config.d, config.reach)
        points = zip(self._first_yx, handles_yx, steps, moving.tolist(), strict=True)
        for first, handle, step, moves in points:
            if not moves:
                continue
            if config.ms_reference == "initial":
                wanted = cut(unedited, first, radius, self._border)
            else:
                wanted = cut(seen.detach(), handle, radius, self._border)
            total = total + scale * (wanted - between(seen, handle + step, radius, self._border)).abs().mean()
        return total

    def track(self, reference: Tensor, seen: Tensor, handles_yx: Tensor, fetched: Callable[[], None]) -> Tensor:
        fetched()
        unedited, radius = reference.to(self._device), self._config.r2
        height, width = self._feature_hw
        found = []
        for first, handle in zip(self._first_yx, handles_yx, strict=True):
            row, column = (int(value) for value in handle)
            template = cut(unedited, first, 0, self._border)
            top, left = row - radius, column - radius
            if self._config.track_pad == "zero":
                window = cut(seen, handle, radius, "zero")
            else:
                top, left = max(top, 0), max(left, 0)
                window = seen[..., top : min(row + radius + 1, height), left : min(column + radius + 1, width)]
            distance = (window - template).abs().sum(dim=(0, 1))
            best = int(distance.argmin())
            down, right = divmod(best, distance.shape[1])
            found.append([float(top + down), float(left + right)])
        return torch.tensor(found)


def cut(full: Tensor, centre: Tensor, radius: int, border: str) -> Tensor:
    """The cells [1,C,2r+1,2r+1] around a whole position of an enlarged map; outside it repeats the border or is 0."""
    top, left = (int(value) - radius for value in centre)
    side, (height, width) = 2 * radius + 1, full.shape[-2:]
    if top >= 0 and top + side <= height and left >= 0 and left + side <= width:
        return full[..., top : top + side, left : left + side]
    rows, columns = (torch.arange(start, start + side) for start in (top, left))
    inside = ((rows >= 0) & (rows < height))[:, None] & (columns >= 0) & (columns < width)
    cells = full[..., rows.clamp(0, height - 1)[:, None], columns.clamp(0, width - 1)]
    return cells if border == "clamp" else cells * inside.to(full)


def between(full: Tensor, centre: Tensor, radius: int, border: str) -> Tensor:
    """The patch around a position between cells: four cuts, weighed alike at every cell of it."""
    low = centre.floor()
    y, x = (centre - low).tolist()
    patch = full.new_zeros(())
    for down, weight in ((0, 1 - y), (1, y)):
        for right, share in ((0, 1 - x), (1, x)):
            patch = patch + weight * share * cut(full, low + low.new_tensor([down, right]), radius, border)
    return patch


class NativeMaps:
    """Maps at their own resolution on their own device, read by this engine's operators: plain ones, or its fastest."""

    def __init__(
        self,
        config: DirectDragConfig,
        feature_hw: tuple[int, int],
        first_yx: Tensor,
        device: torch.device,
        *,
        kernels: bool = False,
    ) -> None:
        self._config, self._feature_hw, self._first_yx, self._device = config, feature_hw, first_yx.to(device), device
        self._border = "zero" if config.ms_border == "zero" else "clamp"
        self._kernels = None if kernels else "reference"

    def keep(self, feature: Tensor) -> Tensor:
        return feature

    def at(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        radii = ((self._config.r1, self._border), (0, "clamp"))
        patches, template = (self._patches(kept, self._first_yx, *radius) for radius in radii)
        return patches, template[..., 0, 0]

    def see(self, feature: Tensor) -> Tensor:
        return feature

    def loss(
        self,
        reference: tuple[Tensor, Tensor],
        seen: Tensor,
        handles_yx: Tensor,
        targets_yx: Tensor,
        fetched: Callable[[], None],
    ) -> Tensor:
        config = self._config
        handles = handles_yx.to(self._device)
        step, moving = supervision_step(handles, targets_yx.to(self._device), config.d, config.reach)
        initial = config.ms_reference == "initial"
        patches = reference[0] if initial else self._patches(seen.detach(), handles, config.r1, self._border)
        scale = (2 * config.r1 + 1) ** 2 if config.ms_scale == "positions" else (2 * config.r1) ** 2
        given = seen, (handles + step)[None], patches, moving[None], scale, config.r1, self._feature_hw
        return drag_loss(*given, border=self._border, kernels=self._kernels).sum()

    def track(
        self, reference: tuple[Tensor, Tensor], seen: Tensor, handles_yx: Tensor, fetched: Callable[[], None]
    ) -> Tensor:
        config = self._config
        given = seen, reference[1], handles_yx.to(self._device)[None], config.r2, self._feature_hw
        return track(*given, border=config.track_pad, kernels=self._kernels)[0].cpu()

    def _patches(self, feature: Tensor, centres: Tensor, radius: int, border: str) -> Tensor:
        grid = self._feature_hw
        return sample_patches(feature, centres[None], radius, grid, border=border, kernels=self._kernels)
