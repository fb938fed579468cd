"""Ahead-of-time compilation of every Triton kernel, without a GPU: registers, stack and shared memory."""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ddengine.errors import BackendUnavailable, InputError

# Compute capabilities compiled for, and the most shared memory in bytes that one block may take on each.
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
CAPABILITIES = tuple(SHARED_LIMIT)


@dataclass(frozen=True)
class Configuration:
    """One way in which a kernel is launched; each operator's file lists all of its own as `CONFIGURATIONS`.

    signature: Triton type of each runtime argument ("*fp32", "i32", ...). constants: value of each `tl.constexpr`.
    aligned: pointers are multiples of 16 bytes, as torch's own allocations are; False compiles for any view.
    fusion: a product and a sum may become one operation with one rounding; False keeps the reference's two.
    """

    name: str
    kernel: Any
    signature: dict[str, str] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 1
    aligned: bool = True
    fusion: bool = True


@dataclass(frozen=True)
class Report:
    """What one configuration takes on one architecture: registers a thread, bytes of stack a thread and shared a block.

    stack: where the assembler puts what does not fit in registers; 0 means no spill.
    """

    operator: str
    name: str
    kernel: str
    capability: int
    registers: int
    stack: int
    shared: int
    num_warps: int
    num_stages: int
    triton: str


def configurations() -> Iterator[tuple[str, Configuration]]:
    """Every configuration of every operator, with the name of the operator's file."""
    package = importlib.import_module(__package__)
    for module in sorted(module.name for module in pkgutil.iter_modules(package.__path__)):
        for each in getattr(importlib.import_module(f"{__package__}.{module}"), "CONFIGURATIONS", ()):
            yield module, each


def compile_for(configuration: Configuration, capability: int, *, operator: str = "") -> Report:
    """Compile for a compute capability (90 means sm_90) and read what the binary takes; needs no GPU.

    Raises InputError for an argument without type or value and BackendUnavailable where Triton cannot compile.
    """
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
    except ImportError as error:
        raise BackendUnavailable("kernels cannot be compiled: Triton is not installed; pip install triton") from error
    kernel = configuration.kernel
    if not isinstance(kernel, triton.JITFunction):
        raise BackendUnavailable(
            f"{configuration.name} is a {type(kernel).__name__} and no compilable kernel; unset TRITON_INTERPRET"
        )
    given = configuration.signature.keys() | configuration.constants.keys()
    if wrong := given ^ set(kernel.arg_names):
        raise InputError(
            f"{configuration.name}: {', '.join(sorted(wrong))} unknown or missing; name each argument once"
        )
    # The compiler reads the signature in the order of the arguments.
    signature = {name: configuration.signature.get(name, "constexpr") for name in kernel.arg_names}
    pointers = [index for index, kind in enumerate(signature.values()) if kind.startswith("*")]
    hints = {(index,): [["tt.divisibility", 16]] for index in pointers} if configuration.aligned else {}
    compiled = triton.compile(
        ASTSource(kernel, signature, configuration.constants, hints),
        target=GPUTarget("cuda", capability, 32),
        options={
            "num_warps": configuration.num_warps,
            "num_stages": configuration.num_stages,
            "enable_fp_fusion": configuration.fusion,
        },
    )
    usage = _usage(compiled.asm["cubin"])
    return Report(
        operator=operator,
        name=configuration.name,
        kernel=kernel.__name__,
        capability=capability,
        registers=usage["REG"],
        stack=usage["STACK"] + usage["LOCAL"],
        shared=compiled.metadata.shared,
        num_warps=configuration.num_warps,
        num_stages=configuration.num_stages,
        triton=triton.__version__,
    )


def _usage(cubin: bytes) -> dict[str, int]:
    """Resources of the one kernel in a binary, as the assembler recorded them."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    if found.keys() != {"REG", "STACK", "LOCAL"}:
        raise BackendUnavailable(f"cuobjdump's answer has changed; expected REG, STACK and LOCAL in {text!r}")
    return found
