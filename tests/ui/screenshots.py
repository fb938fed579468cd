"""Makes the pictures of docs/editor.md again, to be looked at: python tests/ui/screenshots.py [FOLDER]."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

from ddengine.engine import Engine
from ddengine.ui.editor import Editor
from ddengine.ui.server import open_socket, running

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE = 120_000  # milliseconds


def opened(browser: Browser, address: str, example: str, **options: object) -> Page:
    """The page with an example and its arrow."""
    page = browser.new_context(**options).new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(address)
    page.click(f"button[data-name={example}]")
    page.get_by_role("button", name="Example's arrow").click()
    page.wait_for_selector("#dd-list li")
    page.mouse.move(0, 0)
    page.evaluate("document.activeElement.blur()")
    return page


def make(browser: Browser, address: str, folder: Path) -> None:
    """An edit that is done, 1280 pixels wide; an arrow on a telephone."""
    page = opened(browser, address, "cat", viewport={"width": 1280, "height": 900})
    page.locator("#dd-run").click()
    page.wait_for_selector("#dd-slider img")
    page.mouse.move(0, 0)
    page.wait_for_timeout(2000)  # for the page to come to rest
    page.screenshot(path=folder / "ui-1280.png", full_page=True)
    page.context.close()
    telephone = {"viewport": {"width": 390, "height": 1024}, "device_scale_factor": 1.5}
    page = opened(browser, address, "hill", is_mobile=True, has_touch=True, **telephone)
    page.evaluate("scrollTo(0, 0)")
    page.wait_for_timeout(1000)
    page.screenshot(path=folder / "ui-390.png")
    page.context.close()


def main(folder: Path) -> None:
    editor, bound = Editor(Engine.load()), open_socket(0)
    with running(editor, bound) as server:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]}, daemon=True)
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.05)
        try:
            with sync_playwright() as driver:
                browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
                make(browser, "http://{}:{}".format(*bound.getsockname()), folder)
                browser.close()
        finally:
            server.should_exit = True
            thread.join(30)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/pictures"))
