"""The rows of an evaluation: which configurations every sample is edited with, under which names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ddengine.config import DirectDragConfig, ablation
from ddengine.errors import InputError

UNEDITED, GOAL = "unedited", "goal"
REFERENCES = {UNEDITED: "the input itself", GOAL: "the right answer, drawn"}  # judged beside the edits


@dataclass(frozen=True)
class Row:
    """One row of the table. prompt: whether an edit is given its sample's prompt."""

    name: str
    config: DirectDragConfig
    prompt: bool = False

    @property
    def slug(self) -> str:
        """The name as a folder: "+SM+RG +prompt" -> "SM-RG-prompt"."""
        return re.sub(r"[^A-Za-z0-9]+", "-", self.name).strip("-")

    def facts(self) -> dict[str, Any]:
        """All that decides this row's edits, ready for JSON."""
        return {"config": self.config.to_dict(), "prompt": self.prompt}


def plan_rows(
    presets: Sequence[str], settings: Mapping[str, str] | None = None, *, ablated: bool = False
) -> tuple[Row, ...]:
    """A row for each preset with the settings; `ablated` puts the paper's six rows on the first preset in its place.

    Where the first preset with the settings is one of the six, it keeps the ablation's name. Raises InputError for
    unknown presets and settings, for a setting that undoes a row's own switch, and for a preset named twice.
    """
    changes = dict(settings or {})
    if len(set(presets)) != len(presets) or not presets:
        raise InputError(f"the configurations are {', '.join(presets) or 'none'}; name each one once")
    plain = [Row(name, DirectDragConfig.preset(name).changed_from_strings(changes)) for name in presets]
    if not ablated:
        return tuple(plain)
    switches = sorted({"soft_mask", "readout_guidance", "latent_warpage"} & set(changes))
    if switches:
        raise InputError(f"--set {switches[0]} has no meaning with --ablation, whose rows switch it; leave one out")
    table = ablation(presets[0])
    six = [Row(name, row.config.changed_from_strings(changes), row.prompt) for name, row in table.items()]
    return (*six, *plain[1:])


def slug_of(rows: Sequence[Row], name: str) -> str:
    """The folder of a row or a reference by its name."""
    return next((row.slug for row in rows if row.name == name), name)
