"""Running out of memory, told so that a user can do something about it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ddengine.errors import DDEngineError, InputError

_UNITS = {"B": 1, "bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_WANTED = re.compile(r"allocate (\d+(?:\.\d+)?) ?(bytes|B|KiB|MiB|GiB)")
_MARGIN = 0.8  # of the room, because what failed was only the first allocation too many


@contextmanager
def memory_errors(device: torch.device, work_hw: tuple[int, int], edits: int = 1) -> Iterator[None]:
    """Turn a failed allocation into an InputError that names the size that would fit; caches are given back first.

    work_hw: the working picture that was being computed (rows, columns); edits: how many at once.
    """
    held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    try:
        yield
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if isinstance(error, DDEngineError) or not _is_memory(error):
            raise
        message, failed = str(error).splitlines()[0], error
    else:
        return
    del failed  # with its traceback go the tensors of the edit
    used = total = 0
    if device.type == "cuda":
        used = torch.cuda.max_memory_allocated(device)
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        total = free + held
    raise InputError(
        f"{device} has not enough memory for a working picture of {work_hw[1]} x {work_hw[0]} pixels"
        f"{f', {edits} at once' if edits > 1 else ''}: {message}. "
        + remedy(work_hw, edits, held, used + _wanted(message), total)
    )


def remedy(work_hw: tuple[int, int], edits: int, held: int, needed: int, total: int) -> str:
    """What would fit. Bytes: `held` before the edit, at least `needed` in it, `total` to be had (0 where nobody knows).

    What an edit takes beyond the weights grows with its pixels.
    """
    side = max(work_hw)
    share = _MARGIN * (total - held) / (needed - held) if total > held and needed > held else 0.5
    if edits > 1:
        return (
            f"Edit {max(1, int(edits * min(share, 0.9)))} at once, or load the engine with size={_fitting(side, share)}"
        )
    return f"Load the engine with size={_fitting(side, share)} (--size), or in dtype='float16' if it is not"


def _fitting(side: int, share: float) -> int:
    """The long side whose area is `share` of this one's, in whole latent cells."""
    return max(64, min(int(side * share**0.5), side - 8) // 8 * 8)


def _is_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _wanted(message: str) -> int:
    found = _WANTED.search(message)
    return int(float(found[1]) * _UNITS[found[2]]) if found else 0
