"""A prepared source: kept in files and pickles to the last bit, changed by nothing, refused when anything is wrong."""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
import shutil
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import ImageCms
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ddengine import Cancelled, DirectDragConfig, Engine, InputError, Source
from ddengine import engine as engine_module
from ddengine.cli import main
from ddengine.models.embedded import embedded_folder
from ddengine.scenes.scene import true_drag
from ddengine.source_header import ENTRY
from ddengine.source_reader import loads, read_header
from ddengine.source_writer import dumps

# Two drag steps of two updates: every stage runs, in about a second.
QUICK = DirectDragConfig.preset(
    "default", n_inference_step=8, drag_end_step=2, track_per_step=2, max_drag_per_track=1, reach=0
)
DRAG = true_drag(np.random.default_rng(4))
PICTURE = DRAG.scene.render(128).crop((0, 0, 128, 101))
PICTURE.info["icc_profile"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
ARROW = ((40.0, 50.5), (60.0, 48.0))


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load(device="cpu")


@pytest.fixture(scope="module")
def source(engine) -> Source:
    return engine.prepare(PICTURE, config=QUICK)


@pytest.fixture(scope="module")
def pixels(engine, source) -> bytes:
    return engine.edit(source, [ARROW]).image.tobytes()


@pytest.fixture(scope="module")
def original(source, tmp_path_factory) -> Path:
    return source.save(tmp_path_factory.mktemp("source") / "picture.safetensors")


@pytest.fixture
def saved(original, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copyfile(original, tmp_path / "picture.safetensors"))


def checksums(source: Source) -> list[tuple[Any, ...]]:
    return [
        (
            t.dtype,
            t.device,
            tuple(t.shape),
            t.stride(),
            hashlib.sha256(t.contiguous().view(torch.uint8).numpy()).digest(),
        )
        for t in source._tensors()
    ]


# Kept


@pytest.mark.parametrize("way", ["file", "pickle", "deepcopy"])
def test_what_comes_back_is_equal_to_the_last_bit(engine, source, pixels, original, way):
    with torch.inference_mode():  # the caller's mode must not reach the tensors
        again = {
            "file": lambda: Source.load(original),
            "pickle": lambda: pickle.loads(pickle.dumps(source)),
            "deepcopy": lambda: copy.deepcopy(source),
        }[way]()
    assert again is not source and not any(tensor.is_inference() for tensor in again._tensors())
    assert checksums(again) == checksums(source)
    assert again.image.tobytes() == PICTURE.tobytes() and again.image.info == source.image.info != {}
    assert again.prepared.inverted is again.prepared.reference.latents[0]
    for name in ("spaces", "model", "prompt", "device", "dtype", "timings", "passes"):
        assert getattr(again, name) == getattr(source, name)
    assert again.prepared.config == QUICK and again.prepared.times == source.prepared.times
    assert engine.edit(again, [ARROW]).image.tobytes() == pixels
    assert dumps(again) == dumps(source) == original.read_bytes()


def test_a_file_lends_no_memory_to_what_was_read_from_it(engine, pixels, saved):
    again = Source.load(saved)
    with open(saved, "r+b") as file:  # in place: a mapped file would change under the tensors
        file.write(bytes(saved.stat().st_size))
    assert engine.edit(again, [ARROW]).image.tobytes() == pixels


def test_any_safetensors_reader_finds_the_tensors(source, original):
    found = load_file(original)
    assert torch.equal(found["latent.6"], source.prepared.reference.latents[-1])
    assert np.array_equal(found["picture"].numpy(), np.asarray(PICTURE))
    assert torch.equal(found["value.5.3"], source.prepared.reference.kv[5][3][1])


def test_keys_and_values_left_out_are_made_again(engine, source, pixels, original, tmp_path):
    light = source.save(tmp_path / "light.safetensors", kv=False)
    again = Source.load(light)
    assert again.prepared.reference.kv is None and again.prepared.reference.kv_place == "recompute"
    assert 4 * light.stat().st_size < original.stat().st_size
    result = engine.edit(again, [ARROW])
    assert result.image.tobytes() == pixels
    # The end of no edit is at hand: what `preserve` needs costs no pass of its own.
    assert result.passes["denoise"]["forward"] == engine.edit(source, [ARROW]).passes["denoise"]["forward"] + 4
    for where in (partial(Source.load, original), partial(engine.prepare, PICTURE, config=QUICK)):
        assert where(budget=0).prepared.reference.kv is None
        with pytest.raises(InputError, match=r"budget is -1.*None"):
            where(budget=-1)


@pytest.mark.parametrize("config", [QUICK.changed(mutual_attention=False), QUICK.changed(drag_end_step=0)])
def test_other_trajectories_come_back_too(engine, config):
    """Without mutual attention the end alone is recorded, for `preserve`; without drag steps there are no features."""
    source = engine.prepare(PICTURE, config=config)
    again = loads(dumps(source))
    assert checksums(again) == checksums(source)
    results = [engine.edit(which, [ARROW]) for which in (source, again)]
    assert results[0].image.tobytes() == results[1].image.tobytes()
    if not config.mutual_attention:
        assert source.prepared.reference.kv is None and source.passes["reference"]["forward"] == 6
        assert results[0].passes["denoise"]["forward"] == 4  # no second row


def test_half_precision_and_channels_last_maps_stay_as_they_are(source):
    reference = source.prepared.reference
    half = replace(
        reference,
        features=tuple(f.bfloat16().contiguous(memory_format=torch.channels_last) for f in reference.features),
        appearance=tuple(a.bfloat16() for a in reference.appearance),
        kv=tuple(tuple((k.bfloat16(), v.bfloat16()) for k, v in row) for row in reference.kv),
    )
    half = replace(source, dtype=torch.bfloat16, prepared=replace(source.prepared, reference=half))
    assert not half.prepared.reference.features[0].is_contiguous()
    assert checksums(loads(dumps(half))) == checksums(half)


def test_bytes_by_place(source):
    reference = source.prepared.reference
    kv = sum(t.nbytes for row in reference.kv for pair in row for t in pair)
    rest = sum(t.nbytes for t in (source.prepared.encoded, *reference.latents, *reference.features))
    appearance = sum(t.nbytes for t in reference.appearance)
    assert source.nbytes == (kv + rest + appearance, 128 * 101 * 3, kv + rest + appearance + 128 * 101 * 3)
    elsewhere = replace(source, device=torch.device("cuda:0"))  # as if all lay in the host's memory
    assert elsewhere.nbytes.device == 0 and elsewhere.nbytes.host == elsewhere.nbytes.total == source.nbytes.total


# Changed by nothing


def test_no_edit_changes_a_source(engine, source):
    def stop(at):
        if at.stage == "drag" and at.step == 2:
            raise Cancelled("enough")

    before = checksums(source)
    mask = np.zeros((101, 128), bool)
    mask[30:80] = True
    authors = DirectDragConfig.preset("authors", **{
        name: getattr(QUICK, name) for name in ("n_inference_step", "drag_end_step", "track_per_step", "resize",
                                                "rg_grid", "rg_reference", "max_drag_per_track")
    })  # fmt: skip
    for config, options in (
        (QUICK, {}),
        (QUICK.changed(mutual_attention=False, preserve=False, latent_warpage=False), {}),
        (QUICK.changed(soft_mask=False, readout_guidance=False, drag_end_step=1, ms_reference="current"), {}),
        (QUICK, {"mask": mask}),
        (authors, {}),
    ):
        engine.edit(source, [ARROW, ((70, 20), (75, 30))], config=config, **options)
    with pytest.raises(Cancelled):
        engine.edit(source, [ARROW], progress=stop)
    assert checksums(source) == before


# Refused


def test_it_belongs_to_one_model_place_format_prompt_and_trajectory(engine, source, saved):
    def reloaded(**changes):
        return Source.load(replace(source, **changes).save(saved))

    for changes, options, message in (
        ({"model": "0" * 64}, {}, "with model 000000000000, this engine holds .*prepare the picture"),
        ({"prompt": "a cat"}, {"prompt": "a dog"}, "with prompt 'a cat'"),
        ({"prepared": replace(source.prepared, times=tuple(t + 1 for t in source.prepared.times))}, {}, "schedule"),
        ({}, {"config": QUICK.changed(n_inference_step=9)}, "n_inference_step"),
    ):
        with pytest.raises(InputError, match=message):
            engine.edit(reloaded(**changes), [ARROW], **options)


def test_it_can_be_loaded_where_it_was_not_prepared(engine, source, pixels, saved):
    """Prepared on a GPU that is not here."""
    replace(source, device=torch.device("cuda:7")).save(saved)
    with pytest.raises(InputError, match=r"prepared on 'cuda:7', which is not here; load it with device='cpu'"):
        Source.load(saved)
    assert engine.edit(Source.load(saved, device="cpu"), [ARROW]).image.tobytes() == pixels


def test_values_that_are_not_finite_are_neither_saved_nor_loaded(source, saved):
    before = saved.read_bytes()
    bad = source.prepared.encoded.clone()
    bad[0, 0, 0, 0] = torch.nan
    with pytest.raises(InputError, match=r"encoded holds values that are not finite.*float32"):
        replace(source, prepared=replace(source.prepared, encoded=bad)).save(saved)
    assert saved.read_bytes() == before and [path.name for path in saved.parent.glob("*.*")] == [saved.name]
    for name in ("latent.3", "value.5.0", "feature.1"):
        saved.write_bytes(before)
        with pytest.raises(InputError, match=r"not finite; prepare"):
            Source.load(alter(saved, tensors={name: lambda t: torch.full_like(t, torch.inf)}))


def alter(path: Path, header: dict[str, Any] | None = None, tensors: dict[str, Any] | None = None) -> Path:
    """Change a saved source as anyone could, with the safetensors library; a function changes what is there."""
    held = load_file(path)
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()[ENTRY])
    for where, changes in ((facts, header or {}), (held, tensors or {})):
        for name, value in changes.items():
            if value is None:
                del where[name]
            else:
                where[name] = value(where[name]) if callable(value) else value
    save_file({name: tensor.contiguous() for name, tensor in held.items()}, path, {ENTRY: json.dumps(facts)})
    return path


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"format": 2}, "its format is 2, this version of ddengine reads format 1"),
        ({"format": None}, "format is None"),
        ({"prompt": None}, "lacks, or should not have, prompt"),
        ({"secret": 1}, "should not have, secret"),
        ({"image_size": [128, 10**9]}, r"image_size is \[128, 1000000000\], not .*at most 64000000 pixels"),
        ({"image_size": [128, 102]}, r"picture is uint8 \[101, 128, 3\], expected uint8 \[102, 128, 3\]"),
        ({"image_size": [1280, 64]}, "8:1"),
        ({"work_size": [128, 64]}, r"working size is \(128, 64\), that of its .* \(128, 104\)"),
        ({"config": []}, "config is .*not an object"),
        ({"config": lambda config: {**config, "r2": 1e9}}, "r2 is 1000000000.0; it must be"),
        ({"config": lambda config: {**config, "colour": "red"}}, "another version, lacks or should not have colour"),
        ({"config": lambda config: {**config, "n_inference_step": 20}}, "times are 6 from .*expected 15"),
        ({"config": lambda config: {**config, "drag_end_step": 3}}, "lacks the tensor feature.2"),
        ({"times": lambda times: [*times[:-1], times[-1] - 1]}, "apart"),
        ({"times": [5, -1]}, "times is .*not a list of whole numbers from 0"),
        ({"times": []}, "times are 0 from None, expected 6"),
        ({"spacing": True}, "spacing is True"),
        ({"model": "../../weights"}, "not a digest of 64"),
        ({"dtype": "float8"}, "dtype is 'float8', not one of float16"),
        ({"dtype": "float16"}, r"feature.0 is float32 .*expected float16"),
        ({"device": 3}, "device is 3"),
        ({"device": "moon"}, "prepared on 'moon'"),
        ({"device": "meta"}, "prepared on 'meta'"),
        ({"guided": False}, "tensors that no source has: appearance.0"),
        ({"followed": 5}, "follows 5 of 6 steps"),
        ({"followed": 7}, "follows 7 of 6 steps"),
        ({"layers": 3}, "no source has: key.0.3"),
        ({"layers": 10**9}, "lacks the tensor key.0.4"),
        ({"channels_last": ["picture", "moon"]}, "no source has: .*moon"),
        ({"timings": {"invert": float("nan")}}, "timings is .*not seconds"),
        ({"passes": {"invert": 6}}, "passes is .*not counts"),
    ],
    ids=str,
)  # fmt: skip
def test_a_header_is_not_trusted(saved, header, message):
    with pytest.raises(InputError, match=message):
        Source.load(alter(saved, header))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"encoded": None}, "lacks the tensor encoded"),
        ({"extra": torch.zeros(1)}, "holds tensors that no source has: extra"),
        ({"encoded": torch.double}, "expected float32"),
        ({"latent.6": lambda t: t[..., :-1]}, r"latent.6 is float32 .1, 4, 13, 15., expected float32 .1, 4, 13, 16."),
        ({"feature.1": lambda t: t[:, :-1]}, r"feature.1 is float32 \[1, 95, 13, 16\], expected float32 \[1, 96, "),
        ({"appearance.0": lambda t: t.transpose(2, 3)}, "appearance.0 is"),
        ({"picture": lambda t: t[..., :1]}, "picture is uint8"),
        ({"key.3.1": lambda t: t[:, 1:]}, r"key.3.1 is"),
        ({"value.0.0": lambda t: t[..., 1:]}, r"value.0.0 is"),
        ({"icc_profile": lambda t: t[20:]}, "no profile of RGB"),
        ({f"{part}.{step}.0": lambda t: t[:, :9] for step in range(6) for part in ("key", "value")}, "has 9 tokens"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_tensors_are_not_trusted(saved, tensors, message):
    if tensors.get("encoded") is torch.double:
        tensors = {"encoded": lambda t: t.double()}
    with pytest.raises(InputError, match=message):
        Source.load(alter(saved, None, tensors))


def test_what_is_no_source_is_refused(saved, tmp_path):
    weights = embedded_folder() / "readout.safetensors"
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "folder.safetensors").mkdir()
    torch.save({"encoded": torch.zeros(1)}, tmp_path / "pickle.safetensors")
    torch.save({"encoded": torch.zeros(1)}, tmp_path / "pickle.pt")
    for path, message in (
        (tmp_path / "none.safetensors", "there is no file"),
        (tmp_path / "folder.safetensors", "there is no file"),
        (tmp_path / "empty.safetensors", "damaged or incomplete"),
        (tmp_path / "pickle.safetensors", "damaged or incomplete"),
        (tmp_path / "pickle.pt", r"no prepared source; its name would end in .safetensors"),
        (weights, "a safetensors file but no prepared source; prepare the picture"),
    ):
        for reading in (Source.load, read_header):
            with pytest.raises(InputError, match=message):
                reading(path)
    for wrong, message in ((tmp_path / "x.pt", ".safetensors"), (tmp_path / "no" / "x.safetensors", "no folder")):
        with pytest.raises(InputError, match=message):
            Source.load(saved).save(wrong)


@pytest.fixture(scope="module")
def small(engine, source) -> bytes:
    """The bytes of a source of few tensors."""
    light = replace(
        source.prepared.reference, kv=None, features=(), appearance=None, latents=source.prepared.reference.latents[:2]
    )
    config = QUICK.changed(drag_end_step=0)
    return dumps(replace(source, prepared=replace(source.prepared, reference=light, config=config)))


@given(data=st.data())
def test_damage_is_an_input_error_or_goes_unseen_in_values(small, tmp_path_factory, data):
    """Whatever is cut off or overwritten: never another error, and never a source of other shapes."""
    whole = loads(small)
    if data.draw(st.booleans()):
        damaged = small[: data.draw(st.integers(0, len(small) - 1))]
    else:
        head = 8 + int.from_bytes(small[:8], "little")
        # Mostly in the header, where every byte means something.
        at = data.draw(st.integers(0, head - 1) | st.integers(0, len(small) - 1))
        damaged = small[:at] + data.draw(st.binary(min_size=1, max_size=3)) + small[at + 1 :]
    path = tmp_path_factory.mktemp("damaged") / "damaged.safetensors"
    path.write_bytes(damaged)
    for reading in (lambda: loads(damaged), lambda: Source.load(path)):
        with suppress(InputError):  # and no other
            assert [t.shape for t in reading()._tensors()] == [t.shape for t in whole._tensors()]


# From the command line

OPTIONS = [f"--set={name}={getattr(QUICK, name)}" for name in ("n_inference_step", "drag_end_step", "track_per_step")]


def call(*arguments: str) -> Any:
    done = CliRunner().invoke(main, [*arguments, "--device", "cpu", "--json"])
    return done, json.loads(done.stdout)


def test_a_picture_prepared_and_edited_by_two_commands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    PICTURE.save("in.png", icc_profile=PICTURE.info["icc_profile"])
    drag = ["--drag", "40,50.5:60,48"]
    done, made = call("prepare", "in.png", "-o", "in.safetensors", "--config", "preview", *OPTIONS)
    assert done.exit_code == 0 and made["passes"]["invert"] == {"forward": 6, "backward": 0}
    assert made["bytes"]["file"] == Path("in.safetensors").stat().st_size and made["size"] == [128, 101]
    done, edited = call("edit", "in.safetensors", *drag, "-o", "a.png")  # with the settings it was prepared with
    assert done.exit_code == 0 and edited["config"] == made["config"] and "invert" not in edited["passes"]
    done, direct = call("edit", "in.png", *drag, "-o", "b.png", "--config", "preview", *OPTIONS)
    assert done.exit_code == 0 and direct["passes"]["invert"]["forward"] == 6
    assert Path("a.png").read_bytes() == Path("b.png").read_bytes()

    monkeypatch.setattr(engine_module, "load_model", pytest.fail)  # what follows is found before weights are read
    Path("cut.safetensors").write_bytes(Path("in.safetensors").read_bytes()[:-1])
    for arguments, message in (
        (["edit", "in.safetensors", "--drag", "40,50:60,101", "-o", "c.png"], "outside the picture of 128 x 101"),
        (["edit", "in.safetensors", *drag, "-o", "c.png", "--identity"], "--identity"),
        (["edit", "cut.safetensors", *drag, "-o", "c.png"], "damaged or incomplete"),
        (["edit", "in.safetensors", *drag, "-o", "in.safetensors"], "the input itself"),
        (["prepare", "in.png", "-o", "out.pt"], ".safetensors"),
        (["prepare", "in.safetensors", "-o", "out.safetensors"], "picture"),
    ):
        done, answer = call(*arguments)
        assert done.exit_code == 2 and answer["error"]["type"] == "InputError" and message in answer["error"]["message"]
    assert not Path("c.png").exists()


@pytest.mark.gpu
def test_places_on_a_gpu_do_not_show_in_the_picture(tmp_path):
    """On the device, in pinned memory or made again, prepared here or read from a file."""
    engine = Engine.load(device="cuda")
    near, far, none = (engine.prepare(PICTURE, config=QUICK, budget=budget) for budget in (None, 1, 0))
    assert [s.prepared.reference.kv_place for s in (near, far, none)] == ["device", "host", "recompute"]
    assert all(tensor.is_pinned() for row in far.prepared.reference.kv for pair in row for tensor in pair)
    assert far.nbytes.host > far.nbytes.device > 0 and near.nbytes.host == 128 * 101 * 3
    path = near.save(tmp_path / "picture.safetensors")
    assert far.save(tmp_path / "far.safetensors").read_bytes()[-100:] == path.read_bytes()[-100:]
    loaded = [Source.load(path, device="cuda", budget=budget) for budget in (None, 1, 0)]
    assert [s.prepared.reference.kv_place for s in loaded] == ["device", "host", "recompute"]
    assert len({engine.edit(s, [ARROW]).image.tobytes() for s in (near, far, none, *loaded)}) == 1
