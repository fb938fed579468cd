"""Other editors beside this one, shown on toy peers: turns, ratios, CUDA that is not there, and peers that fail."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ddengine.bench.peers import random_weights
from ddengine.bench.peers.child import plain
from ddengine.bench.peers.order import REACH, Order, derived_mask, spread
from ddengine.bench.peers.rows import System
from ddengine.bench.peers.run import ADAPTERS, known, make_systems, run
from ddengine.bench.peers.stand_ins import StandIn
from ddengine.bench.peers.view import contact_sheet, markdown, needs, text
from ddengine.cli import main
from ddengine.drags import Drag
from ddengine.errors import InputError

ROOT = Path(__file__).resolve().parents[2]

# A peer that knows one machine: CUDA, half precision, a page in the browser, a library that nobody else has.
CODE = """
import torch
import gradio
import peculiar_page as page
from peculiar_page.parts import Slider
from pytorch_lightning import seed_everything

def show(image, progress=gradio.Progress()):
    page.launch()

class Editor:
    def __init__(self):
        seed_everything(42)
        self.net = torch.nn.Conv2d(3, 3, 1).cuda().to("cuda:0", dtype=torch.float16)

    @classmethod
    def open(cls, folder):
        assert (folder / "unet").is_dir()
        return cls()

    def invert(self, image):
        assert torch.zeros(1, device="cuda").dtype == torch.empty(1).dtype
        return self.net(image.half().cuda()).detach()

    def drag(self, latent, count):
        latent.requires_grad_(True)
        optimiser = torch.optim.Adam([latent], lr=0.1)
        for _ in range(count):
            optimiser.zero_grad()
            self.net(latent).square().sum().backward()
            optimiser.step()
        torch.cuda.empty_cache()

    def edit(self, image, mask, count):
        latent = self.invert(torch.from_numpy(image / 255.0).permute(2, 0, 1)[None])
        self.drag(latent, count)
        done = image.copy()
        done[mask > 0] = 255 - done[mask > 0]
        return done
"""
ADAPTER = """
import os, sys
from pathlib import Path
NAME = "Toy"
NEEDS = {"mask": "what moves"}
PUBLISHED = {"count": 8}
kept = {}

def prepare(host):
    host.stand_in("gradio", always=True)
    host.stand_in("peculiar_page.parts", "pytorch_lightning", "torch.nn")
    import toypeer, torch
    host.time(toypeer.Editor, "open", "load")
    host.time(toypeer.Editor, "invert", "invert")
    host.time(toypeer.Editor, "drag", "drag")
    host.count(torch.optim.Adam, "step", "updates")
    host.note(f"sees {[path for path in sys.path if 'elsewhere' in path]}, {os.environ.get('PYTHONPATH')}")
    times, tracks, group = host.updates(2, 2, 2)
    kept.update(code=toypeer, settings=host.publish(count=times * tracks * group))

def edit(host):
    print("a peer may say what it likes")
    editor = kept["code"].Editor.open(Path("weights"))
    return editor.edit(host.picture(), host.mask(), kept["settings"]["count"])

def train_lora(host):
    host.counts["updates"] = 5
"""
OURS = """
NAME, NEEDS, PUBLISHED = "ddengine", {}, {}

def prepare(host):
    with host.stage("load"):
        sum(range(10000))

def edit(host):
    with host.stage("drag"):
        sum(range(300000))
    host.counts["updates"] = 4
    return host.picture()

def edit_next(host):
    with host.stage("drag"):
        sum(range(100000))
"""
FAILING = """
NAME, NEEDS, PUBLISHED = "Failing", {}, {}
def prepare(host):
    raise ValueError(f"two lines\\n{host.checkout}/model.py has no such layer")
"""
DYING = """
import os, sys
print("no memory left", file=sys.stderr, flush=True)
os._exit(3)
"""
SILENT = """
import time
NAME, NEEDS, PUBLISHED = "Silent", {}, {}
def prepare(host): pass
def edit(host): time.sleep(600)
"""


@pytest.fixture(scope="module")
def order(tmp_path_factory: pytest.TempPathFactory) -> Order:
    model = tmp_path_factory.mktemp("model") / "xl-weights"
    (model / "unet").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    drags = (Drag((20, 24), (40, 24)),)
    return Order(Image.fromarray(pixels), drags, derived_mask((64, 48), drags), "derived", model, lora_steps=0)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    (folder / "toypeer.py").write_text(CODE)
    if shutil.which("git"):
        for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "toy"]):
            who = ["-c", "user.name=toy", "-c", "user.email=toy@example.org"]
            subprocess.run(["git", *who, *words], cwd=folder, check=True)
    (folder / ".venv").mkdir()
    (folder / ".venv" / "library.py").touch()  # not the peer's own
    return folder


@pytest.fixture(scope="module")
def found(order: Order, checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """One comparison of all toys."""
    folder = tmp_path_factory.mktemp("run")
    files = {}
    for name, code in {"ours": OURS, "toy": ADAPTER, "failing": FAILING, "dying": DYING}.items():
        files[name] = folder / f"{name}.py"
        files[name].write_text(textwrap.dedent(code))
    python = Path(sys.executable)
    systems = [System("ddengine", files["ours"])]
    systems += [System(name, files[name], python, checkout) for name in ("toy", "failing", "dying")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(["/elsewhere", *sys.path[1:]]))
        facts = run(systems, order, folder / "peers.json", rounds=2, timeout=120)
    return SimpleNamespace(facts=facts, rows={row["system"]: row for row in facts["systems"]}, folder=folder)


def test_a_peer_is_timed_by_stage_beside_ours(found: SimpleNamespace, order: Order) -> None:
    toy, ours = found.rows["toy"], found.rows["ddengine"]
    assert toy["error"] is None and toy["name"] == "Toy" and toy["clock"] == ours["clock"] == "the process's own time"
    assert toy["updates"] == 8 and toy["settings"] == {"count": 8} and toy["edit_ms"]["samples"] == 2
    assert set(toy["stages_ms"]) == {"load", "invert", "drag", "other"} and toy["load"] == "every edit"
    assert sum(toy["stages_ms"].values()) - toy["stages_ms"]["load"] == pytest.approx(min(toy["edit_ms"]["rounds"]))
    assert math.isclose(toy["update_ms"], toy["ms"]["drag"] / 8) and toy["ms"]["drag"] > 0 == toy["ms"]["denoise"]
    assert ours["load"] == "once a process" and ours["next_ms"]["median"] < ours["edit_ms"]["median"]
    assert "ratio" not in ours and toy["ratio"]["low"] <= toy["ratio"]["median"] <= toy["ratio"]["high"]
    # Ratios are of one round each, so they lie between the extremes of the two times.
    low, high = (toy["edit_ms"][a] / ours["edit_ms"][b] for a, b in (("low", "high"), ("high", "low")))
    assert low <= toy["ratio"]["low"] and toy["ratio"]["high"] <= high
    assert toy["lora"]["steps"] == 5 and ours["lora"] is None and toy["memory_bytes"] is not None
    picture = np.asarray(order.picture)
    wanted = np.where(order.mask[..., None] > 0, 255 - picture, picture)
    assert np.array_equal(np.asarray(Image.open(found.folder / "peers" / "toy.png")), wanted)
    assert math.isclose(
        found.facts["levels"]["ddengine"]["toy"], np.abs(wanted.astype(float) - picture).mean(), rel_tol=1e-5
    )


def test_what_was_changed_for_a_peer_is_told(found: SimpleNamespace, checkout: Path) -> None:
    toy = found.rows["toy"]
    assert {"gradio", "peculiar_page.parts"} <= set(toy["stand_ins"]) and "torch.nn" not in toy["stand_ins"]
    assert "float16 is float32" in toy["redirected"]
    assert "sees [], None" in toy["notes"] and "derived" in toy["notes"]
    assert found.rows["ddengine"]["redirected"] == []
    assert sorted(path.name for path in checkout.iterdir() if path.name != ".git") == [".venv", "toypeer.py"]
    if shutil.which("git"):
        assert len(toy["source"]["commit"]) == 40 and toy["source"]["dirty"] is False
    assert "a peer may say what it likes" in (found.folder / "peers" / "toy.log").read_text()


def test_peers_that_fail_get_a_row_and_end_nothing(found: SimpleNamespace) -> None:
    assert found.rows["failing"]["error"] == "ValueError: model.py has no such layer"
    assert found.rows["dying"]["error"] == "the process ended with 3: no memory left"
    assert all("edit_ms" not in found.rows[name] for name in ("failing", "dying"))


def test_a_peer_that_says_nothing_is_waited_for_so_long(order: Order, checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "silent.py").write_text(SILENT)
    systems = [System("silent", tmp_path / "silent.py", Path(sys.executable), checkout)]
    facts = run(systems, replace(order, lora_steps=None), tmp_path / "peers.json", rounds=1, warm_up=False, timeout=2)
    (row,) = facts["systems"]
    assert row["error"] == "no end of edit within 2 s" and "edit_ms" not in row
    assert "silent: no end of edit within 2 s" in text(facts, terminal=False)


def test_the_comparison_is_written_and_shown(found: SimpleNamespace, order: Order) -> None:
    assert json.loads((found.folder / "peers.json").read_text()) == json.loads(json.dumps(found.facts))
    shown = text(found.facts, terminal=False)
    assert "| failing | failed |" in shown and "dying: the process ended with 3: no memory left" in shown
    assert f"{found.rows['toy']['ratio']['median']:.2f}" in shown and "each system's own updates" in shown
    assert "Toy" in text(found.facts, terminal=True)
    assert "stand-ins for gradio, peculiar_page.parts" in needs(found.facts) and "mask (what moves)" in needs(
        found.facts
    )
    with Image.open(contact_sheet(found.facts, order, found.folder / "peers")) as sheet:
        assert sheet.width > 4 * 256 and sheet.height > 192  # before, arrows, ours, toy in one row


@given(st.integers(1, 1000))
def test_updates_are_spread_as_published(wanted: int) -> None:
    times, tracks, group = spread(wanted)
    assert group == min(3, wanted) and 1 <= tracks <= 10
    assert abs(times * tracks * group - wanted) <= (wanted if wanted < 3 else 15)
    assert spread(210) == (7, 10, 3) and spread(30) == (1, 10, 3) and spread(12) == (1, 4, 3) and spread(1) == (1, 1, 1)


def test_the_derived_mask_is_where_the_soft_mask_is_above_one_half() -> None:
    assert math.isclose(REACH * 256, 30 * math.sqrt(2 * math.log(2)), rel_tol=1e-2)
    mask = derived_mask((200, 100), [Drag((40, 50), (160, 50))])
    rows, columns = np.nonzero(mask)
    reach = int(REACH * 200)
    assert (rows.min(), rows.max()) == (50 - reach, 50 + reach)
    assert (columns.min(), columns.max()) == (40 - reach, 160 + reach)
    assert mask[50 - reach, 39 - reach] == 0 and set(np.unique(mask)) == {0, 255}


def test_messages_lose_the_folders_of_a_machine() -> None:
    assert plain("cannot open /home/me/some-where/model.py: gone") == "cannot open model.py: gone"
    assert plain("No module named 'cv2' (1/2)") == "No module named 'cv2' (1/2)"
    for address in ("https://example.org/a-/b/c.html", "http://127.0.0.1:80/x/y/", "s3://bucket/some/key"):
        words = f"see '{address}' or {address}, not /home/me/a/b.py"
        assert plain(words) == f"see '{address}' or {address}, not b.py"
    assert plain("cannot load file:///home/me/w/model.bin") == "cannot load model.bin"


def test_what_cannot_be_compared_is_refused(tmp_path: Path, order: Order) -> None:
    assert set(known()) >= {"directdrag", "gooddrag", "dragdiffusion", "fastdrag"}
    for repos, rest, said in (
        ({"nobody": tmp_path}, {}, "no adapter for 'nobody'"),
        ({"gooddrag": tmp_path / "gone"}, {}, "not a folder"),
        ({"own": tmp_path}, {"adapters": {"own": tmp_path / "gone.py"}}, "not found"),
        ({"gooddrag": tmp_path}, {"pythons": {"fastdrag": tmp_path}}, "'fastdrag' has no checkout"),
        ({"gooddrag": tmp_path}, {"pythons": {"gooddrag": tmp_path / "python"}}, "python: not found"),
    ):
        with pytest.raises(InputError, match=said):
            make_systems(repos, **rest)
    (tmp_path / "python").symlink_to(sys.executable)
    relative = Path(os.path.relpath(tmp_path / "python"))
    assert make_systems({"gooddrag": tmp_path}, pythons={"gooddrag": relative})[1].python == tmp_path / "python"
    configs = [("default", {}), ("authors", {}), ("authors", {"r1": "5"})]
    assert [one.name for one in make_systems({}, configs=configs)] == [
        "ddengine", "ddengine-authors", "ddengine-authors-2",
    ]  # fmt: skip
    with pytest.raises(InputError, match=r"end its name in \.json"):
        run([], order, tmp_path / "peers")
    with pytest.raises(InputError, match="cannot be timed"):
        run([], dataclasses.replace(order, device="mps"), tmp_path / "peers.json")
    Image.new("RGB", (64, 64)).save(tmp_path / "picture.png")
    base = ["bench", "peers", "--repo", f"gooddrag={tmp_path}", "-o", str(tmp_path / "peers.json"), "--device", "cpu"]
    for words, said in (
        (["--model", str(tmp_path)], "config.json: not found"),
        (["--model", "x", "--config", "nothing"], "nothing"),
        (["--model", "x", "--config", "default,r1"], "PRESET,FIELD=VALUE"),
        (["--model", "x", "--config", "default,r1=x"], "r1"),
        (["--model", "x", "--repo", "gooddrag"], "NAME=PATH"),
        (["--model", "x", "--readout", str(tmp_path / "gone")], "not found"),
    ):
        done = CliRunner().invoke(main, [*base, *words])
        assert done.exit_code == 2 and said in done.stderr, done.output
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text("{}")
    done = CliRunner().invoke(main, [*base, "--model", str(tmp_path), str(tmp_path / "picture.png")])
    assert done.exit_code == 2 and "come together" in done.stderr
    assert not (tmp_path / "peers.json").exists()


def test_a_stand_in_can_be_named_and_says_so_when_called() -> None:
    page = StandIn("page")
    with pytest.raises(RuntimeError, match=r"page\.Slider\.show was called, but only a stand-in is here: install page"):
        page.Slider.show("x")


def test_adapters_import_nothing_of_this_package() -> None:
    """They may run in a Python that has never seen it."""
    for path in [
        *known().values(),
        *(ADAPTERS.parent / f"{name}.py" for name in ("process", "host", "redirect", "stand_ins")),
    ]:
        assert "import ddengine" not in path.read_text() and "from ddengine" not in path.read_text(), path


def test_random_weights_are_a_model_that_this_engine_loads(tmp_path: Path) -> None:
    from ddengine.models.load import load_model

    folder, head = random_weights.write(tmp_path / "random", (8, 16, 16, 16))
    before = (folder / "model_index.json").stat().st_mtime_ns
    assert random_weights.write(folder) == (folder, head)
    assert (folder / "model_index.json").stat().st_mtime_ns == before
    model = load_model(folder, device="cpu", dtype="float32", readout=head)
    assert model.readout is not None and tuple(model.empty_context.shape) == (1, 77, 32)


def test_the_documents_numbers_are_those_that_were_measured() -> None:
    facts = json.loads((ROOT / "bench" / "results" / "peers-cpu.json").read_text(encoding="utf-8"))
    document = (ROOT / "docs" / "peers.md").read_text(encoding="utf-8")
    assert markdown(facts) in document and needs(facts) in document
    for row in facts["systems"]:
        assert row["error"] is None and (row["own"] or row["source"]["dirty"] is False)
    rows = {row["system"]: row for row in facts["systems"]}
    theirs, mine = rows["directdrag"], rows["ddengine-authors"]
    assert theirs["updates"] == mine["updates"] == facts["updates"] and rows["ddengine"]["updates"] == 12
    for kind in ("edit_ms", "next_ms"):
        assert f"{theirs['edit_ms']['median'] / mine[kind]['median']:.2f} times" in document
    for number in facts["levels"]["ddengine-authors"].values():
        assert f"{number:.2f}" in document
    lora = json.loads((ROOT / "bench" / "results" / "peers-lora-cpu.json").read_text(encoding="utf-8"))
    for row in lora["systems"]:
        assert row["error"] is None
        assert not row["lora"] or f"{row['lora']['seconds']:.3g} s for {row['lora']['steps']} steps" in document


def real_peers() -> dict[str, Path]:
    folder = Path(os.environ.get("DDENGINE_PEERS", "/nonexistent"))
    return {name: folder / name for name in known() if (folder / name).is_dir()}


@pytest.mark.slow
@pytest.mark.skipif(not real_peers(), reason="DDENGINE_PEERS names no folder with checkouts of peers")
def test_real_peers_run_and_the_published_code_makes_its_golden_picture(golden: Path, tmp_path: Path) -> None:
    """Each from its folder, in the Python of its .venv where it has one."""
    repos = real_peers()
    pythons = {name: path / ".venv/bin/python" for name, path in repos.items() if (path / ".venv/bin/python").exists()}
    picture = Image.open(golden / "edits" / "source_256x256_seed7.png").convert("RGB")
    drags = (Drag((112, 112), (152, 152)),)
    order = Order(
        picture, drags, derived_mask(picture.size, drags), "derived", golden / "tiny-sd",
        golden / "tiny-readout-appearance.safetensors", updates=(2, 2, 3),
    )  # fmt: skip
    facts = run(make_systems(repos, pythons=pythons), order, tmp_path / "peers.json", rounds=1, warm_up=False)
    rows: dict[str, Any] = {row["system"]: row for row in facts["systems"]}
    assert [row["error"] for row in rows.values()] == [None] * (1 + len(repos))
    if "directdrag" in repos:
        made, wanted = (
            np.asarray(Image.open(path), float)
            for path in (tmp_path / "peers" / "directdrag.png", golden / "edits" / "p1diag_all.png")
        )
        assert np.abs(made - wanted).mean() < 1 and rows["directdrag"]["updates"] == 12
