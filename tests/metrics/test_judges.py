"""All metrics of a sample: what is missing or fails is an empty cell with a reason, never an exception."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ddengine.drags import Drag
from ddengine.errors import InputError
from ddengine.metrics.datasets import Sample
from ddengine.metrics.judges import CLIP, DAI, IF, MD, NOT_GIVEN, Judges, load_judges
from ddengine.metrics.lpips import FEATURES
from ddengine.metrics.pooling import pool


class Stand:
    """Answers as the networks do, or fails as asked."""

    notes = ("a stand-in",)

    def __init__(self, answer: Any) -> None:
        self.answer, self.seen = answer, []

    def fidelity(self, original: Image.Image, result: Image.Image) -> float:
        self.seen.append((original.size, result.size))
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    similarity = fidelity

    def pair(self, original: torch.Tensor, result: torch.Tensor, prompt: str) -> Any:
        self.seen.append((tuple(original.shape), tuple(result.shape), prompt))
        return self.answer


@pytest.fixture
def sample(tmp_path: Path) -> Sample:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 100, 3), np.uint8))
    picture.save(tmp_path / "original_image.png")
    drags = (Drag((30, 30), (60, 40)), Drag((8, 8), (60, 40)))
    return Sample("animals/a", "animals", tmp_path / "original_image.png", drags, "a cat", (100, 80), None)


def test_every_metric_sees_the_result_at_the_originals_size(sample: Sample) -> None:
    maps = torch.randn(2, 1, 6, 5, 7, generator=torch.Generator().manual_seed(0))
    lpips, clip, dift = Stand(0.8), Stand(0.9), Stand((maps[0], maps[0]))
    judges = Judges(lpips, clip, dift)
    small = Image.open(sample.image).resize((200, 160))
    scores = judges.score(sample, small)
    assert (scores.fidelity, scores.similarity, scores.empty) == (0.8, 0.9, {})
    assert lpips.seen == clip.seen == [((100, 80), (100, 80))]
    assert dift.seen == [((1, 3, 80, 100), (1, 3, 80, 100), "a cat")]
    assert scores.distances == pytest.approx([np.hypot(30, 10), np.hypot(52, 32)])
    assert scores.dai["1"][0] > 0 and scores.dai["10"][1] is None and scores.dai["5"][1] is not None
    assert judges.notes == ("a stand-in", "a stand-in")


def test_missing_weights_leave_their_columns_empty(sample: Sample, tmp_path: Path) -> None:
    judges = load_judges(lpips=tmp_path, dift=tmp_path / "none", device="cpu")
    assert (judges.lpips, judges.clip, judges.dift, judges.notes) == (None, None, None, ())
    assert FEATURES in judges.missing[IF] and "make it once" in judges.missing[IF]
    assert judges.missing[CLIP] == NOT_GIVEN and "unet/config.json: not found" in judges.missing[MD]
    scores = judges.score(sample, sample.image)
    assert (scores.fidelity, scores.similarity, scores.distances) == (None, None, None)
    assert scores.empty == judges.missing and scores.dai["1"] != (0.0, 0.0)
    columns = pool([scores])
    assert columns[IF].published is None and columns[IF].empty == {judges.missing[IF]: 1}
    assert columns["DAI_1"].published == pytest.approx(columns["DAI_1"].per_image / 2)


def test_one_failing_metric_costs_no_other(sample: Sample) -> None:
    judges = Judges(Stand(torch.OutOfMemoryError("out of memory")), Stand(float("nan")), Stand((torch.ones(1), None)))
    scores = judges.score(sample, sample.image)
    assert scores.dai is not None and set(scores.empty) == {IF, CLIP, MD}
    assert "out of memory" in scores.empty[IF] and "nan" in scores.empty[CLIP]


def test_a_result_that_cannot_be_read_is_an_empty_row(sample: Sample, tmp_path: Path) -> None:
    scores = Judges().score(sample, tmp_path / "dragged_image.png")
    assert set(scores.empty) == {IF, CLIP, MD, DAI} and "there is no file" in scores.empty[DAI]
    assert scores.dai is None


def test_an_unknown_device_is_refused_at_once() -> None:
    with pytest.raises(InputError, match="device"):
        load_judges(device="tpu9")
