"""The editor with the real engine and no browser: what it shows, runs, saves and hands out."""

from __future__ import annotations

import os
import shlex
import threading
import time

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from ddengine.cli import main
from ddengine.config import DirectDragConfig
from ddengine.drags import Drag
from ddengine.engine import Engine
from ddengine.errors import InputError
from ddengine.ui import words
from ddengine.ui.editor import Described, Editor, arrived, file_name
from ddengine.ui.files import Files, sweep

FEW = {"n_inference_step": 8, "drag_end_step": 1, "track_per_step": 2, "max_drag_per_track": 1}
CONFIG = DirectDragConfig.preset("preview", **FEW)


@pytest.fixture(scope="module")
def editor():
    made = Editor(Engine.load(device="cpu"), Described(device="cpu"))
    yield made
    made.close()


@pytest.fixture
def session(editor, request):
    yield editor.shelf.session(request.node.name)
    editor.shelf.drop(request.node.name)


def finished(job):
    assert job.ended.wait(60) and job.error is None, job.error
    return job.result


def test_an_example_is_edited_twice_and_the_second_pays_less(editor, session, tmp_path, monkeypatch):
    editor.open_example(session, "cat")
    editor.example_arrows(session)
    assert session.arrows.drags == editor.examples["cat"].drags
    first = finished(editor.run(session, CONFIG))
    keep = Files(tmp_path / "kept", editor.shelf.holds)
    old = keep.write(session, first)
    assert first.saved == 0 and first.prepared > 0 and editor.shelf.held["sources"] == 1
    again = finished(editor.run(session, CONFIG.changed(r2=14)))
    assert again.prepared == 0 and again.saved > 0 and "prepared before" in words.outcome(again)
    assert "invert" not in again.result.passes
    (row,) = arrived(again)
    assert row["left"] >= 0 and np.isfinite(row["share"])

    # What the page hands out makes the same pixels.
    monkeypatch.chdir(tmp_path)
    paths = keep.write(session, again)
    with pytest.raises(InputError, match="another picture opened, as its edit ended"):
        keep.write(session, first)
    assert not old.result.exists() and paths.result.name == "cat-edit2.png"
    for path in (paths.base, paths.recipe):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    python, command, replay = editor.snippets(again)
    exec(compile(python, "snippet", "exec"), {})
    wanted = np.asarray(again.edited.image)
    np.testing.assert_array_equal(np.asarray(Image.open("cat-edit2.png")), wanted)
    np.testing.assert_array_equal(np.asarray(Image.open(paths.result)), wanted)
    for line in (command, replay):
        (tmp_path / "cat-edit2.png").unlink()
        done = CliRunner().invoke(main, shlex.split(line)[1:])
        assert done.exit_code == 0, done.output
        np.testing.assert_array_equal(np.asarray(Image.open("cat-edit2.png")), wanted, err_msg=line)
    for path, shown in zip(paths.shown, (again.base, again.edited), strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(path)), np.asarray(shown.shown))
    keep.drop(session.key)
    assert not paths.result.exists() and not list(keep.folder.iterdir())

    # And the result can be edited on.
    session.choose("cat-edit2.png")
    third = finished(editor.run(session, CONFIG))
    assert third.base is again.edited and third.edited.name == "cat-edit3.png" and third.prepared > 0


def test_a_model_that_reads_takes_a_prompt_and_another_one_ignores_it(editor, session, golden):
    editor.open_example(session, "cat")
    editor.example_arrows(session)
    assert not editor.takes_prompts() and editor.recipe(session, CONFIG, "a cat").prompt == ""
    reader = Editor(
        Engine.load(golden / "tiny-sd", device="cpu"), Described(model=str(golden / "tiny-sd"), device="cpu")
    )
    try:
        own = reader.shelf.session("own")
        reader.open_example(own, "cat")
        reader.example_arrows(own)
        with pytest.raises(InputError, match="half a surrogate"):
            reader.run(own, CONFIG, "a cat \ud83d")
        edits = [finished(reader.run(own, CONFIG, prompt)) for prompt in ("a cat", "a cat", "a dog")]
        assert [done.saved > 0 for done in edits] == [False, True, False]
        assert [done.recipe.prompt for done in edits] == ["a cat", "a cat", "a dog"]
        assert all(
            text in code
            for text, code in zip(('"a dog"', "--prompt 'a dog'"), reader.snippets(edits[2])[:2], strict=True)
        )
        first, _, other = (np.asarray(done.edited.image) for done in edits)
        assert (first != other).any()
        assert "tiny-sd model" in words.about(reader) and f">{golden}" not in words.about(reader)
    finally:
        reader.close()


def test_the_mask_shown_before_is_the_mask_of_the_edit(editor, session):
    editor.open_example(session, "hill")
    editor.example_arrows(session)
    plain, veiled = editor.shown(session), editor.shown(session, CONFIG)
    changed = (np.asarray(plain) != np.asarray(veiled)).any(-1)
    x, y = map(int, session.base.view.shown_at(session.arrows.drags[0].handle))
    assert changed[5, 5] and not changed[y - 2 : y + 3, x - 2 : x + 3].any()
    drags, picture = session.arrows.drags, session.base.image
    mask = editor.engine.soft_mask(picture, drags, config=CONFIG)
    result = finished(editor.run(session, CONFIG)).result
    np.testing.assert_array_equal(mask, result.mask)
    everything = editor.engine.soft_mask(picture, drags, config=CONFIG.changed(soft_mask=False))
    assert everything.min() == 1
    shown = session.base.shown
    near = editor.engine.soft_mask(shown, session.base.view.arrows(drags), config=CONFIG)
    reduced = np.asarray(Image.fromarray(near).resize(picture.size, Image.Resampling.BOX))
    assert np.abs(reduced - mask).max() < 0.05


def test_an_edit_is_cancelled_within_a_step_and_nothing_is_lost(editor, session):
    editor.open_example(session, "harbour")
    editor.example_arrows(session)
    before, steps, stopped = session.arrows, [], threading.Event()
    job = editor.run(session, DirectDragConfig.preset("default"))
    tell = job.tell

    def watched(at):
        steps.append(at)
        if at.stage == "drag" and not stopped.is_set():
            stopped.set()
            assert editor.cancel(session)
        tell(at)

    job.tell = watched
    assert job.ended.wait(60) and job.cancelled and job.result is None
    assert steps[-1].stage == "drag" and sum(at.stage == "drag" for at in steps) <= 2
    assert session.arrows == before and session.last is None and not editor.cancel(session)
    assert editor.shelf.held["sources"] == 1  # what was prepared stays
    assert editor.travelling(session, job) is not None


def test_a_page_runs_one_edit_at_a_time(editor, session):
    editor.open_example(session, "cat")
    editor.example_arrows(session)
    job = editor.run(session, DirectDragConfig.preset("default"))
    with pytest.raises(InputError, match="runs already"):
        editor.run(session, CONFIG)
    editor.open_example(session, "hill")  # opening another picture stops it
    assert job.ended.wait(60) and job.cancelled and session.last is None


def test_of_two_runs_at_once_one_is_refused(editor, session, monkeypatch):
    """Both look before either has queued its edit: only one may."""
    editor.open_example(session, "cat")
    editor.example_arrows(session)
    looked, recipe, jobs, refused = threading.Barrier(2, timeout=30), editor.recipe, [], []
    monkeypatch.setattr(editor, "recipe", lambda *given: (looked.wait(), recipe(*given))[1])

    def run():
        try:
            jobs.append(editor.run(session, CONFIG))
        except InputError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(jobs) == len(refused) == 1 and "runs already" in refused[0]
    assert session.job is jobs[0] and finished(jobs[0])


def test_a_run_that_another_picture_overtakes_is_refused(editor, session, monkeypatch):
    editor.open_example(session, "cat")
    editor.example_arrows(session)
    recipe = editor.recipe
    monkeypatch.setattr(editor, "recipe", lambda *given: (recipe(*given), editor.open_example(session, "hill"))[0])
    with pytest.raises(InputError, match="another picture was opened"):
        editor.run(session, CONFIG)
    assert session.job is None and session.base.name == "hill.png"


def test_a_run_of_a_page_that_is_left_meanwhile_is_stopped(editor, monkeypatch):
    session = editor.shelf.session("gone")
    editor.open_example(session, "cat")
    editor.example_arrows(session)
    recipe = editor.recipe
    monkeypatch.setattr(editor, "recipe", lambda *given: (recipe(*given), editor.shelf.drop("gone"))[0])
    job = editor.run(session, DirectDragConfig.preset("default"))
    assert job.ended.wait(60) and job.cancelled


def test_files_of_a_page_that_is_left_are_not_kept(editor, session, tmp_path, monkeypatch):
    editor.open_example(session, "cat")
    editor.example_arrows(session)
    done = finished(editor.run(session, CONFIG))
    keep = Files(tmp_path, editor.shelf.holds)
    editor.shelf.on_drop(lambda left: keep.drop(left.key))
    written = keep._written
    with monkeypatch.context() as patched:
        patched.setattr(keep, "_written", lambda *given: (written(*given), editor.shelf.drop(session.key))[0])
        with pytest.raises(InputError, match="the page was closed, or"):
            keep.write(session, done)
    again = editor.shelf.session(session.key)  # the same browser, a page anew
    with pytest.raises(InputError, match="the page was closed, or"):
        keep.write(session, done)
    assert list(tmp_path.iterdir()) == []
    again.last = done
    assert keep.write(again, done).result.exists()
    editor.shelf.drop(again.key)
    assert list(tmp_path.iterdir()) == []


def test_uploads_are_swept_once_nobody_writes_to_them(tmp_path):
    old, new, writing = (tmp_path / name for name in ("a/old.png", "b/new.png", "tmp123"))
    for path in (old, new, writing):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x")
    for path in (old, old.parent, new.parent):
        os.utime(path, (time.time() - 200,) * 2)
    sweep(tmp_path, 120)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "new.png", "tmp123"]
    os.utime(old.parent, (time.time() - 200,) * 2)
    sweep(tmp_path, 120)
    assert not old.parent.exists() and new.exists()
    sweep(tmp_path / "nowhere", 120)


def test_a_page_that_is_left_stops_its_edit(editor):
    session = editor.shelf.session("left")
    editor.open_example(session, "cat")
    editor.example_arrows(session)
    job = editor.run(session, DirectDragConfig.preset("default"))
    editor.shelf.drop("left")
    assert job.ended.wait(60) and job.cancelled
    assert all(key != "left" for key, _ in editor.shelf._sources)


def test_what_cannot_be_edited_is_said(editor, session, tmp_path):
    with pytest.raises(InputError, match="no picture is open"):
        editor.run(session, CONFIG)
    editor.open_example(session, "cat")
    with pytest.raises(InputError, match="there is no arrow yet"):
        editor.run(session, CONFIG)
    opened = session.base
    (tmp_path / "secret-folder").mkdir()
    path = tmp_path / "secret-folder" / "note.png"
    path.write_text("no picture")
    with pytest.raises(InputError, match=r"note\.png is not a picture") as refused:
        editor.open_file(session, str(path), "note.png")
    assert "secret-folder" not in str(refused.value) and session.base is opened
    Image.new("RGB", (64 * 9, 64)).save(path)
    with pytest.raises(InputError, match=r"8:1"):
        editor.open_file(session, str(path), "note.png")
    with pytest.raises(InputError, match="no example"):
        editor.open_example(session, "../cat")
    assert session.base is opened


def test_a_large_picture_is_shown_small_and_edited_in_its_own_pixels(editor, session, tmp_path):
    Image.effect_noise((3000, 2000), 40).convert("RGB").save(tmp_path / "large.jpg")
    editor.open_file(session, str(tmp_path / "large.jpg"), "large.jpg")
    assert editor.shown(session).size == (1024, 683)
    session.arrows = session.arrows.pull(session.base.view.picture_at((0.5, 0.5)), (1800, 900))
    assert session.arrows.drags == (Drag((1500, 1000), (1800, 900)),)
    assert editor.shown(session, CONFIG).size == (1024, 683)
    assert editor.recipe(session, CONFIG, "").image_size == (3000, 2000)


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("cat.jpg", "cat.jpg"),
        ("my cat.jpg", "my cat.jpg"),
        ("/etc/../x/a.png", "a.png"),
        ("C:\\pictures\\b.png", "b.png"),
        ('<img onerror="x">.png', "img onerror-x.png"),
        ("--help.png", "help.png"),
        ("", "picture"),
        ("a" * 300 + ".png", "a" * 60 + ".png"),
    ],
)
def test_a_files_name_is_made_safe(name, kept):
    assert file_name(name) == kept


def test_what_comes_from_outside_is_escaped(session, editor):
    assert "<b>" not in words.notice("<b>") and words.notice("") == ""
    editor.open_example(session, "cat")
    object.__setattr__(session.base, "name", "<script>")
    assert "<script>" not in words.hint(session)
    assert "embedded model" in words.about(editor)
