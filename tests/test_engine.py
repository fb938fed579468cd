"""The engine as users call it: results filled, sizes kept, sources reused, runs repeatable, cancel clean."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import ddengine
from ddengine import Cancelled, DirectDragConfig, Engine, InputError
from ddengine import engine as module
from ddengine.bench import scenes
from ddengine.result import EditResult
from ddengine.scenes.scene import true_drag

# Two drag steps of two updates, all of them whatever the weights do: every stage runs, in about a second.
QUICK = DirectDragConfig.preset(
    "default", n_inference_step=8, drag_end_step=2, track_per_step=2, max_drag_per_track=1, reach=0
)
DRAG = true_drag(np.random.default_rng(4))
PICTURE = DRAG.scene.render(128)
ARROW = tuple((x * 128, y * 128) for x, y in (DRAG.handle, DRAG.target))


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load()


@pytest.fixture(scope="module")
def result(engine) -> EditResult:
    return engine.edit(PICTURE, [ARROW], config=QUICK)


def test_result_is_filled(result):
    assert result.image.size == (128, 128) and result.image.mode == "RGB"
    assert len(result.handles) == 1 and all(0 <= c < 128 for c in result.handles[0])
    assert result.mask.shape == (128, 128) and result.mask.dtype == np.float32
    assert 0 <= result.mask.min() < 0.5 < result.mask.max() <= 1
    assert set(result.timings) == {
        "load", "encode", "invert", "reference", "warp", "drag", "denoise", "decode", "total"
    }  # fmt: skip
    parts = sum(seconds for stage, seconds in result.timings.items() if stage != "total")
    assert 0.8 * result.timings["total"] <= parts <= result.timings["total"]
    assert result.passes["invert"] == {"forward": 6, "backward": 0}
    assert result.passes["drag"]["backward"] == len(result.history) == 4
    assert {"drag_loss", "background_loss", "readout_loss", "total_loss", "handles"} <= set(result.history[0])
    cells = (np.array(result.history[0]["handles"][0]) - ARROW[0]) / 2  # the first tracking moves by whole cells
    assert cells == pytest.approx(np.rint(cells), abs=1e-3) and np.abs(cells).max() < 12.5
    assert set(result.backend) == {"encode", "invert", "reference", "warp", "drag", "denoise", "decode"}
    assert all(reason.startswith("eager") for reason in result.backend.values())


def test_the_edit_changes_the_picture_near_the_drag_and_nothing_far_away(engine):
    big = PICTURE.resize((700, 500), Image.Resampling.LANCZOS)
    scale = np.array([700, 500]) / 128
    arrow = tuple(tuple(np.array(p) * scale) for p in ARROW)
    out = engine.edit(big, [arrow], config=QUICK)
    assert out.image.size == (700, 500)
    same = (np.asarray(out.image) == np.asarray(big)).all(2)
    assert 0.02 < 1 - same.mean() < 0.9
    corners = [same[:20, :20], same[:20, -20:], same[-20:, :20], same[-20:, -20:]]
    assert any(corner.all() for corner in corners)


def test_a_prepared_source_gives_the_same_picture_for_less(engine, result):
    source = engine.prepare(PICTURE, config=QUICK)
    again = engine.edit(source, [ARROW], config=QUICK)
    assert again.image.tobytes() == result.image.tobytes()
    assert "invert" not in again.passes and again.timings["invert"] == 0
    other = engine.edit(source, [(ARROW[1], ARROW[0])], config=QUICK)
    assert other.image.tobytes() != result.image.tobytes()
    third = engine.edit(source, [ARROW], config=QUICK)
    assert third.image.tobytes() == result.image.tobytes()  # the edit between left no trace


def test_equal_seeds_give_equal_bytes_and_leave_torch_alone(engine, result):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    again = engine.edit(PICTURE, [ARROW], config=QUICK, seed=0)
    assert torch.equal(torch.rand(3), expected)
    assert again.image.tobytes() == result.image.tobytes()


@pytest.mark.parametrize("stage", ["encode", "invert", "reference", "warp", "drag", "denoise", "decode"])
def test_cancel_stops_at_once_and_leaves_the_engine_usable(engine, result, stage):
    seen = []

    def progress(at):
        seen.append(at)
        if at.stage == stage:
            raise Cancelled(f"stopped in {stage}")

    with pytest.raises(Cancelled, match=stage):
        engine.edit(PICTURE, [ARROW], config=QUICK, progress=progress)
    assert [at.stage for at in seen].count(stage) == 1  # not one step further
    assert engine.edit(PICTURE, [ARROW], config=QUICK).image.tobytes() == result.image.tobytes()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_callers_gradient_mode_does_not_matter(result, mode):
    with mode():
        engine = Engine.load()
        source = engine.prepare(PICTURE, config=QUICK)
        found = [engine.edit(given, [ARROW], config=QUICK).image.tobytes() for given in (PICTURE, source)]
        assert not torch.is_grad_enabled() and torch.is_inference_mode_enabled() == (mode is torch.inference_mode)
    assert found == [result.image.tobytes()] * 2


def test_the_picture_does_not_depend_on_the_memory_for_keys_and_values(engine, result):
    frugal = engine.edit(engine.prepare(PICTURE, config=QUICK, budget=0), [ARROW], config=QUICK)
    assert frugal.passes["denoise"]["forward"] > result.passes["denoise"]["forward"]
    assert frugal.image.tobytes() == result.image.tobytes()


def test_progress_speaks_of_input_pixels_and_shows_pictures(engine):
    picture = PICTURE.resize((400, 300))
    arrow = ((150, 140), (200, 160))
    seen = []
    out = engine.edit(picture, [arrow, ((300, 200), (320, 220))], config=QUICK, progress=seen.append)
    told = {at.stage: at for at in seen}
    assert told["invert"].points is told["invert"].preview is told["warp"].preview is None
    assert told["warp"].points.dtype == np.float64
    assert told["warp"].points == pytest.approx(np.array([(150, 140), (300, 200)]), abs=1e-3)
    assert told["decode"].points == pytest.approx(np.array(out.handles))
    for stage in ("drag", "denoise", "decode"):
        look = told[stage].preview()
        assert look.mode == "RGB" and look.size == (128, 96)
    # The last preview is the edit itself: like the picture, more so than noise.
    difference = np.asarray(look, float) - np.asarray(out.image.resize(look.size), float)
    assert np.abs(difference).mean() < 15


def test_progress_counts_every_stage_to_its_end(engine):
    seen = {}
    engine.edit(
        PICTURE, [ARROW], config=QUICK, progress=lambda at: seen.setdefault(at.stage, []).append((at.step, at.total))
    )
    assert list(seen) == ["encode", "invert", "reference", "warp", "drag", "denoise", "decode"]
    for stage, steps in seen.items():
        assert steps[-1][0] == steps[-1][1], stage
        assert [step for step, _ in steps] == sorted(step for step, _ in steps)


def test_threads_take_turns(engine, result):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(engine.edit(PICTURE, [ARROW], config=QUICK).image.tobytes()))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [result.image.tobytes()] * 2


@pytest.mark.parametrize("size", [(64, 64), (65, 131), (333, 97), (128, 512), (1000, 750)])
def test_any_size_comes_back_at_its_size(engine, size):
    picture = PICTURE.resize(size)
    width, height = size
    out = engine.edit(picture, [((width * 0.4, height * 0.5), (width * 0.6, height * 0.5))], config=QUICK)
    assert out.image.size == size and out.mask.shape == (height, width)
    assert all(-0.5 <= x <= width - 0.5 and -0.5 <= y <= height - 0.5 for x, y in out.handles)


def test_many_points_and_a_mask(engine):
    mask = np.zeros((128, 128), bool)
    mask[30:100, 30:100] = True
    drags = [((40 + 6 * k, 50), (42 + 6 * k, 60)) for k in range(8)]
    out = engine.edit(PICTURE, drags, mask=mask, config=QUICK)
    assert len(out.handles) == 8
    assert np.array_equal(out.mask > 0.5, mask)


def test_outside_a_mask_not_one_pixel_changes(engine):
    picture = PICTURE.resize((600, 402))
    mask = np.zeros((402, 600), np.uint8)
    mask[41:358, 33:551] = 255
    mask[:, ::16] = 0  # bars that a working pixel is too coarse for
    arrow = tuple((x * 600, y * 402) for x, y in (DRAG.handle, DRAG.target))
    before, after = (np.asarray(p) for p in (picture, engine.edit(picture, [arrow], mask=mask, config=QUICK).image))
    assert np.array_equal(after[mask == 0], before[mask == 0])
    assert not np.array_equal(after, before)


def test_a_thin_mask_does_not_vanish_and_an_empty_one_is_refused(engine):
    picture = PICTURE.resize((900, 600))
    thin = np.zeros((600, 900), np.uint8)
    thin[301:303] = 255  # less than half a working pixel
    out = engine.edit(picture, [((300, 301), (400, 302))], mask=thin, config=QUICK)
    assert out.mask.max() > 0.5
    for empty, value in ((np.zeros((600, 900), bool), "0.00"), (np.full((600, 900), 0.4), "0.40")):
        with pytest.raises(InputError, match=rf"nothing free .* value is {value}.*white"):
            engine.edit(picture, [((300, 301), (400, 302))], mask=empty, config=QUICK)


@pytest.mark.parametrize("resize", ["fit", "shrink"])
@pytest.mark.parametrize("size", [(100, 67), (300, 201)], ids=["below the model's size", "above"])
def test_the_working_size(engine, resize, size):
    """Fitting goes both ways and snaps to 8, shrinking only shrinks; the result has the input's size either way."""
    picture = PICTURE.resize(size)
    x, y = size
    arrow = ((x * 0.4, y * 0.5), (x * 0.6, y * 0.5))
    config = QUICK.changed(resize=resize, preserve=False)
    source = engine.prepare(picture, config=config)
    out = engine.edit(picture, [arrow], config=config)
    shrunk = size if x < 128 else (128, 86)
    assert source.spaces.work_size == ((128, 88) if resize == "fit" else shrunk)
    assert out.image.size == size
    assert engine.edit(picture, [arrow], config=config.changed(preserve=True)).image.size == size


@pytest.mark.parametrize("drag", scenes.held_out(2), ids=["first", "second"])
def test_the_default_moves_parts_of_scenes_it_has_not_seen(engine, drag):
    picture = drag.scene.render(scenes.SIZE)
    arrow = tuple((x * scenes.SIZE - 0.5, y * scenes.SIZE - 0.5) for x, y in (drag.handle, drag.target))
    edited, unedited = (scenes.score(drag, image) for image in (engine.edit(picture, [arrow]).image, picture))
    assert edited.goal_gain > 0.25
    assert edited.distance < unedited.distance


@pytest.mark.parametrize("preset", ["paper", "authors", "gooddrag", "fast", "preview"])
def test_every_preset_runs(engine, preset):
    changes = {
        "n_inference_step": 8,
        "drag_end_step": 1,
        "track_per_step": 1,
        "max_drag_per_track": 1,
        "amp_skip": "none",
    }
    config = DirectDragConfig.preset(preset, **changes)
    arrow = [((50, 60), (70, 70))]
    out = engine.edit(PICTURE, arrow, config=config)
    assert out.image.size == (128, 128)
    assert len(out.history) == 1


def test_refusals_name_the_remedy(engine):
    for arguments, options, message in [
        ((PICTURE, ARROW), {}, "list"),
        ((PICTURE, []), {}, "drag"),
        ((PICTURE, [((1, 1), (500, 1))]), {}, "500"),
        ((PICTURE, [ARROW]), {"method": "magic"}, "directdrag"),
        ((PICTURE, [ARROW]), {"config": "magic"}, "default"),
        ((PICTURE, [ARROW]), {"config": 3}, "DirectDragConfig"),
        ((PICTURE, [ARROW]), {"mask": np.ones((5, 5), bool)}, "5 x 5"),
        ((PICTURE, [ARROW]), {"progress": "yes"}, "callable"),
        ((3, [ARROW]), {}, "path"),
        *(((PICTURE, [ARROW]), {"seed": seed}, "seed is .*2\\*\\*63") for seed in (-1, 2**63, 1.0, True, None, "1")),
        ((PICTURE, [ARROW]), {"config": QUICK.changed(n_inference_step=1000, inversion_strength=1)}, "1000.*lower"),
    ]:
        with pytest.raises(InputError, match=message):
            engine.edit(*arguments, **options)
    with pytest.raises(ddengine.ModelError, match="text encoder"):
        engine.edit(PICTURE, [ARROW], prompt="a cat", config=QUICK)
    with pytest.raises(ddengine.BackendUnavailable, match="eager"):
        Engine.load(backend="tensorrt")


def test_a_source_is_refused_by_another_model_and_another_trajectory(engine):
    source = engine.prepare(PICTURE, config=QUICK)
    with pytest.raises(InputError, match="prepare"):
        engine.edit(replace(source, model="0" * 64), [ARROW], config=QUICK)
    with pytest.raises(InputError, match=r"on cpu in torch.float16, this engine computes on cpu in torch.float32"):
        engine.edit(replace(source, dtype=torch.float16), [ARROW], config=QUICK)
    with pytest.raises(InputError, match=r"on cuda:0 in torch.float32, this engine computes on cpu"):
        engine.edit(replace(source, device=torch.device("cuda:0")), [ARROW], config=QUICK)
    with pytest.raises(InputError, match="n_inference_step"):
        engine.edit(source, [ARROW], config=QUICK.changed(n_inference_step=9))


@pytest.fixture
def loads(monkeypatch):
    """The models that `ddengine.edit` loads, from an empty cache on."""
    loads = []
    load = module.load_model
    monkeypatch.setattr(module, "load_model", lambda *a, **k: loads.append(a[0]) or load(*a, **k))
    module._engine.cache_clear()
    yield loads
    module._engine.cache_clear()


def test_edit_function_loads_once(loads):
    seen = []
    first = ddengine.edit(PICTURE, [ARROW], config=QUICK, progress=seen.append)
    second = ddengine.edit(PICTURE, [ARROW], config=QUICK)
    assert loads == ["embedded"]
    assert first.image.tobytes() == second.image.tobytes()
    assert first.timings["load"] > second.timings["load"] >= 0
    assert [(at.stage, at.step, at.total) for at in seen][:2] == [("load", 1, 1), ("encode", 1, 1)]


def test_threads_and_spellings_of_a_folder_share_one_engine(loads, sd15, monkeypatch):
    monkeypatch.chdir(sd15.parent)
    found = []
    threads = [
        threading.Thread(target=lambda path=path: found.append(module._loaded(path, "auto", "cpu", "float32")))
        for path in (sd15, str(sd15), "sd15", "./sd15/")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len({id(engine) for engine in found}) == len(loads) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": Image.new("RGB", (1000, 100))}, "8:1"),
        ({"seed": -1}, "seed"),
        ({"progress": "yes"}, "callable"),
        ({"mask": np.zeros((128, 128), bool)}, "nothing free"),
        ({"drags": []}, "drag"),
        ({"config": "magic"}, "default"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_input_is_refused_before_anything_is_loaded(loads, changes, message):
    with pytest.raises(InputError, match=message):
        ddengine.edit(**{"image": PICTURE, "drags": [((20, 20), (50, 50))], **changes})
    assert not loads


@pytest.mark.gpu
def test_equal_seeds_give_equal_bytes_on_a_gpu():
    engine = Engine.load(device="cuda")
    torch.cuda.manual_seed(1)
    expected = torch.rand(3, device="cuda")
    torch.cuda.manual_seed(1)
    first, second = (engine.edit(PICTURE, [ARROW], config=QUICK).image.tobytes() for _ in range(2))
    assert first == second
    assert torch.equal(torch.rand(3, device="cuda"), expected)


def test_a_small_model_runs_on_one_thread_and_gives_the_others_back(engine):
    import torch

    before, seen = torch.get_num_threads(), set()
    torch.set_num_threads(2)
    try:
        engine.edit(PICTURE, [ARROW], config=QUICK, progress=lambda at: seen.add(torch.get_num_threads()))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == {1}
