"""Where a model runs and in what number format."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ddengine.errors import InputError

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "float16", "bfloat16")


def resolve_device(device: str | torch.device) -> torch.device:
    """The torch device for a name or "auto" (the first CUDA device, else the CPU); `InputError` if absent."""
    import torch

    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"device {device!r} is unknown; use 'auto', 'cpu', 'cuda' or 'cuda:N'") from error
    count = torch.cuda.device_count()
    if resolved.type == "cuda" and (resolved.index or 0) >= count:
        raise InputError(f"device {str(device)!r}: {count} CUDA devices are visible; use 'auto' or 'cpu'")
    if resolved.type == "mps" and not torch.backends.mps.is_available():
        raise InputError(f"device {str(device)!r} is not available here; use 'auto' or 'cpu'")
    if resolved.type not in ("cpu", "cuda", "mps"):
        raise InputError(f"device {str(device)!r} is not supported; use 'auto', 'cpu', 'cuda' or 'cuda:N'")
    return resolved


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The torch dtype for a name out of `DTYPES`; "auto" is float16 on CUDA and float32 elsewhere."""
    import torch

    if dtype == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise InputError(f"dtype {str(dtype)!r} is unknown; use one of auto, {', '.join(DTYPES)}")
    resolved: torch.dtype = getattr(torch, name)
    return resolved
