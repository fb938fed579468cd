"""The DDIM noise schedule: its table, its times, and the one step that moves a latent between two noise levels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ddengine.errors import InputError, ModelError


@dataclass(frozen=True)
class Schedule:
    """The cumulative signal levels a latent diffusion model was trained with.

    alphas_cumprod: float32 [T], the signal level ā_t of each training time t, decreasing.
    steps_offset: added to every sampling time (1 for Stable Diffusion, so the last time is 1, not 0).
    final_alpha: the level "before the first step"; None means ā_0.
    """

    alphas_cumprod: Tensor
    steps_offset: int = 1
    final_alpha: float | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | None = None) -> Schedule:
        """Build the schedule from a diffusers scheduler config; a missing entry takes Stable Diffusion 1.5's value.

        The betas are float32 and, for "scaled_linear", the square of a linear ramp of their roots.
        Raises ModelError for a schedule or a prediction type that the method is not defined for.
        """
        config = dict(config or {})
        prediction = config.get("prediction_type", "epsilon")
        if prediction != "epsilon":
            raise ModelError(f"the model predicts {prediction!r}; drag editing needs a model that predicts 'epsilon'")
        start, end = config.get("beta_start", 0.00085), config.get("beta_end", 0.012)
        count, kind = config.get("num_train_timesteps", 1000), config.get("beta_schedule", "scaled_linear")
        if config.get("trained_betas") is not None:
            betas = torch.tensor(config["trained_betas"], dtype=torch.float32)
        elif kind == "scaled_linear":
            betas = torch.linspace(start**0.5, end**0.5, count, dtype=torch.float32) ** 2
        elif kind == "linear":
            betas = torch.linspace(start, end, count, dtype=torch.float32)
        else:
            raise ModelError(f"beta schedule {kind!r} is not supported; it must be 'scaled_linear' or 'linear'")
        return cls(
            alphas_cumprod=torch.cumprod(1.0 - betas, dim=0),
            steps_offset=config.get("steps_offset", 1),
            final_alpha=1.0 if config.get("set_alpha_to_one", False) else None,
        )

    @cached_property
    def _table(self) -> list[float]:
        return self.alphas_cumprod.double().tolist()

    def alpha(self, t: int) -> float:
        """The signal level ā_t; a time below zero is the level before the first step."""
        if t < 0:
            return self._table[0] if self.final_alpha is None else self.final_alpha
        return self._table[t]

    def spacing(self, n_inference_step: int) -> int:
        """The distance between two sampling times ("leading" spacing)."""
        return len(self._table) // n_inference_step

    def timesteps(self, n_inference_step: int, strength: float = 1.0) -> tuple[int, ...]:
        """The sampling times in descending order, the last `round(strength * n)` of them (halves round to even).

        For 50 steps and strength 0.75: 741, 721, ..., 21, 1. Raises InputError where the schedule has no such times.
        """
        count = round(strength * n_inference_step)
        if not 1 <= count <= n_inference_step <= len(self._table):
            raise InputError(
                f"{n_inference_step} steps at strength {strength:g} give {count} sampling steps; the schedule needs "
                f"1 to {len(self._table)}: change n_inference_step or inversion_strength"
            )
        spacing = self.spacing(n_inference_step)
        top = (count - 1) * spacing + self.steps_offset
        if top >= len(self._table):
            raise InputError(
                f"{n_inference_step} steps at strength {strength:g} start at time {top}, the schedule ends at "
                f"{len(self._table) - 1}: lower n_inference_step or inversion_strength"
            )
        return tuple(k * spacing + self.steps_offset for k in reversed(range(count)))


def coefficients(alpha_from: float, alpha_to: float) -> tuple[float, float]:
    """(A, B) of the deterministic DDIM move z_to = A z_from + B ε between two signal levels.

    x̂0 = (z − √(1−ā_from) ε)/√ā_from ;  z_to = √ā_to x̂0 + √(1−ā_to) ε        (DDIM, η = 0)
    """
    scale = (alpha_to / alpha_from) ** 0.5
    return scale, (1.0 - alpha_to) ** 0.5 - scale * (1.0 - alpha_from) ** 0.5


def ddim_step(schedule: Schedule, noise: Tensor, t: int, latent: Tensor, spacing: int) -> Tensor:
    """One denoising step from time t to t − spacing; latent and noise [B,4,h,w] (DDIM, η = 0)."""
    a, b = coefficients(schedule.alpha(t), schedule.alpha(t - spacing))
    return a * latent + b * noise


def invert_step(schedule: Schedule, noise: Tensor, t: int, latent: Tensor, spacing: int) -> Tensor:
    """One inversion step to time t from t − spacing; the noise is predicted at the *target* time t (DDIM inversion)."""
    a, b = coefficients(schedule.alpha(t - spacing), schedule.alpha(t))
    return a * latent + b * noise


def predicted_image(schedule: Schedule, noise: Tensor, t: int, latent: Tensor) -> Tensor:
    """The clean latent x̂0 that the noise prediction at time t implies, [B,4,h,w]: what a preview decodes."""
    a, b = coefficients(schedule.alpha(t), 1.0)
    return a * latent + b * noise
