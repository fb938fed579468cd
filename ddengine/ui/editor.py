"""The editor without its page: opens pictures, moves arrows, runs edits. Everything the page's handlers call."""

from __future__ import annotations

import re
import shlex
import threading
import time
from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ddengine.config import DirectDragConfig
from ddengine.demo import Example, examples
from ddengine.drags import Drag
from ddengine.errors import InputError
from ddengine.image import read_image
from ddengine.progress import Progress
from ddengine.recipe import Recipe, command_line, picture_digest, python_call
from ddengine.request import ANY_SIZE, plan_of, spaces_for
from ddengine.ui.lane import Job, Lane
from ddengine.ui.session import Done, Limits, Picture, Session, Shelf
from ddengine.ui.view import draw_arrows, draw_travel, veil

if TYPE_CHECKING:
    from ddengine.engine import Engine

PREPARING = ("encode", "invert", "reference")


@dataclass(frozen=True)
class Described:
    """The command line's words for the engine, for recipes: what `Engine.load` was given."""

    model: str = "embedded"
    readout: str | None = None
    lora: str | None = None
    vae: str | None = None
    size: int | None = None
    backend: str = "auto"
    device: str = "auto"
    dtype: str = "auto"


class Editor:
    """An engine, the lane that edits go through, and the shelf of open pages."""

    def __init__(self, engine: Engine, described: Described | None = None, limits: Limits | None = None) -> None:
        self.engine, self.described = engine, described or Described()
        self.lane = Lane()
        self._starting = threading.Lock()  # of an edit: two clicks at once are answered on two threads
        self.shelf = Shelf(limits)
        self.shelf.on_drop(self._stop)
        self.examples: dict[str, Example] = {example.name: example for example in examples()}

    def close(self) -> None:
        """Stop what runs; the engine is the caller's."""
        self.lane.close()

    def takes_prompts(self) -> bool:
        """Whether the model can read a prompt."""
        return self.engine.model.text is not None

    # Pictures

    def open_example(self, session: Session, name: str) -> None:
        """Begin with a bundled picture, without arrows."""
        if name not in self.examples:
            raise InputError(f"there is no example {name!r}; examples are {', '.join(self.examples)}")
        self._open(session, f"{name}.png", self.examples[name].picture)

    def open_file(self, session: Session, path: str, name: str) -> None:
        """Begin with a user's file, which had that name; InputError, and nothing changes, if it is no picture."""
        try:
            picture = read_image(path)
        except InputError as error:  # whose file the user knows by its name alone
            raise InputError(str(error).replace(path, name)) from error
        self._open(session, file_name(name), picture)

    def _open(self, session: Session, name: str, image: Image.Image) -> None:
        spaces_for(image, ANY_SIZE, DirectDragConfig())  # for its refusals
        picture = Picture.of(name, image)
        with self._starting:
            self._stop(session)
            session.open(picture)

    def has_example_arrows(self, session: Session) -> bool:
        """Whether the open picture is an example, which comes with arrows."""
        return session.original is not None and any(
            session.original.image is example.picture for example in self.examples.values()
        )

    def example_arrows(self, session: Session) -> None:
        """Add the arrows that the open example comes with, if it is one."""
        for example in self.examples.values():
            if session.original is not None and session.original.image is example.picture:
                for drag in example.drags:
                    session.arrows = session.arrows.pull(drag.handle, drag.target)

    # Looking

    def shown(self, session: Session, config: DirectDragConfig | None = None) -> Image.Image | None:
        """The picture as the page shows it, with its arrows; with a configuration also where an edit may change it."""
        base, arrows = session.base, session.arrows
        if base is None:
            return None
        picture = base.shown
        if config is not None and arrows.drags:
            # At the size of the screen: working size and grid are the picture's own up to rounding of the sides.
            drags = [drag for drag in base.view.arrows(arrows.drags) if drag.handle != drag.target]
            width, height = picture.size
            inside = [Drag(_inside(d.handle, width, height), _inside(d.target, width, height)) for d in drags]
            picture = veil(picture, self.engine.soft_mask(picture, inside, config=config))
        return draw_arrows(picture, base.view, arrows)

    def travelling(self, session: Session, job: Job) -> Image.Image | None:
        """The last preview of a running edit, with handles on their way; None before there is one."""
        _, points, preview = job.look()
        if session.base is None or not points:
            return None
        return draw_travel(preview or session.base.shown, session.base.view, points, job.targets)

    # Editing

    def recipe(self, session: Session, config: DirectDragConfig, prompt: str) -> Recipe:
        """The edit that `run` would make now; InputError without a picture or an arrow."""
        base, drags = session.base, session.arrows.drags
        if base is None:
            raise InputError("no picture is open; choose an example or open a picture first")
        if not drags:
            raise InputError("there is no arrow yet; click what should move, then where it should go")
        here = {name: getattr(self.described, name) for name in Described.__dataclass_fields__}
        return Recipe(
            image_size=base.image.size,
            image_sha256=picture_digest(base.image),
            drags=drags,
            config=config,
            prompt=prompt if self.takes_prompts() else "",
            **here,
        )

    def run(self, session: Session, config: DirectDragConfig, prompt: str = "") -> Job:
        """Queue the edit of the session's picture by its arrows; its `Done` is the job's result and the session's last.

        Raises InputError where there is nothing to edit, another edit of the page runs, or the queue is full.
        """
        self._check_free(session)
        original = session.original  # first: if it still is at the end, all below are of the same picture
        recipe, base, arrows = self.recipe(session, config, prompt), session.base, session.arrows
        assert original is not None and base is not None
        held = self.shelf.source(session.key, base, recipe.prompt, config)

        def work(job: Job) -> Done:
            started = time.perf_counter()
            # Looked for again: it may have been let go while the job waited.
            source = self.shelf.source(session.key, base, recipe.prompt, config)
            prepared, saved = 0.0, 0.0
            if source is None:
                source = self.engine.prepare(base.image, prompt=recipe.prompt, config=config, progress=job.tell)
                prepared = time.perf_counter() - started
                self.shelf.keep(session.key, base, source)
            else:
                saved = sum(source.timings.get(stage, 0.0) for stage in PREPARING)
            result = self.engine.edit(source, arrows.drags, config=config, seed=recipe.seed, progress=job.tell)
            job.tell(Progress("decode", 1, 1))  # a cancel that came last counts too
            number = session.edits + 1
            edited = Picture.of(edited_name(original, number), result.image)
            done = Done(base, edited, recipe, result, time.perf_counter() - started, prepared, saved)
            if session.original is original:  # no other picture was opened meanwhile
                session.edits, session.last = number, done
            return done

        plan, targets = plan_of(config, prepared=held is not None), tuple(drag.target for drag in arrows.drags)
        job = Job(work, plan, targets, config.drag_end_step)
        with self._starting:
            self._check_free(session)
            if session.original is not original:
                raise InputError("another picture was opened just now; run its edit instead")
            self.lane.add(job)
            session.job = job
        if not self.shelf.holds(session):  # left meanwhile: then it is not known that `_stop` saw this job
            self.lane.cancel(job)
        return job

    def busy(self, session: Session) -> bool:
        """Whether an edit of the session waits or runs."""
        return session.job is not None and not session.job.ended.is_set()

    def _check_free(self, session: Session) -> None:
        if self.busy(session):
            raise InputError("an edit of this page runs already; wait for it or cancel it")

    def cancel(self, session: Session) -> bool:
        """Stop the session's edit; whether there was one."""
        job = session.job
        if job is None or job.ended.is_set():
            return False
        self.lane.cancel(job)
        return True

    def snippets(self, done: Done) -> tuple[str, str, str]:
        """What makes a finished edit again: the Python call, the command, and the command that replays its file."""
        names = done.base.name, done.edited.name
        replay = shlex.join(["ddengine", "edit", names[0], "--from", f"{PurePath(names[1]).stem}.json", "-o", names[1]])
        return python_call(done.recipe, *names), command_line(done.recipe, *names), replay

    def _stop(self, session: Session) -> None:
        self.cancel(session)


def file_name(name: str) -> str:
    """A file's name that is safe to show, to write and to put in a command: no folder, no odd letters, not too long."""
    path = PurePath(name.replace("\\", "/"))
    stem = re.sub(r"[^\w. -]+", "-", path.stem).strip("-. ") or "picture"
    suffix = re.sub(r"[^\w]+", "", path.suffix)[:8]
    return f"{stem[:60]}.{suffix}" if suffix else stem[:60]


def edited_name(original: Picture, number: int) -> str:
    """The name of a picture's edit: cat-edit1.png."""
    return f"{PurePath(original.name).stem}-edit{number}.png"


def arrived(done: Done) -> list[dict[str, Any]]:
    """How far each handle came: the drag, where it arrived, pixels from its target, share of its way."""
    rows = []
    for drag, point in zip(done.recipe.drags, done.result.handles, strict=True):
        way = float(np.hypot(*np.subtract(drag.target, drag.handle)))
        left = float(np.hypot(*np.subtract(drag.target, point)))
        rows.append({"drag": drag, "arrived": point, "left": left, "share": max(0.0, 1 - left / way)})
    return rows


def _inside(point: tuple[float, float], width: int, height: int) -> tuple[float, float]:
    return min(max(point[0], 0.0), width - 1.0), min(max(point[1], 0.0), height - 1.0)
