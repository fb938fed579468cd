"""CUDA, asked for unconditionally, answered by the CPU: for peers that were written for one machine.

Runs in a peer's process and imports torch alone. Half precision becomes float32 there, as nothing gains from it on a
CPU and not every operator has it. `apply` returns in words what was changed, for the report.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

FACTORIES = ("tensor", "as_tensor", "zeros", "ones", "empty", "full", "rand", "randn", "randint", "arange", "eye")
HALF = torch.float16
WORDS = (
    "CUDA calls and devices answered by the CPU",
    "float16 is float32",
    "no mixed precision, no gradient scaler",
    "no offloading between devices",
)


def apply() -> list[str]:
    """Make this process's torch answer for a CUDA device that is not there; what was changed, in words."""
    with torch.device("cpu"):
        torch.empty(0)  # torch notes here which of its functions make tensors, before they are wrapped
    torch.float16 = torch.half = torch.float32
    owners: tuple[Any, ...] = (torch.Tensor, torch.nn.Module)
    for owner in owners:
        owner.cuda, owner.half, owner.to = _itself, owner.float, _on_cpu(owner.to)
    for name in FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    torch.load, torch.save = _as_written(_on_cpu(torch.load)), _as_written(torch.save)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats", "manual_seed", "manual_seed_all"):
        setattr(torch.cuda, name, lambda *_, **__: None)
    return list(WORDS)


def libraries() -> None:
    """The same for Accelerate and diffusers; where they were imported before."""
    accelerate: Any = sys.modules.get("accelerate")
    if accelerate is not None:

        class Accelerator(accelerate.Accelerator):
            """In full precision on the CPU."""

            def __init__(self, *arguments: Any, **options: Any) -> None:
                super().__init__(*arguments, **{**options, "mixed_precision": "no", "cpu": True})

        accelerate.Accelerator = Accelerator
    if diffusers := sys.modules.get("diffusers"):
        diffusers.DiffusionPipeline.enable_model_cpu_offload = lambda self, *_, **__: None


def _itself(self: Any, *_: Any, **__: Any) -> Any:
    return self


def _is_cuda(value: Any) -> bool:
    if isinstance(value, torch.device):
        return value.type == "cuda"
    return isinstance(value, str) and value.partition(":")[0] == "cuda"


def _on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with every CUDA device among its arguments replaced by the CPU."""

    @functools.wraps(function)
    def on_cpu(*arguments: Any, **options: Any) -> Any:
        if any(map(_is_cuda, arguments)):
            arguments = tuple("cpu" if _is_cuda(value) else value for value in arguments)
        for name in ("device", "map_location"):
            if _is_cuda(options.get(name)):
                options[name] = "cpu"
        return function(*arguments, **options)

    return on_cpu


def _as_written(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with float16 itself again: files name the types of their tensors."""

    @functools.wraps(function)
    def as_written(*arguments: Any, **options: Any) -> Any:
        torch.float16 = torch.half = HALF
        try:
            return function(*arguments, **options)
        finally:
            torch.float16 = torch.half = torch.float32

    return as_written
