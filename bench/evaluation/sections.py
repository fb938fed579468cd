"""The report's table, plots and categories."""

from __future__ import annotations

import math
from statistics import fmean

from ddengine.bench.evaluation.markup import Html, h
from ddengine.bench.evaluation.plots import Spread, spreads, trade
from ddengine.bench.evaluation.tables import NAMES, SCORED, all_scored, columns, counts, coverage, scored, shown
from ddengine.bench.evaluation.view import Facts, edited, known_cells, main_row, ranking, value_of


def results(facts: Facts) -> Html:
    """Every row's figures, the best of the edits marked, the paper's beside ours, and of how many samples they are."""
    wanted, whole = columns(facts), all_scored(facts)
    better = {figure["name"]: figure["better"] for figure in facts["figures"]}
    drawn = facts["suite"] == "scenes"
    groups, seconds, last = [h("th", "")], [h("th", "row", scope="col")], ""
    for figure, kind, _ in wanted:
        if figure != last:
            arrow = h("span", " \u2191" if better[figure] == "higher" else " \u2193", class_="better")
            span = sum(1 for name, _, _ in wanted if name == figure)
            kinds = "group" if span == 1 else "group first many"
            groups.append(h("th", NAMES.get(figure, figure.replace("_", " ")), arrow, colspan=span, class_=kinds))
        words = {"published": "published", "per_image": "mean" if drawn else "per image", "paper": "the paper"}
        first = " first" if figure != last else ""
        seconds.append(h("th", words.get(kind, kind), scope="col", class_=first.strip() or None))
        last = figure
    if not whole:
        groups.append(h("th", "samples", class_="group first"))
        seconds.append(h("th", SCORED, scope="col", class_="first"))
    best: dict[tuple[str, str], tuple[float, int]] = {}
    for figure, kind, _ in wanted:
        each = [facts["rows"][name]["cells"][figure] for name in edited(facts)]
        most = max((cell["samples"] for cell in each), default=0)
        # A row of fewer samples than others may have lost its worst: it is never the best.
        values = [cell[kind] for cell in each if cell[kind] is not None and cell["samples"] == most]
        if kind != "paper" and len(values) > 1:
            best[figure, kind] = (max if better[figure] == "higher" else min)(values), most
    lines = []
    for name, row in facts["rows"].items():
        cells, last = [], ""
        for figure, kind, digits in wanted:
            value = row["cells"][figure][kind]
            style = {"paper": "paper", "published": "", "per_image": "" if drawn else "minor"}.get(kind, "minor")
            held = (value, row["cells"][figure]["samples"])
            if row["config"] is not None and held == best.get((figure, kind)):
                style = "best"
            cells.append(h("td", shown(value, digits), class_=f"{style}{' first' if figure != last else ''}".strip()))
            last = figure
        if not whole:
            short = any(count < facts["samples"] for count in counts(facts, name).values())
            cells.append(h("td", scored(facts, name), class_="first short" if short else "first"))
        place = "reference" if row["config"] is None else "main" if name == main_row(facts) else None
        about = [" ", h("small", row["about"])] if row["about"] else None
        lines.append(h("tr", h("th", name, about, scope="row"), cells, class_=place))
    table = h("table", h("thead", h("tr", groups), h("tr", seconds)), h("tbody", lines))
    if drawn:
        says = "Every scene's right answer is known: means over scenes, and of the gain the median."
    else:
        says = (
            "Published: pooled as the published scripts do, MD over all drags of all samples alike, DAI with its "
            "second division by the number of drags. Per image: the plain mean over samples."
        )
    if facts["paper"]:
        says += f" The paper's figures are its own, not measured here ({facts['paper']})."
    says = f"{says} {coverage(facts)}".rstrip()
    return h("section", h("h2", "Results"), h("p", says, class_="say"), h("div", table, class_="wide"), id="results")


def plots(facts: Facts) -> Html | None:
    """Each known figure's spread by row, and what one costs the other."""
    main, found = main_row(facts), []
    wanted = [figure for figure in facts["figures"] if known_cells(facts, figure["name"], "per_image")]
    for figure in wanted:
        name, rows = figure["name"], []
        for row in edited(facts):
            values = [value_of(facts, sample, row, name) for sample in sorted(facts["edits"])]
            cell = facts["rows"][row]["cells"][name]
            known = [value for value in values if value is not None]
            rows.append(Spread(row, known, cell["per_image"], cell["error"], cell["paper"], row == main))
        way = "higher is better" if figure["better"] == "higher" else "lower is better"
        found.append(spreads(f"{NAMES.get(name, name.replace('_', ' '))}, {way}", rows, figure["digits"]))
    still, moved = ("psnr_outside", "goal_gain") if facts["suite"] == "scenes" else ("IF", "MD")
    names = {figure["name"] for figure in wanted}
    if {still, moved} <= names:
        x, y = (still, moved) if facts["suite"] == "scenes" else (moved, still)
        kinds = "per_image" if facts["suite"] == "scenes" else "published"
        points: dict[str, tuple[float, float]] = {}
        papers: dict[str, tuple[float, float]] = {}
        for row in edited(facts):
            cells = facts["rows"][row]["cells"]
            for into, kind in ((points, kinds), (papers, "paper")):
                if cells[x][kind] is not None and cells[y][kind] is not None:
                    into[row] = (cells[x][kind], cells[y][kind])
        axes = (NAMES.get(x, x), NAMES.get(y, y))
        words = "How far edits go, and what they leave alone"
        found.append(trade(words, points, papers, axes, main))
    found = [plot for plot in found if plot]
    if not found:
        return None
    key = [
        "Each dot is a sample, those beyond the axis drawn hollow at its end; the upright bar is the mean over samples "
        "with twice its standard error on either side."
    ]
    if facts["paper"]:
        key += [" ", h("span", "\u25c7", class_="d"), " is what the paper states."]
    return h("section", h("h2", "Plots"), h("div", found, class_="plots"), h("p", key, class_="key"), id="plots")


def categories(facts: Facts) -> Html | None:
    """The ranking figure's mean by category: which kind of picture does badly."""
    figure = next((each for each in facts["figures"] if each["name"] == ranking(facts)), None)
    groups: dict[str, list[str]] = {}
    for sample, about in facts["edits"].items():
        groups.setdefault(about["category"], []).append(sample)
    if figure is None or len(groups) < 2:
        return None
    rows = edited(facts)
    means: dict[tuple[str, str], float | None] = {}
    for group, samples in groups.items():
        for row in rows:
            values = [value_of(facts, sample, row, figure["name"]) for sample in samples]
            known = [value for value in values if value is not None]
            means[group, row] = fmean(known) if known else None
    top = max((abs(value) for value in means.values() if value is not None), default=0) or 1
    main = main_row(facts)
    sign = 1 if figure["better"] == "higher" else -1

    def key(group: str) -> tuple[float, str]:
        value = means[group, main]
        return (-math.inf if value is None else sign * value, group)

    order = sorted(groups, key=key)
    lines = []
    for group in order:
        cells = []
        for row in rows:
            value = means[group, row]
            width = 0 if value is None else max(0.0, value) / top * 88
            bar = h("i", style=f"width:{width:.1f}%")
            cells.append(h("td", bar, h("span", shown(value, figure["digits"])), class_="heat"))
        name = group.replace("_", " ")
        lines.append(h("tr", h("th", h("bdi", name), " ", h("small", len(groups[group])), scope="row"), cells))
    head = h("tr", h("th", "category"), [h("th", row, scope="col") for row in rows])
    name = NAMES.get(figure["name"], figure["name"])
    return h(
        "section",
        h("h2", f"By {'part' if facts['suite'] == 'scenes' else 'category'}"),
        h("p", f"{name[0].upper()}{name[1:]}, mean over samples, worst first.", class_="say"),
        h("div", h("table", h("thead", head), h("tbody", lines)), class_="wide"),
    )
