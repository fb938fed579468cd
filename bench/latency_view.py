"""A latency run to look at: tables for a terminal or a page, rows for a spreadsheet, and docs/latency.md's numbers.

`python -m ddengine.bench.latency_view` in a checkout writes the page's tables and draws its picture anew.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddengine.artifacts import atomic_write
from ddengine.bench.latency_meter import REST
from ddengine.engine import STAGES

ROOT = Path(__file__).resolve().parent.parent
PAGE, RESULTS = ROOT / "docs" / "latency.md", ROOT / "bench" / "results"
PLACE = re.compile(r"(<!-- latency: (\w+) (\w+) -->\n).*?(\n<!-- end -->)", re.DOTALL)
SHOWN = tuple(stage for stage in STAGES if stage != "load")  # of a loaded engine: nothing


@dataclass(frozen=True)
class Table:
    """Words in rows. numbers: how many columns at the end are flush right. extra: columns a narrow terminal lacks."""

    title: str
    head: tuple[str, ...]
    rows: list[list[str]]
    numbers: int
    extra: tuple[str, ...] = ()

    def within(self, width: int) -> Table:
        """The table without as many of the extra columns as it takes to be so many characters wide."""
        if (
            not self.extra
            or sum(3 + max(map(len, column)) for column in zip(self.head, *self.rows, strict=True)) <= width
        ):
            return self
        gone = self.head.index(self.extra[0])
        rows = [[*row[:gone], *row[gone + 1 :]] for row in self.rows]
        head = (*self.head[:gone], *self.head[gone + 1 :])
        return Table(self.title, head, rows, self.numbers - 1, self.extra[1:]).within(width)


def timed(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows with times."""
    return [row for row in facts["rows"] if "ms" in row]


def times(facts: Mapping[str, Any]) -> Table:
    """ms an edit, a point and a drag step, and how many times as fast as eager; a row without times says why."""
    rows = timed(facts)
    more = {
        "J an edit": any(row["joules"] for row in rows),
        "of the limit: edit": any("edit_share" in row["limit"] for row in rows),
        "drag step": any("step_share" in row["limit"] for row in rows),
    }
    head = [
        "points",
        "backend",
        "edit",
        "samples",
        "ms an edit",
        "20 to 80 %",
        "of eager's",
        "ms a point",
        "ms a drag step",
    ]
    gaps = any(row["gap"] for row in rows) and facts["plan"]["device"] != "cpu"  # where the device is not the host
    head += ["updates", *["host gap, ms"] * gaps, "peak, GB", *(name for name, there in more.items() if there)]
    lines = []
    for row in facts["rows"]:
        if "ms" not in row:
            if "failed" in row:
                lines.append([str(row["points"]), row["backend"], "no time", "0", "not equal", *[""] * (len(head) - 5)])
            continue
        ms, updates = row["ms"], row["updates"]
        cells = [str(row["points"]), row["backend"], row["edit"], str(row["edits"]), _ms(ms["edit"]["p50"])]
        cells += [
            f"{_ms(ms['edit']['p20'])} to {_ms(ms['edit']['p80'])}",
            _of_eager(row, rows),
            _ms(ms["point"]["p50"]),
        ]
        cells += ["-" if ms["step"] is None else _ms(ms["step"]["p50"]), _range(updates["least"], updates["most"])]
        cells += ["-" if row["gap"] is None else _ms(row["gap"]["p50"])] * gaps
        cells += ["-" if row["memory_bytes"] is None else f"{row['memory_bytes'] / 1e9:.2f}"]
        cells += [f"{row['joules']['p50']:.3g}" if row["joules"] else "-"] if more["J an edit"] else []
        for name, there in (("edit", more["of the limit: edit"]), ("step", more["drag step"])):
            share = row["limit"].get(f"{name}_share")
            cells += ["-" if share is None else f"{100 * share:.1f} %"] if there else []
        lines.append(cells)
    extra = ("peak, GB", "ms a point", "host gap, ms", "20 to 80 %", "updates", "samples")
    return Table("latency, medians", tuple(head), lines, len(head) - 3, tuple(name for name in extra if name in head))


def stages(facts: Mapping[str, Any]) -> Table:
    """Where an edit's time goes at the smallest number of points: ms by stage; last, how many steps a stage makes."""
    rows = timed(facts)
    least = min((row["points"] for row in rows), default=0)
    rows = [row for row in rows if row["points"] == least]
    lines = []
    for row in rows:
        spent = [row["stages"][stage]["p50"] for stage in SHOWN]
        ends = [row["stages"][REST]["p50"], row["ms"]["edit"]["p50"]]
        lines.append([row["backend"], row["edit"], *(_ms(value) if value else "-" for value in spent), *map(_ms, ends)])
    counts = ([count for row in rows if (count := steps(row, stage))] for stage in SHOWN)
    lines.append(["steps", "", *(_range(min(found), max(found)) if found else "" for found in counts), "", ""])
    title = f"where the time goes at {least} point{'s' * (least != 1)}, ms, medians"
    return Table(title, ("backend", "edit", *SHOWN, REST, "all"), lines if rows else [], len(SHOWN) + 2, (REST, "warp"))


def steps(row: Mapping[str, Any], stage: str) -> int:
    """How many steps of a stage one edit made: latent updates of the drag, forwards of the others; 0 without."""
    if stage == "drag":
        return int(row["updates"]["most"])
    return int(row["passes"].get(stage, {}).get("forward", 0))


def notes(facts: Mapping[str, Any]) -> list[str]:
    """What the tables do not say: why a backend has no times, what came first, where updates differ, and the limit."""
    said: dict[str, None] = {}
    for row in facts["rows"]:
        if "failed" in row:
            said[f"{row['backend']} has no time at {row['points']} points: {row['failed']}."] = None
        if "skipped" in row:
            said[f"{row['backend']} was not run: {row['skipped']}"] = None
    rows = timed(facts)
    if warm := {row["backend"]: row["warm_up_seconds"] for row in reversed(rows) if "warm_up_seconds" in row}:
        loaded = facts["model_load_seconds"]
        model = "" if loaded is None else f"The model was loaded in {loaded:.1f} s by the host's clock. "
        words = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in reversed(warm.items()))
        does = "builds what is missing and opens" if facts.get("built") else "opens"
        said[f"{model}An engine's very first edit also {does} programs and packages: {words}."] = None
    for row in rows:
        same = [other for other in rows if other["points"] == row["points"] and other["edit"] == row["edit"]]
        if len({str(other["updates"]) for other in same}) > 1:
            words = "Backends made different numbers of updates, since rounding decides when an edit ends early: "
            said[f"{words}compare drag steps, or fix the number with --updates."] = None
        if row["limit"].get("why"):
            said[f"Limit: {row['limit']['why']}."] = None
    if rows and not any(row["joules"] for row in rows):
        said[f"Energy: {facts['energy']}."] = None
    return list(said)


def conditions(facts: Mapping[str, Any]) -> str:
    """What was run, and on what, in a few sentences."""
    about, plan, rows = facts["machine"], facts["plan"], timed(facts)
    where = about["gpu"]["name"] if "gpu" in about else about["processor"]
    threads = f"{about['threads']} thread{'s' * (about['threads'] > 1)} of {about['cores']} cores"
    counts = [row["edits"] for row in rows] or [0]
    loads = [value for row in rows for value in row["load"] or []]
    load = f"load {min(loads):g} to {max(loads):g}, " if loads else ""
    commit = "an unknown commit" if about["commit"] is None else f"commit {about['commit'][:12]}"
    versions = [f"{name} {about[name]}" for name in ("torch", "triton")]
    versions += [about[name] for name in ("tensorrt", "onnxruntime") if about[name]]
    versions += [f"driver {about['driver']}"] if about["driver"] else []
    batch = f", batch of {plan['batch']}" if plan["batch"] > 1 else ""
    return (
        f"The {plan['model']} model at {plan['size'][0]} x {plan['size'][1]}, {plan['dtype']}{batch}, "
        f"{_range(min(counts), max(counts))} edits a row in turns, clock: {facts['clock']}; {where}, {threads}, "
        f"Python {about['python']}, {', '.join(versions)}, {load}{commit}{' and changes' if about['dirty'] else ''}."
    )


def text(facts: Mapping[str, Any], *, terminal: bool | None = None, width: int | None = None) -> str:
    """What the command prints: drawn by rich where someone watches a terminal, else Markdown.

    terminal, width: instead of what standard output is.
    """
    found = [table for table in (times(facts), stages(facts)) if table.rows]
    rest = "\n\n".join(["\n".join(notes(facts)), conditions(facts)]).strip()
    watched = sys.stdout.isatty() if terminal is None else terminal
    return f"{_drawn(found, width) if watched else _joined(found)}\n\n{rest}"


def markdown(table: Table) -> str:
    """A table in Markdown."""
    rule = ["---"] * (len(table.head) - table.numbers) + ["---:"] * table.numbers
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (table.head, rule, *table.rows))


def _joined(tables: Iterable[Table]) -> str:
    return "\n\n".join(f"{table.title}\n\n{markdown(table)}" for table in tables)


def _drawn(tables: Iterable[Table], width: int | None) -> str:
    """By rich, as wide as the terminal."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as Drawn

    buffer = io.StringIO()
    console = Console(file=buffer, force_terminal=True, width=width)
    for table in (one.within(console.width) for one in tables):
        drawn = Drawn(title=table.title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        for number, name in enumerate(table.head):
            right = number >= len(table.head) - table.numbers
            drawn.add_column(name, justify="right" if right else "left", no_wrap=True)
        before = None
        for cells in table.rows:
            if before is not None and cells[0] != before:
                drawn.add_section()
            before = cells[0]
            drawn.add_row(*cells, style="red" if "no time" in cells else None)
        console.print(drawn)
    return buffer.getvalue().rstrip()


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.3g}"


def _range(least: int, most: int) -> str:
    return str(least) if least == most else f"{least} to {most}"


def _of_eager(row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    """The share of eager's time at as many points, where both made as many updates."""
    for other in rows:
        if (other["backend"], other["points"], other["edit"]) == ("eager", row["points"], row["edit"]):
            same = other["updates"] == row["updates"]
            return f"{row['ms']['edit']['p50'] / other['ms']['edit']['p50']:.2f}" if same else "-"
    return "-"


def flat(row: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """A row of the file as one level of plain values; names are joined by dots."""
    found: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{path}{name}.")
        elif isinstance(value, (list, tuple)):
            found[f"{path}{name}"] = " ".join(map(str, value))
        else:
            found[f"{path}{name}"] = value
    return found


def write_csv(facts: Mapping[str, Any], path: Path) -> None:
    """Every row of the file as a line; a column that a row lacks, and None, are empty."""
    rows = [flat(row) for row in facts["rows"]]
    names = list(dict.fromkeys(name for row in rows for name in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    atomic_write(path, buffer.getvalue().encode())


def page(words: str) -> str:
    """The page with its tables as the results have them."""
    views = {
        "times": lambda facts: markdown(times(facts)),
        "stages": lambda facts: markdown(stages(facts)),
        "notes": lambda facts: "\n".join(f"- {note}" for note in notes(facts)),
        "conditions": conditions,
    }

    def anew(match: re.Match[str]) -> str:
        facts = json.loads((RESULTS / f"latency-{match[3]}.json").read_text(encoding="utf-8"))
        return match[1] + views[match[2]](facts) + match[4]

    return PLACE.sub(anew, words)


if __name__ == "__main__":
    from ddengine.bench.latency_plot import plot

    for result in sorted(RESULTS.glob("latency-*.json")):
        plot(json.loads(result.read_text(encoding="utf-8")), PAGE.parent / "pictures" / f"{result.stem}.png")
    atomic_write(PAGE, page(PAGE.read_text(encoding="utf-8")).encode())
