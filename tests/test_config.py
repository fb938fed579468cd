"""The configuration: its rules, its presets, and what a user may write."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddengine.config import ABLATION, MEASURED, PRESETS, RULES, DirectDragConfig, ablation
from ddengine.errors import InputError


def test_the_contracts_fields_have_the_papers_values() -> None:
    contract = {
        "n_inference_step": 50, "inversion_strength": 0.75, "drag_end_step": 7, "track_per_step": 10,
        "max_drag_per_track": 3, "max_track_no_change": 5, "r1": 4, "r2": 12, "d": 4, "latent_lr": 0.02, "lam": 0.1,
        "soft_mask_sigma": 30, "latent_warpage_ratio": 0.15, "readout_weight": 350,
    }  # fmt: skip
    for config in (DirectDragConfig(), DirectDragConfig.preset("paper"), DirectDragConfig.preset("authors")):
        assert {name: getattr(config, name) for name in contract} == contract
        assert config.soft_mask and config.readout_guidance and config.latent_warpage
    assert [DirectDragConfig.preset(name).preserve for name in ("default", "paper", "authors")] == [True, False, False]
    assert DirectDragConfig.preset("paper", preserve=True) == DirectDragConfig()
    assert DirectDragConfig.preset() == DirectDragConfig.preset("default") == DirectDragConfig().changed(**MEASURED)
    assert PRESETS["paper"].keys() == PRESETS["authors"].keys() == RULES.keys()  # independent of the class defaults


def test_presets_are_valid_and_take_changes() -> None:
    for name in PRESETS:
        config = DirectDragConfig.preset(name, lam=0.3)
        assert config.lam == 0.3
        assert DirectDragConfig(**json.loads(json.dumps(config.to_dict()))) == config
    assert DirectDragConfig.preset("preview").n_inference_step < DirectDragConfig.preset("fast").n_inference_step < 50


def test_the_six_ablation_rows() -> None:
    stages = {
        name: (row.config.soft_mask, bool(row.config.readout_guidance), row.config.latent_warpage, row.prompt)
        for name, row in ABLATION.items()
    }
    assert stages == {
        "baseline": (False, False, False, False),
        "+SM": (True, False, False, False),
        "+SM+RG": (True, True, False, False),
        "+SM+RG +prompt": (True, True, False, True),
        "+SM+RG+LWF": (True, True, True, False),
        "+SM+RG+LWF +prompt": (True, True, True, True),
    }
    assert ablation("authors")["+SM+RG"].config.mask_transposed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lam": -0.1}, r"lam is -0.1; it must be 0 to"),
        ({"lam": float("nan")}, "lam is nan"),
        ({"latent_lr": float("inf")}, "latent_lr is inf"),
        ({"r1": 4.5}, "r1 is 4.5; it must be a whole number"),
        ({"r1": True}, "r1 is True"),
        ({"soft_mask": 1}, "soft_mask is 1; it must be true or false"),
        ({"soft_mask": "yes"}, "soft_mask is 'yes'"),
        ({"track_pad": "mirror"}, "track_pad is 'mirror'; it must be 'slice', 'clamp' or 'zero'"),
        ({"amp_skip": "some"}, "amp_skip is 'some'"),
        ({"amp_skip": -1}, "amp_skip is -1"),
        ({"lamda": 0.2}, "no setting 'lamda' .did you mean 'lam'"),
        ({"drag_end_step": 39}, "drag_end_step is 39; it must be at most 38"),
        ({"inversion_strength": 0.001}, "inversion_strength 0.001"),
    ],
)
def test_what_is_refused_and_how(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DirectDragConfig.preset("default", **changes)


@pytest.mark.parametrize("name", ["self", "cls", "name", "changes", "nothing", ""])
def test_an_unknown_setting_is_refused_by_its_name_whatever_it_is(name: str) -> None:
    """Names come from requests and files: those of the methods' own arguments are as unknown as any other."""
    for change in (DirectDragConfig().changed, DirectDragConfig.preset):
        with pytest.raises(InputError, match=f"no setting '{name}'"):
            change(**{name: 1})
    with pytest.raises(InputError, match=f"no setting '{name}'"):
        DirectDragConfig().changed_from_strings({name: "1"})


def test_an_unknown_preset_gets_a_suggestion() -> None:
    with pytest.raises(InputError, match=r"no preset 'author'.*'authors'.*default, paper"):
        DirectDragConfig.preset("author")


def test_settings_from_the_command_line() -> None:
    texts = {"lam": "0.2", "r1": "3", "soft_mask": "off", "readout_guidance": "True", "amp_skip": "14", "d": "1e-1"}
    config = DirectDragConfig().changed_from_strings(texts)
    assert (config.lam, config.r1, config.soft_mask, config.d) == (0.2, 3, False, 0.1)
    assert config.readout_guidance is True and config.amp_skip == 14
    assert DirectDragConfig().changed_from_strings({"amp_skip": " emulate "}).amp_skip == "emulate"
    wrong = {"lam": "many", "r1": "3.5", "soft_mask": "2", "track_pad": "", "r2": "0", "nothing": "1"}
    for name, text in wrong.items():
        with pytest.raises(InputError, match=name):
            DirectDragConfig().changed_from_strings({name: text})


@given(st.sampled_from(sorted(RULES)), st.data())
def test_every_allowed_value_can_be_written_and_read(name: str, data: st.DataObject) -> None:
    rule = RULES[name]
    values = [st.sampled_from(rule.choices)] if rule.choices else []
    if rule.kind is bool:
        values.append(st.booleans())
    elif rule.kind is int:
        values.append(st.integers(int(rule.low), int(rule.high)))
    elif rule.kind is float:
        values.append(st.floats(rule.low, rule.high))
    value = data.draw(st.one_of(*values))
    assert rule.parse(name, str(value)) == rule.check(name, value) == value
    assert rule.doc and rule.describe()


def test_it_is_frozen_and_light() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        DirectDragConfig().lam = 1.0  # type: ignore[misc]
    code = "import sys, ddengine.config; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
