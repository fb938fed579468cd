"""`ddengine eval`: what it answers, its exit codes, and the published judges through tiny stand-in networks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file

from ddengine.cli import main
from ddengine.metrics.datasets import read_set
from ddengine.metrics.judges import NOT_GIVEN, load_judges
from ddengine.metrics.lpips import FEATURES, HEADS


def call(*words: object):
    return CliRunner().invoke(main, ["eval", *map(str, words)])


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, sd15_original: Path) -> dict[str, Path]:
    """Folders of the three judges: the right architecture, random numbers, as few as each allows."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    root = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    (root / "lpips").mkdir()
    layers = {0: (64, 3, 11), 3: (192, 64, 5), 6: (384, 192, 3), 8: (256, 384, 3), 10: (256, 256, 3)}
    body, heads = {}, {}
    for number, (index, (out, into, size)) in enumerate(layers.items()):
        body[f"features.{index}.weight"] = torch.randn(out, into, size, size) * (into * size * size) ** -0.5
        body[f"features.{index}.bias"] = torch.randn(out) * 0.1
        heads[f"lin{number}.model.1.weight"] = torch.rand(1, out, 1, 1)
    save_file(body, root / "lpips" / FEATURES)
    save_file(heads, root / "lpips" / HEADS)
    config = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8,
        projection_dim=12,
    )  # fmt: skip
    CLIPVisionModelWithProjection(config).save_pretrained(root / "clip")
    return {"lpips": root / "lpips", "clip": root / "clip", "dift": sd15_original}


def test_the_judges_figures_are_the_tables(dragbench: Path, shifter, weights: dict[str, Path], tmp_path: Path) -> None:
    words = ["--data", dragbench, "-o", tmp_path / "out", "--device", "cpu", "--limit", "2", "--json"]
    first = json.loads(call(*words).stdout)
    assert first["missing"] == dict.fromkeys(("IF", "CLIP", "MD"), NOT_GIVEN) and shifter.edits == 2
    # Weights may come later: nothing is edited again.
    done = call(*words, *(word for name, folder in weights.items() for word in (f"--{name}", folder)))
    assert (done.exit_code, done.stderr) == (0, ""), done.output
    facts = json.loads(done.stdout)
    assert facts["missing"] == {} and shifter.edits == 2 and "not ViT-B/32" in " ".join(facts["notes"])
    samples, _ = read_set(dragbench, "dragbench")
    judges = load_judges(**weights, device="cpu")
    expected = []
    for sample in samples[:2]:
        scores = judges.score(sample, tmp_path / "out/results/default" / sample.name / "dragged_image.png")
        row = facts["edits"][sample.name]["rows"]["default"]
        assert row["IF"] == pytest.approx(scores.fidelity, abs=1e-6)
        assert row["CLIP"] == pytest.approx(scores.similarity, abs=1e-6)
        distances = row["MD"] if isinstance(row["MD"], list) else [row["MD"]]
        assert distances == pytest.approx(list(scores.distances), abs=1e-6)
        expected += list(scores.distances)
    cell = facts["rows"]["default"]["cells"]["MD"]
    assert cell["published"] == pytest.approx(sum(expected) / 3) and cell["drags"] == 3 and cell["samples"] == 2
    assert facts["rows"]["unedited"]["cells"]["IF"]["per_image"] == pytest.approx(1)
    assert facts["rows"]["unedited"]["cells"]["CLIP"]["per_image"] == pytest.approx(1)
    page = (tmp_path / "out/report.html").read_text(encoding="utf-8")
    assert f"{cell['published']:.2f}" in page


def test_drag100_has_its_dai(shifter, tmp_path: Path) -> None:
    folder = tmp_path / "set" / "one"
    folder.mkdir(parents=True)
    Image.linear_gradient("L").convert("RGB").save(folder / "original.png")
    (folder / "points.json").write_text(json.dumps({"points": [[40, 40], [50, 60], [40, 41], [50, 61]]}))
    done = call("--suite", "drag100", "--data", tmp_path / "set", "-o", tmp_path / "out", "--json", "--device", "cpu")
    cell = json.loads(done.stdout)["rows"]["unedited"]["cells"]["DAI_5"]
    assert cell["per_image"] == pytest.approx((20 / 255) ** 2 * 3, abs=1e-6)  # twenty rows down, three channels
    assert cell["published"] == pytest.approx(cell["per_image"] / 2)


def test_a_sample_that_fails_sets_the_exit_code(dragbench: Path, shifter, tmp_path: Path) -> None:
    shifter.fail = staticmethod(lambda pixels, config: shifter.edits == 2)
    done = call("--data", dragbench, "-o", tmp_path / "out", "--device", "cpu")
    assert done.exit_code == 1, done.output
    assert "failed: animals/b (default): RuntimeError" in done.stdout and "empty: IF: no folder" in done.stdout
    assert "report.html" in done.stdout and (tmp_path / "out/report.html").is_file()
    assert call("--data", dragbench, "-o", tmp_path / "out", "--device", "cpu").exit_code == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "name the one it was unpacked to with --data"),
        (("--suite", "scenes", "--data", "x"), "leave out --data x"),
        (("--suite", "scenes", "--set", "r2=1000"), "r2"),
        (("--suite", "scenes", "--lpips", "nowhere"), "--lpips nowhere is no folder"),
        (("--data", "nowhere"), "no folder nowhere"),
        (("--suite", "scenes", "--config", "best"), "best"),
        (("--suite", "scenes", "--jobs", "0"), "--jobs"),
    ],
)
def test_bad_input_is_refused_before_anything_is_loaded(words, says, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ddengine.engine.Engine", None)
    done = call(*words)
    assert done.exit_code == 2 and says in done.stderr, done.output
