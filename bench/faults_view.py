"""The faults that were made, as docs/service.md's table tells them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ddengine.bench.faults import DRAIN_S, HEAD_S, SILENT


def text(facts: dict[str, Any]) -> str:
    """The faults as a Markdown table, a column a service."""
    names = {"process": "`--no-ray`", "ray": "Ray"}
    shown = [key for key in names if key in facts]
    lines = ["| fault | " + " | ".join(names[key] for key in shown) + " |", "| --- " * (1 + len(shown)) + "|"]
    rows: dict[str, Callable[[dict[str, Any]], str]] = {
        "cancelled at each of six stages": _said_cancelled,
        "client hangs up mid-edit": lambda one: f"stopped within {one['client gone']['seconds'] * 1e3:.0f} ms",
        "deadline of 1 s": lambda one: f"`{one['deadline']['code']}` after {one['deadline']['seconds']:.2f} s",
        "queue full": _said_full,
        "worker killed mid-edit (SIGKILL)": _said_killed,
        f"{SILENT} connections with half a request, `--head-s {HEAD_S:g}`": _said_half,
        "SIGTERM mid-edit": lambda one: _said_stopped(one["stopped"]),
        f"the same, `--drain-s {DRAIN_S:g}`": lambda one: _said_stopped(one["stopped late"]),
        "the next edit, after each of these": _said_next,
    }
    lines += [f"| {name} | " + " | ".join(say(facts[key]) for key in shown) + " |" for name, say in rows.items()]
    for name in facts[shown[0]]["hostile"]["answers"]:
        lines.append(f"| {name} | " + " | ".join(f"`{facts[key]['hostile']['answers'][name]}`" for key in shown) + " |")
    return "\n".join(lines)


def _said_cancelled(one: dict[str, Any]) -> str:
    found = one["cancelled"]
    codes = sorted(set(found["codes"].values()))
    worst = max(found["seconds"], key=found["seconds"].get)
    return (
        f"`{', '.join(codes)}`; stopped within {found['seconds'][worst] * 1e3:.0f} ms ({worst}), "
        f"a step takes up to {found['longest_step_s'] * 1e3:.0f} ms"
    )


def _said_full(one: dict[str, Any]) -> str:
    found = one["queue full"]
    return f"`{found['code']}` within {found['seconds'] * 1e3:.0f} ms, Retry-After {found['retry_after_s']:.0f} s"


def _said_killed(one: dict[str, Any]) -> str:
    found = one.get("worker killed")
    if found is None:
        return "it is the service: whoever runs it starts it again"
    told = f"`{found['code']}` within {found['seconds'] * 1e3:.0f} ms"
    return f"{told}; an edit succeeds again after {found['next_s']:.0f} s"


def _said_half(one: dict[str, Any]) -> str:
    found = one["half a request"]
    told = f"`{found['ready']}` for readiness within {found['ready_within_s'] * 1e3:.0f} ms"
    if found["closed"] == found["connections"]:
        return f"{told}; all closed after {found['seconds']:.1f} s"
    return f"{told}; {found['closed']} closed within {found['seconds']:.0f} s"


def _said_stopped(found: dict[str, Any]) -> str:
    return (
        f"the edit ends (`{found['running_edit']}`) after {found['running_s']:.1f} s, readiness is `{found['ready']}`, "
        f"a new one gets `{found['new_edit']}`; exit code {found['exit_code']} after {found['exit_s']:.1f} s"
    )


def _said_next(one: dict[str, Any]) -> str:
    equal = [found["next_equal"] for found in one.values() if "next_equal" in found]
    return f"equal to the first, {sum(equal)} of {len(equal)}"
