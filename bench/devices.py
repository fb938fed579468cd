"""What named GPUs can do at most: dense 16-bit tensor arithmetic and memory bandwidth, from their makers' documents."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

from ddengine.errors import InputError


@dataclass(frozen=True)
class Device:
    """Peaks of one GPU: TFLOP/s of dense float16 or bfloat16 matrix arithmetic without sparsity, TB/s of its memory.

    accumulate: what the tensor cores add up in at that rate; cards for games are twice as fast with float16.
    """

    name: str
    tflops: float
    bandwidth: float
    source: str
    accumulate: str = "float32"


# Data sheets give tensor rates with 2:4 sparsity where they are starred: half of that is the dense rate.
DEVICES: dict[str, Device] = {
    # 1979 TFLOP/s with sparsity.
    "h200": Device("H200 SXM", 989.5, 4.8, "NVIDIA H200 data sheet"),
    # 989.4 dense; the PCIe card is slower in both.
    "h100": Device("H100 SXM5 80 GB", 989.4, 3.35, "NVIDIA H100 architecture white paper"),
    # The 40 GB card has 1.555 TB/s.
    "a100": Device("A100 SXM4 80 GB", 312.0, 2.039, "NVIDIA A100 80 GB data sheet"),
    # 733 with sparsity; the data sheet prints the dense rate too.
    "l40s": Device("L40S", 362.05, 0.864, "NVIDIA L40S data sheet"),
    # 242 with sparsity.
    "l4": Device("L4", 121.0, 0.300, "NVIDIA L4 data sheet"),
    "4090": Device("GeForce RTX 4090", 165.2, 1.008, "NVIDIA Ada architecture white paper"),
    "4090-fp16acc": Device("GeForce RTX 4090", 330.3, 1.008, "NVIDIA Ada architecture white paper", "float16"),
    "3090": Device("GeForce RTX 3090", 71.0, 0.936, "NVIDIA GA102 architecture white paper"),
    # 838 with sparsity and float16 accumulation: a quarter of it.
    "5090": Device("GeForce RTX 5090", 209.5, 1.792, "NVIDIA RTX Blackwell architecture white paper"),
}

# What their drivers call them, after the maker's name: to the letter, since a word more is another product (PCIe and
# NVL cards, laptops, D, Ti and Super, half the memory, a slice by MIG).
DRIVERS = {
    "H200": "h200",
    "H100 80GB HBM3": "h100",
    "A100-SXM4-80GB": "a100",
    "L40S": "l40s",
    "L4": "l4",
    "GeForce RTX 4090": "4090",
    "GeForce RTX 3090": "3090",
    "GeForce RTX 5090": "5090",
}


def devices(names: Sequence[str] = (), *, measured: bool = False) -> dict[str, Device]:
    """GPUs by short names in any case, all without names; InputError for an unknown one.

    measured: times measured on the GPU come with it, so that there must be exactly one.
    """
    chosen = {}
    for name in names:
        key = name.strip().lower()
        if key not in DEVICES:
            close = difflib.get_close_matches(key, DEVICES, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise InputError(f"there are no peaks for GPU {name!r}{hint}; known are {', '.join(DEVICES)}")
        chosen[key] = DEVICES[key]
    if measured and len(chosen) != 1:
        raise InputError(f"a measured time belongs to one GPU, {len(chosen)} are named; name the one it is of")
    return chosen or dict(DEVICES)


def named(name: str) -> Device | None:
    """What is known of a GPU by the whole name that its driver gives; None of any other."""
    key = DRIVERS.get(" ".join(name.split()).removeprefix("NVIDIA "))
    return DEVICES[key] if key else None
