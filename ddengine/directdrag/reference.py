"""The reference trajectory: the unedited picture denoised again, and what the edit is held to on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ddengine.backends.passes import Passes
from ddengine.config import DirectDragConfig
from ddengine.directdrag.readout import readout_grid
from ddengine.directdrag.run import Run
from ddengine.models.network import Observation
from ddengine.models.unet import KeyValue
from ddengine.schedule import ddim_step


@dataclass(frozen=True)
class Reference:
    """The unedited trajectory from the inverted latent down, as far as it was followed.

    latents: [1,4,h,w] entering each step, and one more leaving the last. features: drag feature map [1,C,h,w] of each
    drag step. appearance: readout map [1,P,g,g'] of each drag step, None where readout guidance is off. kv: keys and
    values of every step for mutual self-attention, None where they are made again during the edit.
    """

    latents: tuple[Tensor, ...]
    features: tuple[Tensor, ...]
    appearance: tuple[Tensor, ...] | None
    kv: tuple[tuple[KeyValue, ...], ...] | None


def follow(
    passes: Passes,
    inverted: Tensor,
    times: Sequence[int],
    spacing: int,
    config: DirectDragConfig,
    run: Run,
    *,
    last_inversion: Observation | None,
    guided: bool,
    kv_budget: int,
) -> Reference:
    """Denoise the inverted latent without any edit and record the reference of every drag step.

    y ← z_T ; per step: (ε, F*_t) = U(y, t), y ← DDIM(ε, t, y), O_t ← y                (DirectDrag, AIDD schedule)

    guided: record the readout's maps too, once per time, of this trajectory or, where given, the last inversion call's.
    The steps after the drag are followed only if the keys and values of all steps fit in `kv_budget`
    bytes; the edit then needs no second row.
    """
    latents, features, appearance, kv = [inverted], [], [], []
    steps = config.drag_end_step
    keep_kv = config.mutual_attention and kv_budget > 0
    step = 0
    while step < (len(times) if keep_kv else steps):
        t = times[step]
        reads = guided and last_inversion is None and step < steps
        out = passes.reference(latents[-1], t, readout_hw=readout_grid(config, inverted) if reads else None)
        run.count("reference", forward=1)
        if keep_kv and step == 0:
            size = sum(tensor.numel() * tensor.element_size() for pair in out.kv for tensor in pair)
            keep_kv = size * len(times) <= kv_budget
        latents.append(ddim_step(passes.schedule, out.noise, t, latents[-1], spacing))
        if keep_kv:
            kv.append(out.kv)
        if step < steps:
            features.append(out.feature)
            if guided:
                appearance.append(out.appearance[0] if last_inversion is None else last_inversion.appearance[step])
        step += 1
        run.report("reference", step, len(times) if keep_kv else steps)
    return Reference(
        tuple(latents), tuple(features), tuple(appearance) if guided else None, tuple(kv) if keep_kv else None
    )
