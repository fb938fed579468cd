"""The reference trajectory: the unedited picture denoised again, and what the edit is held to on the way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ddengine.backends.passes import Passes
from ddengine.config import DirectDragConfig
from ddengine.directdrag.memory import Place, Shelf
from ddengine.directdrag.readout import readout_grid
from ddengine.directdrag.run import Run
from ddengine.models.network import Observation
from ddengine.models.unet import KeyValue
from ddengine.schedule import ddim_step


@dataclass(frozen=True)
class Reference:
    """The unedited trajectory from the inverted latent down, as far as it was followed. No edit changes a tensor of it.

    latents: [1,4,h,w] entering each step, and one more leaving the last; with all steps followed, that is the end of no
    edit. features: drag feature map [1,C,h,w] of each drag step. appearance: readout map [1,P,g,g'] of each drag step,
    None where readout guidance is off. kv: keys and values of every step for mutual self-attention, on the device or in
    pinned host memory, None where they are made again during the edit.
    """

    latents: tuple[Tensor, ...]
    features: tuple[Tensor, ...]
    appearance: tuple[Tensor, ...] | None
    kv: tuple[tuple[KeyValue, ...], ...] | None

    @property
    def kv_place(self) -> Place:
        """Where the keys and values are."""
        if self.kv is None:
            return "recompute"
        return "device" if self.kv[0][0][0].device == self.latents[0].device else "host"


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
    kv_budget: int | None,
) -> Reference:
    """Denoise the inverted latent without any edit and record the reference of every drag step.

    y ← z_T ; per step: (ε, F*_t) = U(y, t), y ← DDIM(ε, t, y), O_t ← y                (DirectDrag, AIDD schedule)

    guided: record the readout's maps too, once per time, of this trajectory or, where given, the last inversion call's.
    The steps after the drag are followed if the keys and values of all steps find a place (`place_kv`), or if only the
    end is wanted, by `preserve`: the edit then needs no second row. Keys and values of the drag steps are kept as well,
    a fifth of all: they cost no pass here, and up to six in an edit whose handles arrive early.
    """
    latents, features, appearance = [inverted], [], []
    drags, shelf = config.drag_end_step, None
    keeps = config.mutual_attention and kv_budget != 0
    # Made again during an edit, keys and values bring the end along; following it here would be walking twice.
    steps = len(times) if keeps or (config.preserve and not config.mutual_attention) else drags
    step = 0
    while step < steps:
        t = times[step]
        reads = guided and last_inversion is None and step < drags
        out = passes.reference(latents[-1], t, readout_hw=readout_grid(config, inverted) if reads else None)
        run.count("reference", forward=1)
        if keeps and step == 0:
            shelf = Shelf(out.kv, len(times), passes.device, kv_budget)
            if shelf.place == "recompute":
                shelf, steps = None, max(drags, 1)
        latents.append(ddim_step(passes.schedule, out.noise, t, latents[-1], spacing))
        if shelf is not None:
            shelf.put(out.kv)
        if step < drags:
            features.append(out.feature)
            if guided:
                appearance.append(out.appearance[0] if last_inversion is None else last_inversion.appearance[step])
        step += 1
        run.report("reference", step, steps)
    return Reference(
        tuple(latents),
        tuple(features),
        tuple(appearance) if guided else None,
        None if shelf is None else tuple(shelf.rows),
    )
