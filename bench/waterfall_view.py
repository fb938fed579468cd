"""The waterfall to look at: table, plot, and the tables of docs/drag-step.md, which a test holds to the results.

`python -m ddengine.bench.waterfall_view` in a checkout writes the page's tables and draws its pictures anew.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddengine.artifacts import atomic_write
from ddengine.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
PAGE, RESULTS = ROOT / "docs" / "drag-step.md", ROOT / "bench" / "results"
TABLE = re.compile(r"(<!-- waterfall: (\w+) (\w+) -->\n).*?(\n<!-- end -->)", re.DOTALL)


def table(facts: Mapping[str, Any]) -> str:
    """Medians, and times as fast as the published structure with the 20th and 80th percentile of the rounds' ratios."""
    floor = facts.get("floor")
    head = ["bar", "drag step", "first edit", "next edit", "first, times as fast", "next, times as fast"]
    gpu = [("host gap", "host_gap"), ("peak memory", "peak_bytes")] if "cuda" in facts["device"] else []
    lines = [[*head, *(name for name, _ in gpu), *(["step's share of the limit"] if floor else [])]]
    lines.append(["---"] * len(lines[0]))
    for row in facts["bars"]:
        name = _name(row)
        if "first" not in row:
            why = row.get("skipped") or ("not timed" if row["gate"]["equal"] else "not equal, no time")
            lines.append([name, why, *[""] * (len(lines[0]) - 2)])
            continue
        cells = [name, _time(row["step"]["median"]), *(_time(row[edit]["median"]) for edit in ("first", "next"))]
        cells += [_ratio(row["ratio"].get(edit)) for edit in ("first", "next")]
        cells += [_plain(key, row.get(key)) for _, key in gpu]
        cells += [f"{floor['step'] / (10 * row['step']['median']):.1f} %"] if floor else []
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['name']} of {row['edits']}, each" if row["edits"] > 1 else str(row["name"])


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def _ratio(found: Mapping[str, float] | None) -> str:
    return "-" if found is None else f"{found['median']:.2f} ({found['p20']:.2f} to {found['p80']:.2f})"


def _plain(key: str, value: float | None) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f} %" if key == "host_gap" else f"{value / 1e9:.2f} GB"


def conditions(facts: Mapping[str, Any]) -> str:
    """What was run, and on what, in a few sentences."""
    about, (height, width) = facts["machine"], facts["size"]
    where = about["gpu"]["name"] if "gpu" in about else about["processor"]
    threads = f", {about['threads']} thread{'s' * (about['threads'] > 1)} of {about['cores']} cores"
    commit = "an unknown commit" if about["commit"] is None else f"commit {about['commit'][:12]}"
    load = f"load {min(facts['load']):g} to {max(facts['load']):g}, " if facts["load"] else ""
    rounds = max((row["first"]["samples"] for row in facts["bars"] if "first" in row), default=0)
    return (
        f"The {facts['shape']} model at {width} x {height}, {facts['dtype']}, {facts['updates']} updates an edit, "
        f"{rounds} round{'s' * (rounds != 1)}; {where}{threads}, Python {about['python']}, torch {about['torch']}, "
        f"{load}{commit}{' and changes' if about['dirty'] else ''}."
    )


def bars(facts: Mapping[str, Any]) -> str:
    """What every bar adds to the one before, and what was left out here."""
    rows = [f"| {row['name']} | {row['doc']}{_skipped(row)} |" for row in facts["bars"]]
    return "\n".join(["| bar | what it adds |", "| --- | --- |", *rows])


def _skipped(row: Mapping[str, Any]) -> str:
    return f" (not run here: {row['skipped']})" if row.get("skipped") else ""


def text(facts: Mapping[str, Any]) -> str:
    """What the command prints."""
    return f"{table(facts)}\n\n{conditions(facts)}"


def check_plot(path: Path) -> Any:
    """matplotlib's pyplot, which draws without a screen; InputError where it is missing or cannot write such a file."""
    if path.suffix not in (".png", ".svg"):
        raise InputError(f"cannot draw {path}: its name must end in .png or .svg")
    try:
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise InputError("the plot is drawn with matplotlib, which is missing; pip install matplotlib") from error
    return plt


def plot(facts: Mapping[str, Any], path: Path) -> None:
    """The bars as a picture (.png or .svg). Raises InputError as `check_plot`, or with nothing to show."""
    plt = check_plot(path)
    rows = [row for row in facts["bars"] if "first" in row]
    if not rows:
        raise InputError("no bar has a time; run at least one round")
    ink, dark, light, grey = "#202124", "#d9480f", "#ffc078", "#5f6368"
    style = {"font.size": 9, "axes.titlesize": 10, "text.color": ink, "axes.edgecolor": "#9aa0a6"}
    with plt.rc_context({**style, "xtick.color": grey, "ytick.color": ink, "svg.hashsalt": "ddengine"}):
        figure, axes = plt.subplots(
            1, 2, figsize=(11, 0.55 * len(rows) + 1.7), layout="constrained", sharey=True, width_ratios=(3, 2)
        )
        places = [-float(index) for index in range(len(rows))]
        for kind, offset, colour in (("first", 0.19, dark), ("next", -0.19, light)):
            _draw(axes[0], [place + offset for place in places], rows, kind, 0.36, colour, 1.0, ink)
        _draw(axes[1], places, rows, "step", 0.55, dark, 1e3, ink)
        axes[0].set_title("an edit, s: the first of a picture (dark), the next (light)", loc="left")
        axes[1].set_title("a drag step, ms", loc="left")
        axes[0].set_yticks(places, [_name(row) for row in rows])
        for axis in axes:
            axis.set_xlim(0, axis.get_xlim()[1] * 1.12)
            axis.spines[["top", "right", "left"]].set_visible(False)
            axis.tick_params(left=False)
            axis.grid(axis="x", color="#e8eaed", linewidth=0.8)
            axis.set_axisbelow(True)
        figure.supxlabel(_wrapped(conditions(facts)), fontsize=7.5, color=grey, x=0.01, ha="left")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=130, facecolor="white", metadata={"Date": None} if path.suffix == ".svg" else None)
        plt.close(figure)


def _draw(
    axis: Any, places: list[float], rows: list[Any], kind: str, height: float, colour: str, unit: float, ink: str
) -> None:
    """Medians as bars, the 20th to the 80th percentile as lines, times as fast as the first bar as words."""
    middle = [unit * row[kind]["median"] for row in rows]
    low, high = ([unit * abs(row[kind][end] - row[kind]["median"]) for row in rows] for end in ("p20", "p80"))
    error = {"ecolor": ink, "elinewidth": 0.9, "capsize": 2}
    axis.barh(places, middle, height, color=colour, xerr=[low, high], error_kw=error)
    for place, value, above, row in zip(places, middle, high, rows, strict=True):
        ratio = row["ratio"].get(kind)
        words = f"  {value:.3g}" + (f"  ({ratio['median']:.2f} x)" if ratio and row is not rows[0] else "")
        axis.text(value + above, place, words, va="center", fontsize=8, color=ink)


def _wrapped(words: str) -> str:
    middle = words.find("; ") + 1
    return f"{words[:middle]}\n{words[middle + 1 :]}"


def page(words: str) -> str:
    """The page with its tables as the results have them."""
    views = {"times": table, "conditions": conditions, "bars": bars}

    def anew(match: re.Match[str]) -> str:
        facts = json.loads((RESULTS / f"waterfall-{match[3]}.json").read_text(encoding="utf-8"))
        return match[1] + views[match[2]](facts) + match[4]

    return TABLE.sub(anew, words)


if __name__ == "__main__":
    for result in sorted(RESULTS.glob("waterfall-*.json")):
        plot(json.loads(result.read_text(encoding="utf-8")), PAGE.parent / f"{result.stem}.png")
    atomic_write(PAGE, page(PAGE.read_text(encoding="utf-8")).encode())
