"""A latency run as a picture: the stages of an edit one after the other, and what more points cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ddengine.bench.latency_meter import REST
from ddengine.bench.latency_rows import KINDS
from ddengine.bench.latency_view import conditions, steps, timed
from ddengine.bench.waterfall_view import check_plot
from ddengine.errors import InputError

INK, GREY, LINE = "#202124", "#5f6368", "#e8eaed"
# Preparing in blues, dragging in orange, what follows in greens: what a prepared picture saves is one family.
STAGES = {
    "encode": "#1c4f82",
    "invert": "#3b82c4",
    "reference": "#8fbfe8",
    "warp": "#7a3b0c",
    "drag": "#e8590c",
    "denoise": "#37936b",
    "decode": "#9bd1ae",
    REST: "#9aa0a6",
}
BACKENDS = {
    "eager": "#5f6368",
    "compile": "#e8590c",
    "onnxruntime": "#1971c2",
    "tensorrt": "#2f9e44",
    "auto": "#862e9c",
}
MARKS = {"eager": "o", "compile": "s", "onnxruntime": "^", "tensorrt": "D", "auto": "v"}


def plot(facts: Mapping[str, Any], path: Path) -> None:
    """The picture (.png or .svg). Raises InputError as `check_plot`, or where no row has times."""
    plt = check_plot(path)
    rows = timed(facts)
    if not rows:
        raise InputError("no backend has times, so there is nothing to draw")
    least = min(row["points"] for row in rows)
    bars = [row for row in rows if row["points"] == least]
    style = {"font.size": 9, "axes.titlesize": 10.5, "text.color": INK, "axes.edgecolor": "#9aa0a6"}
    with plt.rc_context({**style, "xtick.color": GREY, "ytick.color": INK, "svg.hashsalt": "ddengine"}):
        height = 0.36 * len(bars) + 1.1
        figure, ((top, gone), (left, right)) = plt.subplots(
            2, 2, figsize=(11, height + 4.6), layout="constrained", height_ratios=(height, 3.6)
        )
        gone.remove()
        top.set_subplotspec(top.get_gridspec()[0, :])
        _stages(top, bars, least)
        _lines(left, rows, "edit", 1e-3, "an edit against its points, s: first, next (dashed)")
        _lines(right, rows, "step", 1.0, "a drag step against its points, ms")
        for axis in (top, left, right):
            axis.spines[["top", "right"]].set_visible(False)
            axis.set_axisbelow(True)
        figure.supxlabel(_wrapped(conditions(facts)), fontsize=7, color=GREY, x=0.01, ha="left")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130, facecolor="white", metadata={"Date": None} if path.suffix == ".svg" else None)
        plt.close(figure)


def _stages(axis: Any, rows: Sequence[Mapping[str, Any]], points: int) -> None:
    """Stages from left to right, an edit a bar; a backend's first and next edit stand together."""
    places, place, before = [], 0.0, None
    for row in rows:
        place += 0 if before is None else 1.0 if row["backend"] == before else 1.35
        places.append(-place)
        before = row["backend"]
    full = max(row["ms"]["edit"]["p80"] for row in rows) * 1e-3
    for at, row in zip(places, rows, strict=True):
        begun = 0.0
        for stage, colour in STAGES.items():
            spent = row["stages"][stage]["p50"] * 1e-3
            axis.barh(at, spent, 0.78, left=begun, color=colour, edgecolor="white", linewidth=0.4)
            if spent > 0.055 * full:
                count = steps(row, stage)
                inside = f"{count} x {spent / count * 1e3:.3g}" if count > 1 else f"{spent * 1e3:.0f}"
                dark = stage in ("reference", "decode")
                axis.text(
                    begun + spent / 2,
                    at,
                    inside,
                    ha="center",
                    va="center",
                    fontsize=7.5,
                    color=INK if dark else "white",
                )
            begun += spent
        found = row["ms"]["edit"]
        low, high = (abs(found[end] - found["p50"]) * 1e-3 for end in ("p20", "p80"))
        middle = found["p50"] * 1e-3
        axis.errorbar(middle, at - 0.31, xerr=[[low], [high]], color=INK, elinewidth=0.9, capsize=2, fmt="none")
        axis.text(max(begun, middle + high), at, f"  {middle:.2f} s", va="center", fontsize=8.5, color=INK)
    axis.set_yticks(places, [f"{row['backend']}, {row['edit']}" for row in rows])
    axis.tick_params(left=False)
    axis.spines["left"].set_visible(False)
    axis.grid(axis="x", color=LINE, linewidth=0.8)
    axis.set_xlim(0, full * 1.1)
    handles = [_patch(colour) for colour in STAGES.values()]
    form = {"handlelength": 1.0, "handleheight": 1.0, "columnspacing": 1.2, "borderpad": 0, "borderaxespad": 0.2}
    above = {"loc": "lower left", "bbox_to_anchor": (0, 1.0), "ncols": len(STAGES)}
    axis.legend(handles, list(STAGES), frameon=False, fontsize=8, **form, **above)
    words = f"where the time of an edit with {points} point{'s' * (points != 1)} goes, s; inside: steps x ms"
    axis.set_title(words, loc="left", pad=20)


def _patch(colour: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(facecolor=colour)


def _lines(axis: Any, rows: Sequence[Mapping[str, Any]], quantity: str, unit: float, title: str) -> None:
    """Medians over points, the 20th to the 80th percentile shaded; a drag step is the first edits'."""
    kinds = KINDS if quantity == "edit" else KINDS[:1]
    shown = sorted({row["points"] for row in rows})
    for backend, colour in BACKENDS.items():
        for kind in kinds:
            line = [row for row in rows if (row["backend"], row["edit"]) == (backend, kind) and row["ms"][quantity]]
            if not line:
                continue
            xs = [row["points"] for row in line]
            low, middle, high = ([row["ms"][quantity][end] * unit for row in line] for end in ("p20", "p50", "p80"))
            axis.fill_between(xs, low, high, color=colour, alpha=0.14, linewidth=0)
            first = kind == KINDS[0]
            drawn = {"marker": MARKS[backend], "markersize": 4.5, "linewidth": 1.5, "color": colour}
            if backend == "auto":  # it runs what another backend does: both shall be seen
                drawn |= {"markersize": 8, "markerfacecolor": "none", "linewidth": 1.0}
            axis.plot(xs, middle, linestyle="-" if first else (0, (4, 2)), label=backend if first else None, **drawn)
    axis.set_xscale("log", base=2)
    axis.set_xticks(shown, [str(points) for points in shown])
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.set_xlabel("points", color=GREY)
    axis.grid(color=LINE, linewidth=0.8)
    axis.set_title(title, loc="left")
    axis.legend(frameon=False, fontsize=8, loc="best", ncols=2)


def _wrapped(words: str) -> str:
    middle = words.find("; ") + 1
    return f"{words[:middle]}\n{words[middle + 1 :]}"
