"""The pictures of docs/kernels.md, drawn by the operators themselves: `python -m ddengine.bench.kernel_pictures DIR`.

Needs matplotlib, which nothing else here does.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ddengine.artifacts import make_folder
from ddengine.errors import InputError
from ddengine.kernels.gaussian_mask import gaussian_mask, rasterise_paths
from ddengine.kernels.sample_patches import sample_patches
from ddengine.kernels.warpage import warp_latent, warpage_field
from ddengine.kernels.windows import window_cells

INK, ACCENT, HOLE = "#202124", "#d9480f", "#f0f0f0"


def main(folder: str) -> None:
    """Write one PNG an operator."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise InputError("the pictures are drawn with matplotlib, which is missing; pip install matplotlib") from error
    plt.rcParams.update({"font.size": 9, "axes.titlesize": 10, "text.color": INK, "axes.edgecolor": "#9aa0a6"})
    plt.rcParams.update({"xtick.color": "#5f6368", "ytick.color": "#5f6368", "savefig.dpi": 110})
    out = make_folder(folder)
    for draw in (draw_mask, draw_patches, draw_warp):
        figure = draw(plt)
        path = out / f"{draw.__name__.removeprefix('draw_')}.png"
        figure.savefig(path, bbox_inches="tight", facecolor="white")
        print(path)


def draw_mask(plt: Any) -> Any:
    """Paths, their blur over the whole plane, and the published truncated blur."""
    size = (256, 256)
    starts = torch.tensor([[60.0, 50.0], [150.0, 205.0]])
    ends = torch.tensor([[100.0, 150.0], [205.0, 180.0]])
    paths = rasterise_paths(starts, ends, size)
    blurs = {
        r"closed form, $\sigma$ = 30": gaussian_mask(starts, ends, size, 30.0),
        r"cut at $\pm 2\sigma$ (authors)": gaussian_mask(starts, ends, size, 30.0, truncated=True, epsilon=1e-6),
    }
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.9), layout="constrained")
    grown = F.max_pool2d(paths[None, None], 3, 1, 1)[0, 0]  # one pixel wide would be lost in print
    axes[0].imshow(1 - grown, cmap="gray", vmin=0, vmax=1)
    axes[0].set_title("paths of two drags (drawn thicker)")
    for axis, (title, mask) in zip(axes[1:], blurs.items(), strict=True):
        shown = axis.imshow(mask, cmap="magma", vmin=0, vmax=1)
        axis.contour(mask, levels=[1e-4, 0.25, 0.5, 0.75], colors="white", linewidths=0.6, alpha=0.8)
        axis.set_title(title)
    figure.colorbar(shown, ax=axes[1:], label="M", fraction=0.04, pad=0.02, shrink=0.82)
    for index, axis in enumerate(axes):
        for start, end in zip(starts, ends, strict=True):
            _arrow(axis, start, end, ACCENT if index == 0 else "#74c0fc")
        axis.set_xlabel("column, feature grid")
    axes[0].set_ylabel("row, feature grid")
    return figure


def draw_patches(plt: Any) -> Any:
    """A patch of the enlarged map read from the native one, and what reading the native map directly would give."""
    native, size, radius = (16, 16), (64, 64), 4
    centre = torch.tensor([[30.4, 37.7]], dtype=torch.float64)
    generator = torch.Generator().manual_seed(3)
    feature = torch.randn(1, 1, *native, dtype=torch.float64, generator=generator)
    enlarged = F.interpolate(feature, size=size, mode="bilinear")[0, 0]
    patch = sample_patches(feature, centre, radius, size)[0, 0]
    direct = _read_directly(feature, centre[0], radius, size)
    limit = float(feature.abs().max())
    style = {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
    exact = sampled_enlargement(enlarged, centre[0], radius)
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.6), layout="constrained")
    offsets = torch.arange(-radius, radius + 1)
    rows, columns = (grid.flatten() for grid in torch.meshgrid(*(centre[0][:, None] + offsets), indexing="ij"))
    for axis, values, scale, title in (
        (axes[0], feature[0, 0], native[0] / size[0], r"native map $F$: all that is kept"),
        (axes[1], enlarged, 1.0, "its enlargement: never built"),
    ):
        axis.imshow(values, **style)
        where = [(points + 0.5) * scale - 0.5 for points in (columns, rows)]
        axis.scatter(*where, s=7, c=INK, linewidths=0)
        middle, reach = (centre[0] + 0.5) * scale - 0.5, 14 * scale
        axis.set_xlim(middle[1] - reach, middle[1] + reach)
        axis.set_ylim(middle[0] + reach, middle[0] - reach)
        axis.set_title(title)
    count = window_cells(radius, size[0], native[0])
    corner = ((centre[0].floor() - radius + 0.5) * native[0] / size[0] - 0.5).floor() - 0.5
    axes[0].add_patch(plt.Rectangle(corner.flip(0).tolist(), count, count, fill=False, color=ACCENT, linewidth=1.6))
    axes[0].set_xlabel(rf"the ${count} \times {count}$ cells that are read")
    axes[1].set_xlabel(r"the $9 \times 9$ positions that are wanted")
    for axis, values, title, note in (
        (axes[2], patch, r"patch $= R\,F\,C^{\mathsf{T}}$", f"largest error {float((patch - exact).abs().max()):.0e}"),
        (
            axes[3],
            direct - exact,
            r"error of reading $F$ at the positions",
            f"up to {float((direct - exact).abs().max()):.1f}: a short cut not taken",
        ),
    ):
        shown = axis.imshow(values, extent=(-4.5, 4.5, 4.5, -4.5), **style)
        axis.set_title(title)
        axis.set_xlabel(note)
    figure.colorbar(shown, ax=axes, fraction=0.02, pad=0.01, shrink=0.85)
    return figure


def sampled_enlargement(enlarged: Tensor, centre: Tensor, radius: int) -> Tensor:
    """What the patch stands for: the enlarged map [H,W] sampled with one bilinear weight quadruple."""
    low = centre.floor().long()
    fraction = (centre - low).tolist()
    first, last = low - radius, low + radius + 2
    window = enlarged[first[0] : last[0], first[1] : last[1]]
    rows = (1 - fraction[0]) * window[:-1] + fraction[0] * window[1:]
    return (1 - fraction[1]) * rows[:, :-1] + fraction[1] * rows[:, 1:]


def _read_directly(feature: Tensor, centre: Tensor, radius: int, size: tuple[int, int]) -> Tensor:
    """The tempting shortcut: bilinear samples of the native map at the points' native positions."""
    offsets = torch.arange(-radius, radius + 1)
    rows, columns = ((centre[axis] + offsets + 0.5) / size[axis] * 2 - 1 for axis in (0, 1))
    grid = torch.stack([columns.expand(len(rows), -1), rows[:, None].expand(-1, len(columns))], dim=-1)
    return F.grid_sample(feature, grid[None], align_corners=False, padding_mode="border")[0, 0]


def draw_warp(plt: Any) -> Any:
    """The field with the circle where it ends, the cells moved with the holes they leave, and the holes filled."""
    size = (64, 64)
    handles = torch.tensor([[20.3, 22.6], [44.2, 40.4]], dtype=torch.float64)
    moves = torch.tensor([[3.0, 13.0], [6.0, -9.0]], dtype=torch.float64)
    field = warpage_field(handles, moves, size)
    latent = _pattern(size)
    holes = warp_latent(torch.ones_like(latent), field, fill="none")[0, 0] == 0
    filled = warp_latent(latent, field)
    figure, axes = plt.subplots(1, 4, figsize=(14.5, 3.8), layout="constrained")
    length = torch.linalg.vector_norm(field, dim=-1)
    shown = axes[0].imshow(length, cmap="viridis")
    figure.colorbar(shown, ax=axes[0], label="|v|, cells", fraction=0.046, pad=0.03)
    at = np.arange(2, 64, 5)
    down, right = (field[2::5, 2::5, axis] for axis in (0, 1))
    axes[0].quiver(at, at, right, down, angles="xy", scale_units="xy", scale=1.6, color="white", width=0.006)
    circle = plt.Circle((31.5, 31.5), 31.5 * 2**0.5, fill=False, color=ACCENT, linewidth=1.2)
    axes[0].add_patch(circle)
    circle.set_clip_on(False)
    axes[0].set_title("field v: nothing moves on the circle")
    moved = warp_latent(latent, field, fill="none")
    pictures = {
        "latent": latent,
        f"moved: {int(holes.sum())} holes": torch.where(holes, 1.0, moved),
        "holes filled": filled,
    }
    for axis, (title, picture) in zip(axes[1:], pictures.items(), strict=True):
        axis.imshow(picture[0].permute(1, 2, 0).numpy())
        axis.set_title(title)
    for axis in axes[1:]:
        for handle, move in zip(handles, moves, strict=True):
            _arrow(axis, handle, handle + move, INK)
    return figure


def _pattern(size: tuple[int, int]) -> Tensor:
    """Coloured squares on which one sees where a cell came from, [1,3,h,w] in 0..1."""
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in size), indexing="ij")
    checks = ((rows // 8 + columns // 8) % 2) * 0.35 + 0.55
    return torch.stack([checks * (0.35 + 0.65 * rows / 63), checks * 0.75, checks * (0.35 + 0.65 * columns / 63)])[None]


def _arrow(axis: Any, start: Tensor, end: Tensor, colour: str) -> None:
    tip, tail = (tuple(point.flip(0).tolist()) for point in (end, start))
    style = {"arrowstyle": "-|>", "color": colour, "lw": 1.6, "shrinkA": 0, "shrinkB": 0}
    axis.annotate("", tip, tail, arrowprops=style)


if __name__ == "__main__":
    main(*sys.argv[1:])
