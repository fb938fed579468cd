"""Distance to the limit: the least time that a GPU's arithmetic and memory leave for each pass and for an edit.

The floor of a call is its arithmetic at the device's peak or the bytes no implementation avoids (weights once, inputs
and outputs) at its bandwidth, whichever takes longer. Attention counts as fused kernels execute it. What is left out
only makes it lower: normalisations, resizes, losses, tracking, launches, and small layers that cannot fill a GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ddengine.bench.account import Account, Line, total
from ddengine.bench.counting import Cost
from ddengine.bench.devices import Device
from ddengine.bench.savings import SAVINGS, Published, Structure
from ddengine.bench.shapes import sd15
from ddengine.config import DirectDragConfig
from ddengine.errors import InputError

STEP = "drag step"  # a forward and its backward: what most of an edit consists of
PASSES = (
    *("encode", "predict", "last inversion", "reference", "reference and readout"),
    *("supervise", "backward", STEP, "denoise", "decode"),
)


@dataclass(frozen=True)
class Floor:
    """Milliseconds that a call's arithmetic and its bytes take at least."""

    arithmetic: float
    memory: float

    @property
    def ms(self) -> float:
        return max(self.arithmetic, self.memory)


def floor(cost: Cost, gpu: Device) -> Floor:
    """The floor of one call on a GPU."""
    return Floor(cost.executed / gpu.tflops * 1e-9, cost.memory / gpu.bandwidth * 1e-9)


def floor_ms(lines: Iterable[Line], gpu: Device) -> float:
    """The floor of an edit: its calls one after the other, since each needs the one before."""
    return sum(line.count * floor(line.cost, gpu).ms for line in lines)


def share(floor_ms: float, measured_ms: float) -> float:
    """How much of a measured time the floor is, 0 to 1; InputError for a time below it, which is not of this work."""
    if not measured_ms >= floor_ms:
        raise InputError(
            f"{measured_ms:g} ms were measured, the floor is {floor_ms:.3g} ms; name the GPU, size and configuration "
            f"that were measured"
        )
    return floor_ms / measured_ms


def limit(
    gpus: Mapping[str, Device],
    *,
    size: int = 512,
    config: DirectDragConfig | None = None,
    savings: bool = False,
    step_ms: float | None = None,
    edit_ms: float | None = None,
) -> dict[str, Any]:
    """Costs and floors of every pass and of first, next and published edits, at the Stable Diffusion 1.5 shape.

    gpus: by short name (`ddengine.bench.devices`). size: side of a square picture, a multiple of 8 of at least 64.
    savings: count what each saving removes, too. step_ms, edit_ms: measured there, for our share of the limit.
    """
    if size % 8 or size < 64:
        raise InputError(f"size is {size}; it must be a multiple of 8 of at least 64")
    account = Account(sd15(), (size, size), config or DirectDragConfig.preset())
    found = report(account, Published(account, sd15()), gpus, savings=savings)
    for gpu in found["gpus"].values():
        gpu["measured"] = {}
        if step_ms is not None:
            gpu["measured"][STEP] = {"ms": step_ms, "share": share(gpu["passes_ms"][STEP], step_ms)}
        if edit_ms is not None:
            gpu["measured"]["first edit"] = {"ms": edit_ms, "share": share(gpu["edits_ms"]["first"], edit_ms)}
    return found


def report(account: Account, published: Published, gpus: Mapping[str, Device], *, savings: bool) -> dict[str, Any]:
    """The facts of `limit` for some account, without what was measured."""
    edits = {"first": account.edit(), "next": account.edit(prepared=True), "published": published.edit(Structure())}
    costs = {line.call: line.cost for line in edits["first"]}
    if "backward" in costs:
        costs[STEP] = costs["supervise"] + costs["backward"]
    facts: dict[str, Any] = {
        "model": account.model.name,
        "size": list(account.size_hw),
        "config": account.config.to_dict(),
        "reference_kv_bytes": account.kv_bytes,
        "passes": {name: _plain(costs[name]) for name in PASSES if name in costs},
        "edits": {
            name: {
                **_plain(total(lines)),
                "without_autoencoder": _plain(total(x for x in lines if x.stage not in ("encode", "decode"))),
                "calls": [{"stage": x.stage, "call": x.call, "count": x.count, **_plain(x.cost)} for x in lines],
            }
            for name, lines in edits.items()
        },
        "forward": {part: account.cost("predict").by(part) for part in ("stage", "kind")},
        "gpus": {
            name: {
                "name": gpu.name,
                "tflops": gpu.tflops,
                "accumulate": gpu.accumulate,
                "bandwidth": gpu.bandwidth,
                "source": gpu.source,
                "passes_ms": {key: floor(costs[key], gpu).ms for key in PASSES if key in costs},
                "edits_ms": {key: floor_ms(lines, gpu) for key, lines in edits.items()},
            }
            for name, gpu in gpus.items()
        },
    }
    if savings:
        facts["savings"] = [{"name": row.name, **_plain(row.cost)} for row in published.savings()]
        facts["folding"] = {name: _plain(cost) for name, cost in published.forward().items()}
    return facts


def _plain(cost: Cost) -> dict[str, int]:
    return {
        "flops": cost.arithmetic,
        "flops_executed": cost.executed,
        "weights_bytes": cost.weights,
        "parameters": cost.parameters,
        "handed_bytes": cost.handed,
        "kept_bytes": cost.kept,
        "traffic_bytes": cost.traffic,
        "operators": cost.operators,
        "host_bytes": cost.host,
    }


def text(facts: Mapping[str, Any]) -> str:
    """The tables of `limit`, in Markdown."""
    parts = [_passes(facts), _edits(facts)]
    if "savings" in facts:
        parts += [_savings(facts["savings"]), _folding(facts["folding"])]
    for gpu in facts["gpus"].values():
        for name, found in gpu.get("measured", {}).items():
            parts.append(f"{gpu['name']}: {found['ms']:g} ms a {name}, {100 * found['share']:.1f} % of the limit")
    return "\n\n".join(parts)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines)


def _gpu(name: str) -> str:
    return f"{name}, ms"


def _passes(facts: Mapping[str, Any]) -> str:
    gpus = facts["gpus"]
    head = ["pass", "GFLOP", "executed", "weights, GB", "kept, GB", *map(_gpu, gpus)]
    rows = []
    for name, cost in facts["passes"].items():
        amounts = [f"{cost[key] / 1e9:.1f}" for key in ("flops", "flops_executed")]
        amounts += [f"{cost[key] / 1e9:.2f}" for key in ("weights_bytes", "kept_bytes")]
        rows.append([name, *amounts, *(f"{gpu['passes_ms'][name]:.2f}" for gpu in gpus.values())])
    return _table(head, rows)


def _edits(facts: Mapping[str, Any]) -> str:
    gpus = facts["gpus"]
    rows = []
    for name, cost in facts["edits"].items():
        flops = [part[key] for part in (cost["without_autoencoder"], cost) for key in ("flops", "flops_executed")]
        amounts = [f"{value / 1e12:.1f}" for value in flops]
        rows.append([name, *amounts, *(f"{gpu['edits_ms'][name]:.0f}" for gpu in gpus.values())])
    return _table(["edit", "UNet and readout, TFLOP", "executed", "all, TFLOP", "executed", *map(_gpu, gpus)], rows)


def _savings(found: Sequence[Mapping[str, Any]]) -> str:
    rows, before = [], found[0]
    for row in found:
        memory = row["weights_bytes"] + row["handed_bytes"], before["weights_bytes"] + before["handed_bytes"]
        rows.append(
            [
                SAVINGS.get(row["name"], "the published structure"),
                f"{row['flops'] / 1e12:.2f}",
                f"{(row['flops'] - before['flops']) / 1e12:+.2f}",
                f"{memory[0] / 1e12:.3f}",
                f"{(memory[0] - memory[1]) / 1e12:+.3f}",
                f"{row['host_bytes'] / 1e9:.1f}",
            ]
        )
        before = row
    return _table(["first edit", "TFLOP", "change", "memory, TB", "change", "host, GB"], rows)


def _folding(found: Mapping[str, Mapping[str, Any]]) -> str:
    names = {
        "published": "as published",
        "constant_cross": "keys and values of the prompt constant",
        "time_table": "and time terms from a table",
        "kept_kv": "and the reference's keys and values kept",
    }
    rows = [
        [
            names[name],
            f"{cost['flops'] / 1e9:.2f}",
            str(cost["operators"]),
            f"{cost['parameters']:,}",
            f"{cost['weights_bytes'] / 1e6:.1f}",
        ]
        for name, cost in found.items()
    ]
    return _table(["one forward", "GFLOP", "operators", "parameters", "weights and constants, MB"], rows)
