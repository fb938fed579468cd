"""The two kinds of work, as pure functions of a job: edit a sample by several rows, judge its results.

Jobs carry bytes and plain records, so that they travel to other processes and machines; what loads networks is the
specification's `open`, once in each worker. Nothing here writes files, and this file imports no torch: a worker first
says how many threads it may use.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ddengine.bench.evaluation.suites import Item, png, scene_picture
from ddengine.config import DirectDragConfig
from ddengine.errors import Cancelled, DDEngineError

if TYPE_CHECKING:
    from PIL import Image

    from ddengine.engine import Engine
    from ddengine.source import Source

STAGES = ("soft_mask", "readout_guidance", "latent_warpage")  # what no preparation depends on, but for the readout


@dataclass(frozen=True)
class Edit:
    """One edit that is asked for. row: the row's name, to answer by."""

    row: str
    config: DirectDragConfig
    prompt: str


@dataclass(frozen=True)
class EditJob:
    """Edits of one picture (the bytes of a file)."""

    item: Item
    picture: bytes
    edits: tuple[Edit, ...]
    seed: int = 0

    @property
    def rows(self) -> tuple[str, ...]:
        return tuple(edit.row for edit in self.edits)


@dataclass(frozen=True)
class JudgeJob:
    """Judgements of one picture's results (the bytes of files), by row."""

    item: Item
    picture: bytes
    results: Mapping[str, bytes]

    @property
    def rows(self) -> tuple[str, ...]:
        return tuple(self.results)


@dataclass(frozen=True)
class Outcome:
    """What came of one row of a job: `error`, or facts for JSON and, of an edit, its picture as PNG."""

    row: str
    facts: Mapping[str, Any]
    picture: bytes = b""
    error: str = ""


Do = Callable[[Any], Iterator[Outcome]]


@dataclass(frozen=True)
class Editor:
    """Which engine edits; `open` loads it. threads: of each worker, None to leave them as they are."""

    options: Mapping[str, Any]
    threads: int | None = None

    def open(self, engine: Engine | None = None) -> Do:
        """The function that edits; raises what `Engine.load` does."""
        _limit_threads(self.threads)
        from ddengine.engine import Engine

        loaded = engine or Engine.load(**self.options)
        return lambda job: _edits(loaded, job)


@dataclass(frozen=True)
class Judge:
    """Which networks judge a suite's edits, by folders of weights; `open` loads them."""

    suite: str
    folders: Mapping[str, str]
    device: str = "auto"
    threads: int | None = None

    def open(self) -> Do:
        """The function that judges; raises InputError for an unknown device alone."""
        _limit_threads(self.threads)
        if self.suite == "scenes":
            return _judge_scenes
        from ddengine.metrics.judges import load_judges

        judges = load_judges(**self.folders, device=self.device)
        return lambda job: _judge_published(judges, job)


def _edits(engine: Engine, job: EditJob) -> Iterator[Outcome]:
    """Every edit of the job; rows that share a trajectory share its preparation, which costs them each its time."""
    from ddengine.image import read_image

    ready: dict[Any, Source] = {}
    try:
        picture: Image.Image | None = read_image(_opened(job.picture))
        problem = ""
    except Exception as error:
        picture, problem = None, describe(error)
    for edit in job.edits:
        if picture is None:
            yield Outcome(edit.row, {}, error=problem)
            continue
        try:
            shared = _shared(edit, job.edits)
            source = ready.get(shared)
            if source is None:
                ready.clear()  # of a large picture one holds a GiB
                config, prompt = shared
                source = ready[shared] = engine.prepare(picture, config=config, prompt=prompt)
            yield _one(engine, source, edit, job)
        except Cancelled:
            raise
        except Exception as error:  # whatever it is, the others go on
            yield Outcome(edit.row, {}, error=describe(error))


def _one(engine: Engine, source: Source, edit: Edit, job: EditJob) -> Outcome:
    result = engine.edit(source, job.item.drags, prompt=edit.prompt, config=edit.config, seed=job.seed)
    stages = {stage: taken + source.timings.get(stage, 0.0) for stage, taken in result.timings.items()}
    stages["total"] = result.timings["total"] + sum(source.timings.values())
    facts = {
        "handles": [list(point) for point in result.handles],
        "updates": len(result.history),
        "seconds": {stage: round(value, 4) for stage, value in stages.items()},
        "backend": dict(result.backend),
        "notes": list(result.notes),
    }
    return Outcome(edit.row, facts, png(result.image))


def _shared(edit: Edit, edits: Sequence[Edit]) -> tuple[DirectDragConfig, str]:
    """The configuration and prompt to prepare with: one for all edits that differ in the method's stages alone."""

    def without(config: DirectDragConfig) -> DirectDragConfig:
        return config.changed(soft_mask=True, readout_guidance="auto", latent_warpage=True)

    alike = [other for other in edits if without(other.config) == without(edit.config) and other.prompt == edit.prompt]
    guided = next((other.config for other in alike if other.config.readout_guidance is not False), edit.config)
    return without(edit.config).changed(readout_guidance=guided.readout_guidance), edit.prompt


def _judge_scenes(job: JudgeJob) -> Iterator[Outcome]:
    from ddengine.bench.scenes import score

    _, drag = scene_picture(job.item.truth)
    for row, result in job.results.items():
        try:
            figures = asdict(score(drag, _opened(result).convert("RGB")))
            figures.pop("moved")
            yield Outcome(row, {"figures": figures, "notes": []})
        except Exception as error:  # noqa: PERF203 - a damaged picture costs its own row
            yield Outcome(row, {}, error=describe(error))


def _judge_published(judges: Any, job: JudgeJob) -> Iterator[Outcome]:
    from ddengine.image import read_image

    for row, result in job.results.items():
        try:
            sample: Any = replace(job.item.truth, image=read_image(_opened(job.picture)))
            scores = judges.score(sample, _opened(result))
            facts = {name: value for name, value in asdict(scores).items() if name != "name"}
            yield Outcome(row, {"scores": facts, "notes": list(judges.notes)})
        except Exception as error:  # noqa: PERF203 - a damaged picture costs its own row
            yield Outcome(row, {}, error=describe(error))


def describe(error: BaseException) -> str:
    """An error in one line: ours as they are, others with their kind."""
    message = " ".join(str(error).split())[:2000]
    return message if isinstance(error, DDEngineError) and message else f"{type(error).__name__}: {message}"


def _opened(content: bytes) -> Image.Image:
    from PIL import Image

    from ddengine.image import FORMATS

    return Image.open(io.BytesIO(content), formats=FORMATS)


def _limit_threads(threads: int | None) -> None:
    if threads is None:
        return
    os.environ["OMP_NUM_THREADS"] = str(threads)  # read when torch is first imported
    import torch

    torch.set_num_threads(threads)
