"""The command line: what it asks the engine for, what it prints, how it fails; the engine is a stand-in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import ddengine
from ddengine.artifacts import save_picture
from ddengine.cli import main
from ddengine.drags import Drag
from ddengine.errors import BackendUnavailable, Cancelled, EngineMismatch, InputError, ModelError

DRAG = ["--drag", "10,20:30.5,40"]


class Result:
    def __init__(self, picture, drags):
        self.image = Image.eval(picture, lambda value: 255 - value)
        self.handles = tuple((drag.target[0] - 1, drag.target[1] - 1) for drag in drags)
        self.timings = {"load": 0.25, "total": 1.5}
        self.passes = {"invert": {"forward": 38, "backward": 0}}
        self.history = [{"step": 0, "loss": np.float32(0.5), "points": np.zeros((1, 2))}]
        self.backend = {"invert": "eager"}
        self.notes = ("no readout head",)

    def save(self, path):
        save_picture(self.image, path)


class Identity:
    def save(self, path):
        path.write_bytes(b"factors")


class Engine:
    """Records what it is asked; `raises` makes the edit fail."""

    loaded: dict = {}
    edited: dict = {}
    fitted: dict = {}
    raises: BaseException | None = None

    @classmethod
    def load(cls, **options):
        Engine.loaded = options
        return cls()

    def fit_identity(self, picture, **options):
        Engine.fitted = {"picture": picture, **options}
        return Identity()

    def edit(self, picture, drags, **options):
        Engine.edited = {"picture": picture, "drags": drags, **options}
        if Engine.raises:
            raise Engine.raises
        return Result(picture, drags)


@pytest.fixture(autouse=True)
def engine(monkeypatch):
    stand_in = types.ModuleType("ddengine.engine")
    stand_in.Engine = Engine
    stand_in.edit = lambda picture, drags, **options: Engine.load().edit(picture, drags, **options)
    monkeypatch.setitem(sys.modules, "ddengine.engine", stand_in)
    monkeypatch.setattr(Engine, "raises", None)
    monkeypatch.setattr(Engine, "loaded", {})
    monkeypatch.setattr(Engine, "edited", {})
    monkeypatch.setattr(Engine, "fitted", {})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (72, 96, 3), dtype=np.uint8)).save("in.png")
    Image.new("L", (96, 72), 255).save("mask.png")
    return tmp_path


def call(*arguments):
    return CliRunner().invoke(main, [*arguments])


def test_an_edit_writes_the_picture_and_says_where(folder):
    done = call("edit", "in.png", *DRAG, "-o", "out.png")
    assert (done.exit_code, done.stderr) == (0, "")
    assert "wrote out.png (96 x 72)" in done.stdout
    assert "1.4 pixels" in done.stdout
    assert "note: no readout head" in done.stdout
    expected = 255 - np.asarray(Image.open("in.png"))
    np.testing.assert_array_equal(np.asarray(Image.open("out.png")), expected)


def test_defaults_are_those_of_the_library(folder):
    call("edit", "in.png", *DRAG, "-o", "out.png")
    assert Engine.loaded == {
        "model": "embedded",
        "backend": "auto",
        "device": "auto",
        "dtype": "auto",
        "readout": None,
        "lora": None,
        "vae": None,
        "size": None,
        "build": False,
    }
    assert Engine.edited["drags"] == (Drag((10, 20), (30.5, 40)),)
    assert Engine.edited["config"] == ddengine.DirectDragConfig.preset()
    assert (Engine.edited["mask"], Engine.edited["prompt"], Engine.edited["seed"]) == (None, "", 0)
    assert not Engine.edited["progress"]  # stderr is no terminal here
    assert Engine.edited["identity"] is None and not Engine.fitted


def test_every_option_reaches_the_engine(folder):
    done = call(
        *(
            "edit",
            "in.png",
            *DRAG,
            "--drag",
            "50,60:40,60",
            "-o",
            "out.webp",
            "--mask",
            "mask.png",
            "--prompt",
            "a cat",
        ),
        *(
            "--model",
            "m",
            "--readout",
            "r.safetensors",
            "--lora",
            "l",
            "--vae",
            "v",
            "--size",
            "256",
            "--backend",
            "eager",
            "--seed",
            "7",
        ),
        *(
            "--device",
            "cpu",
            "--dtype",
            "float32",
            "--config",
            "paper",
            "--set",
            "r2=16",
            "--set",
            "soft_mask=off",
        ),
    )
    assert done.exit_code == 0, done.output
    assert {name: str(value) for name, value in Engine.loaded.items()} == {
        "model": "m",
        "backend": "eager",
        "device": "cpu",
        "dtype": "float32",
        "readout": "r.safetensors",
        "lora": "l",
        "vae": "v",
        "size": "256",
        "build": "False",
    }
    assert len(Engine.edited["drags"]) == 2
    assert Engine.edited["config"] == ddengine.DirectDragConfig.preset("paper", r2=16, soft_mask=False)
    assert (Engine.edited["prompt"], Engine.edited["seed"]) == ("a cat", 7)
    np.testing.assert_array_equal(Engine.edited["mask"], np.ones((72, 96), np.float32))


def test_an_identity_is_fitted_to_the_picture_used_and_saved(folder):
    options = ["--identity", "--prompt", "a cat", "--seed", "7", "--json"]
    done = call("edit", "in.png", *DRAG, "-o", "out.png", *options)
    assert done.exit_code == 0, done.output
    assert Engine.fitted.pop("picture").size == (96, 72)
    assert Engine.fitted == {"prompt": "a cat", "seed": 7, "progress": False}
    assert isinstance(Engine.edited["identity"], Identity)
    timings = json.loads(done.stdout)["timings"]
    assert timings["total"] == pytest.approx(1.25 + timings["load"] + timings["identity"])
    assert {path.name for path in folder.iterdir()} == {"in.png", "mask.png", "out.png"}
    Engine.raises = Cancelled("stopped")  # what was fitted is kept although the edit is not made
    done = call("edit", "in.png", *DRAG, "-o", "other.png", "--identity", "--save-identity", "i.safetensors")
    assert done.exit_code == 130 and (folder / "i.safetensors").read_bytes() == b"factors"


def test_json_is_one_object_and_all_there_is_on_stdout(folder):
    done = call("edit", "in.png", *DRAG, "-o", "out.png", "--json")
    answer = json.loads(done.stdout)
    assert answer["output"] == "out.png"
    assert answer["size"] == [96, 72]
    assert answer["drags"] == [
        {"handle": [10, 20], "target": [30.5, 40], "arrived": [29.5, 39], "distance": pytest.approx(2**0.5)}
    ]
    assert answer["timings"]["total"] == pytest.approx(1.25 + answer["timings"]["load"])  # 0.25 of its 1.5 are loading
    assert answer["passes"]["invert"]["forward"] == 38
    assert answer["history"][0]["points"] == [[0, 0]]
    assert answer["backend"] == {"invert": "eager"}
    assert answer["config"]["r2"] == 12


def test_quiet_says_nothing(folder):
    done = call("edit", "in.png", *DRAG, "-o", "out.png", "-q")
    assert (done.exit_code, done.output) == (0, "")


BAD = {
    "missing picture": (["edit", "no.png", *DRAG, "-o", "out.png"], "no file"),
    "not a picture": (["edit", "text.png", *DRAG, "-o", "out.png"], "not a picture"),
    "empty picture": (["edit", "empty.png", *DRAG, "-o", "out.png"], "zero bytes"),
    "point outside": (["edit", "in.png", "--drag", "10,20:96,40", "-o", "out.png"], "outside"),
    "nan": (["edit", "in.png", "--drag", "nan,20:30,40", "-o", "out.png"], "finite"),
    "infinite": (["edit", "in.png", "--drag", "10,20:inf,40", "-o", "out.png"], "finite"),
    "equal points": (["edit", "in.png", "--drag", "10,20:10,20", "-o", "out.png"], "same point"),
    "too many": (["edit", "in.png", *DRAG * 65, "-o", "out.png"], "limit is 64"),
    "too narrow": (["edit", "narrow.png", *DRAG, "-o", "out.png"], "limit is 8:1"),
    "mask size": (["edit", "in.png", *DRAG, "--mask", "small.png", "-o", "out.png"], "picture's size"),
    "mask all black": (["edit", "in.png", *DRAG, "--mask", "black.png", "-o", "out.png"], "nothing free"),
    "no such mask": (["edit", "in.png", *DRAG, "--mask", "no.png", "-o", "out.png"], "no file"),
    "unknown preset": (["edit", "in.png", *DRAG, "--config", "magic", "-o", "out.png"], "magic"),
    "unknown setting": (["edit", "in.png", *DRAG, "--set", "r9=1", "-o", "out.png"], "r9"),
    "bad value": (["edit", "in.png", *DRAG, "--set", "r2=many", "-o", "out.png"], "many"),
    "value too large": (
        ["edit", "in.png", *DRAG, "--set", "n_inference_step=100000", "-o", "out.png"],
        "100000",
    ),
    "unknown suffix": (["edit", "in.png", *DRAG, "-o", "out.xyz"], "suffix"),
    "no folder": (["edit", "in.png", *DRAG, "-o", "no/out.png"], "folder"),
    "output is a folder": (["edit", "in.png", *DRAG, "-o", "folder.png"], "folder"),
    "identity of another suffix": (
        ["edit", "in.png", *DRAG, "-o", "out.png", "--identity", "--save-identity", "i.bin"],
        ".safetensors",
    ),
    "no identity to save": (["edit", "in.png", *DRAG, "-o", "out.png", "--save-identity", "i.safetensors"], "add --id"),
    "output is the input": (["edit", "in.png", *DRAG, "-o", "in.png"], "input itself"),
    "output is the input by a link": (["edit", "in.png", *DRAG, "-o", "link.png"], "input itself"),
    "output is the mask": (["edit", "in.png", *DRAG, "--mask", "mask.png", "-o", "mask.png"], "input itself"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_exit_code_2_and_no_file(folder, name):
    (folder / "text.png").write_text("hello")
    (folder / "empty.png").touch()
    (folder / "folder.png").mkdir()
    (folder / "link.png").symlink_to(folder / "in.png")
    Image.new("L", (96, 71), 255).save("small.png")
    Image.new("L", (96, 72), 0).save("black.png")
    Image.new("RGB", (64 * 8 + 1, 64)).save("narrow.png")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    arguments, says = BAD[name]
    done = call(*arguments)
    assert done.exit_code == 2
    assert done.stdout == ""
    assert done.stderr.startswith("ddengine: ")
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert not Engine.loaded  # found before any weights are read
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    answer = json.loads(call(*arguments, "--json").stdout)
    assert says in answer["error"]["message"]
    assert answer["error"]["type"] == "InputError"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nonsense"], "nonsense"),
        (["edit"], "IMAGE"),
        (["edit", "in.png", "-o", "out.png"], "--drag"),
        (["edit", "in.png", *DRAG], "--output"),
        (["edit", "in.png", "--drag", "10,20", "-o", "out.png"], "for example 153,445:210,443"),
        (["edit", "in.png", "--drag", "10,20:30", "-o", "out.png"], "'10,20:30' is not X0,Y0:X1,Y1"),
        (["edit", "in.png", "--drag", "a,b:c,d", "-o", "out.png"], "'a,b:c,d' is not X0,Y0:X1,Y1"),
        (["edit", "in.png", *DRAG, "--set", "r2", "-o", "out.png"], "'r2' is not FIELD=VALUE"),
        (["edit", "in.png", *DRAG, "--method", "magic", "-o", "out.png"], "'directdrag'"),
        (["edit", "in.png", *DRAG, "--backend", "magic", "-o", "out.png"], "'eager'"),
        (["edit", "in.png", *DRAG, "--seed", "-1", "-o", "out.png"], "-1"),
        (["edit", "in.png", *DRAG, "--seed", str(2**63), "-o", "out.png"], str(2**63 - 1)),
        (["edit", "in.png", *DRAG, "--nonsense", "-o", "out.png"], "--nonsense"),
        (["train-embedded", "--minutes", "0", "1", "1"], "x>0"),
        (["train-readout", "--minutes", "0", "-o", "r.safetensors"], "x>0"),
    ],
)
def test_wrong_usage_is_one_line_exit_code_2_and_no_file(folder, arguments, says):
    done = call(*arguments)
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("ddengine: ")
    assert done.stderr.count("\n") == 1
    assert says in done.stderr and "--help" in done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["in.png", "mask.png"]
    answer = call(*arguments, "--json")
    assert answer.exit_code == 2
    assert says in json.loads(answer.stdout)["error"]["message"]


def test_no_arguments_show_the_help():
    done = call()
    assert done.exit_code == 2
    assert "train-embedded" in done.stderr


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("a\nb"), 2),
        (ModelError("no weights"), 2),
        (BackendUnavailable("no GPU"), 2),
        (EngineMismatch("other GPU"), 2),
        (Cancelled("enough"), 130),
        (KeyboardInterrupt(), 130),
    ],
)
def test_errors_of_the_engine_become_exit_codes_and_leave_no_file(folder, monkeypatch, error, code):
    monkeypatch.setattr(Engine, "raises", error)
    done = call("edit", "in.png", *DRAG, "-o", "out.png", "--json")
    assert done.exit_code == code
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
    expected = "Cancelled" if code == 130 else type(error).__name__
    assert json.loads(done.stdout)["error"]["type"] == expected
    assert not (folder / "out.png").exists()


def test_an_unexpected_error_is_not_called_bad_input(folder, monkeypatch):
    monkeypatch.setattr(Engine, "raises", RuntimeError("a defect"))
    done = call("edit", "in.png", *DRAG, "-o", "out.png")
    assert done.exit_code == 1
    assert isinstance(done.exception, RuntimeError)


def test_help_shows_examples_and_every_setting_and_preset():
    text = call("edit", "--help").stdout
    assert "ddengine edit cat.png --drag 153,445:210,443 -o out.png" in text
    from ddengine.config import PRESETS, RULES

    assert all(f"{name}=" in text for name in RULES)
    assert all(name in text for name in PRESETS)
    for command in main.commands:
        assert call(command, "--help").exit_code == 0


def test_demo_edits_the_examples_and_says_where(folder, monkeypatch):
    from ddengine import demo

    example = demo.Example("boat", Image.new("RGB", (128, 96), "white"), (Drag((30, 40), (90, 60)),))
    monkeypatch.setattr(demo, "examples", lambda: (example,))
    done = call("demo", "-o", "pictures", "--json")
    assert done.exit_code == 0, done.output
    (answer,) = json.loads(done.stdout)["examples"]
    assert answer["name"] == "boat"
    assert all(os.path.isfile(answer[part]) for part in ("before", "after", "side_by_side"))
    assert "pictures" in call("demo", "-o", "pictures").stdout


def test_info_names_versions_devices_and_backends():
    answer = json.loads(call("info", "--json").stdout)
    assert answer["ddengine"] == ddengine.__version__
    assert answer["packages"]["torch"]
    assert answer["devices"][0]["name"] == "cpu"
    assert answer["backends"]["eager"]["works"]
    assert all(state["works"] or state["why"] for state in answer["backends"].values())
    assert "eager" in call("info").stdout


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["no.pt", "out.safetensors"], "not found"),
        (["in.png", "out.safetensors"], "in.png"),
        (["in.png", "out.pt"], r".safetensors"),
        (["in.png", "no/out.safetensors"], "folder"),
    ],
)
def test_convert_readout_refuses(folder, arguments, says):
    done = call("convert-readout", *arguments)
    assert done.exit_code == 2
    assert says in done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["in.png", "mask.png"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train-readout", "-o", "r.pt"], r".safetensors"),
        (["train-readout", "-o", "no/r.safetensors"], "folder"),
        (["train-readout", "-o", "r.safetensors", "--model", "no"], "no such folder"),
        (["train-embedded", "-o", "in.png"], "folder"),
        (["train-embedded", "-o", "run", "--device", "magic"], "magic"),
    ],
)
def test_training_refuses(folder, arguments, says):
    done = call(*arguments)
    assert done.exit_code == 2
    assert says in done.stderr and done.stderr.count("\n") == 1
    assert sorted(path.name for path in folder.iterdir()) == ["in.png", "mask.png"]


def test_train_readout_writes_a_head_for_the_model(folder):
    options = ("--triplets", "2", "--minutes", "1e-6", "--device", "cpu")
    done = call("train-readout", "-o", "r.safetensors", *options, "--json")
    assert (done.exit_code, done.stderr) == (0, "")
    assert json.loads(done.stdout)["step"] == 1
    from ddengine.models.load import load_model

    assert load_model("embedded", device="cpu", readout="r.safetensors").readout is not None
    assert sorted(path.name for path in folder.iterdir()) == ["in.png", "mask.png", "r.safetensors"]


def test_convert_readout_reads_the_published_format(golden, folder):
    done = call("convert-readout", str(golden / "tiny-readout-appearance.pt"), "out.safetensors", "--json")
    assert done.exit_code == 0, done.output
    assert len(json.loads(done.stdout)["dims"]) == 12
    from safetensors.numpy import load_file

    ours, theirs = load_file("out.safetensors"), load_file(golden / "tiny-readout-appearance.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_python_m_ddengine_is_the_command():
    done = subprocess.run([sys.executable, "-m", "ddengine", "--version"], capture_output=True, text=True, check=True)
    assert ddengine.__version__ in done.stdout
