"""Latent warpage: where each latent cell goes, the scatter that moves it, and the filling of the holes left behind.

    v(C) = Σ_i w_i λ_i D_i      w_i ∝ 1/(‖C − A_i‖ + 10⁻⁴), Σ w_i = 1      λ_i = ‖C − P_i‖/‖P_i − A_i‖

C a latent cell, A_i handle, D_i displacement, P_i the point where the ray from A_i through C leaves the circle around
the area: λ is 1 at the handle and 0 on the circle (FastDrag's latent warpage function, used by DirectDrag). Cell C then
goes whole to round(C + v(C)); where several arrive, the first in raster order stays, and where none does, a hole is
left. "First in raster order" is the least source index of a destination, which no order of execution changes.
"""

from __future__ import annotations

from functools import reduce

import torch
from torch import Tensor

from ddengine.errors import InputError
from ddengine.kernels.compilation import Configuration
from ddengine.kernels.dispatch import interpreted, jit, launch, tl, triton, uses_triton
from ddengine.kernels.gaussian_mask import nearest

HANDLE_CELLS, FILLS, HOLES = ("moves", "lost"), ("none", "keep", "parallel", "sequential"), ("unclaimed", "zero")
CHUNK = 1 << 16  # cells times handles that the reference takes at once: tensors of 256 KiB in float32


@torch.no_grad()
def warpage_field(
    handles: Tensor,
    displacements: Tensor,
    size_hw: tuple[int, int],
    *,
    area: Tensor | None = None,
    handle_cell: str = "moves",
    valid: Tensor | None = None,
    kernels: str | None = None,
) -> Tensor:
    """Displacement field v [h,w,2] in latent cells (row, column) that drags handles [n,2] by displacements [n,2].

    area: bool [h,w] or None for the whole latent; cells outside do not move. handle_cell: what a cell exactly at a
    handle does, where the ray has no direction: "moves" takes λ = 1, "lost" marks the cell with NaN, so that it moves
    nowhere. A ray that never meets the circle, its handle being outside, has λ = 0. valid: bool [n], the pairs that
    count, or None for all; without any, nothing moves. kernels: as in `uses_triton`. No gradient. Raises InputError.
    """
    height, width = size_hw
    if handles.ndim != 2 or handles.shape[1] != 2 or handles.shape != displacements.shape:
        raise InputError(
            f"handles {tuple(handles.shape)} and displacements {tuple(displacements.shape)} must both be [n,2]"
        )
    if handles.dtype not in (torch.float32, torch.float64) or handles.dtype != displacements.dtype:
        raise InputError(
            f"handles are {handles.dtype}, displacements {displacements.dtype}; both must be float32 or both float64"
        )
    if valid is not None and (valid.shape != handles.shape[:1] or valid.dtype != torch.bool):
        raise InputError(f"valid is {valid.dtype} {tuple(valid.shape)}; it must be bool [{len(handles)}]")
    _check("handle_cell", handle_cell, HANDLE_CELLS)
    _check_grid(height, width, area)
    run = _field_operator if uses_triton(kernels, handles, displacements) else _field_reference
    return run(handles, displacements, valid, area, height, width, handle_cell)


@torch.no_grad()
def warp_latent(
    latent: Tensor,
    field: Tensor,
    *,
    area: Tensor | None = None,
    fill: str = "parallel",
    holes: str = "unclaimed",
    kernels: str | None = None,
) -> Tensor:
    """Move whole latent cells [1,C,h,w] along a field [h,w,2], within an area (bool [h,w]) if given; fill the holes.

    Cell C goes to round(C + v(C)) (halves to even), clamped to the latent; where several arrive, the first in raster
    order stays. fill: "parallel" averages the nearest moved cells to the left, right, above and below, weighted by
    1/distance, and a hole that sees none keeps what was there; "sequential" averages the nearest cells whose channel 0
    is not zero in raster order, filled cells counting too (the published fill, bit for bit); "keep" leaves what was
    there; "none" leaves zeros. holes: "unclaimed" are cells that nothing moved to, "zero" cells whose channel 0 is
    exactly zero. float16 and bfloat16 latents are averaged in float32. kernels: as in `uses_triton`. No gradient.
    Raises InputError.
    """
    if latent.ndim != 4 or latent.shape[0] != 1 or not latent.is_floating_point():
        raise InputError(f"the latent is {latent.dtype} {tuple(latent.shape)}; it must be floating [1,C,h,w]")
    height, width = latent.shape[-2:]
    if field.shape != (height, width, 2) or not field.is_floating_point():
        raise InputError(f"the field is {field.dtype} {tuple(field.shape)}; it must be floating [{height},{width},2]")
    _check("fill", fill, FILLS)
    _check("holes", holes, HOLES)
    _check_grid(height, width, area)
    run = _warp_operator if uses_triton(kernels, latent, field) else _warp_reference
    return run(latent, field, area, fill, holes)


def _check(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise InputError(f"{name} {value!r} is unknown; use one of {', '.join(choices)}")


def _check_grid(height: int, width: int, area: Tensor | None) -> None:
    if not 0 < height * width < 2**31:  # a cell's index is an int32
        raise InputError(f"the latent is {height} x {width} cells; it must have at least one and fewer than 2^31")
    if area is not None and (area.shape != (height, width) or area.dtype != torch.bool):
        raise InputError(f"the area is {area.dtype} {tuple(area.shape)}; it must be bool [{height},{width}]")


# The reference: plain PyTorch, on any device.


def _field_reference(
    handles: Tensor,
    displacements: Tensor,
    valid: Tensor | None,
    area: Tensor | None,
    height: int,
    width: int,
    handle_cell: str,
) -> Tensor:
    rows, columns = (torch.arange(size, dtype=handles.dtype, device=handles.device) for size in (height, width))
    if area is None:
        first, last = handles.new_zeros(2), torch.stack([rows[-1], columns[-1]])
    else:
        axes = ((rows, area.any(dim=1)), (columns, area.any(dim=0)))
        first = torch.stack([torch.where(inside, axis, float("inf")).amin() for axis, inside in axes])
        last = torch.stack([torch.where(inside, axis, -float("inf")).amax() for axis, inside in axes])
    centre = (first + last) / 2
    # The published distance adds 1e-6 to each coordinate difference.
    half = centre - first + 1e-6
    radius = (half[0] * half[0] + half[1] * half[1]).sqrt()
    if valid is None:
        valid = torch.ones(len(handles), dtype=torch.bool, device=handles.device)
    step = max(1, CHUNK // max(1, len(handles) * width))
    parts = [
        _field_rows(handles, displacements, valid, centre, radius, some, columns, handle_cell)
        for some in rows.split(step)
    ]
    field = torch.cat(parts)
    return field if area is None else torch.where(area[..., None], field, 0.0)


def _field_rows(
    handles: Tensor,
    displacements: Tensor,
    valid: Tensor,
    centre: Tensor,
    radius: Tensor,
    rows: Tensor,
    columns: Tensor,
    handle_cell: str,
) -> Tensor:
    """The field [rows,columns,2] at some rows; sums run over the pairs in order, so that padding changes no bit."""

    def each(values: Tensor) -> Tensor:
        return values[:, None, None]

    from_centre = handles - centre
    down, right = rows[:, None] - each(handles[:, 0]), columns - each(handles[:, 1])
    distance = (down * down + right * right).sqrt()  # [n,rows,columns]
    along = down / distance * each(from_centre[:, 0]) + right / distance * each(from_centre[:, 1])
    square = radius * radius - (from_centre[:, 0] * from_centre[:, 0] + from_centre[:, 1] * from_centre[:, 1])
    reach = (each(square) + along * along).clamp_min(0).sqrt() - along
    stretch = torch.where(reach > 0, (reach - distance).abs() / reach, 0.0).clamp_max(1)
    stretch = torch.where(distance == 0, float("nan") if handle_cell == "lost" else 1.0, stretch)
    weight = torch.where(each(valid), 1 / (distance + 1e-4), 0.0)
    nothing = torch.zeros_like(weight[0]) if len(weight) else rows.new_zeros(len(rows), len(columns))
    share = weight / reduce(torch.add, weight.unbind(0), nothing) * stretch
    moves = [torch.where(each(valid), share * each(displacements[:, axis]), 0.0) for axis in (0, 1)]
    return torch.stack([reduce(torch.add, move.unbind(0), nothing) for move in moves], dim=-1)


def _warp_reference(latent: Tensor, field: Tensor, area: Tensor | None, fill: str, holes: str) -> Tensor:
    channels, (height, width) = latent.shape[1], latent.shape[-2:]
    count = height * width
    source = torch.arange(count, device=latent.device)
    cells = torch.stack([source // width, source % width], dim=1)
    goal = (cells + field.reshape(count, 2)).round()
    lost = goal.isnan().any(dim=1)
    row, column = (goal[:, axis].nan_to_num(0).clamp(0, size - 1).long() for axis, size in ((0, height), (1, width)))
    if area is not None:  # nothing leaves the area, and nothing outside it is overwritten
        lost = lost | ~area.reshape(-1) | ~area[row, column]
    # First come, first served is the least source index for each destination; index `count` means nobody.
    destination = torch.where(lost, count, row * width + column)
    owner = source.new_full((count + 1,), count).scatter_reduce(0, destination, source, "amin")[:count]
    if area is not None:
        owner = torch.where(area.reshape(-1), owner, source)
    values = latent[0].reshape(channels, count)
    moved = torch.cat([values, values.new_zeros(channels, 1)], dim=1)[:, owner].reshape(latent.shape)
    empty = (owner == count).reshape(height, width) if holes == "unclaimed" else moved[0, 0] == 0
    if fill == "none":
        return moved
    if fill == "keep":
        return torch.where(empty, latent, moved).contiguous()
    return _fill_sequentially(moved, empty) if fill == "sequential" else _fill(moved, empty, latent)


def _wide(values: Tensor) -> Tensor:
    """Half precision as float32, where sums are made; wider numbers as they are."""
    return values.float() if values.element_size() < 4 else values


def _fill(moved: Tensor, empty: Tensor, original: Tensor) -> Tensor:
    """Every hole from the nearest moved cells of its row and column; a hole that sees none keeps the original."""
    values = _wide(moved)
    total = torch.zeros_like(values)
    weights = values.new_zeros(empty.shape)
    for dim in (1, 0):
        size = empty.shape[dim]
        shape = (-1, 1) if dim == 0 else (1, -1)
        index = torch.arange(size, device=moved.device).reshape(shape).expand(empty.shape)
        before = torch.where(empty, -1, index).cummax(dim=dim).values
        after = torch.where(empty, size, index).flip(dim).cummin(dim=dim).values.flip(dim)
        for neighbour, found in ((before, before >= 0), (after, after < size)):
            near = neighbour.clamp(0, size - 1)
            weight = torch.where(found & empty, 1 / (near - index).abs().clamp_min(1).to(values.dtype), 0)
            total += weight * values.gather(2 + dim, near.expand(values.shape))
            weights += weight
    filled = torch.where(weights > 0, total / weights.clamp_min(1e-12), original)
    return torch.where(empty, filled.to(moved.dtype), moved).contiguous()


def _fill_sequentially(moved: Tensor, empty: Tensor) -> Tensor:
    """Holes in raster order, each from the nearest cells with a non-zero channel 0, filled holes included.

    A hole looks left and up at finished cells, right and down at cells as they were moved. Hence all cells of an
    anti-diagonal can be filled at once after the one before it: h + w − 1 steps. Distances, their reciprocals and
    the reciprocals' sum are float64, and the terms added left, right, up, down: so the published fill's bits are met.
    """
    if moved.device.type == "mps":  # without float64
        return _fill_sequentially(moved.cpu(), empty.cpu()).to(moved.device)
    height, width = empty.shape
    steps = height + width - 1
    values = _wide(moved)[0]
    rows, columns = (torch.arange(size, device=moved.device) for size in (height, width))
    column = torch.arange(steps, device=moved.device)[:, None] - rows
    inside = (column >= 0) & (column < width)
    cell = rows * width + column.clamp(0, width - 1)

    def by_diagonal(grid: Tensor) -> tuple[Tensor, ...]:
        """[...,h,w] as [...,h] for each step: row r of step d is the cell (r, d − r), or zero outside."""
        return grid.flatten(-2)[..., cell].masked_fill(~inside, 0).movedim(-2, 0).contiguous().unbind(0)

    def ahead(dim: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Weight and weighted value of the nearest non-zero cell to the right (dim 1) or below (dim 0), by diagonal."""
        size = empty.shape[dim]
        index = rows[:, None].expand(empty.shape) if dim == 0 else columns.expand(empty.shape)
        near = torch.where(values[0] != 0, index, size).flip(dim).cummin(dim=dim).values.flip(dim)
        weight = torch.where(near < size, 1 / (near - index).clamp_min(1).double(), 0)
        near = values.gather(1 + dim, near.clamp_max(size - 1).expand(values.shape))
        return by_diagonal(weight), by_diagonal(near * weight.to(values.dtype))

    hole, value = by_diagonal(empty), by_diagonal(values)
    (right_weight, right), (down_weight, down) = ahead(1), ahead(0)
    # The nearest non-zero cells so far and their distances, to the left by row and above by column. Columns lie last
    # one first: the rows of a diagonal meet neighbours, one place further on with each step, so that nothing is moved.
    lanes = steps + height
    nearest = values.new_zeros(len(values), 2, lanes)
    away = torch.full((2, lanes), float("inf"), dtype=torch.float64, device=moved.device)
    done = []
    for step in range(steps):
        shift = lanes + steps - 1 - step  # from a row's place to that of the column it meets
        near = nearest.as_strided((len(values), 2, height), (2 * lanes, shift, 1))
        far = away.as_strided((2, height), (shift, 1))
        weight = far.reciprocal()
        (left, above), (left_weight, above_weight) = (near * weight.to(near.dtype)).unbind(1), weight.unbind(0)
        weights = left_weight + right_weight[step] + above_weight + down_weight[step]
        total = left + right[step] + above + down[step]
        filled = torch.where(hole[step] & (weights > 0), total / weights.to(total.dtype), value[step]).to(moved.dtype)
        done.append(filled)
        taken = filled[0] != 0
        near.copy_(torch.where(taken, filled[:, None].to(near.dtype), near))
        far.add_(1).masked_fill_(taken, 1)
    return torch.stack(done)[rows[:, None] + columns, :, rows[:, None]].permute(2, 0, 1)[None].contiguous()


# The Triton version. The field is one launch; the warp is two (claim; gather and fill) and a third, of a single block,
# for the sequential fill. What the options choose at run time costs nothing next to reading the cells.


@jit
def _displace(  # type: ignore[no-untyped-def]
    handles,
    displacements,
    valid,
    area,
    field,
    pairs,
    height,
    width,
    count,
    confined,
    at_handle,
    BLOCK: tl.constexpr,
    SCAN: tl.constexpr,
):
    """The field of a block of cells. confined: `area` is given; each block finds its bounds by reading it whole."""
    cell = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at, inside = cell.to(tl.int64), cell < count
    row, column = (cell // width).to(tl.float32), (cell % width).to(tl.float32)

    first_row = tl.full((SCAN,), float("inf"), tl.float32)
    first_column, last_row, last_column = first_row, -first_row, -first_row
    for begin in range(0, count * confined, SCAN):
        read = begin + tl.arange(0, SCAN)
        free = tl.load(area + read.to(tl.int64), mask=read < count, other=0) != 0
        cell_row, cell_column = (read // width).to(tl.float32), (read % width).to(tl.float32)
        first_row = tl.where(free, tl.minimum(first_row, cell_row), first_row)
        last_row = tl.where(free, tl.maximum(last_row, cell_row), last_row)
        first_column = tl.where(free, tl.minimum(first_column, cell_column), first_column)
        last_column = tl.where(free, tl.maximum(last_column, cell_column), last_column)
    top = tl.where(confined != 0, tl.min(first_row, 0), 0.0)
    bottom = tl.where(confined != 0, tl.max(last_row, 0), tl.cast(height - 1, tl.float32))
    start = tl.where(confined != 0, tl.min(first_column, 0), 0.0)
    end = tl.where(confined != 0, tl.max(last_column, 0), tl.cast(width - 1, tl.float32))
    centre_row, centre_column = (top + bottom) * 0.5, (start + end) * 0.5
    half_row, half_column = centre_row - top + 1e-6, centre_column - start + 1e-6
    radius = tl.sqrt_rn(half_row * half_row + half_column * half_column)

    weights = tl.zeros((BLOCK,), tl.float32)
    for pair in range(pairs):
        down, right = row - tl.load(handles + 2 * pair), column - tl.load(handles + 2 * pair + 1)
        distance = tl.sqrt_rn(down * down + right * right)
        weights += tl.where(tl.load(valid + pair) != 0, tl.div_rn(1.0, distance + 1e-4), 0.0)
    field_row, field_column = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for pair in range(pairs):
        handle_row, handle_column = tl.load(handles + 2 * pair), tl.load(handles + 2 * pair + 1)
        down, right = row - handle_row, column - handle_column
        distance = tl.sqrt_rn(down * down + right * right)
        from_row, from_column = handle_row - centre_row, handle_column - centre_column
        along = tl.div_rn(down, distance) * from_row + tl.div_rn(right, distance) * from_column
        inner = radius * radius - (from_row * from_row + from_column * from_column) + along * along
        reach = tl.sqrt_rn(tl.maximum(inner, 0.0)) - along
        stretch = tl.where(reach > 0, tl.minimum(tl.div_rn(tl.abs(reach - distance), reach), 1.0), 0.0)
        stretch = tl.where(distance == 0, at_handle, stretch)
        share = tl.div_rn(tl.div_rn(1.0, distance + 1e-4), weights) * stretch
        counts = tl.load(valid + pair) != 0
        field_row += tl.where(counts, share * tl.load(displacements + 2 * pair), 0.0)
        field_column += tl.where(counts, share * tl.load(displacements + 2 * pair + 1), 0.0)
    moves = tl.load(area + at, mask=inside & (confined != 0), other=1) != 0
    tl.store(field + 2 * at, tl.where(moves, field_row, 0.0), mask=inside)
    tl.store(field + 2 * at + 1, tl.where(moves, field_column, 0.0), mask=inside)


@jit
def _claim(field, area, owner, height, width, count, confined, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The least source index that goes to each cell; an integer minimum is the same in any order."""
    cell = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at, inside = cell.to(tl.int64), cell < count
    down = tl.load(field + 2 * at, mask=inside, other=0.0) + (cell // width).to(tl.float32)
    right = tl.load(field + 2 * at + 1, mask=inside, other=0.0) + (cell % width).to(tl.float32)
    lost = (down != down) | (right != right)
    row = nearest(tl.minimum(tl.maximum(tl.where(lost, 0.0, down), 0.0), height - 1))
    column = nearest(tl.minimum(tl.maximum(tl.where(lost, 0.0, right), 0.0), width - 1))
    goal = row.to(tl.int64) * width + column.to(tl.int64)
    free = tl.load(area + at, mask=inside & (confined != 0), other=1) != 0
    moves = inside & ~lost & free
    moves = moves & (tl.load(area + goal, mask=moves & (confined != 0), other=1) != 0)
    tl.atomic_min(owner + goal, cell, mask=moves, sem="relaxed")
    tl.store(owner + at, cell, mask=inside & ~free)  # nothing moves outside the area


@jit
def _is_hole(owner, latent, cell, asked, count, by_value):  # type: ignore[no-untyped-def]
    """Whether nothing moved to the cells or, by_value, what did has a channel 0 of exactly zero."""
    source = tl.load(owner + cell, mask=asked, other=0)
    empty = source >= count
    first = tl.load(latent + source.to(tl.int64), mask=asked & ~empty & (by_value != 0), other=1.0)
    return empty | (first == 0)


@jit
def _steps_to_taken(owner, latent, at, asked, room, stride, count, by_value):  # type: ignore[no-untyped-def]
    """Steps from each cell to the nearest that is no hole, `stride` apart; 0 where there is none within `room`."""
    found = tl.zeros_like(room)
    step = 1
    asked = asked & (room >= step)
    while tl.max(asked.to(tl.int32), 0) > 0:
        hole = _is_hole(owner, latent, at + step * stride, asked, count, by_value)
        found = tl.where(asked & ~hole, step, found)
        step += 1
        asked = asked & hole & (room >= step)
    return found


@jit
def _gather(  # type: ignore[no-untyped-def]
    latent,
    owner,
    moved,
    ahead,
    height,
    width,
    count,
    channels,
    by_value,
    keep,
    FILL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What arrived at a block of cells and, where nothing did, the fill.

    FILL: "plain" puts the original (keep) or what arrived, "parallel" averages, "sequential" notes in ahead [2,count]
    how far the nearest non-zero cells lie to the right and below, −1 to the right where there is no hole.
    """
    cell = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at, inside = cell.to(tl.int64), cell < count
    hole = inside & _is_hole(owner, latent, at, inside, count, by_value)
    row, column = cell // width, cell % width
    stride = tl.cast(width, tl.int64)
    if FILL == "sequential":
        right = _steps_to_taken(owner, latent, at, hole, width - 1 - column, 1, count, 1)
        down = _steps_to_taken(owner, latent, at, hole, height - 1 - row, stride, count, 1)
        tl.store(ahead + at, tl.where(hole, right, -1), mask=inside)
        tl.store(ahead + count + at, down, mask=inside)
    if FILL == "parallel":
        left = _steps_to_taken(owner, latent, at, hole, column, -1, count, by_value)
        right = _steps_to_taken(owner, latent, at, hole, width - 1 - column, 1, count, by_value)
        above = _steps_to_taken(owner, latent, at, hole, row, -stride, count, by_value)
        down = _steps_to_taken(owner, latent, at, hole, height - 1 - row, stride, count, by_value)
        left_source = tl.load(owner + at - left, mask=left > 0, other=0).to(tl.int64)
        right_source = tl.load(owner + at + right, mask=right > 0, other=0).to(tl.int64)
        above_source = tl.load(owner + at - above * stride, mask=above > 0, other=0).to(tl.int64)
        down_source = tl.load(owner + at + down * stride, mask=down > 0, other=0).to(tl.int64)
        left_weight = tl.where(left > 0, tl.div_rn(1.0, left.to(tl.float32)), 0.0)
        right_weight = tl.where(right > 0, tl.div_rn(1.0, right.to(tl.float32)), 0.0)
        above_weight = tl.where(above > 0, tl.div_rn(1.0, above.to(tl.float32)), 0.0)
        down_weight = tl.where(down > 0, tl.div_rn(1.0, down.to(tl.float32)), 0.0)
        weights = left_weight + right_weight + above_weight + down_weight
    source = tl.load(owner + at, mask=inside, other=0)
    came = inside & (source < count)
    for channel in range(channels):
        plane = latent + tl.cast(channel, tl.int64) * count
        value = tl.load(plane + source.to(tl.int64), mask=came, other=0.0).to(tl.float32)
        if FILL == "plain":
            original = tl.load(plane + at, mask=hole & (keep != 0), other=0.0).to(tl.float32)
            value = tl.where(hole & (keep != 0), original, value)
        if FILL == "parallel":
            total = left_weight * tl.load(plane + left_source, mask=left > 0, other=0.0).to(tl.float32)
            total += right_weight * tl.load(plane + right_source, mask=right > 0, other=0.0).to(tl.float32)
            total += above_weight * tl.load(plane + above_source, mask=above > 0, other=0.0).to(tl.float32)
            total += down_weight * tl.load(plane + down_source, mask=down > 0, other=0.0).to(tl.float32)
            original = tl.load(plane + at, mask=hole, other=0.0).to(tl.float32)
            value = tl.where(hole, tl.where(weights > 0, tl.div_rn(total, weights), original), value)
        tl.store(moved + tl.cast(channel, tl.int64) * count + at, value, mask=inside)


@jit
def _fill_in_order(  # type: ignore[no-untyped-def]
    moved, ahead, filled, height, width, count, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr
):
    """The sequential fill as a wavefront of one block: lane r fills the cell (r, d − r) at step d.

    A lane keeps the last non-zero cell of its row. What it knows of its column goes to the next lane with each step.
    """
    row = tl.arange(0, ROWS)
    channel = tl.arange(0, CHANNELS)
    plane = channel.to(tl.int64)[:, None] * count
    before = tl.maximum(row - 1, 0)
    before_all = tl.zeros((CHANNELS, ROWS), tl.int32) + before[None, :]
    left, above = tl.zeros((CHANNELS, ROWS), tl.float32), tl.zeros((CHANNELS, ROWS), tl.float32)
    left_away, above_away = tl.zeros((ROWS,), tl.int32), tl.zeros((ROWS,), tl.int32)  # 0: nothing found yet
    for step in range(height + width - 1):
        column = step - row
        inside = (row < height) & (column >= 0) & (column < width)
        every = inside[None, :] & (channel < channels)[:, None]
        at = row.to(tl.int64) * width + column
        right_away = tl.load(ahead + at, mask=inside, other=-1)
        down_away = tl.load(ahead + count + at, mask=inside, other=0)
        hole = right_away >= 0
        value = tl.load(moved + plane + at[None, :], mask=every, other=0.0).to(tl.float32)
        ahead_of = (at + right_away)[None, :]
        right = tl.load(moved + plane + ahead_of, mask=every & (right_away > 0)[None, :], other=0.0).to(tl.float32)
        below = (at + down_away.to(tl.int64) * width)[None, :]
        down = tl.load(moved + plane + below, mask=every & (down_away > 0)[None, :], other=0.0).to(tl.float32)
        left_weight = tl.where(left_away > 0, 1.0 / left_away.to(tl.float64), 0.0)
        right_weight = tl.where(right_away > 0, 1.0 / right_away.to(tl.float64), 0.0)
        above_weight = tl.where(above_away > 0, 1.0 / above_away.to(tl.float64), 0.0)
        down_weight = tl.where(down_away > 0, 1.0 / down_away.to(tl.float64), 0.0)
        weights = (left_weight + right_weight + above_weight + down_weight).to(tl.float32)
        total = left * left_weight.to(tl.float32)[None, :] + right * right_weight.to(tl.float32)[None, :]
        total += above * above_weight.to(tl.float32)[None, :]
        total += down * down_weight.to(tl.float32)[None, :]
        value = tl.where((hole & (weights > 0))[None, :], tl.div_rn(total, weights[None, :]), value)
        value = value.to(filled.dtype.element_ty).to(tl.float32)
        tl.store(filled + plane + at[None, :], value, mask=every)
        taken = tl.max(((value != 0) & (channel == 0)[:, None]).to(tl.int32), 0) > 0
        left = tl.where(taken[None, :], value, left)
        left_away = tl.where(taken, 1, tl.where(left_away > 0, left_away + 1, 0))
        above = tl.gather(tl.where(taken[None, :], value, above), before_all, 1)
        above_away = tl.gather(tl.where(taken, 1, tl.where(above_away > 0, above_away + 1, 0)), before, 0)
        above_away = tl.where(row == 0, 0, above_away)


DISPLACE = Configuration(
    "displace",
    _displace,
    {"handles": "*fp32", "displacements": "*fp32", "valid": "*i1", "area": "*i1", "field": "*fp32", "pairs": "i32"}
    | {"height": "i32", "width": "i32", "count": "i32", "confined": "i32", "at_handle": "fp32"},
    {"BLOCK": 64, "SCAN": 512},
    num_warps=2,
    fusion=False,
)
CLAIM = Configuration(
    "claim",
    _claim,
    {"field": "*fp32", "area": "*i1", "owner": "*i32", "height": "i32", "width": "i32", "count": "i32"}
    | {"confined": "i32"},
    {"BLOCK": 128},
)
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
GATHER = {
    (fill, dtype): Configuration(
        f"gather-{fill}-{name}",
        _gather,
        {"latent": f"*{name}", "owner": "*i32", "moved": f"*{name}", "ahead": "*i32", "height": "i32", "width": "i32"}
        | {"count": "i32", "channels": "i32", "by_value": "i32", "keep": "i32"},
        {"FILL": fill, "BLOCK": 64},
        num_warps=2,
        fusion=False,
    )
    for fill in ("plain", "parallel", "sequential")
    for dtype, name in DTYPES.items()
}


def _in_order(dtype: torch.dtype, rows: int, channels: int) -> Configuration:
    name = DTYPES[dtype]
    return Configuration(
        f"fill-in-order-{name}-{rows}x{channels}",
        _fill_in_order,
        {"moved": f"*{name}", "ahead": "*i32", "filled": f"*{name}", "height": "i32", "width": "i32", "count": "i32"}
        | {"channels": "i32"},
        {"ROWS": rows, "CHANNELS": channels},
        num_warps=min(rows // 16, 32),
        fusion=False,  # the published bits have every product rounded
    )


CONFIGURATIONS = (
    DISPLACE,
    CLAIM,
    *GATHER.values(),
    *(_in_order(dtype, 64, 4) for dtype in DTYPES),
    _in_order(torch.float32, 128, 4),
)


def _field_launch(
    handles: Tensor,
    displacements: Tensor,
    valid: Tensor | None,
    area: Tensor | None,
    height: int,
    width: int,
    handle_cell: str,
) -> Tensor:
    pairs, count = len(handles), height * width
    valid = handles.new_ones(pairs, dtype=torch.bool) if valid is None else valid.contiguous()
    field = handles.new_empty(height, width, 2)
    free = field.new_empty(1, dtype=torch.bool) if area is None else area.contiguous()
    grid = (triton.cdiv(count, DISPLACE.constants["BLOCK"]),)
    sizes = (pairs, height, width, count, int(area is not None), float("nan") if handle_cell == "lost" else 1.0)
    launch(DISPLACE, grid, handles.contiguous(), displacements.contiguous(), valid, free, field, *sizes)
    return field


def _warp_launch(latent: Tensor, field: Tensor, area: Tensor | None, fill: str, holes: str) -> Tensor:
    latent, channels, (height, width) = latent.contiguous(), latent.shape[1], latent.shape[-2:]
    count = height * width
    owner = torch.full((count,), count, dtype=torch.int32, device=latent.device)
    free = owner.new_empty(1, dtype=torch.bool) if area is None else area.contiguous()
    grid = (triton.cdiv(count, CLAIM.constants["BLOCK"]),)
    launch(CLAIM, grid, field.contiguous(), free, owner, height, width, count, int(area is not None))
    gather = GATHER[fill if fill in ("parallel", "sequential") else "plain", latent.dtype]
    moved = torch.empty_like(latent)
    ahead = owner.new_empty(2, count) if fill == "sequential" else owner
    grid = (triton.cdiv(count, gather.constants["BLOCK"]),)
    by_value, keep = int(holes == "zero"), int(fill == "keep")
    launch(gather, grid, latent, owner, moved, ahead, height, width, count, channels, by_value, keep)
    if fill != "sequential":
        return moved
    filled = torch.empty_like(moved)
    configuration = _in_order(latent.dtype, max(64, triton.next_power_of_2(height)), triton.next_power_of_2(channels))
    launch(configuration, (1,), moved, ahead, filled, height, width, count, channels)
    return filled


# The operators that graphs and compilers see as one; without a formula for gradients, backward through them raises.

_field_operator = torch.library.custom_op(
    "ddengine::warpage_field",
    lambda *arguments: (_field_launch if interpreted() else _field_reference)(*arguments),
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor handles, Tensor displacements, Tensor? valid, Tensor? area, SymInt height, SymInt width, "
    "str handle_cell) -> Tensor",
)
_field_operator.register_kernel("cuda")(_field_launch)
_field_operator.register_fake(
    lambda handles, displacements, valid, area, height, width, handle_cell: handles.new_empty(height, width, 2)
)
_warp_operator = torch.library.custom_op(
    "ddengine::warp_latent",
    lambda *arguments: (_warp_launch if interpreted() else _warp_reference)(*arguments),
    mutates_args=(),
    device_types="cpu",
    schema="(Tensor latent, Tensor field, Tensor? area, str fill, str holes) -> Tensor",
)
_warp_operator.register_kernel("cuda")(_warp_launch)
_warp_operator.register_fake(lambda latent, field, area, fill, holes: latent.new_empty(latent.shape))
