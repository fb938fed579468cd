"""The readout head: reads an appearance map out of the UNet's decoder features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ReadoutHead(nn.Module):
    """Aggregates the up-block resnet taps into one appearance map (Readout Guidance's aggregation network).

    dims: channels of each tap. time_dim: width of the UNet's time embedding, or None for a head that ignores it.
    projection: channels P of the map. bottleneck: hidden channels of a layer (a quarter of P). groups: norm groups.
    Parameter names are those of the published checkpoints.

        G = Σ_l softmax(mix)_l · y_l        y_l one bottleneck layer of tap l, resized bilinearly to the common grid
    """

    def __init__(
        self,
        dims: Sequence[int],
        time_dim: int | None,
        projection: int = 384,
        bottleneck: int | None = None,
        groups: int = 32,
    ) -> None:
        super().__init__()
        hidden = projection // 4 if bottleneck is None else bottleneck
        self.dims, self.time_dim, self.projection = tuple(dims), time_dim, projection
        self.bottleneck, self.groups = hidden, groups
        self.bottleneck_layers = nn.ModuleList(_Bottleneck(dim, hidden, projection, time_dim, groups) for dim in dims)
        self.mixing_weights = nn.Parameter(torch.ones(len(self.dims)))

    def forward(self, taps: Sequence[Tensor], time_embedding: Tensor | None, size_hw: tuple[int, int]) -> Tensor:
        """The appearance map [B,P,h,w] on a grid of `size_hw`; taps [B,C_l,h_l,w_l], time_embedding [1 or B,D]."""
        return self.read(taps, self.time_terms(time_embedding), size_hw)

    def time_terms(self, time_embedding: Tensor | None) -> tuple[Tensor | None, ...]:
        """What a time embedding [T,D] adds to every layer's hidden channels, [T,hidden] each, or None."""
        layers: Any = self.bottleneck_layers
        return tuple(layer.time_term(time_embedding) for layer in layers)

    def read(self, taps: Sequence[Tensor], time: Sequence[Tensor | None], size_hw: tuple[int, int]) -> Tensor:
        """`forward` with the terms that `time_terms` made of the time."""
        weights = torch.softmax(self.mixing_weights, dim=0)
        parts = zip(self.bottleneck_layers, taps, time, strict=True)
        maps = [layer(tap, term, size_hw) for layer, tap, term in parts]
        return torch.stack([weight * one for weight, one in zip(weights, maps, strict=True)]).sum(0)


class _Conv(nn.Conv2d):
    """A bias-free convolution that carries its own group norm."""

    def __init__(self, channels: int, out: int, size: int, groups: int) -> None:
        super().__init__(channels, out, size, padding=size // 2, bias=False)
        self.norm = nn.GroupNorm(groups, out)


class _Bottleneck(nn.Module):
    """One residual bottleneck layer on the common grid.

    a = ReLU(GN(conv1×1 x)) + ReLU(W·emb + b) ;  a = ReLU(GN(conv3×3 a)) ;  y = ReLU(GN(conv1×1 a) + GN(conv1×1 x))
    """

    def __init__(self, channels: int, hidden: int, out: int, time_dim: int | None, groups: int) -> None:
        super().__init__()
        self.shortcut = _Conv(channels, out, 1, groups)
        self.conv1 = _Conv(channels, hidden, 1, groups)
        self.conv2 = _Conv(hidden, hidden, 3, groups)
        self.conv3 = _Conv(hidden, out, 1, groups)
        self.emb_layers = nn.Linear(time_dim, hidden) if time_dim is not None else None

    def time_term(self, time_embedding: Tensor | None) -> Tensor | None:
        if self.emb_layers is None or time_embedding is None:
            return None
        return F.relu(self.emb_layers(time_embedding))

    def forward(self, tap: Tensor, time: Tensor | None, size_hw: tuple[int, int]) -> Tensor:
        # A 1x1 convolution mixes channels, the resize positions, with weights that sum to one: they commute, and the
        # smaller of the two maps is the cheaper place to convolve.
        if tap.shape[-2] * tap.shape[-1] > size_hw[0] * size_hw[1]:
            x = _resize(tap, size_hw)
            a, short = self.conv1(x), self.shortcut(x)
        else:
            a, short = _resize(self.conv1(tap), size_hw), _resize(self.shortcut(tap), size_hw)
        a = F.relu(self.conv1.norm(a))
        if time is not None:
            a = a + time[:, :, None, None]
        a = F.relu(self.conv2.norm(self.conv2(a)))
        return F.relu(self.conv3.norm(self.conv3(a)) + self.shortcut.norm(short))


def _resize(x: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Bilinear resizing, pixel centres kept, as two products: the same bits each time, backwards too, on any device."""
    if tuple(x.shape[-2:]) == tuple(size_hw):
        return x
    rows, columns = (_axis(new, old, x) for new, old in zip(size_hw, x.shape[-2:], strict=True))
    return rows @ x @ columns.T


def _axis(new: int, old: int, like: Tensor) -> Tensor:
    """The weights [new,old] by which cells of an axis are interpolated to another number of cells."""
    place = (torch.arange(new, device=like.device) + 0.5) * (old / new) - 0.5
    apart = place.clamp(0, old - 1)[:, None] - torch.arange(old, device=like.device)
    return (1 - apart.abs()).clamp_min(0).to(like.dtype)
