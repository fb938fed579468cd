"""What default's own settings are worth: the page's table is the committed result, of these settings and figures."""

from __future__ import annotations

import json

import pytest

from ddengine.bench import chosen
from ddengine.bench.scenes import arrow, held_out, score
from ddengine.engine import Engine


@pytest.fixture(scope="module")
def facts() -> dict:
    return json.loads(chosen.RESULT.read_text(encoding="utf-8"))


def test_the_page_has_the_numbers_of_the_result(facts: dict) -> None:
    words = chosen.PAGE.read_text(encoding="utf-8")
    assert chosen.PLACE.search(words) and chosen.page(words, facts) == words, "run `python -m ddengine.bench.chosen`"
    assert chosen.table(facts).count(f" of {chosen.SCENES} |") == len(facts["rows"]) - 1
    said = " ".join(words.split())  # what the page says in words
    default, preview, fewer, whole, kept = (
        chosen.means(facts, name)
        for name in ("default", "preview", "as few updates as preview", "warp_reach=picture", "preserve=False")
    )
    assert (
        "`preview` scored {:.2f}, {:.2f}, {:.1f} against `default`'s {:.2f}, {:.2f}, {:.1f},".format(*preview, *default)
        in said
        and f"`default` scored {default[1]:.2f} on those drags" in said
    )
    assert fewer == pytest.approx(default, abs=0.2) and fewer[:2] == pytest.approx(default[:2], abs=0.01)
    assert f"saves {default[2] - whole[2]:.0f} dB outside" in said and f"saves {default[2] - kept[2]:.0f} dB:" in said


def test_the_result_is_of_the_settings_of_this_version(facts: dict) -> None:
    assert {name: row["config"] for name, row in facts["rows"].items()} == {
        name: config.to_dict() for name, config in chosen.rows().items()
    }
    assert (facts["scenes"], facts["seed"]) == (chosen.SCENES, chosen.SEED)
    assert all(len(row["edits"]) == chosen.SCENES for row in facts["rows"].values())


def test_an_edit_of_it_comes_out_again(facts: dict) -> None:
    """The quickest row, on the first scene: rounding of another processor may move the figures a little."""
    scene, engine = held_out(1, chosen.SEED)[0], Engine.load(backend="eager", device="cpu")
    image = scene.scene.render(engine.model.size)
    judged = score(scene, engine.edit(image, [arrow(scene)], config=chosen.rows()["preview"]).image)
    known = facts["rows"]["preview"]["edits"][0]
    assert judged.goal_gain == pytest.approx(known["goal_gain"], abs=0.1)
    assert judged.psnr_outside == pytest.approx(known["psnr_outside"], abs=1)
