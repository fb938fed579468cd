"""DDIM inversion: from the encoded picture up to the noise level where the drag starts."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ddengine.backends.passes import Passes, Size
from ddengine.directdrag.run import Run
from ddengine.models.network import Observation
from ddengine.schedule import invert_step


def invert(
    passes: Passes,
    latent: Tensor,
    times: Sequence[int],
    spacing: int,
    run: Run,
    *,
    readout_hw: Size | None = None,
    readout_times: Sequence[int] = (),
) -> tuple[Tensor, Observation | None]:
    """The latent [1,4,h,w] at the noisiest of the descending `times`, and what the last network call observed.

    At each time t, in ascending order, ε = U(z_s, t) with z_s the latent at the level below (s = t − spacing), then

        x̂0 = (z_s − √(1−ā_s) ε)/√ā_s ;  z_t = √ā_t x̂0 + √(1−ā_t) ε                   (DirectDrag, DDIM inversion)

    readout_hw, readout_times: read the last call's appearance on that grid, once for each time the head is told; None
    returns no observation.
    """
    last = None
    for step, t in enumerate(reversed(times), start=1):
        if readout_hw is not None and step == len(times):
            last = passes.reference(latent, t, readout_hw=readout_hw, readout_times=readout_times)
            noise = last.noise
        else:
            noise = passes.predict(latent, t)
        run.count("invert", forward=1)
        latent = invert_step(passes.schedule, noise, t, latent, spacing)
        run.report("invert", step, len(times))
    return latent, last
