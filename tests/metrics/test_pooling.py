"""Pooling: over drags as published, over pictures, the second division, empty cells."""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict

import pytest

from ddengine.metrics.dai import RADII
from ddengine.metrics.judges import CLIP, IF, MD, Scores
from ddengine.metrics.pooling import BORDER, pool

DIGITS = [str(radius) for radius in RADII]


def scores() -> list[Scores]:
    return [
        Scores("a", 0.8, 0.9, (10.0,), dict.fromkeys(DIGITS, (0.5,))),
        Scores("b", 0.6, None, (1.0, 2.0, 3.0), dict.fromkeys(DIGITS, (0.1, None, 0.3)), {CLIP: "no weights"}),
        Scores(
            "c", None, None, None, dict.fromkeys(DIGITS, (None,)), {IF: "damaged", CLIP: "no weights", MD: "damaged"}
        ),
    ]


def test_both_poolings() -> None:
    columns = pool(scores())
    fidelity, similarity, distance = columns[IF], columns[CLIP], columns[MD]
    assert (fidelity.published, fidelity.per_image) == (pytest.approx(0.7), pytest.approx(0.7))
    assert (fidelity.samples, fidelity.drags, fidelity.empty) == (2, 2, {"damaged": 1})
    assert (similarity.published, similarity.samples, similarity.empty) == (0.9, 1, {"no weights": 2})
    assert distance.published == pytest.approx((10 + 1 + 2 + 3) / 4)
    assert distance.per_image == pytest.approx((10 + 2) / 2)
    assert (distance.samples, distance.drags) == (2, 4)


def test_the_second_division_of_dai_is_in_the_published_number_alone() -> None:
    for radius in RADII:
        column = pool(scores())[f"DAI_{radius}"]
        assert column.per_image == pytest.approx((0.5 + 0.2) / 2)
        assert column.published == pytest.approx((0.5 / 1 + 0.2 / 2) / 2)
        assert (column.samples, column.drags, column.empty) == (2, 3, {BORDER: 1})


def test_an_empty_column_is_no_failure() -> None:
    for column in (*pool([]).values(), pool([Scores("a")])[MD]):
        assert (column.published, column.per_image, column.samples) == (None, None, 0)
    assert pool([Scores("a")])[IF].empty == {"not computed": 1}


def test_the_order_of_samples_does_not_matter() -> None:
    rng = random.Random(0)
    many = [Scores(f"{k}", rng.random(), rng.random(), (rng.random() * 1e6, rng.random())) for k in range(50)]
    expected = pool(many)
    rng.shuffle(many)
    assert pool(many) == expected
    assert expected[MD].published == pytest.approx(math.fsum(v for s in many for v in s.distances) / 100)


def test_figures_that_were_written_as_json_pool_the_same() -> None:
    written = json.loads(json.dumps([asdict(each) for each in scores()]))
    assert pool(Scores(**each) for each in written) == pool(scores())
