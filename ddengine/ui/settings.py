"""The configuration as fields of a form: what kind each is, what it says, and the way back, checked by the rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ddengine.config import RULES, DirectDragConfig
from ddengine.errors import InputError

# What people really change, with words for people; all else stands under Advanced by its own name.
FRONT: dict[str, tuple[str, str]] = {
    "soft_mask_sigma": ("Reach", "How far around an arrow the picture may change"),
    "drag_end_step": ("Drag steps", "More of them move further and take longer"),
    "preserve": ("Keep untouched pixels", "Take the picture's own pixels wherever the edit changed nothing"),
}
SLIDERS = {"soft_mask_sigma": (5, 120, 1), "drag_end_step": (0, 30, 1)}  # what is useful; rules allow more
PRESET_WORDS = {"preview": "Quick look", "fast": "Fast", "default": "Full"}
OTHER_PRESETS = {
    "paper": "DirectDrag's numbers, as its paper has them",
    "authors": "DirectDrag's published code",
    "gooddrag": "DirectDrag's baseline, in its published code",
}
# Groups of the advanced fields by their first one, in the configuration's own order.
GROUPS = {
    "n_inference_step": "Trajectory and drag loop",
    "soft_mask": "Stages",
    "r1": "Numbers of the method",
    "resize": "Behaviours: ours first, the published code's by name",
}


@dataclass(frozen=True)
class Field:
    """One setting as a form shows it. kind: "switch", "whole", "number", "choice" or "words" (a number or a word)."""

    name: str
    label: str
    info: str
    kind: str
    choices: tuple[str, ...] = ()
    low: float | None = None
    high: float | None = None


def field_of(name: str) -> Field:
    """The form's field of one setting."""
    rule = RULES[name]
    label, info = FRONT.get(name, (name, sentence(f"{rule.doc}: {rule.describe()}")))
    if rule.choices and rule.kind is bool:
        return Field(name, label, info, "choice", (*rule.choices, "true", "false"))
    if rule.choices:
        return Field(name, label, info, "words" if rule.kind else "choice", rule.choices)
    if rule.kind is bool:
        return Field(name, label, info, "switch")
    kind = "whole" if rule.kind is int else "number"
    return Field(name, label, info, kind, low=rule.low, high=rule.high)


def fields() -> list[Field]:
    """All settings in the order of the configuration."""
    return [field_of(name) for name in RULES]


def advanced() -> dict[str, list[Field]]:
    """The settings that do not stand in front, by the title of their group."""
    found: dict[str, list[Field]] = {}
    title = ""
    for field in fields():
        title = GROUPS.get(field.name, title)
        if field.name not in FRONT:
            found.setdefault(title, []).append(field)
    return found


def shown(config: DirectDragConfig) -> list[Any]:
    """A configuration's values for the fields, in their order."""
    return [_shown(field, getattr(config, field.name)) for field in fields()]


def preset_shown(preset: str) -> list[Any]:
    """The values of a preset."""
    return shown(DirectDragConfig.preset(preset))


def config_of(values: Sequence[Any]) -> DirectDragConfig:
    """The configuration that the fields' values say; InputError, naming the setting, for one that is not allowed."""
    given: dict[str, Any] = {}
    for field, value in zip(fields(), values, strict=True):
        rule = RULES[field.name]
        if value is None or value == "":
            raise InputError(f"{field.label} is empty; it must be {rule.describe()}")
        if field.kind in ("choice", "words"):
            given[field.name] = rule.parse(field.name, str(value))
        elif field.kind == "whole" and isinstance(value, float) and value.is_integer():
            given[field.name] = rule.check(field.name, int(value))
        else:
            given[field.name] = rule.check(field.name, value)
    return DirectDragConfig(**given)


def preset_of(config: DirectDragConfig) -> str | None:
    """The preset that a configuration is, if it is one."""
    return next((name for name in (*PRESET_WORDS, *OTHER_PRESETS) if DirectDragConfig.preset(name) == config), None)


def sentence(text: str) -> str:
    """A text that begins with a capital letter, unless it begins with the name of a setting or of a file."""
    first = text.partition(" ")[0]
    return text if first in RULES or "." in first.rstrip(".,:;") else text[:1].upper() + text[1:]


def _shown(field: Field, value: Any) -> Any:
    return str(value).lower() if field.kind in ("choice", "words") else value
