"""Recipes: what is written is read, what is wrong is refused, and all three forms make the same pixels."""

from __future__ import annotations

import base64
import contextlib
import copy
import json
import shlex
import struct
import zlib

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ddengine.cli import main
from ddengine.config import PRESETS, DirectDragConfig
from ddengine.drags import Drag
from ddengine.errors import InputError
from ddengine.recipe import (
    MAX_BYTES,
    Recipe,
    command_line,
    mask_png,
    nearest_preset,
    parse,
    picture_digest,
    python_call,
    read_recipe,
)

FEW = {"n_inference_step": 8, "drag_end_step": 1, "track_per_step": 2, "max_drag_per_track": 1}
SIZE = (96, 72)


def picture(seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*SIZE[::-1], 3), dtype=np.uint8))


def make(**changes):
    plain = {
        "image_size": SIZE,
        "image_sha256": picture_digest(picture()),
        "drags": (Drag((10, 20), (30.5, 40)),),
        "config": DirectDragConfig.preset("preview", **FEW),
    }
    return Recipe(**{**plain, **changes})


def half_mask():
    area = np.zeros(SIZE[::-1], dtype=np.float32)
    area[:, :48] = 1
    return area


points = st.tuples(st.floats(0, 95), st.floats(0, 71))
texts = st.text(max_size=30).filter(lambda text: "\0" not in text)


@given(
    drags=st.lists(st.tuples(points, points).filter(lambda d: d[0] != d[1]), min_size=1, max_size=5),
    preset=st.sampled_from(list(PRESETS)),
    sigma=st.floats(0.1, 1000),
    prompt=texts,
    seed=st.integers(0, 2**63 - 1),
    masked=st.booleans(),
    size=st.none() | st.integers(8, 4096),
    lora=st.none() | texts.filter(bool),
)
def test_what_is_written_is_read(drags, preset, sigma, prompt, seed, masked, size, lora):
    recipe = make(
        drags=tuple(Drag(*drag) for drag in drags),
        config=DirectDragConfig.preset(preset, soft_mask_sigma=sigma),
        prompt=prompt,
        seed=seed,
        mask=mask_png(half_mask()) if masked else None,
        size=size,
        lora=lora,
    )
    found = parse(recipe.to_json().encode())
    assert found == recipe
    assert found.to_json() == recipe.to_json()
    if masked:
        np.testing.assert_array_equal(found.area(), half_mask())


@given(drags=st.lists(st.tuples(points, points).filter(lambda d: d[0] != d[1]), min_size=1, max_size=3), prompt=texts)
def test_the_command_says_what_the_recipe_says(drags, prompt):
    """Read back by the options' own types: nothing is rounded, no quoting goes wrong."""
    config = DirectDragConfig.preset("fast", d=3.3)
    recipe = make(drags=tuple(Drag(*drag) for drag in drags), prompt=prompt, config=config)
    words = shlex.split(command_line(recipe, "-odd name's.png", "out.png"))
    edit = main.commands["edit"]
    with edit.make_context("edit", words[2:]) as context:
        given = context.params
    assert given["drags"] == recipe.drags and given["prompt"] == prompt
    assert str(given["image"]) == "-odd name's.png"
    assert DirectDragConfig.preset(given["preset"]).changed_from_strings(dict(given["settings"])) == config


@pytest.mark.parametrize("preset", PRESETS)
def test_the_nearest_preset_and_its_changes_are_the_configuration(preset):
    assert nearest_preset(DirectDragConfig.preset(preset)) == (preset, {})
    config = DirectDragConfig.preset(preset, d=1.25, preserve=False)
    name, changes = nearest_preset(config)
    assert DirectDragConfig.preset(name, **changes) == config and len(changes) <= 2


def wrong(change):
    """A recipe's text with one thing changed."""
    facts = json.loads(make().to_json())
    change(facts)
    return json.dumps(facts)


def put(*path):
    *way, last = path[:-1]

    def change(facts):
        for step in way:
            facts = facts[step]
        facts[last] = path[-1]

    return change


def a_header(width, height):
    """A PNG, in base64, of that size by what its header says; it holds no pixel."""
    facts = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = (facts, b"IDAT", b"IEND")
    chunks = (struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts)
    return base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(chunks)).decode()


NOT_A_MASK = base64.b64encode(b"\x89PNG no picture").decode()
WRONG_SIZE = base64.b64encode(mask_png(np.ones((4, 4), np.float32))).decode()
NOTHING_FREE = base64.b64encode(mask_png(np.zeros(SIZE[::-1], np.float32))).decode()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no JSON"),
        ("[" * 100_000, "no JSON"),
        ("[]", "no edit"),
        ('{"format": "x"}', "no edit"),
        ('{"format": "ddengine-edit", "format": "ddengine-edit"}', "twice"),
        (wrong(put("version", 2)), "reads version 1"),
        (wrong(put("version", True)), "reads version 1"),
        (wrong(put("version", 1.0)), "reads version 1"),
        (wrong(put("odd", 1)), "should not have, odd"),
        (wrong(lambda facts: facts.pop("seed")), "seed"),
        (wrong(put("config", "odd", 1)), "config lacks, or should not have, odd"),
        (wrong(lambda facts: facts["config"].pop("r2")), "r2"),
        (wrong(put("config", "r2", 999)), "r2 is 999; it must be a whole number 1 to 128"),
        (wrong(put("config", "r2", True)), "r2 is True"),
        (wrong(put("config", "d", float("nan"))), "NaN"),
        (wrong(put("drags", 0, "handle", [float("inf"), 1])), "Infinity"),
        (wrong(put("drags", 0, "handle", [0.125, 1])).replace("0.125", "1e999"), "finite"),
        (wrong(put("drags", 0, "handle", [10**400, 1])), "finite"),
        (wrong(put("drags", 0, "handle", [True, 1])), "drags is"),
        (wrong(put("drags", 0, "handle", [1, 2, 3])), "drags is"),
        (wrong(put("drags", 0, "handle", [96, 1])), "outside the picture of 96 x 72"),
        (wrong(put("drags", 0, "handle", [30.5, 40])), "same point"),
        (wrong(put("drags", [])), "no drags"),
        (wrong(lambda facts: facts.update(drags=facts["drags"] * 65)), "the limit is 64"),
        (wrong(put("drags", 0, "odd", 1)), "drags is"),
        (wrong(put("image", "sha256", "A" * 64)), "image is"),
        (wrong(put("image", "size", [1, 72])), "image is"),
        (wrong(put("image", "size", [64000, 64000])), "image is"),
        (wrong(put("image", "path", "/etc")), "image is"),
        (wrong(put("seed", -1)), "seed is -1, not a whole number from 0"),
        (wrong(put("seed", 1.5)), "seed is 1.5"),
        (wrong(put("prompt", "x" * 5000)), "at most 4096 letters"),
        (wrong(put("prompt", "a \ud800cat")), "half a surrogate pair (letter 3, '\\ud800')"),
        (wrong(put("model", "")), "model is ''"),
        (wrong(put("model", "a\0b")), "model is"),
        (wrong(put("method", "other")), "use one of directdrag"),
        (wrong(put("size", 0)), "size is 0"),
        (wrong(put("mask", 3)), "mask is 3"),
        (wrong(put("mask", "§")), "base64"),
        (wrong(put("mask", NOT_A_MASK)), "no PNG picture"),
        (wrong(put("mask", a_header(20_000, 20_000))), "far more pixels than the limit"),
        (wrong(put("mask", a_header(10_000, 10_000))), "the mask is 10000 x 10000 = 100000000 pixels, the limit is"),
        (wrong(put("mask", WRONG_SIZE)), "the mask is 4 x 4 pixels"),
        (wrong(put("mask", NOTHING_FREE)), "nothing free to change"),
    ],
)
def test_what_is_wrong_is_refused_and_named(text, said):
    with pytest.raises(InputError, match=r"cannot be replayed") as refused:
        parse(text, "edit.json")
    assert said in str(refused.value) and "edit.json" in str(refused.value) and ";" in str(refused.value)


def test_a_prompt_that_is_no_text_is_refused_before_it_is_written():
    assert make(prompt="a \U0001f408 cat").prompt  # beyond the first plane is no half
    with pytest.raises(InputError, match=r"half a surrogate pair .*remove it"):
        make(prompt="\udcff")


def test_a_file_too_large_or_missing_is_refused(tmp_path):
    with pytest.raises(InputError, match="bytes, the limit"):
        parse(b" " * (MAX_BYTES + 1))
    with pytest.raises(InputError, match="there is no file"):
        read_recipe(tmp_path / "edit.json")
    with pytest.raises(InputError, match=r"no \.json name"):
        make().save(tmp_path / "edit.png")


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(field=st.sampled_from(sorted(json.loads(make().to_json()))), value=anything)
def test_any_value_in_any_field_is_read_or_refused(field, value):
    facts = json.loads(make().to_json())
    facts[field] = copy.deepcopy(value)
    with contextlib.suppress(InputError):
        assert parse(json.dumps(facts)).to_json()


def test_another_picture_is_refused():
    recipe = make()
    recipe.check_picture(picture())
    with pytest.raises(InputError, match="made for another picture"):
        recipe.check_picture(picture(1))
    with pytest.raises(InputError, match="96 x 72 pixels, this one has 72 x 96"):
        recipe.check_picture(picture().transpose(Image.Transpose.ROTATE_90))


def test_a_mask_that_8_bits_do_not_hold_is_refused():
    with pytest.raises(InputError, match="multiples of 1/255"):
        mask_png(np.full((4, 4), 0.3, np.float32))


# The real thing


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture().save("in.png")
    picture(1).save("other.png")
    Image.fromarray((half_mask() * 255).astype(np.uint8)).save("mask.png")
    return tmp_path


def call(*arguments):
    return CliRunner().invoke(main, [*arguments])


def pixels(path):
    return np.asarray(Image.open(path))


def test_file_call_and_command_make_the_same_pixels(folder):
    few = [word for name, value in FEW.items() for word in ("--set", f"{name}={value}")]
    made = call(
        *("edit", "in.png", "--drag", "20,20:40,30.5", "--mask", "mask.png", "--config", "preview", *few),
        *("--seed", "7", "--device", "cpu", "--dtype", "float32", "-o", "first.png", "--save-recipe", "edit.json"),
    )
    assert (made.exit_code, made.stderr) == (0, "")
    recipe = read_recipe("edit.json")
    assert (recipe.seed, recipe.device, recipe.drags) == (7, "cpu", (Drag((20, 20), (40, 30.5)),))

    replayed = call("edit", "in.png", "--from", "edit.json", "-o", "replayed.png", "--save-recipe", "again.json")
    assert (replayed.exit_code, replayed.stderr) == (0, "")
    assert (folder / "again.json").read_bytes() == (folder / "edit.json").read_bytes()
    exec(compile(python_call(recipe, "in.png", "called.png"), "snippet", "exec"), {})
    commanded = call(*shlex.split(command_line(recipe, "in.png", "commanded.png"))[1:])
    assert commanded.exit_code == 0, commanded.output
    for name in ("replayed", "called", "commanded"):
        np.testing.assert_array_equal(pixels(f"{name}.png"), pixels("first.png"), err_msg=name)
    assert (pixels("first.png") != pixels("in.png")).any()


def test_a_working_size_needs_an_engine_and_makes_the_same_pixels(folder):
    recipe = make(size=64, device="cpu")
    recipe.save("edit.json")
    code = python_call(recipe, "in.png", "called.png")
    assert "Engine.load(size=64" in code
    exec(compile(code, "snippet", "exec"), {})
    assert call("edit", "in.png", "--from", "edit.json", "-o", "replayed.png").exit_code == 0
    np.testing.assert_array_equal(pixels("replayed.png"), pixels("called.png"))


def test_a_prepared_picture_replays_its_own_edits_alone(folder):
    make(config=DirectDragConfig.preset("preview")).save("edit.json")
    for name in ("in", "other"):
        assert call("prepare", f"{name}.png", "-o", f"{name}.safetensors", "--config", "preview").exit_code == 0
    done = call("edit", "other.safetensors", "--from", "edit.json", "-o", "out.png")
    assert done.exit_code == 2 and "made for another picture" in done.stderr
    assert not (folder / "out.png").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seed", "0"], "--seed cannot be given beside --from"),
        (["--drag", "1,1:2,2", "--set", "r2=4"], "--drag, --set cannot be given beside --from"),
        (["--config", "fast"], "--config cannot"),
        (["--prompt", "a cat"], "--prompt cannot"),
        (["--mask", "mask.png"], "--mask cannot"),
        (["--identity"], "--identity cannot"),
        (["--save-recipe", "new.png"], "no .json name"),
        (["--save-recipe", "edit.json"], "edit.json is the input itself"),
        (["--model", "nowhere/at-all"], "nowhere/at-all"),  # counts in place of the file's own
        (["--backend", "onnxruntime"], "build"),
    ],
)
def test_what_cannot_go_with_a_file_is_refused_before_anything_is_written(folder, words, said, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    make().save("edit.json")
    before = sorted(path.name for path in folder.iterdir())
    done = call("edit", "in.png", "--from", "edit.json", "-o", "out.png", *words)
    assert done.exit_code == 2, done.output
    assert said in done.stderr
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_drag_or_a_file_is_needed_and_an_identity_cannot_be_saved(folder):
    done = call("edit", "in.png", "-o", "out.png")
    assert done.exit_code == 2 and "add --drag X0,Y0:X1,Y1, or --from" in done.stderr
    done = call(*["edit", "in.png", "--drag", "1,1:9,9", "-o", "out.png", "--identity", "--save-recipe", "e.json"])
    assert done.exit_code == 2 and "--save-identity FILE.safetensors and edit with --lora" in done.stderr
