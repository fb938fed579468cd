"""An evaluation from end to end: what is not there yet is edited, then judged, then tabled."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ddengine
from ddengine.artifacts import sha256_bytes
from ddengine.bench.evaluation import folder as files
from ddengine.bench.evaluation import pool
from ddengine.bench.evaluation.folder import RunFolder, key_of
from ddengine.bench.evaluation.plan import Plan, Progress, Watch
from ddengine.bench.evaluation.result import assemble
from ddengine.bench.evaluation.rows import GOAL, REFERENCES, UNEDITED, Row, slug_of
from ddengine.bench.evaluation.suites import Item, png
from ddengine.bench.evaluation.work import Edit, EditJob, Editor, Judge, JudgeJob, Outcome, describe
from ddengine.errors import DDEngineError, InputError

if TYPE_CHECKING:
    from ddengine.engine import Engine

RESULT = "evaluation.json"


def evaluate(plan: Plan, watch: Watch | None = None) -> dict[str, Any]:
    """Carry out a plan and return the result, which `evaluation.json` in its folder holds too.

    Edits and judgements that the folder holds under the same key (picture, drags, configuration, prompt, model,
    backend, version) are not made again. A sample that fails is listed under "failures" and costs no other. Raises
    InputError for a folder of another run, and what `Engine.load` raises.
    """
    from ddengine.engine import Engine

    if len({row.slug for row in plan.rows}) != len(plan.rows):
        raise InputError(f"rows {', '.join(row.name for row in plan.rows)} share a name; name each one once")
    if not plan.suite.items and not plan.suite.refused:
        raise InputError(f"{plan.suite.title} has no samples to evaluate; name a folder that holds some")
    engine = Engine.load(**plan.engine)
    rows, left_out = _possible(plan, engine)
    setup = _setup(plan, engine)
    run = RunFolder(plan.folder)
    with run.opened(setup, {row.name: row.facts() for row in rows}):
        state = _State(plan, run, rows, setup, watch or (lambda at: None))
        state.edit(engine)
        del engine
        state.judge()
        facts = assemble(plan, rows, setup, state.edits, state.judged, state.failures, left_out)
        files.write_json(plan.folder / RESULT, facts)
    return facts


def _possible(plan: Plan, engine: Engine) -> tuple[tuple[Row, ...], dict[str, str]]:
    """The rows that mean something here, and why the others do not."""
    why = ""
    if not any(item.prompt for item in plan.suite.items):
        why = "its samples have no prompts"
    elif engine.model.text is None:
        why = "the model has no text encoder, which a prompt needs"
    rows = tuple(row for row in plan.rows if not (row.prompt and why))
    return rows, {row.name: why for row in plan.rows if row not in rows}


def _setup(plan: Plan, engine: Engine) -> dict[str, Any]:
    """All that decides every edit besides its sample and its row."""
    return {
        "suite": plan.suite.name,
        "version": ddengine.__version__,
        "model": engine.model.digest,
        "size": engine.model.size,
        "backend": engine.backend.name,
        "device": engine.model.device.type,
        "dtype": str(engine.model.dtype).removeprefix("torch."),
        "seed": plan.seed,
    }


def worker_options(options: Mapping[str, Any], engine: Engine, *, far: bool) -> dict[str, Any]:
    """`Engine.load`'s options for workers, so that each loads what this process did, whatever it finds around itself.

    "auto" becomes what it was here, but for the backend's, a choice for each stage by what is built. far: workers of a
    cluster, which see the one GPU that they claim, whatever its number, and start in folders of their own.
    """
    device = engine.model.device
    found = {**options, "device": device.type if far else str(device)}
    found["dtype"] = str(engine.model.dtype).removeprefix("torch.")
    for name in ("model", "readout", "lora", "vae") if far else ():
        path = options.get(name)
        if path not in (None, "embedded") and Path(path).expanduser().exists():
            found[name] = Path(path).expanduser().absolute()
    return found


class _State:
    """One run on its way: what is done, what failed."""

    def __init__(self, plan: Plan, run: RunFolder, rows: tuple[Row, ...], setup: Any, watch: Watch) -> None:
        self.plan, self.run, self.rows, self.setup, self.watch = plan, run, rows, setup, watch
        self.edits: dict[tuple[str, str], tuple[str, dict[str, Any]]] = {}  # (sample, row): digest of picture, facts
        self.judged: dict[str, dict[str, dict[str, Any]]] = {}  # row, sample
        self.options = dict(plan.engine)
        self.failures = {(name, ""): why for name, why in plan.suite.refused.items()}

    def edit(self, engine: Engine) -> None:
        """Make the edits that are missing."""
        self.options = worker_options(self.plan.engine, engine, far=self.plan.ray is not None)
        left: dict[str, list[Row]] = {}
        for item in self.plan.suite.items:
            for row in self.rows:
                found = self.run.edit(row.slug, item.name, self._edit_key(item, row))
                if found is None:
                    left.setdefault(item.name, []).append(row)
                else:
                    self.edits[item.name, row.name] = sha256_bytes(found[0]), found[1]
        self._tell("edit", len(self.edits))

        def jobs() -> Iterator[EditJob]:
            for item in self.plan.suite.items:
                if item.name in left and (picture := self._picture(item, left[item.name])) is not None:
                    edits = tuple(Edit(row.name, row.config, self._prompt(item, row)) for row in left[item.name])
                    yield EditJob(item, picture, edits, self.plan.seed)

        threads = self._threads()
        what = Editor(self.options, threads)
        for job, outcome in self._answers(what, jobs(), len(left), lambda: what.open(engine)):
            row = next(row for row in self.rows if row.name == outcome.row)
            if outcome.error:
                self.failures[job.item.name, row.name] = outcome.error
            else:
                key = self._edit_key(job.item, row)
                self.run.keep_edit(row.slug, job.item.name, key, outcome.picture, outcome.facts)
                self.edits[job.item.name, row.name] = sha256_bytes(outcome.picture), files.plain(outcome.facts)
            self._tell("edit", len(self.edits), job.item.name)

    def judge(self) -> None:
        """Judge what is not judged yet: the edits, the inputs beside them and, of scenes, the goals."""
        suite = self.plan.suite
        weights = {name: _weights_digest(path) for name, path in self.plan.weights.items()}
        keys: dict[tuple[str, str], str] = {}
        left: dict[str, list[str]] = {}
        for item in suite.items:
            for row in [UNEDITED, *(row.name for row in self.rows), *([GOAL] if suite.drawn else [])]:
                picture = "" if row in REFERENCES else self.edits.get((item.name, row), ("",))[0]
                if not picture and row not in REFERENCES:
                    continue
                keys[item.name, row] = key = key_of(suite.name, ddengine.__version__, item.digest, picture, weights)
                found = self.run.judgement(slug_of(self.rows, row), item.name, key)
                if found is None or not _complete(found):
                    left.setdefault(item.name, []).append(row)
                else:
                    self.judged.setdefault(row, {})[item.name] = found
        self._tell("judge", sum(map(len, self.judged.values())))

        def jobs() -> Iterator[JudgeJob]:
            for item in suite.items:
                picture = self._picture(item, left[item.name]) if item.name in left else None
                if picture is not None:
                    yield JudgeJob(
                        item, picture, {row: self._judged_picture(item, row, picture) for row in left[item.name]}
                    )

        what = Judge(
            suite.name,
            {name: str(Path(path).expanduser().absolute()) for name, path in self.plan.weights.items()},
            str(self.options.get("device", "auto")),
            self._threads(),
        )
        # Colours alone are compared faster than processes start.
        heavy = suite.drawn or bool(self.plan.weights)
        for job, outcome in self._answers(what, jobs(), len(left), what.open, shared=heavy):
            if outcome.error:
                self.failures[job.item.name, outcome.row] = outcome.error
            else:
                facts = files.plain(outcome.facts)
                key = keys[job.item.name, outcome.row]
                self.run.keep_judgement(slug_of(self.rows, outcome.row), job.item.name, key, facts)
                self.judged.setdefault(outcome.row, {})[job.item.name] = facts
            self._tell("judge", sum(map(len, self.judged.values())), job.item.name)

    def _answers(
        self, what: Any, jobs: Iterable[Any], count: int, here: Callable[[], Any], *, shared: bool = True
    ) -> Iterator[tuple[Any, Outcome]]:
        """The outcomes of every row of every job, those of jobs that died included; not `shared`: of this process."""
        if not count:
            return
        answers: Iterator[tuple[Any, Any]]
        if self.plan.ray is not None and shared:
            from ddengine.bench.evaluation.cluster import on_ray

            gpus = 1.0 if self.setup["device"] == "cuda" else 0.0
            answers = on_ray(what, jobs, min(self.plan.jobs or count, count), self.plan.ray, gpus=gpus)
        elif self.plan.jobs > 1 and count > 1 and shared:
            answers = pool.in_processes(what, jobs, min(self.plan.jobs, count))
        else:
            answers = pool.here(here(), jobs)
        answered: Counter[tuple[str, str]] = Counter()
        for job, answer in answers:
            if isinstance(answer, pool.Died):
                for row in job.rows:
                    if not answered[job.item.name, row]:
                        yield job, Outcome(row, {}, error=answer.error)
            else:
                answered[job.item.name, answer.row] += 1
                yield job, answer

    def _picture(self, item: Item, rows: Iterable[Any]) -> bytes | None:
        try:
            return item.picture()
        except DDEngineError as error:
            for row in rows:
                self.failures[item.name, getattr(row, "name", row)] = describe(error)
            return None

    def _judged_picture(self, item: Item, row: str, picture: bytes) -> bytes:
        if row == UNEDITED:
            return picture
        if row == GOAL:
            from ddengine.bench.scenes import SIZE, held_out_drag

            return png(held_out_drag(item.truth).goal.render(SIZE))
        return (self.run.result(slug_of(self.rows, row), item.name) / files.PICTURE).read_bytes()

    def _edit_key(self, item: Item, row: Row) -> str:
        return key_of(self.setup, row.facts(), self._prompt(item, row), item.digest)

    def _prompt(self, item: Item, row: Row) -> str:
        return item.prompt if row.prompt else ""

    def _threads(self) -> int | None:
        """Threads of each worker: as many as there are cores for it; None in this process alone."""
        if self.plan.jobs == 1 and self.plan.ray is None:
            return None
        return max(1, (os.cpu_count() or 1) // self.plan.jobs) if self.plan.ray is None else 1

    def _tell(self, phase: str, done: int, at: str = "") -> None:
        items, rows = len(self.plan.suite.items), len(self.rows)
        if phase == "judge":
            rows += 2 if self.plan.suite.drawn else 1
        failed = sum(1 for _, row in self.failures if row)
        self.watch(Progress(phase, done, items * rows, failed, at))


def _complete(judgement: Mapping[str, Any]) -> bool:
    """Whether nothing in it failed: a column without weights is empty for good, one that failed is tried again."""
    from ddengine.metrics.judges import NOT_GIVEN

    return all(why == NOT_GIVEN for why in judgement.get("scores", {}).get("empty", {}).values())


def _weights_digest(folder: Path) -> str:
    """sha256 over the weights and settings in a folder; "absent" where there is none."""
    from ddengine.models.cache import combined_digest, file_digest

    folder = Path(folder).expanduser()
    found = [path for path in sorted(folder.rglob("*")) if path.suffix in (".safetensors", ".json", ".txt")]
    if not found:
        return "absent"
    return combined_digest((path.relative_to(folder).as_posix(), file_digest(path)) for path in found)
