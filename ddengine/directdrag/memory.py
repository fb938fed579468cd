"""Where the keys and values of a reference trajectory are kept: on the device, in pinned host memory, or nowhere."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ddengine.errors import InputError
from ddengine.models.unet import KeyValue

log = logging.getLogger(__name__)

Place = Literal["device", "host", "recompute"]

KV_BUDGET = 1 << 30  # bytes where free memory is not asked for; a 512 x 512 picture needs 0.83 GiB in half precision
DEVICE_SHARE = 0.25  # of the device's free memory: the backward pass of the drag wants most of it
HOST_SHARE = 0.5  # of the host's: a piece of pinned memory is rounded up, to at most twice its size


def place_kv(bytes_needed: int, device_free: int | None, host_free: int | None, budget: int | None) -> Place:
    """The place for some bytes of keys and values: the first of device and host that has room, else none.

    device_free: bytes; None where nobody can say. host_free: bytes; None where the host is no other place than the
    device. budget: bytes of the device that they may take, by default DEVICE_SHARE of what is free, or KV_BUDGET where
    that is not known; 0 keeps none, anywhere.
    """
    if budget == 0:
        return "recompute"
    if device_free is None:
        room = KV_BUDGET if budget is None else budget
    else:
        room = int(DEVICE_SHARE * device_free) if budget is None else min(budget, device_free)
    if bytes_needed <= room:
        return "device"
    return "host" if host_free is not None and bytes_needed <= HOST_SHARE * host_free else "recompute"


def place_on(bytes_needed: int, device: torch.device, budget: int | None) -> Place:
    """`place_kv` by the memory that is free now. Off CUDA the same everywhere, whatever else the machine does."""
    if device.type != "cuda":
        return place_kv(bytes_needed, None, None, budget)
    free, _ = torch.cuda.mem_get_info(device)
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch holds it, empty
    place = place_kv(bytes_needed, free + cached, host_memory(), budget)
    log.info("%d MiB of keys and values: %s (%d MiB of the device free)", bytes_needed >> 20, place, free >> 20)
    return place


def check_budget(budget: Any) -> None:
    """InputError unless a budget is None or a whole number of bytes."""
    if budget is not None and (isinstance(budget, bool) or not isinstance(budget, int) or budget < 0):
        raise InputError(f"budget is {budget!r}; it must be None or a whole number of bytes, 0 or more")


def kv_bytes(pairs: Iterable[KeyValue]) -> int:
    """Bytes of some keys and values."""
    return sum(tensor.numel() * tensor.element_size() for pair in pairs for tensor in pair)


class Shelf:
    """Room for the keys and values of every step of a trajectory, filled step by step; `rows` are those put down."""

    def __init__(self, pairs: Sequence[KeyValue], steps: int, device: torch.device, budget: int | None) -> None:
        """pairs: those of one step, any step; for `steps` of them a place is found (`place`)."""
        self.rows: list[tuple[KeyValue, ...]] = []
        self.place = place_on(kv_bytes(pairs) * steps, device, budget)
        if self.place == "host":
            try:
                self._free = iter(pinned_rows(pairs, steps))
            except RuntimeError as error:  # the driver gives no more, whatever the system says is free
                log.warning("no pinned memory for keys and values, they are made again in each edit (%s)", error)
                self.place = "recompute"

    def put(self, pairs: Sequence[KeyValue]) -> None:
        """Keep one step's keys and values; on the host they have arrived once the device has been waited for."""
        if self.place == "host":
            row = next(self._free)
            for ours, theirs in zip(row, pairs, strict=True):
                for to, tensor in zip(ours, theirs, strict=True):
                    to.copy_(tensor, non_blocking=True)
            self.rows.append(row)
        else:
            # A view would keep alive whatever it was cut from.
            self.rows.append(tuple((key.contiguous(), value.contiguous()) for key, value in pairs))


def pinned_rows(pairs: Sequence[KeyValue], steps: int) -> list[tuple[KeyValue, ...]]:
    """`steps` empty likenesses of `pairs` in one piece of pinned memory, as every piece is rounded up by itself."""
    sizes = [tensor.numel() for pair in pairs for tensor in pair]
    rows = []
    for row in _pinned(steps, sum(sizes), pairs[0][0].dtype):
        parts = iter(row.split(sizes))
        rows.append(tuple((next(parts).view(key.shape), next(parts).view(value.shape)) for key, value in pairs))
    return rows


def _pinned(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(rows, columns, dtype=dtype, pin_memory=True)


class KeptKeyValues:
    """Keys and values kept anywhere, read on the device: a step's are copied while the step before is computed."""

    def __init__(self, rows: Sequence[tuple[KeyValue, ...]], device: torch.device) -> None:
        self._rows, self._device = rows, device
        self._away = bool(rows) and rows[0][0][0].device != device
        self._coming: tuple[int, Callable[[], tuple[KeyValue, ...]]] | None = None
        self._copies = torch.cuda.Stream(device) if self._away and device.type == "cuda" else None

    def __getitem__(self, step: int) -> tuple[KeyValue, ...]:
        """Those of one step, on the device; asked for in ascending order nobody waits but for the first."""
        if not self._away:
            return self._rows[step]
        coming, self._coming = self._coming, None
        here = (coming[1] if coming is not None and coming[0] == step else self._fetch(step))()
        if step + 1 < len(self._rows):
            self._coming = step + 1, self._fetch(step + 1)
        return here

    def _fetch(self, step: int) -> Callable[[], tuple[KeyValue, ...]]:
        """Start to copy a step's keys and values; calling the answer gives them, once they may be used."""
        if self._copies is None:
            return lambda: copied(self._rows[step], self._device)
        with torch.cuda.stream(self._copies):
            pairs = copied(self._rows[step], self._device)
            ready = self._copies.record_event()

        def arrive() -> tuple[KeyValue, ...]:
            computing = torch.cuda.current_stream(self._device)
            computing.wait_event(ready)
            for tensor in (tensor for pair in pairs for tensor in pair):
                tensor.record_stream(computing)  # made on the other stream: not to be reused while this one reads it
            return pairs

        return arrive


def copied(pairs: Sequence[KeyValue], device: torch.device) -> tuple[KeyValue, ...]:
    """Keys and values on a device; from pinned memory without waiting."""
    return tuple((key.to(device, non_blocking=True), value.to(device, non_blocking=True)) for key, value in pairs)


def host_memory() -> int:
    """Bytes the host can give away: what the system has available, or less where a control group allows less."""
    try:
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # a system that does not say
        return 0
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            available = 1024 * int(line.split()[1])
    limit, used = (_lines(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit and used and limit[0].isdigit() and used[0].isdigit():
        available = min(available, int(limit[0]) - int(used[0]))
    return max(available, 0)


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return []
