"""The form of the settings: every setting is in it once, and what it shows is what it gives back."""

from __future__ import annotations

import pytest

from ddengine.config import PRESETS, RULES, DirectDragConfig
from ddengine.errors import InputError
from ddengine.ui import settings


def changed(name, value):
    values = settings.preset_shown("default")
    values[list(RULES).index(name)] = value
    return values


def test_every_setting_and_every_preset_is_there_once():
    front, rest = list(settings.FRONT), [field.name for group in settings.advanced().values() for field in group]
    assert sorted(front + rest) == sorted(RULES)
    assert list(settings.advanced()) == list(settings.GROUPS.values())
    assert sorted({**settings.PRESET_WORDS, **settings.OTHER_PRESETS}) == sorted(PRESETS)
    assert not settings.PRESET_WORDS.keys() & settings.OTHER_PRESETS.keys()


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_shown_is_the_preset(name):
    config = settings.config_of(settings.preset_shown(name))
    assert config == DirectDragConfig.preset(name)
    assert settings.preset_of(config) == name
    assert settings.preset_of(config.changed(r2=17)) is None


def test_what_a_setting_says_names_its_limits():
    for field in settings.fields():
        assert field.label and field.info
        if field.name not in settings.FRONT:
            assert RULES[field.name].describe() in field.info
    for name, (low, high, _) in settings.SLIDERS.items():
        assert RULES[name].low <= low < high <= RULES[name].high


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("readout_guidance", "true", True),
        ("readout_guidance", "auto", "auto"),
        ("amp_skip", "12", 12),
        ("amp_skip", "none", "none"),
        ("r2", 16.0, 16),  # as a browser may send it
        ("soft_mask_sigma", 40, 40.0),
        ("mask_form", "truncated", "truncated"),
    ],
)
def test_values_of_a_form_are_the_settings(name, value, expected):
    found = getattr(settings.config_of(changed(name, value)), name)
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("r2", 999, "r2 is 999; it must be a whole number 1 to 128"),
        ("r2", None, "r2 is empty; it must be a whole number"),
        ("r2", 3.5, "r2 is 3.5"),
        ("soft_mask_sigma", None, "Reach is empty"),
        ("d", float("nan"), "d is nan"),
        ("mask_form", "odd", "mask_form is 'odd'"),
        ("amp_skip", "-1", "amp_skip is -1"),
        ("soft_mask", "yes", "soft_mask is 'yes'"),
        ("drag_end_step", 1000, "at most 38"),
    ],
)
def test_what_is_not_allowed_is_named(name, value, said):
    with pytest.raises(InputError) as refused:
        settings.config_of(changed(name, value))
    assert said in str(refused.value)
