"""The report: one page beside its pictures that needs no network and reads from a file as it does from a server.

Tables and plots of the rows, then every sample, worst first: the input, its arrows, each row's edit. All text from the
data goes through `markup`, and the page may run no script but its own, by its digest.
"""

from __future__ import annotations

import base64
import hashlib
from importlib import resources
from pathlib import Path
from typing import Any

from ddengine.artifacts import atomic_write
from ddengine.bench.evaluation.contact import samples
from ddengine.bench.evaluation.markup import Html, h
from ddengine.bench.evaluation.pictures import Pictures
from ddengine.bench.evaluation.sections import categories, plots, results
from ddengine.bench.evaluation.suites import Suite
from ddengine.bench.evaluation.tables import NAMES
from ddengine.bench.evaluation.view import Facts, edited

PAGE = "report.html"


def write(facts: Facts, suite: Suite, folder: Path) -> Path:
    """Write report.html and its pictures into a run's folder; return the page. facts: of `run.evaluate`."""
    pictures = Pictures(folder)
    page = build(facts, suite, pictures)
    pictures.sweep()
    return atomic_write(folder / PAGE, page.encode("utf-8"))


def build(facts: Facts, suite: Suite, pictures: Pictures) -> str:
    """The page as text; the pictures it shows are written as it comes to them."""
    style, script = (_resource(name) for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        "default-src 'none'; img-src 'self' file:; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; "
        f"script-src 'sha256-{digest}'"
    )
    head = h(
        "head",
        h("meta", charset="utf-8"),
        h("meta", http_equiv="Content-Security-Policy", content=policy),
        h("meta", name="viewport", content="width=device-width, initial-scale=1"),
        h("title", f"{facts['title']}: evaluation"),
        h("style", Html(style)),
    )
    body = h(
        "body",
        _top(facts),
        h("main", results(facts), plots(facts), categories(facts), samples(facts, suite, pictures)),
        _foot(facts),
        _dialog(),
        h("script", Html(script)),
    )
    return "<!doctype html>\n" + h("html", head, body, lang="en") + "\n"


def _top(facts: Facts) -> Html:
    rows, setup = edited(facts), facts["setup"]
    lead = (
        f"{facts['samples']} samples, {len(rows)} {'row' if len(rows) == 1 else 'rows'}, model {setup['name']} "
        f"({setup['model'][:12]}), {setup['backend']} in {setup['dtype']} on {_place(facts)}."
    )
    hints = [h("li", h("b", name), f" is empty: {why}") for name, why in facts["missing"].items()]
    hints += [h("li", h("b", name), f" was left out: {why}") for name, why in facts["left_out"].items()]
    hints += [h("li", note) for note in facts["notes"]]
    failures = facts["failures"]
    alert = None
    if failures:
        count = len({each["sample"] for each in failures})
        items = [
            h("li", h("b", h("bdi", each["sample"])), f" {each['row']}: ".replace(" : ", ": "), each["error"])
            for each in failures
        ]
        words = f"{count} of {facts['samples']} samples failed in whole or in part"
        alert = h("details", h("summary", words), h("ul", items), class_="alert", open=len(failures) <= 3)
    links = [("results", "Results"), ("plots", "Plots"), ("samples", "Samples"), ("how", "How it was measured")]
    return h(
        "header",
        h("p", "ddengine eval", class_="over"),
        h("h1", facts["title"]),
        h("p", lead, class_="lead"),
        h("nav", [h("a", words, href=f"#{name}") for name, words in links]),
        alert,
        h("ul", hints, class_="hints") if hints else None,
        class_="top",
    )


def _place(facts: Facts) -> str:
    gpu = facts["machine"].get("gpu")
    return str(gpu["name"] if gpu else facts["machine"]["processor"])


def _foot(facts: Facts) -> Html:
    machine, setup = facts["machine"], facts["setup"]
    commit = machine.get("commit")
    sources = f"commit {commit[:12]}{' and changes' if machine['dirty'] else ''}" if commit else "installed"
    lines = [(NAMES.get(f["name"], f["name"].replace("_", " ")), f["about"]) for f in facts["figures"]]
    lines += [
        ("Samples", f"{facts['title']}, {facts['source']}; {facts['samples']} of them, sha256 {facts['data'][:16]}"),
        ("Model", f"{setup['name']}, digest {setup['model'][:16]}, working size {setup['size']}"),
        (
            "Engine",
            f"ddengine {setup['version']} ({sources}), {setup['backend']}, {setup['dtype']}, seed {setup['seed']}",
        ),
        ("Machine", f"{_place(facts)}, {machine['cores']} cores; Python {machine['python']}, torch {machine['torch']}"),
        ("Masks", "none: edits are given points alone, and a prompt only in rows that say so"),
    ]
    configs = []
    for name in edited(facts):
        row = facts["rows"][name]
        settings = ", ".join(f"{field}={_plain(value)}" for field, value in row["config"].items())
        configs.append(h("p", h("b", name), " ", h("code", settings)))
    return h(
        "footer",
        h("h2", "How it was measured"),
        h("dl", [[h("dt", name), h("dd", about)] for name, about in lines], class_="facts"),
        h("details", h("summary", "Every setting of every row"), configs, class_="config"),
        id="how",
    )


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value}"


def _dialog() -> Html:
    buttons = [
        h("button", words, class_=name, type="button", aria_label=label)
        for words, name, label in (
            ("\u2190", "back", "previous"),
            ("\u2192", "next", "next"),
            ("Close", "close", "close"),
        )
    ]
    inside = h("div", h("div", h("h3", ""), buttons, class_="head"), h("div", class_="pair"), class_="inside")
    return h("dialog", inside)


def _resource(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
