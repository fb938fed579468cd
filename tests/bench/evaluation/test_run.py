"""A run is the same whether it is interrupted, repeated or shared; what fails costs nothing but itself."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddengine.bench.evaluation import pool
from ddengine.bench.evaluation.folder import EDIT, PICTURE
from ddengine.bench.evaluation.plan import Plan, Progress
from ddengine.bench.evaluation.rows import plan_rows
from ddengine.bench.evaluation.run import evaluate, worker_options
from ddengine.bench.evaluation.suites import read_suite
from ddengine.errors import InputError

FEW = {"n_inference_step": "4", "drag_end_step": "1", "track_per_step": "1", "max_drag_per_track": "1"}


def pictures(folder: Path) -> dict[str, bytes]:
    """All edits below a run's folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob(PICTURE)}


def test_a_finished_sample_is_not_edited_again(plan: Plan, shifter, dragbench: Path) -> None:
    first = evaluate(plan)
    assert shifter.edits == 6 and first["failures"] == [] and len(pictures(plan.folder)) == 6
    assert evaluate(plan) == first and shifter.edits == 6
    # A row may be added, a record lost, a picture damaged, a sample changed: each costs its own edits alone.
    more = replace(plan, rows=plan_rows(["default", "paper", "fast"], FEW))
    assert len(evaluate(more)["rows"]) == 4 and shifter.edits == 9
    (plan.folder / "results/default/animals/a" / EDIT).unlink()
    (plan.folder / "results/paper/animals/b" / PICTURE).write_bytes(b"half a picture")
    assert evaluate(plan) == first and shifter.edits == 11
    facts = json.loads((dragbench / "animals/b/drag_instruction.json").read_text())
    (dragbench / "animals/b/drag_instruction.json").write_text(json.dumps({**facts, "points": [[9, 9], [19, 9]]}))
    changed = replace(plan, suite=read_suite("dragbench", dragbench))
    assert evaluate(changed)["edits"]["animals/b"] != first["edits"]["animals/b"] and shifter.edits == 13
    assert evaluate(changed)["edits"]["animals/a"] == first["edits"]["animals/a"]


def test_a_prompt_counts_only_where_it_is_used(plan: Plan, shifter, dragbench: Path) -> None:
    evaluate(plan)
    path = dragbench / "animals/a/drag_instruction.json"
    keys = {row.name: row.slug for row in plan_rows(["default"], ablated=True)}
    assert keys["+SM+RG +prompt"] == "SM-RG-prompt" and len(set(keys.values())) == 6
    assert json.loads(path.read_text())["prompt"] == "a picture"
    facts = evaluate(replace(plan, rows=plan_rows(["default"], ablated=True), folder=plan.folder.parent / "six"))
    assert set(facts["left_out"]) == {"+SM+RG +prompt", "+SM+RG+LWF +prompt"}
    assert "no text encoder" in facts["left_out"]["+SM+RG +prompt"]
    assert facts["rows"]["baseline"]["cells"]["MD"]["paper"] == 24.74


def test_another_configuration_is_refused_by_name(plan: Plan, shifter) -> None:
    evaluate(plan)
    before = {path: path.read_bytes() for path in plan.folder.rglob("*") if path.is_file()}
    for other, words in (
        (replace(plan, rows=plan_rows(["default"], {**FEW, "r2": "16"})), r"row default: config.r2 was 12 .* is 16"),
        (replace(plan, seed=7), "seed was 0 there and is 7 here"),
    ):
        with pytest.raises(InputError, match=words):
            evaluate(other)
    assert {path: path.read_bytes() for path in plan.folder.rglob("*") if path.is_file()} == before
    with pytest.raises(InputError, match="no record of a run"):
        (plan.folder / "run.json").write_text("[]")
        evaluate(plan)
    with pytest.raises(InputError, match=r"holds results but no run\.json"):
        (plan.folder / "run.json").unlink()
        evaluate(plan)


def test_two_runs_never_share_a_folder(plan: Plan, shifter) -> None:
    second: list[str] = []

    def watch(at: Progress) -> None:
        if not second:
            with pytest.raises(InputError, match="in use by another run") as refused:
                evaluate(plan)
            second.append(str(refused.value))

    evaluate(plan, watch)
    assert second


def test_a_sample_that_fails_is_listed_and_the_others_are_done(plan: Plan, shifter, dragbench: Path) -> None:
    broken = np.asarray(Image.open(dragbench / "animals/b/original_image.png"))
    shifter.fail = staticmethod(lambda pixels, config: np.array_equal(pixels, broken) and config.r2 == 12)
    (dragbench / "animals/unread").mkdir()
    (dragbench / "animals/unread/original_image.png").write_bytes(b"")
    facts = evaluate(replace(plan, suite=read_suite("dragbench", dragbench)))
    said = {(each["sample"], each["row"]): each["error"] for each in facts["failures"]}
    assert set(said) == {("animals/b", "default"), ("animals/b", "paper"), ("animals/unread", "")}
    assert said["animals/b", "default"] == "RuntimeError: (80, 96, 3) <b>cannot</b> be edited"
    assert "is empty" in said["animals/unread", ""] and facts["samples"] == 4
    assert set(facts["edits"]["animals/b"]["rows"]) == {"unedited"}
    assert len(pictures(plan.folder)) == 4
    # What failed is tried again, and only that.
    shifter.fail, before = None, shifter.edits
    assert [each["sample"] for each in evaluate(plan)["failures"]] == [] and shifter.edits == before + 2


def test_a_set_that_cannot_be_read_any_more_fails_by_sample(plan: Plan, shifter, dragbench: Path) -> None:
    (dragbench / "land_scape/c/original_image.png").unlink()
    facts = evaluate(plan)
    assert {(each["sample"], each["row"]) for each in facts["failures"]} == {
        ("land_scape/c", "default"),
        ("land_scape/c", "paper"),
        ("land_scape/c", "unedited"),
    }


def test_workers_load_what_this_process_did(plan: Plan, shifter, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("W").mkdir()
    Path("embedded").mkdir()
    engine = shifter.load()
    asked = {"model": "W", "vae": None, "device": "auto", "dtype": "auto", "backend": "auto", "size": 96}
    assert worker_options(asked, engine, far=False) == {**asked, "device": "cpu", "dtype": "float32"}
    engine.model.device, engine.model.dtype = torch.device("cuda:1"), torch.float16
    here, far = (worker_options(asked, engine, far=far) for far in (False, True))
    assert (here["device"], here["dtype"], here["model"]) == ("cuda:1", "float16", "W")
    assert (far["device"], far["dtype"], far["model"]) == ("cuda", "float16", tmp_path / "W")
    assert worker_options({"model": "embedded"}, engine, far=True)["model"] == "embedded"
    # And that is what they are given, to edit as to judge.
    given = []

    def pooled(what, jobs, count):
        given.append(what)
        return pool.here(what.open(), jobs)

    monkeypatch.setattr(pool, "in_processes", pooled)
    evaluate(replace(plan, jobs=2, engine={"device": "auto"}, weights={"clip": tmp_path}))
    editor, judge = given
    assert (editor.options["device"], editor.options["dtype"], judge.device) == ("cpu", "float32", "cpu")


def test_edits_that_ran_on_different_backends_are_told_of(plan: Plan, shifter, monkeypatch) -> None:
    edit, backends = shifter.edit, iter(["eager", "compile"] * 3)

    def mixed(self, *given, **options):
        return replace(edit(self, *given, **options), backend={"drag": next(backends), "decode": "eager"})

    monkeypatch.setattr(shifter, "edit", mixed)
    one = replace(plan, rows=plan.rows[:1])
    assert [note for note in evaluate(one)["notes"] if "backend" in note] == [
        "the drag of some edits ran on compile, of others on eager: not the same was built for all; name a --backend"
    ]


def real(folder: Path, data: Path, **more) -> Plan:
    rows = plan_rows(["default"], FEW, ablated=True)
    return Plan(read_suite("dragbench", data, limit=2), rows, folder, {"device": "cpu", "backend": "eager"}, **more)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, sample) -> tuple[Path, Path]:
    """A set, and the folder of its run with the real engine in this process alone."""
    root = tmp_path_factory.mktemp("alone")
    for seed, name in enumerate(("animals/a", "animals/b")):
        sample(root / "set", name, seed)
    assert evaluate(real(root / "out", root / "set"))["failures"] == []
    return root / "set", root / "out"


def test_rows_that_share_a_preparation_are_the_engines_own_edits(alone: tuple[Path, Path]) -> None:
    from ddengine.engine import Engine

    data, folder = alone
    engine = Engine.load(device="cpu", backend="eager")
    item = read_suite("dragbench", data).items[1]
    for row in plan_rows(["default"], FEW, ablated=True)[:5:2]:
        expected = engine.edit(item.truth.image, item.drags, config=row.config).image
        with Image.open(folder / "results" / row.slug / item.name / PICTURE) as found:
            np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


def test_two_processes_answer_as_one(alone: tuple[Path, Path], tmp_path: Path) -> None:
    data, folder = alone
    both = evaluate(real(tmp_path, data, jobs=2))
    assert both["failures"] == []
    assert pictures(tmp_path) == pictures(folder) and len(pictures(folder)) == 8
    assert (tmp_path / "evaluation.json").read_bytes() == (folder / "evaluation.json").read_bytes()


def test_a_killed_run_goes_on_to_the_same_result(alone: tuple[Path, Path], tmp_path: Path) -> None:
    data, whole = alone
    words = [sys.executable, "-m", "ddengine", "eval", "--data", str(data), "--ablation", "--device", "cpu", "-q"]
    words += [word for name, value in FEW.items() for word in ("--set", f"{name}={value}")]
    killed = subprocess.Popen([*words, "--limit", "2", "--backend", "eager", "-o", str(tmp_path)])
    try:
        deadline = time.monotonic() + 240
        while not list(tmp_path.rglob(EDIT)) and killed.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
    assert 1 <= len(pictures(tmp_path)) < 8 and not (tmp_path / "evaluation.json").exists()
    stamps = {path: path.stat().st_mtime_ns for path in tmp_path.rglob(EDIT)}
    evaluate(real(tmp_path, data))
    assert pictures(tmp_path) == pictures(whole)
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert (tmp_path / "evaluation.json").read_bytes() == (whole / "evaluation.json").read_bytes()


def test_scenes_are_judged_against_their_goals(shifter, tmp_path: Path) -> None:
    facts = evaluate(Plan(read_suite("scenes", limit=2), plan_rows(["default"]), tmp_path / "out"))
    goal, nothing = (facts["rows"][row]["cells"] for row in ("goal", "unedited"))
    assert goal["goal_gain"]["per_image"] == 1 and nothing["goal_gain"]["per_image"] == 0
    assert goal["psnr_outside"]["samples"] == 2 and goal["goal_gain"]["published"] is None
    assert facts["rows"]["default"]["cells"]["goal_gain"]["per_image"] < 0.5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("dragbench", None), "--data"),
        (("scenes", Path("x")), "leave out --data x"),
        (("coco", None), "no suite 'coco'"),
    ],
)
def test_what_is_no_suite_is_refused(arguments, words) -> None:
    with pytest.raises(InputError, match=words):
        read_suite(*arguments)


def test_rows_that_contradict_themselves_are_refused() -> None:
    with pytest.raises(InputError, match="soft_mask has no meaning with --ablation"):
        plan_rows(["default"], {"soft_mask": "off"}, ablated=True)
    with pytest.raises(InputError, match="name each one once"):
        plan_rows(["default", "default"])
    assert [row.config.soft_mask for row in plan_rows(["default", "paper"], {"soft_mask": "off"})] == [False, False]
