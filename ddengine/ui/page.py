"""The page of the editor: what each event on it calls. All that decides anything is elsewhere."""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from ddengine.config import DirectDragConfig
from ddengine.errors import DDEngineError, InputError
from ddengine.ui import settings, words
from ddengine.ui.editor import Editor
from ddengine.ui.files import Files
from ddengine.ui.lane import Job
from ddengine.ui.layout import Layout
from ddengine.ui.session import Done, Session
from ddengine.ui.view import View, data_url

log = logging.getLogger(__name__)

POLL = 0.15  # seconds between two looks at a running edit
Changes = dict[Any, Any]


class Page(Layout):
    """The components of one page and what happens to them; `blocks` is what Gradio serves."""

    def __init__(self, editor: Editor, keep: Files) -> None:
        self.keep = keep
        with gr.Blocks(title="ddengine", analytics_enabled=False) as self.blocks:
            super().__init__(editor)
            self._connect()
        # Edits wait in the editor's own lane, which shows them; so many pages may wait at once.
        self.blocks.queue(default_concurrency_limit=4, max_size=64)

    def _connect(self) -> None:
        values = [self.fields[field.name] for field in settings.fields()]
        look = [self.masked, *values]
        hands: dict[str, Any] = {
            "show_progress": "hidden",
            "api_visibility": "private",
            "concurrency_id": "hands",  # in the order they happened
            "concurrency_limit": 1,
        }
        seen = [self.notice, self.canvas, self.hint, self.listed]
        opened = [*seen, self.result, self.base, self.status, self.suggest]
        many: dict[str, Any] = {**hands, "trigger_mode": "multiple"}
        self.choices.choose(self._guarded(self._choose), look, opened, **hands)
        self.upload.upload(self._guarded(self._open), [self.upload, *look], opened, **hands)
        self.canvas.press(self._guarded(self._press), look, seen, **many)
        self.canvas.pull(self._guarded(self._pull), look, seen, **many)
        for event in (self.canvas.back, self.undo.click):
            event(self._guarded(self._undo), look, seen, **many)
        self.clear.click(self._guarded(self._clear), look, seen, **many)
        self.suggest.click(self._guarded(self._suggest), look, seen, **hands)
        self.masked.input(self._guarded(self._look), look, seen, **hands)
        self.base.input(self._guarded(self._choose_base), [self.base, *look], seen, **hands)
        for chooser in (self.preset, self.others):
            chooser.input(
                self._guarded(self._choose_preset), [chooser, self.masked], [*seen, self.preset, self.others, *values],
                **hands,
            )  # fmt: skip
        touched = [component.input for component in values]
        last = {**hands, "trigger_mode": "always_last"}
        gr.on(touched, self._guarded(self._changed), look, [*seen, self.preset, self.others], **last)
        finished = [
            *opened, self.run, self.cancel, self.slider, self.facts, self.python, self.command, self.replay,
            self.get_result, self.get_recipe, self.get_base,
        ]  # fmt: skip
        self.run.click(
            self._run, [self.prompt, *look], finished, show_progress="hidden", api_visibility="private",
            concurrency_limit=64, concurrency_id="edits",
        )  # fmt: skip
        # Without the notice: an edit that ends at once says so before this is answered.
        self.cancel.click(
            self._cancel, None, [self.cancel], queue=False, show_progress="hidden", api_visibility="private"
        )
        self.blocks.unload(self._left)

    def _guarded(self, handler: Callable[..., Changes]) -> Callable[..., Changes]:
        """The handler, whose errors become a message on the page and change nothing else."""

        @functools.wraps(handler)
        def safe(*given: Any) -> Changes:
            try:
                return {self.notice: "", **handler(*given)}
            except Exception as error:
                return {self.notice: words.notice(_message(error))}

        return safe

    def _session(self, request: gr.Request) -> Session:
        return self.editor.shelf.session(str(request.session_hash))

    def _free(self, request: gr.Request) -> Session:
        """The session, if its arrows may be moved now."""
        session = self._session(request)
        if self.editor.busy(session):
            raise InputError("the edit still runs; wait for it or cancel it before you move arrows")
        return session

    def _seen(self, session: Session, masked: bool, values: tuple[Any, ...]) -> Changes:
        try:
            config = settings.config_of(values) if masked else None
        except InputError:  # said when it was typed and when the edit is run; here only the mask cannot be shown
            config = None
        return {
            self.canvas: _canvas(session, self.editor.shown(session, config)),
            self.hint: words.hint(session),
            self.listed: words.arrows(session),
        }

    def _opened(self, session: Session, masked: bool, values: tuple[Any, ...]) -> Changes:
        self.keep.drop(session.key)  # of the picture before
        return {
            **self._seen(session, masked, values),
            self.result: gr.update(visible=False),
            **self._bases(session),
            self.status: "",
            self.suggest: gr.update(visible=self.editor.has_example_arrows(session)),
        }

    def _bases(self, session: Session) -> Changes:
        """The chooser of the picture to edit, once there is more than one."""
        names = list(session.pictures)
        name = session.base.name if session.base else None
        return {self.base: gr.update(choices=names, value=name, visible=len(names) > 1)}

    def _choose(self, request: gr.Request, event: gr.EventData, masked: bool, *values: Any) -> Changes:
        session = self._session(request)
        self.editor.open_example(session, str(event._data.get("name")))
        return self._opened(session, masked, values)

    def _open(self, request: gr.Request, path: str | None, masked: bool, *values: Any) -> Changes:
        if not path:
            return {}
        session = self._session(request)
        self.editor.open_file(session, path, Path(path).name)
        return self._opened(session, masked, values)

    def _press(self, request: gr.Request, event: gr.EventData, masked: bool, *values: Any) -> Changes:
        session, (at,), near = self._hand(request, event, "at")
        session.arrows = session.arrows.click(at, near)
        return self._seen(session, masked, values)

    def _pull(self, request: gr.Request, event: gr.EventData, masked: bool, *values: Any) -> Changes:
        session, (begin, end), near = self._hand(request, event, "from", "to")
        session.arrows = session.arrows.pull(begin, end, near)
        return self._seen(session, masked, values)

    def _hand(self, request: gr.Request, event: gr.EventData, *names: str) -> tuple[Session, list[Any], float]:
        """Points of the picture that a browser named, and how near counts as the same."""
        session = self._free(request)
        if session.base is None:
            raise InputError("no picture is open any more; choose an example or open a picture")
        view = View(session.base.image.size)
        points = [view.picture_at(_pair(event._data.get(name))) for name in names]
        near = event._data.get("near")
        return session, points, view.near(float(near) if isinstance(near, (int, float)) else math.nan)

    def _undo(self, request: gr.Request, masked: bool, *values: Any) -> Changes:
        session = self._free(request)
        session.arrows = session.arrows.undo()
        return self._seen(session, masked, values)

    def _clear(self, request: gr.Request, masked: bool, *values: Any) -> Changes:
        session = self._free(request)
        session.arrows = session.arrows.clear()
        return self._seen(session, masked, values)

    def _suggest(self, request: gr.Request, masked: bool, *values: Any) -> Changes:
        session = self._free(request)
        self.editor.example_arrows(session)
        return self._seen(session, masked, values)

    def _look(self, request: gr.Request, masked: bool, *values: Any) -> Changes:
        session = self._session(request)
        return {} if self.editor.busy(session) else self._seen(session, masked, values)

    def _changed(self, request: gr.Request, masked: bool, *values: Any) -> Changes:
        config = settings.config_of(values)
        return {**self._presets(config), **self._look(request, masked, *values)}

    def _choose_base(self, request: gr.Request, base: str, masked: bool, *values: Any) -> Changes:
        session = self._session(request)
        session.choose(base)
        return self._look(request, masked, *values)

    def _presets(self, config: DirectDragConfig) -> Changes:
        """The presets' choosers, which show what the settings are now."""
        name = settings.preset_of(config)
        found = {self.preset: settings.PRESET_WORDS, self.others: settings.OTHER_PRESETS}
        return {chooser: name if name in words else None for chooser, words in found.items()}

    def _choose_preset(self, request: gr.Request, preset: str, masked: bool) -> Changes:
        values = settings.preset_shown(preset)
        shown = dict(zip((self.fields[field.name] for field in settings.fields()), values, strict=True))
        return {**shown, **self._presets(settings.config_of(values)), **self._look(request, masked, *values)}

    def _cancel(self, request: gr.Request) -> Changes:
        self.editor.cancel(self._session(request))
        return {self.cancel: gr.update(interactive=False)}

    def _left(self, request: gr.Request) -> None:
        self.editor.shelf.drop(str(request.session_hash))

    def _run(self, request: gr.Request, prompt: str, masked: bool, *values: Any) -> Iterator[Changes]:
        """Run the page's edit and show how it goes, until it ends in one way or another."""
        session = self._session(request)
        try:
            config = settings.config_of(values)
            job = self.editor.run(session, config, prompt or "")
        except Exception as error:
            yield {self.notice: words.notice(_message(error))}
            return
        yield {
            self.notice: "",
            self.run: gr.update(interactive=False, value="Running"),
            self.cancel: gr.update(interactive=True),
            self.canvas: _canvas(session, self.editor.shown(session), busy=True),
            self.hint: words.hint(session, busy=True),
            self.status: words.progress(job, self.editor.lane.ahead(job)),
        }
        try:
            yield from self._watch(session, job)
        finally:  # the page was left: nobody waits for it
            if not job.ended.is_set():
                self.editor.cancel(session)
        idle = {
            self.run: gr.update(interactive=True, value="Run"),
            self.cancel: gr.update(interactive=False),
            **self._seen(session, masked, values),
        }
        if isinstance(job.result, Done) and session.last is job.result:
            try:
                end = self._finished(session, job.result)
            except Exception as error:  # its files cannot be written
                end = {self.status: "", self.notice: words.notice(_message(error))}
            yield {**idle, **end}
        elif job.cancelled or job.result:  # or another picture was opened as it ended
            yield {**idle, self.status: "", self.notice: words.notice("Cancelled; nothing was lost", "note")}
        else:
            yield {**idle, self.status: "", self.notice: words.notice(job.error or "the edit ended without a result")}

    def _watch(self, session: Session, job: Job) -> Iterator[Changes]:
        said, seen = "", None
        while not job.ended.wait(POLL):
            changes: Changes = {}
            status = words.progress(job, self.editor.lane.ahead(job))
            if status != said:
                said = changes[self.status] = status
            _, points, preview = job.look()
            if (points, id(preview)) != seen:
                seen = points, id(preview)
                picture = self.editor.travelling(session, job)
                if picture is not None:
                    changes[self.canvas] = _canvas(session, picture, busy=True)
            if changes:
                yield changes
                time.sleep(POLL)  # a browser need not see more

    def _finished(self, session: Session, done: Done) -> Changes:
        paths = self.keep.write(session, done)
        python, command, replay = self.editor.snippets(done)
        return {
            self.result: gr.update(visible=True),
            self.slider: tuple(map(str, paths.shown)),
            self.facts: words.facts(done),
            self.status: words.outcome(done),
            **self._bases(session),
            self.python: python,
            self.command: command,
            self.replay: replay,
            self.get_result: str(paths.result),
            self.get_recipe: str(paths.recipe),
            self.get_base: str(paths.base),
        }


def _canvas(session: Session, picture: Any, busy: bool = False) -> dict[str, Any]:
    """What canvas.js shows."""
    if picture is None or session.base is None:
        return {}
    count = len(session.arrows.drags)
    arrows = "no arrow" if not count else "1 arrow" if count == 1 else f"{count} arrows"
    return {
        "src": data_url(picture),
        "alt": f"{session.base.name} with {arrows}{', being edited' if busy else ''}",
        "ratio": picture.width / picture.height,
        "size": list(session.base.image.size),
        "busy": busy,
    }


def _pair(value: Any) -> tuple[float, float]:
    """Two shares from a browser; not numbers for anything else."""
    if isinstance(value, list) and len(value) == 2 and all(type(part) in (int, float) for part in value):
        return float(value[0]), float(value[1])
    return math.nan, math.nan


def _message(error: Exception) -> str:
    if isinstance(error, DDEngineError):
        return str(error)
    log.error("an event failed", exc_info=error)
    return f"That failed unexpectedly ({type(error).__name__}); nothing was lost, and the terminal has the details."
