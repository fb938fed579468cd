"""Which version of an operator runs: the eager reference or the Triton kernel."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ddengine.errors import BackendUnavailable, InputError
from ddengine.kernels.compilation import Configuration

try:
    import triton
    import triton.language as tl
except ImportError:  # torch's CPU wheels come without it, and no other system has it
    triton = tl = None

__all__ = ["VARIABLE", "VERSIONS", "interpreted", "jit", "launch", "tl", "triton", "uses_triton"]

VARIABLE = "DDENGINE_KERNELS"
VERSIONS = ("reference", "triton")


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit` where Triton is installed; elsewhere the function as it is, which nobody calls."""
    return function if triton is None else triton.jit(function)


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on the CPU (`TRITON_INTERPRET=1` before the first import)."""
    return triton is not None and bool(triton.knobs.runtime.interpret)


def uses_triton(kernels: str | None, *tensors: Tensor) -> bool:
    """Whether this call runs the Triton version.

    kernels: "reference", "triton", or None for `$DDENGINE_KERNELS` and, without that, Triton on CUDA in float32 or
    narrower and the reference elsewhere. Raises InputError for another name and BackendUnavailable where Triton was
    asked for and cannot run.
    """
    asked = kernels or os.environ.get(VARIABLE) or None
    if asked is not None and asked not in VERSIONS:
        raise InputError(f"kernels {asked!r} is unknown; use one of {', '.join(VERSIONS)}, here or in ${VARIABLE}")
    if asked == "reference":
        return False
    on_cuda = all(tensor.is_cuda for tensor in tensors)
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    if asked is None:
        return triton is not None and on_cuda and not double
    if triton is None:
        raise BackendUnavailable(
            "kernels 'triton' cannot run: Triton is not installed; pip install triton, or use 'reference'"
        )
    if not on_cuda and not interpreted():
        raise BackendUnavailable(
            "kernels 'triton' cannot run on the CPU; use 'reference', or set TRITON_INTERPRET=1 before Python starts "
            "to run them in Triton's interpreter"
        )
    if double:
        raise BackendUnavailable("kernels 'triton' compute in float32 at most and were given float64; use 'reference'")
    return True


def launch(configuration: Configuration, grid: tuple[int, ...], *arguments: Any) -> None:
    """Launch a kernel on its first tensor's device, with the very constants that the compile report names."""
    device = next(each for each in arguments if isinstance(each, Tensor))
    with torch.cuda.device_of(device):
        configuration.kernel[grid](
            *arguments,
            **configuration.constants,
            num_warps=configuration.num_warps,
            num_stages=configuration.num_stages,
            enable_fp_fusion=configuration.fusion,
        )
