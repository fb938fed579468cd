"""The command with nothing replaced: the real engine and the embedded model, with settings of a few passes."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from ddengine import demo
from ddengine.cli import main
from ddengine.config import PRESETS
from ddengine.drags import Drag
from ddengine.scenes.scene import random_scene

FEW = {"n_inference_step": 8, "drag_end_step": 1, "track_per_step": 2, "max_drag_per_track": 1}
QUICK = [word for name, value in FEW.items() for word in ("--set", f"{name}={value}")]


@pytest.fixture
def picture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scene = random_scene(np.random.default_rng(3)).render(128).crop((0, 0, 128, 96))
    scene.save("in.png")
    return scene


def edit(output):
    arguments = ["edit", "in.png", "--drag", "50,50:70,50", "-o", output, "--config", "preview", *QUICK]
    return [*arguments, "--device", "cpu"]


def call(*arguments):
    return CliRunner().invoke(main, [*arguments])


def test_an_edit_changes_the_picture_and_tells_all_about_it(picture):
    done = call(*edit("out.png"), "--json")
    assert (done.exit_code, done.stderr) == (0, ""), done.output
    answer = json.loads(done.stdout)
    edited = np.asarray(Image.open("out.png"))
    assert edited.shape == (96, 128, 3)
    assert (edited != np.asarray(picture)).any()
    assert answer["config"]["n_inference_step"] == 8
    assert answer["passes"]["invert"]["forward"] > 0
    assert len(answer["history"]) == 2
    (drag,) = answer["drags"]
    assert drag["handle"] == [50, 50] and np.isfinite(drag["arrived"]).all()
    parts = [seconds for stage, seconds in answer["timings"].items() if stage != "total"]
    assert 0 < answer["timings"]["load"] < answer["timings"]["total"]
    assert sum(parts) <= answer["timings"]["total"] * 1.001  # no stage is counted twice


def test_two_processes_write_the_same_bytes(picture):
    for output in ("a.png", "b.png"):
        subprocess.run([sys.executable, "-m", "ddengine", *edit(output), "-q"], check=True)
    with open("a.png", "rb") as a, open("b.png", "rb") as b:
        assert a.read() == b.read()


@pytest.fixture
def quick_default(monkeypatch):
    """The default preset with few passes, for commands that take no settings."""
    monkeypatch.setitem(PRESETS, "default", {**PRESETS["default"], **FEW})


def test_the_demo_writes_its_pictures(picture, monkeypatch, quick_default):
    monkeypatch.setattr(demo, "examples", lambda: (demo.Example("scene", picture, (Drag((50, 50), (70, 50)),)),))
    done = call("demo", "-o", "shown", "--device", "cpu", "--json")
    assert (done.exit_code, done.stderr) == (0, ""), done.output
    (example,) = json.loads(done.stdout)["examples"]
    before, after, both = (np.asarray(Image.open(example[part])) for part in ("before", "after", "side_by_side"))
    assert before.shape == after.shape == (384, 512, 3)
    assert both.shape[1] > 1024
    assert (before != after).any()


def test_the_evaluation_of_scenes_answers_with_a_table_and_files(picture, quick_default):
    done = call("eval", "--suite", "scenes", "--limit", "1", "-o", "out", "--device", "cpu")
    assert (done.exit_code, done.stderr) == (0, ""), done.output
    assert " default " in done.stdout and " goal " in done.stdout
    with open("out/evaluation.json", encoding="utf-8") as file:
        facts = json.load(file)
    assert facts["rows"]["goal"]["cells"]["goal_gain"]["per_image"] == pytest.approx(1)
    assert facts["rows"]["default"]["config"]["n_inference_step"] == 8
    with open("out/report.html", encoding="utf-8") as file:
        assert "000-bloom" in file.read()
