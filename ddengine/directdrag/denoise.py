"""Denoising the edit: the noise prediction of one step, with or without attention to the unedited picture."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ddengine.backends.passes import Passes
from ddengine.directdrag.memory import KeptKeyValues
from ddengine.directdrag.reference import Reference
from ddengine.directdrag.run import Run
from ddengine.models.network import Observation
from ddengine.models.unet import KeyValue
from ddengine.schedule import ddim_step


class ReferenceRow:
    """The unedited picture beside the edit: each step's keys and values and its end, from memory or by walking along.

    Both are the same whether they were kept, and where, or are made again.
    """

    def __init__(self, passes: Passes, reference: Reference, spacing: int, run: Run) -> None:
        self._passes, self._spacing, self._run = passes, spacing, run
        self._latents = list(reference.latents)
        self._kept = None if reference.kv is None else KeptKeyValues(reference.kv, passes.device)

    def key_value(self, step: int, t: int) -> tuple[KeyValue, ...]:
        """Keys and values of denoising step `step` at time t; steps are asked for in order and without gaps."""
        if self._kept is not None:
            return self._kept[step]
        return self._walk(step, t).kv

    def end(self, times: Sequence[int]) -> Tensor:
        """The final latent [1,4,h,w] of no edit, after all denoising `times`."""
        for step in range(len(self._latents) - 1, len(times)):
            self._walk(step, times[step])
        return self._latents[-1]

    def _walk(self, step: int, t: int) -> Observation:
        latent = self._latents[step]
        out = self._passes.reference(latent, t)
        self._run.count("denoise", forward=1)
        if step + 1 == len(self._latents):
            self._latents.append(ddim_step(self._passes.schedule, out.noise, t, latent, self._spacing))
        return out


def predict_noise(
    passes: Passes, latent: Tensor, t: int, run: Run, *, reference_kv: tuple[KeyValue, ...] | None = None
) -> Tensor:
    """The edit's noise prediction [1,4,h,w] at time t.

    reference_kv: keys and values of the unedited picture, which the edit's queries then attend to instead of their
    own in the last two up blocks (mutual self-attention, MasaCtrl); None: plain.
    """
    run.count("denoise", forward=1)
    return passes.predict(latent, t) if reference_kv is None else passes.denoise(latent, t, reference_kv)
