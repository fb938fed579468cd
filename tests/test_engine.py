"""The engine as users call it: results filled, sizes kept, sources reused, runs repeatable, cancel clean."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from PIL import Image

import ddengine
from ddengine import Cancelled, DirectDragConfig, Engine, InputError
from ddengine.result import EditResult
from ddengine.scenes.scene import true_drag

# Two drag steps of two updates: every stage runs, in about a second.
QUICK = DirectDragConfig.preset("default", n_inference_step=8, drag_end_step=2, track_per_step=2, max_drag_per_track=1)
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
    assert result.history[0]["handles"][0] == pytest.approx(ARROW[0], abs=1e-3)
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
    import torch

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
    ]:
        with pytest.raises(InputError, match=message):
            engine.edit(*arguments, **options)
    with pytest.raises(ddengine.ModelError, match="text encoder"):
        engine.edit(PICTURE, [ARROW], prompt="a cat", config=QUICK)
    with pytest.raises(ddengine.BackendUnavailable, match="eager"):
        Engine.load(backend="tensorrt")


def test_a_source_is_refused_by_another_model_and_another_trajectory(engine):
    from dataclasses import replace

    source = engine.prepare(PICTURE, config=QUICK)
    with pytest.raises(InputError, match="prepare"):
        engine.edit(replace(source, model="0" * 64), [ARROW], config=QUICK)
    with pytest.raises(InputError, match="n_inference_step"):
        engine.edit(source, [ARROW], config=QUICK.changed(n_inference_step=9))


def test_edit_function_loads_once(monkeypatch):
    from ddengine import engine as module

    loads = []
    load = module.load_model
    monkeypatch.setattr(module, "load_model", lambda *a, **k: loads.append(a) or load(*a, **k))
    module._engine.cache_clear()
    first = ddengine.edit(PICTURE, [ARROW], config=QUICK)
    second = ddengine.edit(PICTURE, [ARROW], config=QUICK)
    assert len(loads) == 1
    assert first.image.tobytes() == second.image.tobytes()
    assert first.timings["load"] > second.timings["load"] >= 0
