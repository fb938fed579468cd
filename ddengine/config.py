"""The configuration of a DirectDrag edit: every number and every behaviour switch, with presets.

Fields carry their own rule (type, limits, choices) and one line of documentation, so that validation, the command
line's `--set field=value` and the printed reference all come from one place.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from numbers import Integral, Real
from typing import Any

from ddengine.errors import InputError


@dataclass(frozen=True)
class Rule:
    """What a field may hold: one of the `choices`, or a number or truth value of `kind` within the limits."""

    doc: str
    kind: type | None = None
    low: float = 0.0
    high: float = 0.0
    choices: tuple[str, ...] = ()

    def describe(self) -> str:
        """What is allowed, in words: "0 to 1", "true or false", "'zero', 'slice' or 'clamp'"."""
        parts = [repr(choice) for choice in self.choices]
        if self.kind is bool:
            parts += ["true", "false"]
        elif self.kind is not None:
            whole = "a whole number " if self.kind is int else ""
            parts.append(f"{whole}{self.low:g} to {self.high:g}")
        return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} or {parts[-1]}"

    def check(self, name: str, value: Any) -> Any:
        """The value in its own Python type; InputError if it is not allowed."""
        if isinstance(value, str) and value in self.choices:
            return value
        if self.kind is bool and isinstance(value, bool):
            return value
        if self._is_number(value) and self.low <= value <= self.high:
            return int(value) if self.kind is int else float(value)
        raise InputError(f"{name} is {value!r}; it must be {self.describe()}")

    def _is_number(self, value: Any) -> bool:
        number = Integral if self.kind is int else Real
        return self.kind in (int, float) and isinstance(value, number) and not isinstance(value, bool)

    def parse(self, name: str, text: str) -> Any:
        """The value a user wrote on the command line; InputError if it cannot be read or is not allowed."""
        words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
        word = text.strip()
        if word in self.choices:
            return word
        if self.kind is bool and word.lower() in words:
            return words[word.lower()]
        if self.kind in (int, float):
            try:
                return self.check(name, self.kind(word))
            except ValueError as error:
                if isinstance(error, InputError):
                    raise
        raise InputError(f"{name} is {text!r}; it must be {self.describe()}")


def _switch(default: bool | str, doc: str, *choices: str) -> Any:
    return field(default=default, metadata={"rule": Rule(doc, bool, choices=choices)})


def _whole(default: int | str, low: int, high: int, doc: str, *choices: str) -> Any:
    return field(default=default, metadata={"rule": Rule(doc, int, low, high, choices)})


def _number(default: float, low: float, high: float, doc: str) -> Any:
    return field(default=default, metadata={"rule": Rule(doc, float, low, high)})


def _choice(doc: str, default: str, *others: str) -> Any:
    return field(default=default, metadata={"rule": Rule(doc, choices=(default, *others))})


@dataclass(frozen=True)
class DirectDragConfig:
    """All settings of one edit; frozen, checked on construction (InputError names field, value and limit).

    The class defaults are the paper's numbers with `preserve`. `preset("default")`, what an edit without a
    configuration uses, changes those of them for which the scene bench measured something better (`MEASURED`).
    Distances are in feature cells (half the working size) unless said.
    """

    # The diffusion trajectory.
    n_inference_step: int = _whole(50, 1, 1000, "DDIM steps of the whole noise schedule")
    inversion_strength: float = _number(0.75, 0.001, 1, "share of the schedule that is inverted and denoised again")

    # The drag loop: drag_end_step x track_per_step x max_drag_per_track latent updates.
    drag_end_step: int = _whole(7, 0, 1000, "denoising steps, the noisiest ones, at which the latent is dragged")
    track_per_step: int = _whole(10, 1, 1000, "point tracking events per drag step")
    max_drag_per_track: int = _whole(3, 1, 1000, "latent updates per tracking event")
    max_track_no_change: int = _whole(5, 1, 100000, "tracking events without movement after which dragging may stop")

    # The three stages of DirectDrag, and mutual self-attention with the unedited picture after dragging.
    soft_mask: bool = _switch(True, "hold the picture still away from the drag paths (auto soft mask)")
    readout_guidance: bool | str = _switch(
        "auto", "keep the appearance that the readout head sees; 'auto' means: if the model has a head", "auto"
    )
    latent_warpage: bool = _switch(True, "start from a latent warped a little along the drags")
    mutual_attention: bool = _switch(True, "denoise with keys and values of the unedited picture (MasaCtrl)")
    preserve: bool = _switch(True, "keep the input's own pixels where the edit changed nothing")

    # Their numbers.
    r1: int = _whole(4, 0, 64, "radius of the motion supervision patch")
    r2: int = _whole(12, 1, 128, "radius of the tracking window")
    d: float = _number(4, 0.01, 64, "longest step of motion supervision")
    reach: float = _number(2, 0, 64, "distance at which a handle has arrived")
    latent_lr: float = _number(0.02, 0, 10, "learning rate of the latent (Adam)")
    lam: float = _number(0.1, 0, 1e6, "weight of the background term")
    readout_weight: float = _number(350, 0, 1e9, "weight of the readout term")
    soft_mask_sigma: float = _number(30, 0.1, 1000, "standard deviation of the soft mask's Gaussian")
    latent_warpage_ratio: float = _number(0.15, 0, 1, "share of each drag that the warp moves")

    # Behaviours, in the order of the data; the first value is ours, `authors` shows the published code's.
    resize: str = _choice("working size: scale both ways and snap to 8, or only shrink", "fit", "shrink")
    round_points: bool = _switch(False, "round points to whole pixels and whole feature cells")
    clamp_margin: int = _whole(0, 0, 1000, "least distance of a point from the border, in working pixels; 0: any")
    clamp_swapped: bool = _switch(False, "clamp x with the height and y with the width")
    mask_form: str = _choice("Gaussian in full, or cut at two sigma with a mirrored border", "closed", "truncated")
    mask_epsilon: float = _number(0, 0, 1, "added to the maximum that the mask is divided by")
    mask_unit: str = _choice(
        "soft_mask_sigma is in cells of a feature grid 256 long, whatever the picture's, or in its own",
        "grid",
        "cells",
    )
    mask_transposed: bool = _switch(False, "draw the mask's paths with rows and columns exchanged")
    warp_reach: str = _choice("the warp moves the whole picture, or fades with the soft mask", "picture", "mask")
    warp_grid: str = _choice("feature points on the latent grid: by cell centres, or divided by 4", "centre", "corner")
    warp_handle_cell: str = _choice("the latent cell exactly at a handle moves, or is lost", "moves", "lost")
    warp_holes: str = _choice("a hole is a cell nothing moved to, or one whose channel 0 is zero", "unclaimed", "zero")
    warp_fill: str = _choice(
        "fill holes from moved cells alone, in raster order from filled ones too, or with what was there",
        "parallel",
        "sequential",
        "keep",
    )
    ms_reference: str = _choice(
        "the moving patch is held to the current features at the handle, or the unedited ones at the first handle",
        "current",
        "initial",
    )
    ms_scale: str = _choice("mean patch difference times (2 r1 + 1)^2, or times (2 r1)^2", "positions", "even")
    ms_border: str = _choice("patches over the border: repeat it, read zeros, or refuse", "clamp", "zero", "refuse")
    track_at_start: bool = _switch(True, "track once at the start of each drag step")
    track_lag: bool = _switch(False, "track on the features of before the latent's update")
    track_pad: str = _choice("tracking over the border: leave out, stop at it, or read zeros", "slice", "clamp", "zero")
    early_stop: str = _choice(
        "stop when the count of unmoved trackings reaches the cap, or only if it equals it between steps",
        "inner_ge",
        "outer_eq",
    )
    rg_reference: str = _choice("readout reference: same time, or the last inversion call", "same_t", "last_inversion")
    rg_loss: str = _choice("readout loss: mean square, or cosine times squared latent range", "l2", "cosine_range2")
    rg_grid: int = _whole(0, 0, 4096, "side of the square grid of readout maps; 0 is the latent's own grid")
    amp_skip: int | str = _whole(
        "none",
        0,
        100000,
        "updates that each drag step begins by skipping; 'emulate' does as a half precision gradient scaler",
        "none",
        "emulate",
    )
    output_rounding: str = _choice("8-bit output: to the nearest level, or cut", "nearest", "truncate")

    def __post_init__(self) -> None:
        for name, rule in RULES.items():
            object.__setattr__(self, name, rule.check(name, getattr(self, name)))
        steps = round(self.inversion_strength * self.n_inference_step)
        if steps < 1:
            raise InputError(
                f"inversion_strength {self.inversion_strength:g} of n_inference_step {self.n_inference_step} leaves no "
                f"step; raise one of them"
            )
        if self.drag_end_step > steps:
            raise InputError(
                f"drag_end_step is {self.drag_end_step}; it must be at most {steps}, the steps that "
                f"inversion_strength {self.inversion_strength:g} of n_inference_step {self.n_inference_step} leaves"
            )

    @classmethod
    def preset(cls, name: str = "default", /, **changes: Any) -> DirectDragConfig:
        """A named configuration with changes: default, paper, authors, gooddrag, fast or preview."""
        if name not in PRESETS:
            raise InputError(f"there is no preset {name!r}{_suggest(name, PRESETS)}; presets are {', '.join(PRESETS)}")
        return cls(**PRESETS[name]).changed(**changes)

    def changed(self, /, **changes: Any) -> DirectDragConfig:
        """A copy with some fields changed; InputError for a field that does not exist."""
        for name in changes:
            _rule(name)
        return replace(self, **changes)

    def changed_from_strings(self, settings: Mapping[str, str]) -> DirectDragConfig:
        """A copy changed by `field=value` texts, as the command line's --set gives them."""
        return self.changed(**{name: _rule(name).parse(name, text) for name, text in settings.items()})

    def to_dict(self) -> dict[str, Any]:
        """All fields with plain values, ready for JSON."""
        return asdict(self)


RULES: dict[str, Rule] = {item.name: item.metadata["rule"] for item in fields(DirectDragConfig)}

# Complete on purpose: what `default` comes to take must not change what the paper says.
_PAPER: dict[str, Any] = {
    "n_inference_step": 50,
    "inversion_strength": 0.75,
    "drag_end_step": 7,
    "track_per_step": 10,
    "max_drag_per_track": 3,
    "max_track_no_change": 5,
    "soft_mask": True,
    "readout_guidance": "auto",
    "latent_warpage": True,
    "mutual_attention": True,
    "preserve": False,
    "r1": 4,
    "r2": 12,
    "d": 4,
    "reach": 2,
    "latent_lr": 0.02,
    "lam": 0.1,
    "readout_weight": 350,
    "soft_mask_sigma": 30,
    "latent_warpage_ratio": 0.15,
    "resize": "fit",
    "round_points": False,
    "clamp_margin": 0,
    "clamp_swapped": False,
    "mask_form": "closed",
    "mask_epsilon": 0,
    "mask_unit": "grid",
    "mask_transposed": False,
    "warp_reach": "picture",
    "warp_grid": "centre",
    "warp_handle_cell": "moves",
    "warp_holes": "unclaimed",
    "warp_fill": "parallel",
    "ms_reference": "current",
    "ms_scale": "positions",
    "ms_border": "clamp",
    "track_at_start": True,
    "track_lag": False,
    "track_pad": "slice",
    "early_stop": "inner_ge",
    "rg_reference": "same_t",
    "rg_loss": "l2",
    "rg_grid": 0,
    "amp_skip": "none",
    "output_rounding": "nearest",
}
_AUTHORS: dict[str, Any] = {
    **_PAPER,
    "resize": "shrink",
    "round_points": True,
    "clamp_margin": 12,
    "clamp_swapped": True,
    "mask_form": "truncated",
    "mask_epsilon": 1e-6,
    "mask_unit": "cells",
    "mask_transposed": True,
    "warp_grid": "corner",
    "warp_handle_cell": "lost",
    "warp_holes": "zero",
    "warp_fill": "sequential",
    "ms_reference": "initial",
    "ms_scale": "even",
    "ms_border": "refuse",
    "track_lag": True,
    "track_pad": "zero",
    "early_stop": "outer_eq",
    "rg_reference": "last_inversion",
    "rg_loss": "cosine_range2",
    "rg_grid": 64,
    "amp_skip": "emulate",
    "output_rounding": "truncate",
}
# What the scene bench showed to be better than the paper's value; docs/quality.md has the figures.
MEASURED: dict[str, Any] = {
    "latent_warpage_ratio": 1.0,
    "warp_reach": "mask",
    "ms_reference": "initial",
    "reach": 0.75,
    "readout_weight": 20,
}
_STAGES_OFF = {"soft_mask": False, "readout_guidance": False, "latent_warpage": False}

PRESETS: dict[str, dict[str, Any]] = {
    "default": MEASURED,
    "paper": _PAPER,
    "authors": _AUTHORS,
    "gooddrag": {
        **_AUTHORS, **_STAGES_OFF, "clamp_margin": 0, "clamp_swapped": False, "track_pad": "slice",
        "early_stop": "inner_ge", "amp_skip": "none",
    },
    "fast": {**MEASURED, "n_inference_step": 25, "drag_end_step": 4, "track_per_step": 8},
    "preview": {**MEASURED, "n_inference_step": 16, "drag_end_step": 3, "track_per_step": 5},
}  # fmt: skip


@dataclass(frozen=True)
class AblationRow:
    """One row of the paper's ablation table: a configuration, and whether the edit is given the picture's prompt."""

    config: DirectDragConfig
    prompt: bool = False


def ablation(preset: str = "paper") -> dict[str, AblationRow]:
    """The paper's six ablation rows on a preset, in the table's order (the "+prompt" rows need the caller's prompt)."""
    full = DirectDragConfig.preset(preset, soft_mask=True, readout_guidance=True, latent_warpage=True)
    guided = full.changed(latent_warpage=False)
    return {
        "baseline": AblationRow(full.changed(**_STAGES_OFF)),
        "+SM": AblationRow(guided.changed(readout_guidance=False)),
        "+SM+RG": AblationRow(guided),
        "+SM+RG +prompt": AblationRow(guided, prompt=True),
        "+SM+RG+LWF": AblationRow(full),
        "+SM+RG+LWF +prompt": AblationRow(full, prompt=True),
    }


def _rule(name: str) -> Rule:
    if name not in RULES:
        raise InputError(f"there is no setting {name!r}{_suggest(name, RULES)}; see `ddengine edit --help`")
    return RULES[name]


def _suggest(name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(str(name), known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


ABLATION = ablation()
