"""The published sets: both forms of DragBench say the same, Drag100, and samples that are not as published."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddengine.drags import Drag
from ddengine.errors import InputError
from ddengine.metrics.datasets import Sample, read_set

META = {"prompt": "a cat", "points": [[10, 20], [30, 40], [5, 6], [7, 90]], "mask": np.zeros((100, 80))}


def dragbench(root: Path, name: str = "animals/a", meta: Any = META) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    Image.new("RGB", (80, 100), "red").save(folder / "original_image.png")
    (folder / "meta_data.pkl").write_bytes(pickle.dumps(meta))
    return folder


def drag100(root: Path, name: str, suffix: str = ".png", points: Any = ((1, 2), (3, 4))) -> Path:
    folder = root / name
    folder.mkdir()
    Image.new("RGB", (80, 100)).save(folder / f"original{suffix}")
    (folder / "points.json").write_text(json.dumps({"points": points}))
    return folder


def test_dragbench_as_published(tmp_path: Path) -> None:
    drawn = np.zeros((100, 80), np.uint8)
    drawn[10:20, 30:40] = 1
    dragbench(tmp_path, "animals/b", {**META, "mask": drawn})
    dragbench(tmp_path, "animals/a")
    samples, refused = read_set(tmp_path)
    assert refused == {} and [sample.name for sample in samples] == ["animals/a", "animals/b"]
    first, second = samples
    folder = tmp_path / "animals/a"
    drags = (Drag((10, 20), (30, 40)), Drag((5, 6), (7, 90)))
    image = folder / "original_image.png"
    assert first == Sample("animals/a", "animals", image, drags, "a cat", (80, 100), folder / "meta_data.pkl")
    assert first.handles == ((10, 20), (5, 6)) and first.targets == ((30, 40), (7, 90))
    assert first.result("out") == Path("out/animals/a/dragged_image.png")
    assert first.read_mask() is None  # zeros say that none was drawn
    np.testing.assert_array_equal(second.read_mask(), drawn)


def test_the_extracted_form_says_the_same(photographs: list[Path], tmp_path: Path) -> None:
    for number, folder in enumerate(photographs[::6]):
        for form in ("published", "extracted"):
            copy = tmp_path / form / folder.parent.name / f"{number}"
            copy.mkdir(parents=True)
            names = {"published": ["meta_data.pkl"], "extracted": ["drag_instruction.json", "mask.png"]}[form]
            for name in ("original_image.png", *names):
                (copy / name).symlink_to(folder / name)
    (published, _), (extracted, _) = read_set(tmp_path / "published"), read_set(tmp_path / "extracted", "dragbench")
    assert len(published) == len(extracted) == len(photographs[::6])
    for one, other in zip(published, extracted, strict=True):
        assert (one.name, one.category, one.drags, one.prompt, one.size) == (
            (other.name, other.category, other.drags, other.prompt, other.size)
        )
        np.testing.assert_array_equal(one.read_mask(), other.read_mask())


def test_drag100(tmp_path: Path) -> None:
    drag100(tmp_path, "1")
    (folder := drag100(tmp_path, "2", ".jpg")).joinpath("prompt.txt").touch()
    Image.new("L", (80, 100), 255).save(folder / "mask.png")
    (tmp_path / "notes").mkdir()
    samples, refused = read_set(tmp_path)
    assert refused == {} and [sample.name for sample in samples] == ["1", "2"]
    assert samples[1].image == folder / "original.jpg" and samples[1].drags == (Drag((1, 2), (3, 4)),)
    assert (samples[1].category, samples[1].prompt) == ("", "")
    assert samples[0].read_mask() is None and samples[1].read_mask().min() == 1


@pytest.mark.parametrize(
    ("meta", "match"),
    [
        ({**META, "points": [[1, 2]]}, "1 points, expected handle and target in turn"),
        ({**META, "points": []}, "0 points"),
        ({**META, "points": 7}, "a int"),
        ({**META, "points": [[1, 2], [80, 3]]}, r"target \(80, 3\) lies outside the picture of 80 x 100"),
        ({**META, "points": [[1, "2"], [8, 3]]}, "a point is two numbers"),
        ({**META, "prompt": b"a cat"}, "'prompt' is a bytes"),
        ({"prompt": "a cat"}, "has no 'points'"),
        ([1, 2], "holds a list"),
        ({**META, "points": os}, None),
    ],
)
def test_one_bad_sample_is_named_and_the_others_are_read(tmp_path: Path, meta: Any, match: str | None) -> None:
    dragbench(tmp_path, "animals/good")
    folder = dragbench(tmp_path, "animals/bad", meta if match else META)
    if match is None:  # hostile
        (folder / "meta_data.pkl").write_bytes(b"cos\nsystem\n(S'exit 0'\ntR.")
        match = "is not read: .*; only plain containers"
    samples, refused = read_set(tmp_path, "dragbench")
    assert [sample.name for sample in samples] == ["animals/good"] and list(refused) == ["animals/bad"]
    with pytest.raises(InputError, match=match):
        raise InputError(refused["animals/bad"])
    assert "bad" in refused["animals/bad"]


def test_what_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    (dragbench(tmp_path, "a/no points") / "meta_data.pkl").unlink()
    (dragbench(tmp_path, "a/not json") / "drag_instruction.json").write_text("{")
    (dragbench(tmp_path, "a/no picture") / "original_image.png").write_bytes(b"")
    _, refused = read_set(tmp_path)
    assert set(refused) == {"a/no points", "a/not json", "a/no picture"}
    assert "meta_data.pkl" in refused["a/no points"] and "as JSON" in refused["a/not json"]
    assert "is empty" in refused["a/no picture"]


def test_masks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    dragbench(tmp_path, "a/small", {**META, "mask": np.ones((10, 10), np.uint8)})
    dragbench(tmp_path, "a/text", {**META, "mask": "none"})
    small, text = read_set(tmp_path)[0]
    with pytest.raises(InputError, match="10 x 10"):
        small.read_mask()
    with pytest.raises(InputError, match="'mask' is a str"):
        text.read_mask()


def test_a_folder_that_holds_no_set_is_refused(tmp_path: Path) -> None:
    drag100(tmp_path, "1")
    for root, layout, match in (
        (tmp_path / "1", "auto", "holds no samples"),
        (tmp_path, "dragbench", "holds no samples"),
        (tmp_path / "x", "auto", "no folder"),
        (tmp_path, "coco", "unknown"),
    ):
        with pytest.raises(InputError, match=match):
            read_set(root, layout)
