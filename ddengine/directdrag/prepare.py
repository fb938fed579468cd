"""Everything about a picture that no drag changes: encoded, inverted, and its unedited trajectory recorded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ddengine.backends.passes import Passes
from ddengine.config import DirectDragConfig
from ddengine.directdrag.invert import invert
from ddengine.directdrag.memory import check_budget
from ddengine.directdrag.readout import readout_grid, uses_readout
from ddengine.directdrag.reference import Reference, follow
from ddengine.directdrag.run import Run, Step
from ddengine.errors import InputError


@dataclass(frozen=True)
class Prepared:
    """A picture made ready for any number of edits, none of which changes a tensor of it.

    work_hw, feature_hw: working size and feature grid (rows, columns). encoded z_0 and inverted z_T: [1,4,h,w].
    times: descending denoising times; spacing: distance of two times. config: what it was made with; an edit
    may differ in all that `check` allows. passes and timings: what it cost, by stage.
    """

    work_hw: tuple[int, int]
    feature_hw: tuple[int, int]
    encoded: Tensor
    inverted: Tensor
    times: tuple[int, ...]
    spacing: int
    reference: Reference
    config: DirectDragConfig
    passes: dict[str, dict[str, int]]
    timings: dict[str, float]

    def check(self, config: DirectDragConfig, guided: bool) -> None:
        """InputError if an edit with `config`, with or without readout guidance, cannot start from this preparation."""
        depends = ["n_inference_step", "inversion_strength", "resize"]
        if guided and config.drag_end_step:
            if self.reference.appearance is None:
                raise InputError(
                    "the source was prepared without readout guidance, the edit asks for it; prepare the picture again "
                    "with the edit's configuration"
                )
            depends += ["rg_reference", "rg_grid"]
        names = [name for name in depends if getattr(self.config, name) != getattr(config, name)]
        if config.drag_end_step > len(self.reference.features):
            names.append("drag_end_step")
        if names:
            had, wanted = (
                ", ".join(f"{name}={getattr(which, name)}" for name in names) for which in (self.config, config)
            )
            raise InputError(
                f"the source was prepared with {had}, the edit asks for {wanted}; prepare the picture again with the "
                f"edit's configuration"
            )


def prepare(
    passes: Passes,
    image: Tensor,
    config: DirectDragConfig,
    progress: Callable[[Step], None] | None = None,
    *,
    kv_budget: int | None = None,
) -> Prepared:
    """Encode and invert a picture and record its reference trajectory.

    image: [1,3,H,W] in −1..1 at the working size. kv_budget: bytes of the device that the keys and values of the whole
    trajectory may take, None for the default of `place_kv`; without a place each edit walks the unedited row again.
    Raises InputError, ModelError, and whatever `progress` raises.
    """
    check_budget(kv_budget)
    run = Run(passes.device, progress)
    guided = uses_readout(config, passes)
    times = passes.schedule.timesteps(config.n_inference_step, config.inversion_strength)
    spacing = passes.schedule.spacing(config.n_inference_step)
    height, width = image.shape[-2:]
    with torch.no_grad():
        with run.stage("encode"):
            encoded = passes.encode(image)
            run.report("encode", 1, 1)
        with run.stage("invert"):
            keep_last = guided and config.rg_reference == "last_inversion"
            inverted, last = invert(
                passes,
                encoded,
                times,
                spacing,
                run,
                readout_hw=readout_grid(config, encoded) if keep_last else None,
                readout_times=times[: config.drag_end_step],
            )
        with run.stage("reference"):
            reference = follow(
                passes, inverted, times, spacing, config, run, last_inversion=last, guided=guided, kv_budget=kv_budget
            )
    return Prepared(
        work_hw=(height, width),
        feature_hw=(height // 2, width // 2),
        encoded=encoded,
        inverted=inverted,
        times=times,
        spacing=spacing,
        reference=reference,
        config=config,
        passes=run.passes,
        timings=run.seconds,
    )
