"""The editor in a real browser, headless Chromium: from opening a picture to the edited one, as a user would."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddengine.config import PRESETS
from ddengine.image import read_image
from ddengine.recipe import read_recipe
from ddengine.ui.editor import Editor
from ddengine.ui.files import sweep
from ddengine.ui.lane import Job

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed (Debian, Ubuntu: apt-get install chromium)"),
]
FEW = {"n_inference_step": 8, "drag_end_step": 2, "track_per_step": 5, "max_drag_per_track": 2}
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]
PATIENCE = 120_000  # milliseconds, on busy machines
# Whether an element begins in view.
IN_VIEW = """wanted => {
  const box = document.querySelector(wanted).getBoundingClientRect();
  return box.height > 0 && box.top >= 0 && box.top < innerHeight / 2;
}"""
HANDLE, TARGET = (194, 74), (209, 54)


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield chromium
        chromium.close()


class Visit:
    """A page with what a user does on it; everything it complains of and asks other hosts for is kept."""

    def __init__(self, browser, served, **options):
        self.complaints, self.strangers = [], []
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        self.page = self.context.new_page()
        self.page.set_default_timeout(PATIENCE)
        self.page.on("console", lambda said: said.type in ("error", "warning") and self.complaints.append(said.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        own = (served.address, "data:", "blob:")
        self.page.on("request", lambda asked: asked.url.startswith(own) or self.strangers.append(asked.url))
        self.page.goto(served.address)
        self.open("cat")

    def open(self, name):
        self.page.click(f"button[data-name={name}]")
        self.page.wait_for_selector(f".dd-frame img[alt^={name}]")

    def at(self, x, y):
        box = self.page.locator(".dd-frame").bounding_box()
        return {"x": (x + 0.5) / 256 * box["width"], "y": (y + 0.5) / 256 * box["height"]}

    def click(self, point, tap=False):
        """A click on the picture, or a tap, and the picture that it leads to."""
        before, frame = self.source(), self.page.locator(".dd-frame")
        (frame.tap if tap else frame.click)(position=self.at(*point))
        self.after(before)
        return self.shown()

    def source(self):
        return self.page.get_attribute(".dd-frame img", "src")

    def after(self, source):
        """Wait for another picture than the one of that address."""
        self.page.wait_for_function("src => document.querySelector('.dd-frame img').src !== src", arg=source)

    def shown(self):
        data = base64.b64decode(self.source().split(",")[1])
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)

    def arrows(self):
        return self.page.locator("#dd-list li").all_inner_texts()

    def press(self, name):
        self.page.get_by_role("button", name=name, exact=True).click()

    def preset(self, name):
        self.page.locator("#dd-preset label", has_text=name).click()

    def end(self):
        assert self.complaints == [] and self.strangers == []
        self.context.close()


class Gates:
    """Makes edits wait at these drag steps, until the step is opened or the edit is cancelled."""

    def __init__(self, monkeypatch, *steps):
        self.open = {step: threading.Event() for step in steps}
        tell = Job.tell

        def held(job, at):
            tell(job, at)
            gate, deadline = self.open.get(at.step), time.monotonic() + PATIENCE / 1000
            while at.stage == "drag" and gate and not gate.wait(0.02) and time.monotonic() < deadline:
                tell(job, at)  # which raises once it is cancelled

        monkeypatch.setattr(Job, "tell", held)


def eventually(true):
    """Wait until it is, as long as a busy machine may take."""
    deadline = time.monotonic() + PATIENCE / 1000
    while not true() and time.monotonic() < deadline:
        time.sleep(0.05)
    return true()


def files_below(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def visit(browser, served, monkeypatch):
    monkeypatch.setitem(PRESETS, "preview", {**PRESETS["preview"], **FEW})
    made = Visit(browser, served)
    yield made
    made.context.close()


def red(picture, x, y):
    """Whether a handle's dot is drawn at a point of a picture shown twice as large."""
    r, g, b = picture[2 * y, 2 * x]
    return r > 200 and g < 120 and b < 120


def test_from_a_picture_to_its_edit(visit, served, tmp_path, monkeypatch):
    page = visit.page
    uploads = Path(os.environ["GRADIO_TEMP_DIR"])
    edits = uploads.parent / "edits"
    before_all = files_below(uploads.parent)
    plain = visit.shown()
    assert not red(plain, *HANDLE)
    begun = visit.click(HANDLE)
    assert red(begun, *HANDLE) and "where it should go" in page.inner_text("#dd-help")
    drawn = visit.click(TARGET)
    assert red(drawn, *HANDLE) and visit.arrows() == ["194, 74 → 209, 54"]
    assert (drawn[500:, 10:60] < plain[500:, 10:60] - 10).all(), "the veil lies far from the arrow"
    before = visit.source()
    page.locator("#dd-masked input").uncheck()
    visit.after(before)
    assert np.abs(visit.shown()[500:, 10:60] - plain[500:, 10:60]).max() < 10

    visit.preset("Quick look")
    page.wait_for_function("() => document.querySelector('#dd-set-drag_end_step input').value === '2'")
    gates, before = Gates(monkeypatch, 2, 8), visit.source()
    visit.press("Run")
    page.get_by_text("Dragging step 2 of 20").wait_for()
    visit.after(before)
    before = visit.source()
    gates.open[2].set()
    page.get_by_text("Dragging step 8 of 20").wait_for()
    visit.after(before)  # handles move over previews
    gates.open[8].set()
    page.wait_for_selector("#dd-slider img")

    page.wait_for_function(IN_VIEW, arg="#dd-result")  # which lay below the fold
    marks = page.evaluate(
        "[...document.querySelectorAll('input[type=radio]:checked')].map(one => getComputedStyle(one).backgroundColor)"
    )
    assert len(marks) == 2 and not {"rgb(255, 255, 255)", "rgba(0, 0, 0, 0)"} & set(marks), "their dots are white"

    with page.expect_download() as kept:
        page.get_by_role("link", name="Download the result").or_(
            page.get_by_role("button", name="Download the result")
        ).click()
    result = tmp_path / kept.value.suggested_filename
    kept.value.save_as(result)
    assert result.name == "cat-edit1.png"
    before, after = (np.asarray(one).astype(int) for one in (served.editor.examples["cat"].picture, read_image(result)))
    apart = np.abs(before - after).max(-1)
    near, far = apart[40:90, 176:226], apart[180:, :80]
    assert before.shape == after.shape and near.max() > 40 and near.mean() > 4 * far.mean(), (near.max(), near.mean())
    with page.expect_download() as kept:
        page.get_by_role("button", name="Edit (JSON)").click()
    kept.value.save_as(tmp_path / "edit.json")
    recipe = read_recipe(tmp_path / "edit.json")
    assert (recipe.drags[0].handle, recipe.drags[0].target) == (HANDLE, TARGET)
    assert "--drag 194,74:209,54" in page.inner_text("#dd-code")
    assert page.get_by_role("radio", name="cat-edit1.png").count() == 1

    visit.press("Run")
    page.get_by_text("The picture was prepared before").wait_for()
    # On disk: the last edit's files, of which Gradio made no copies; none of a picture or page that is left.
    kept = [str(path.relative_to(edits)).split(os.sep, 1)[1] for path in files_below(edits)]
    assert kept == ["cat-edit2.json", "cat-edit2.png", "cat.png", "shown/after.png", "shown/before.png"]
    assert files_below(uploads.parent) == sorted([*before_all, *files_below(edits)])
    visit.open("hill")
    assert not files_below(edits) and not page.locator("#dd-slider").is_visible()
    visit.press("Example's arrow")
    page.wait_for_selector("#dd-list li")
    visit.press("Run")
    page.wait_for_selector("#dd-slider img")
    assert files_below(edits)
    visit.end()
    assert eventually(lambda: not len(served.editor.shelf) and not files_below(edits))
    assert served.editor.shelf.held == {"sessions": 0, "picture_bytes": 0, "sources": 0, "source_bytes": 0}


def test_a_running_edit_is_cancelled_and_another_page_waits(visit, browser, served, monkeypatch):
    visit.click(HANDLE)
    visit.click(TARGET)
    Gates(monkeypatch, 2)  # never opened: the edit runs until it is cancelled
    visit.press("Run")
    visit.page.get_by_text("Dragging step 2").wait_for()
    visit.page.locator(".dd-frame").click(position=visit.at(50, 50))
    visit.press("Undo")
    visit.page.get_by_role("alert").get_by_text("The edit still runs").wait_for()
    other = Visit(browser, served)
    other.press("Example's arrow")
    other.page.wait_for_selector("#dd-list li")
    other.press("Run")
    other.page.get_by_text("Waiting: 1 edit before this one").wait_for()
    cancel = Editor.cancel

    def slow(editor, session):
        cancel(editor, session)
        time.sleep(1)

    monkeypatch.setattr(Editor, "cancel", slow)
    with other.page.expect_response(lambda answer: "/run/" in answer.url):  # to Cancel, after the edit has ended
        other.press("Cancel")
        other.page.get_by_text("Cancelled; nothing was lost").wait_for()
    other.page.wait_for_timeout(300)
    assert other.page.get_by_text("Cancelled; nothing was lost").is_visible()
    other.end()
    assert visit.page.get_by_role("button", name="Cancel", exact=True).is_enabled()
    visit.press("Cancel")
    visit.page.get_by_text("Cancelled; nothing was lost").wait_for()
    assert visit.arrows() == ["194, 74 → 209, 54"]
    assert visit.page.get_by_role("button", name="Run", exact=True).is_enabled()
    assert not visit.page.locator("#dd-slider").is_visible()
    visit.end()


def test_arrows_are_moved_undone_cleared_and_pulled(visit):
    page = visit.page
    for point in (HANDLE, TARGET, (62, 74), (50, 50)):
        visit.click(point)
    assert visit.arrows() == ["194, 74 → 209, 54", "62, 74 → 50, 50"]
    visit.click((51, 51))  # picks the end up
    assert "target of arrow 2" in page.inner_text("#dd-help")
    visit.click((80, 40))
    assert visit.arrows()[1] == "62, 74 → 80, 40"
    for wanted in (["194, 74 → 209, 54", "62, 74 → 50, 50"], ["194, 74 → 209, 54"]):
        visit.press("Undo")
        page.wait_for_function(
            "wanted => JSON.stringify([...document.querySelectorAll('#dd-list li')].map(l => l.innerText)) === wanted",
            arg=json.dumps(wanted, ensure_ascii=False, separators=(",", ":")),
        )
    visit.press("Clear arrows")
    page.wait_for_function("() => !document.querySelector('#dd-list li')")
    box = page.locator(".dd-frame").bounding_box()
    ends = [(box["x"] + visit.at(*end)["x"], box["y"] + visit.at(*end)["y"]) for end in (HANDLE, TARGET)]
    page.mouse.move(*ends[0])
    page.mouse.down()
    page.mouse.move(*ends[1], steps=4)
    page.mouse.up()
    page.wait_for_selector("#dd-list li")
    assert visit.arrows() == ["194, 74 → 209, 54"]

    frame = page.locator(".dd-frame")  # and without a mouse
    frame.focus()
    for key in ("ArrowLeft", "Enter"):
        frame.press(key)
    page.get_by_text("where it should go").wait_for()
    for key in ("Shift+ArrowDown", "Enter"):
        frame.press(key)
    page.wait_for_function("() => document.querySelectorAll('#dd-list li').length === 2")
    assert visit.arrows()[1] == "127, 128 → 127, 138"
    visit.end()


def test_what_is_wrong_is_said_and_nothing_is_lost(visit, tmp_path):
    page = visit.page
    visit.press("Run")
    page.get_by_role("alert").get_by_text("There is no arrow yet").wait_for()
    visit.click(HANDLE)
    visit.click(TARGET)
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"\x89PNG\r\n\x1a\n nothing")
    page.set_input_files("#dd-pictures input[type=file]", bad)
    page.get_by_role("alert").get_by_text("bad.png").wait_for()
    assert visit.arrows() == ["194, 74 → 209, 54"]
    steps = page.locator("#dd-set-drag_end_step input[type=number]")
    steps.fill("")
    page.get_by_role("alert").get_by_text("Drag steps is empty").wait_for()
    steps.fill("7")
    page.get_by_role("alert").wait_for(state="detached")
    page.get_by_role("button", name="Advanced").click()
    page.fill("#dd-set-r2 input", "999")
    page.locator("#dd-set-r2 input").press("Tab")
    page.get_by_role("alert").get_by_text("r2 is 999; it must be a whole number 1 to 128").wait_for()
    visit.press("Run")
    page.get_by_role("alert").get_by_text("r2 is 999").wait_for()
    good = tmp_path / "my photograph.jpg"
    Image.effect_noise((700, 300), 60).convert("RGB").save(good)
    page.set_input_files("#dd-pictures input[type=file]", good)
    page.get_by_text("my photograph.jpg, 700 x 300").wait_for()
    uploads = Path(os.environ["GRADIO_TEMP_DIR"])
    assert "my photograph.jpg" in {path.name for path in files_below(uploads)}
    sweep(uploads, -1)  # which are read already: the page goes on without them
    assert not files_below(uploads)
    visit.press("Undo")
    visit.click((128, 40))
    visit.end()


def test_on_a_telephone_it_fits_and_fingers_work(browser, served, monkeypatch):
    monkeypatch.setitem(PRESETS, "preview", {**PRESETS["preview"], **FEW})
    visit = Visit(
        browser, served, viewport={"width": 390, "height": 844}, device_scale_factor=2, is_mobile=True, has_touch=True
    )
    page = visit.page
    page.locator("#dd-run").tap()
    page.get_by_role("alert").get_by_text("There is no arrow yet").wait_for()
    page.wait_for_function(IN_VIEW, arg="#dd-notice")  # though its place is above the picture
    for point in (HANDLE, TARGET):
        visit.click(point, tap=True)
    page.wait_for_selector("#dd-list li")
    (arrow,) = visit.arrows()
    assert arrow.startswith(("194, 74", "193, 7", "195, 7")), arrow
    gates = Gates(monkeypatch, 2)
    visit.preset("Quick look")
    page.locator("#dd-run").tap()
    page.get_by_text("Dragging step 2 of").wait_for()
    page.wait_for_function(IN_VIEW, arg=".dd-frame")  # with how far it is
    page.wait_for_function("document.querySelector('#dd-status').getBoundingClientRect().bottom <= innerHeight")
    gates.open[2].set()
    page.wait_for_selector("#dd-slider img")
    page.wait_for_function(IN_VIEW, arg="#dd-result")
    page.get_by_role("button", name="Advanced").click()
    page.wait_for_selector("#dd-set-r2 input")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('button, input:not([type=file]), select, textarea')]
          .filter(e => e.offsetParent && !(e.labels && e.labels.length) && !e.innerText.trim()
            && !e.getAttribute('aria-label') && !e.title).map(e => e.outerHTML.slice(0, 200))"""
    )
    assert unnamed == []
    assert page.evaluate("[...document.images].filter(i => !i.hasAttribute('alt')).length") == 0
    visit.end()
