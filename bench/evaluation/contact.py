"""The report's contact sheet: every sample with its input, its arrows and each row's edit, worst first."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from ddengine.bench.evaluation.markup import Html, h
from ddengine.bench.evaluation.pictures import Pictures, Shown
from ddengine.bench.evaluation.suites import Item, Suite
from ddengine.bench.evaluation.tables import NAMES, shown
from ddengine.bench.evaluation.view import SHORT, Facts, edited, main_row, ranked, ranking, value_of


def samples(facts: Facts, suite: Suite, pictures: Pictures) -> Html:
    """All samples, and what chooses among their rows and orders them."""
    main, rows, ranks = main_row(facts), edited(facts), ranking(facts)
    items = {item.name: item for item in suite.items}
    why: dict[str, list[tuple[str, str]]] = {}
    for each in facts["failures"]:
        why.setdefault(each["sample"], []).append((each["row"], each["error"]))
    cards = [
        _card(facts, items[name], number, main, why.get(name, []), pictures)
        for number, name in enumerate(ranked(facts), 1)
    ]
    known = [figure for figure in facts["figures"] if facts["rows"][main]["cells"][figure["name"]]["samples"]]
    known.sort(key=lambda figure: figure["name"] != ranks)
    orders = [
        h("option", f"{NAMES.get(figure['name'], figure['name'].replace('_', ' '))}, {way} first",
          value=f"{figure['name']}|{way}")
        for figure in known for way in ("worst", "best")
    ]  # fmt: skip
    choices = [h("option", row, value=row, selected=row == main) for row in rows]
    choices.append(h("option", "all rows", value="all"))
    bar = h(
        "div",
        h("label", h("span", "Row"), h("select", choices, id="row")),
        h("label", h("span", "Order"), h("select", orders, h("option", "name", value="name|"), id="order")),
        h("label", h("span", "Find"), h("input", type="search", id="find", placeholder="name or prompt")),
        h("span", f"{len(cards)} samples", class_="count"),
        class_="bar",
        hidden=True,
    )
    shots = 4 if suite.drawn else 3
    box = h(
        "div",
        cards,
        class_="cards",
        style=f"--shots:{shots};--narrow:{2 if suite.drawn else 3}",
        data_main=main,
        data_better=json.dumps({figure["name"]: figure["better"] for figure in facts["figures"]}),
    )
    figure = NAMES.get(ranks, ranks)
    words = f"The worst first, by {figure} of {main}." if ranks else "In the order of their names."
    return h("section", h("h2", "Samples"), h("p", words, class_="say"), bar, box, id="samples")


def _card(facts: Facts, item: Item, number: int, main: str, why: Sequence[tuple[str, str]], pictures: Pictures) -> Html:
    before = pictures.input(item)
    arrows = _arrows(item)
    shots = [_shot("before", before), _shot("drag", before, arrows, class_="drag")]
    for row in edited(facts):
        slug = facts["rows"][row]["slug"]
        digest = facts["edits"][item.name]["rows"].get(row, {}).get("picture")
        picture = pictures.result(slug, item.name, digest) if digest else None
        figures = [
            h("span", SHORT.get(figure["name"], figure["name"]), " ", h("b", shown(value, figure["digits"])),
              class_="figure")
            for figure in facts["figures"]
            if (value := value_of(facts, item.name, row, figure["name"])) is not None
        ]  # fmt: skip
        shots.append(_shot(row, picture, None, figures, data_row=row, hidden=row != main))
    if isinstance(item.truth, int):
        shots.append(_shot("goal", pictures.goal(item)))
    numbers = {
        row: {figure["name"]: value_of(facts, item.name, row, figure["name"]) for figure in facts["figures"]}
        for row in edited(facts)
    }
    return h(
        "article",
        h(
            "header",
            h("span", number, class_="rank"),
            h("h3", h("bdi", item.name)),
            h("p", h("bdi", f"\u201c{item.prompt}\u201d"), class_="prompt") if item.prompt else None,
        ),
        [h("p", f"{row}: " if row else "", error, class_="why") for row, error in why],
        h("div", shots, class_="strip"),
        class_="card",
        data_name=item.name,
        data_words=f"{item.name} {item.prompt}".lower(),
        data_values=json.dumps(numbers),
    )


def _shot(words: str, picture: Shown | None, over: Html | None = None, figures: Any = None, **more: Any) -> Html:
    """A picture with its caption, and what lies over it."""
    if picture is None:
        inner = h("div", "no picture", class_="none")
    else:
        width, height = picture.size
        image = h("img", src=picture.at, alt=words, width=width, height=height, loading="lazy", decoding="async")
        inner = h("a", image, over, href=picture.file, class_="shot")
    return h("figure", inner, h("figcaption", h("span", words, class_="name") if figures else words, figures), **more)


def _arrows(item: Item) -> Html:
    """The drags over the picture, in its own pixels; (0, 0) is a pixel's centre."""
    unit = max(item.size) / 100
    parts = []
    for drag in item.drags:
        (x0, y0), (x1, y1) = ((x + 0.5, y + 0.5) for x, y in (drag.handle, drag.target))
        length = math.hypot(x1 - x0, y1 - y0) or 1.0
        ux, uy = (x1 - x0) / length, (y1 - y0) / length
        head = min(5.6 * unit, 0.6 * length)
        nx, ny = x1 - ux * head, y1 - uy * head
        for kind, width in (("casing", 2.6), ("shaft", 1.3)):
            parts.append(
                h("line", x1=f"{x0:.2f}", y1=f"{y0:.2f}", x2=f"{nx:.2f}", y2=f"{ny:.2f}", class_=kind,
                  stroke_width=f"{width * unit:.2f}")
            )  # fmt: skip
        wing = 0.5 * head
        tip = f"M{x1:.2f} {y1:.2f}L{nx - uy * wing:.2f} {ny + ux * wing:.2f}L{nx + uy * wing:.2f} {ny - ux * wing:.2f}z"
        edge = f"{0.6 * unit:.2f}"
        parts.append(h("path", d=tip, class_="tip", stroke_width=edge, stroke_linejoin="round"))
        grip = min(2.0 * unit, 0.3 * length)
        parts.append(h("circle", cx=f"{x0:.2f}", cy=f"{y0:.2f}", r=f"{grip:.2f}", class_="grip", stroke_width=edge))
    return h("svg", parts, viewBox=f"0 0 {item.size[0]} {item.size[1]}", aria_hidden="true")
