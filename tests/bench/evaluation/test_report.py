"""The page holds every sample, worst first, needs nothing from elsewhere, and takes nothing of the data for markup."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote_to_bytes

import pytest

from ddengine.bench.evaluation import report
from ddengine.bench.evaluation.markup import VOID, Html, h
from ddengine.bench.evaluation.plan import Plan
from ddengine.bench.evaluation.run import evaluate
from ddengine.bench.evaluation.suites import read_suite

PROMPT = "\"'><script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\">\u202egnp"
HOSTILE = (
    "a&b/<script>document.title = 'taken'<\\script>",
    'a&b/" onclick="document.title = \'taken\'" x="',
    "a&b/100%41 #1?x=<b>&amp;\n\x07",
    os.fsdecode(b"a&b/not \xff text"),
)


class Page(HTMLParser):
    """Elements with their attributes, and whether they are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@pytest.fixture
def hostile(plan: Plan, shifter, sample, tmp_path: Path) -> tuple[dict, Path]:
    """A set whose names and prompts attack the page; the second sample fails with an error that does too."""
    root = tmp_path / "hostile"
    for seed, name in enumerate(HOSTILE):
        sample(root, name, seed, prompt=PROMPT, points=((10, 20), (30 + seed, 40)))
    calls: list[int] = []
    shifter.fail = staticmethod(lambda pixels, config: calls.append(1) or len(calls) in (3, 4))
    plan = replace(plan, suite=read_suite("dragbench", root))
    facts = evaluate(plan)
    return facts, report.write(facts, plan.suite, plan.folder)


def test_what_comes_from_data_is_never_markup(hostile: tuple[dict, Path]) -> None:
    facts, path = hostile
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert [tag for tag, _ in page.elements].count("script") == 1
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert "onerror=" in text and "<b>cannot</b>" not in text  # it is there, as text
    assert not re.search("[\ud800-\udfff\u202e\x07]", text)
    cards = [attributes for tag, attributes in page.elements if tag == "article"]
    assert len(cards) == len(facts["edits"]) == 4
    assert {json.dumps(card["data-name"]) for card in cards} >= {json.dumps(HOSTILE[1])}


def test_nothing_is_asked_from_elsewhere_and_everything_is_there(hostile: tuple[dict, Path]) -> None:
    _, path = hostile
    found = [
        attributes[name]
        for _, attributes in Page(path.read_text(encoding="utf-8")).elements
        for name in ("src", "href")
        if name in attributes
    ]
    assert len(found) > 20
    for address in found:
        assert ":" not in address
        if not address.startswith("#"):
            place = os.path.join(os.fsencode(path.parent), unquote_to_bytes(address))
            assert os.path.isfile(place), address


def test_failing_samples_come_first_and_then_the_worst(plan: Plan, shifter) -> None:
    calls: list[int] = []
    shifter.fail = staticmethod(lambda pixels, config: calls.append(1) or len(calls) == 5)
    facts = evaluate(plan)
    judged = {"animals/a": 3.0, "animals/b": 50.0}
    facts["rows"]["default"]["cells"]["MD"].update(per_image=26.5, published=26.5, samples=2)
    for name, value in judged.items():
        facts["edits"][name]["rows"]["default"]["MD"] = value
    page = report.write(facts, plan.suite, plan.folder).read_text(encoding="utf-8")
    order = re.findall(r'data-name="([^"]*)"', page)
    assert order == ["land_scape/c", "animals/b", "animals/a"]
    assert "1 of 3 samples failed" in page and "no picture" in page and "IF</b> is empty" in page
    # The next page leaves no picture of this one behind that it does not show.
    (plan.folder / "report" / "0123456789abcdef0123.webp").write_bytes(b"old")
    report.write(facts, plan.suite, plan.folder)
    assert all(name in page for name in os.listdir(plan.folder / "report"))


def test_markup_escapes_and_nests() -> None:
    assert h("p", "a<b", [Html("<i>"), None, 3], class_='"x"') == '<p class="&quot;x&quot;">a&lt;b<i>3</p>'
    assert h("img", alt="&", hidden=True, title=None) == '<img alt="&amp;" hidden>'


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_in_a_browser(hostile: tuple[dict, Path], width: int, scheme: str) -> None:
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no Chromium here")
    _, path = hostile
    asked, said = [], []
    with sync.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        try:
            page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
            page.on("request", lambda request: asked.append(request.url))
            page.on("console", lambda message: said.append(message.text))
            page.on("pageerror", lambda error: said.append(str(error)))
            page.goto(path.as_uri())
            assert page.title() == "DragBench: evaluation"
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            page.evaluate("for (const image of document.images) image.loading = 'eager'")
            page.wait_for_function("[...document.images].every(image => image.complete)")
            assert page.evaluate("[...document.images].every(image => image.naturalWidth > 0)")
            # Another row is shown in place of the first, samples are found, and pictures open in large.
            shown = page.locator("figure[data-row]:visible")
            assert {each.get_attribute("data-row") for each in shown.all()} == {"default"}
            page.select_option("#row", "paper")
            assert {each.get_attribute("data-row") for each in shown.all()} == {"paper"}
            page.fill("#find", "onclick")
            assert page.locator("article").count() == 1 and page.locator(".count").inner_text() == "1 of 4"
            page.locator("article a.shot:visible").last.click()
            assert page.locator("dialog[open] img").count() == 2
            page.keyboard.press("Escape")
            assert page.locator("dialog[open]").count() == 0
            assert page.title() == "DragBench: evaluation"
        finally:
            browser.close()
    assert said == [] and all(url.startswith("file://") for url in asked)
