"""The compile report: what every Triton kernel takes of every architecture in registers, stack and shared memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from ddengine.errors import BackendUnavailable, InputError
from ddengine.kernels.compilation import CAPABILITIES, Report, compile_for, configurations


def compile_all(capabilities: Sequence[int] = (), *, progress: bool = False) -> list[Report]:
    """Reports of all configurations, architecture by architecture within each; none named: all that we compile for.

    Raises InputError for an architecture that is none of these, and BackendUnavailable where Triton cannot compile.
    """
    if unknown := set(capabilities) - set(CAPABILITIES):
        raise InputError(f"sm_{min(unknown)} is not compiled for; use some of {', '.join(map(str, CAPABILITIES))}")
    chosen = capabilities or CAPABILITIES
    work = [(operator, each, capability) for operator, each in configurations() for capability in chosen]
    if not work:
        raise BackendUnavailable("no operator lists a Triton kernel; install triton, and look at ddengine.kernels")
    return [
        compile_for(each, capability, operator=operator)
        for operator, each, capability in tqdm(work, disable=not progress)
    ]


def table(reports: Sequence[Report]) -> str:
    """One line per configuration and one column per architecture: registers a thread, shared memory a block, spills."""
    capabilities = sorted({report.capability for report in reports})
    rows: dict[tuple[str, str, int], dict[int, str]] = {}
    for report in reports:
        cell = _cell(report.registers, report.stack, report.shared)
        rows.setdefault((report.operator, report.name, report.num_warps), {})[report.capability] = cell
    lines = [
        "| operator | kernel | warps | " + " | ".join(f"sm_{capability}" for capability in capabilities) + " |",
        "| --- " * (3 + len(capabilities)) + "|",
    ]
    for (operator, name, warps), cells in rows.items():
        lines.append(f"| {operator} | {name} | {warps} | " + " | ".join(cells[c] for c in capabilities) + " |")
    return "\n".join(lines)


def facts(reports: Sequence[Report]) -> dict[str, Any]:
    """The same as plain values: for each configuration [registers, bytes of stack, bytes shared] by target."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for each in reports:
        first = {"operator": each.operator, "name": each.name, "kernel": each.kernel, "warps": each.num_warps}
        row = rows.setdefault((each.operator, each.name), first)
        row[f"sm_{each.capability}"] = [each.registers, each.stack, each.shared]
    return {"triton": reports[0].triton, "kernels": list(rows.values())}


def compared(answers: Mapping[str, Sequence[Mapping[str, Any]]], target: str = "sm_90") -> str:
    """Several Tritons' `facts()["kernels"]`, by version, for one target: the most that any configuration takes."""
    most: dict[tuple[str, str], dict[str, list[int]]] = {}
    count: Counter[tuple[str, str]] = Counter()
    for version, rows in answers.items():
        for row in rows:
            key = row["operator"], row["kernel"].strip("_")
            versions = most.setdefault(key, {})
            versions[version] = [
                max(pair) for pair in zip(versions.get(version, row[target]), row[target], strict=True)
            ]
            count[key] += 1
    lines = ["| operator | kernel | configurations | " + " | ".join(f"Triton {version}" for version in answers) + " |"]
    lines += ["| --- " * (3 + len(answers)) + "|"]
    for (operator, kernel), versions in most.items():
        cells = " | ".join(_cell(*taken) for taken in versions.values())
        lines.append(f"| {operator} | {kernel} | {count[operator, kernel] // len(answers)} | {cells} |")
    return "\n".join(lines)


def _cell(registers: int, stack: int, shared: int) -> str:
    memory = f"{shared / 1024:g} KiB" if shared >= 1024 else f"{shared} B"
    return f"{registers}, {memory}" + (f", {stack} B of stack" if stack else "")
