"""The operators' bench: no time without equality, loops that are the published algorithm, a page that is true."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from ddengine.bench import kernel_docs, kernels, loop_form
from ddengine.bench.compile_report import compared, facts, table
from ddengine.cli import main
from ddengine.errors import DDEngineError, InputError
from ddengine.kernels.compilation import Report

CPU = torch.device("cpu")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Maps of a few cells, so that a bench takes a moment."""
    for name, value in {"LATENT": (8, 8), "FEATURE": (32, 32), "CHANNELS": 6, "SIGMA": 4.0}.items():
        monkeypatch.setattr(kernels, name, value)


def test_the_loops_are_the_published_algorithm(golden: Path) -> None:
    stored = np.load(golden / "units" / "latent_warpage.npz")
    for case in (0, 4, 7, 8):
        latent, handles, shortened, filled = (
            torch.from_numpy(stored[f"c{case}_{name}"]).float()
            for name in ("latent", "handles_yx", "scaled_targets_yx", "out")
        )
        assert torch.equal(loop_form.warp(latent, handles / 4, (shortened - handles) / 4), filled), case
    stored = np.load(golden / "units" / "soft_mask.npz")
    for case in range(int(stored["n_cases"])):
        handles, targets, mask, size, sigma = (
            stored[f"c{case}_{name}"] for name in ("handles_yx", "targets_yx", "mask", "shape_hw", "sigma")
        )
        drawn = loop_form.mask(torch.from_numpy(handles), torch.from_numpy(targets), tuple(size.tolist()), float(sigma))
        assert np.abs(drawn.numpy() - mask[0, 0]).max() < 2e-6, case


def test_loops_and_ours_are_compared_before_they_are_timed(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    warp, mask = kernels.against_loops(2, 0.01)
    assert (warp["difference"], warp["operator"], mask["operator"]) == (0, "warp", "mask")
    for row in (warp, mask):
        assert row["times"]["loops"]["median"] / row["times"]["authors"]["median"] == row["ratio"]["authors"]
    right = loop_form.mask
    monkeypatch.setattr(loop_form, "mask", lambda *given: right(*given) + 1e-3)
    with pytest.raises(DDEngineError, match=r"mask with 2 points: loops and ours differ by 0\.001"):
        kernels.against_loops(2, 0.01)


def test_every_operator_is_equal_and_timed(small: None, tmp_path: Path) -> None:
    found = kernels.run(CPU, tmp_path / "new" / "out.json", points=(1, 3), seconds=0.01)
    assert json.loads((tmp_path / "new" / "out.json").read_text())["operators"] == found["operators"]
    assert {row["points"] for row in found["operators"]} == {1, 3}
    for row in found["operators"]:
        assert row["equal"] and row["times"]["eager"]["launched"]["median"] > 0
        assert row["times"].keys() == {"eager"} and not row["cannot"]
    text = kernels.table(found)
    assert "the eager reference alone is timed" in text and "| drag_loss and gradient | 3 | eager |" in text
    assert kernels.ratios(found["loop_form"]) in text
    assert found["machine"]["torch"] == torch.__version__


def test_a_wrong_version_gets_no_time(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value off by twice the reference's error and more, a wrong gradient and a NaN are each refused."""
    cases = {case.operator: case for case in kernels.cases(CPU, torch.float32, points=(1,))}
    masks, patches = cases["gaussian_mask"], cases["sample_patches and gradient"]

    def spoiled(case: kernels.Case, spoil: float) -> kernels.Case:
        def run(version: str, first: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
            result = case.run("reference", first, *others)
            # The value stays; where there is a gradient, it alone is wrong.
            extra = (first - first.detach()).sum() if case.weights is not None else 1.0
            return result + spoil * extra if version == "triton" else result

        return replace(case, run=run)

    for case in (masks, patches):
        for spoil, equal in ((0.0, True), (1e-2, False), (math.nan, False)):
            found = kernels.errors(spoiled(case, spoil), ("reference", "triton"))["triton"]
            assert (found["error"] <= found["limit"]) == equal, (case.operator, spoil)

    wrong = replace(masks, run=lambda _, starts, ends: starts.sum() * (1.0 if starts.dtype == torch.float64 else 1.001))
    monkeypatch.setattr(kernels, "cases", lambda *_: [wrong])
    with pytest.raises(DDEngineError, match="not equal to the float64 reference: gaussian_mask"):
        kernels.run(CPU, tmp_path / "out.json", points=(1,), seconds=0.01)
    (row,) = json.loads((tmp_path / "out.json").read_text())["operators"]
    assert not row["equal"] and "times" not in row


def test_the_fewest_bytes_are_bounded_by_the_maps() -> None:
    """At full size: no operator is charged for reading more than whole maps and patches, however many points it has."""
    generous = {case.operator: case for case in kernels.cases(CPU, torch.float16, points=(64,))}
    feature, _, reference, _ = generous["drag_loss and gradient"].inputs
    assert feature.nbytes == 640 * 64 * 64 * 2
    cells = 64 * 5 * 5 * 640 * 2  # nine positions four to a native cell touch five of them
    assert cells < feature.nbytes
    assert generous["drag_loss and gradient"].traffic == cells + reference.nbytes + feature.nbytes
    assert generous["track"].traffic == feature.nbytes + 64 * 4 * (640 + 4)  # 64 windows of 9 x 9 cells overlap
    assert generous["gaussian_mask"].traffic == 4 * 256 * 256 + 64 * 16


def test_the_command(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "measure_case", lambda case, *_: {"operator": case.operator, "equal": True})
    monkeypatch.setattr(kernels, "LOOP_POINTS", ())
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["bench", "kernels", "--device", "cpu", "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout) == json.loads(Path("out/kernels.json").read_text())
    refused = CliRunner().invoke(main, ["bench", "kernels", "--device", "cuda:7"])
    assert refused.exit_code == 2 and "cuda:7" in refused.stderr
    with pytest.raises(InputError, match="mps"):
        kernels.run(torch.device("mps"), tmp_path / "x.json")


def test_the_compile_table_shows_a_spill() -> None:
    reports = [
        Report("mask", "draw", "_draw", capability, 40, stack, 2048, 4, 1, "3.7.1")
        for capability, stack in ((80, 0), (90, 16))
    ]
    assert table(reports).endswith("| mask | draw | 4 | 40, 2 KiB | 40, 2 KiB, 16 B of stack |")
    rows = facts(reports)["kernels"]
    assert rows == [
        {
            "operator": "mask",
            "name": "draw",
            "kernel": "_draw",
            "warps": 4,
            "sm_80": [40, 0, 2048],
            "sm_90": [40, 16, 2048],
        }
    ]
    more = [*rows, {**rows[0], "name": "draw-wide", "sm_90": [48, 0, 0]}]
    both = "48, 2 KiB, 16 B of stack"
    assert compared({"a": more, "b": more}).endswith(f"| mask | draw | 2 | {both} | {both} |")


def test_an_architecture_nobody_compiles_for_is_refused() -> None:
    done = CliRunner().invoke(main, ["bench", "kernels", "--compile", "--sm", "90", "--sm", "75"])
    assert done.exit_code == 2 and "sm_75" in done.stderr and "80, 86, 89, 90, 100" in done.stderr


def test_the_page_has_the_numbers_of_the_results() -> None:
    text = kernel_docs.PAGE.read_text(encoding="utf-8")
    assert len(kernel_docs.TABLE.findall(text)) == len(kernel_docs.tables())
    assert kernel_docs.page(text) == text, "run `python -m ddengine.bench.kernel_docs`"
    stale = text.replace("| warp | 1 |", "| warp | 2 |")
    assert stale != text and kernel_docs.page(stale) == text


def test_the_pictures_the_page_shows_are_there() -> None:
    shown = [part.partition(")")[0] for part in kernel_docs.PAGE.read_text(encoding="utf-8").split("](")[1:]]
    assert {"kernels/mask.png", "kernels/patches.png", "kernels/warp.png"} <= set(shown)
    assert all((kernel_docs.PAGE.parent / path).exists() for path in shown if "://" not in path and path[0] != "#")
