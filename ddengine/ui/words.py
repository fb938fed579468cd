"""What the page says: status, results and errors as small pieces of HTML. All that comes from outside is escaped."""

from __future__ import annotations

import html
import time
from collections.abc import Iterable
from pathlib import PurePath

from ddengine.ui.editor import Editor, arrived
from ddengine.ui.lane import Job
from ddengine.ui.session import Done, Session
from ddengine.ui.settings import sentence

STAGES = {
    "load": "loading",
    "build": "building what the backend lacks",
    "encode": "reading the picture",
    "invert": "inverting the picture",
    "reference": "recording the picture",
    "warp": "warping along the arrows",
    "drag": "dragging",
    "denoise": "denoising",
    "decode": "making the picture",
}


def notice(message: str, kind: str = "error") -> str:
    """A message that stays until the next one; errors are announced at once."""
    if not message:
        return ""
    role = "alert" if kind == "error" else "status"
    return f'<div class="dd-notice dd-{kind}" role="{role}">{html.escape(sentence(message))}</div>'


def hint(session: Session, busy: bool = False) -> str:
    """What to do next, and what is open."""
    if session.base is None:
        return '<p class="dd-hint">Choose an example or open a picture of your own.</p>'
    width, height = session.base.image.size
    file = f'<span class="dd-file">{html.escape(session.base.name)}, {width} x {height}</span>'
    said = session.arrows.hint()
    if busy:
        said = "Red is the point now, blue where it goes; coarse until the end."
    return f'<p class="dd-hint"><span role="status">{said}</span>{file}</p>'


def arrows(session: Session) -> str:
    """The arrows as numbers."""
    items = "".join("<li>{:g}, {:g} → {:g}, {:g}</li>".format(*d.handle, *d.target) for d in session.arrows.drags)
    return f'<ol class="dd-arrows" aria-label="Arrows, in pixels">{items}</ol>' if items else ""


def progress(job: Job, ahead: int) -> str:
    """Where a job is: its place in the queue, or stage, step, share and the time it still needs."""
    at, _, _ = job.look()
    if job.started is None:
        edits = "1 edit" if ahead == 1 else f"{ahead} edits"
        return _status(f"Waiting: {edits} before this one" if ahead else "Starting", None)
    if at is None:
        return _status("Starting", 0.0)
    share, seconds = job.share(), time.monotonic() - job.started
    left = ""
    if seconds > 1.5 and share > 0.05:
        left = f", about {max(1, round(seconds / share - seconds))} s left"
    stage = STAGES.get(at.stage, at.stage)
    step = f" step {at.step} of {at.total}" if at.total > 1 else ""
    return _status(f"{stage[:1].upper()}{stage[1:]}{step}{left}", share)


def _status(text: str, share: float | None) -> str:
    value = "" if share is None else f' value="{share:.3f}"'
    percent = "" if share is None else f'<span class="dd-percent">{share:.0%}</span>'
    return (
        f'<div class="dd-status"><div class="dd-line"><span role="status">{html.escape(text)}</span>{percent}</div>'
        f'<progress max="1"{value} aria-label="Progress of the edit"></progress></div>'
    )


def outcome(done: Done) -> str:
    """One line: how long an edit took and what its prepared picture saved."""
    text = f"Done in {done.seconds:.1f} s."
    if done.saved:
        text += f" The picture was prepared before: {done.saved:.1f} s saved."
    line = f'<div class="dd-line"><span role="status">{html.escape(text)}</span></div>'
    return f'<div class="dd-status dd-done">{line}</div>'  # by that name the page knows that there is a result


def facts(done: Done) -> str:
    """Where the handles arrived, what the edit cost by stage, what ran it, and notes."""
    rows = [
        (
            str(number),
            "{:g}, {:g} → {:g}, {:g}".format(*row["drag"].handle, *row["drag"].target),
            "{:.0f}, {:.0f}".format(*row["arrived"]),
            f"{row['left']:.1f} px",
        )
        for number, row in enumerate(arrived(done), 1)
    ]
    table = _table("Arrows", ("", "Asked", "Arrived", "Off by"), rows)
    timings = done.result.timings
    stages = [(STAGES.get(stage, stage), f"{timings[stage]:.2f} s") for stage in ("warp", "drag", "denoise", "decode")]
    before = "saved this time" if done.saved else "once a picture"
    stages.insert(0, (f"preparing ({before})", f"{done.saved or done.prepared:.2f} s"))
    stages.append(("in all", f"{done.seconds:.2f} s"))
    backend = done.result.backend.get("drag", "")
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in done.result.notes)
    more = f'<p class="dd-small">Drag steps ran on {html.escape(backend)}.</p>' if backend else ""
    more += f'<ul class="dd-small">{notes}</ul>' if notes else ""
    return table + _table("Time", ("Stage", "Seconds"), stages) + more


def about(editor: Editor) -> str:
    """What edits here: the model and where it computes."""
    model = editor.engine.model
    name = editor.described.model
    short = PurePath(name).name or name  # of a folder or a hub's id
    where = html.escape(str(model.device).replace("cpu", "CPU"))
    return f'<span title="{html.escape(name)}">{html.escape(short)} model</span>, {model.size} px, {where}'


def _table(caption: str, head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    titles = "".join(f'<th scope="col">{html.escape(title)}</th>' for title in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<table class="dd-table"><caption>{html.escape(caption)}</caption><thead><tr>{titles}</tr></thead>'
        f"<tbody>{body}</tbody></table>"
    )
