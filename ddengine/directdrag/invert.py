"""DDIM inversion: from the encoded picture up to the noise level where the drag starts."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ddengine.backends.passes import Passes
from ddengine.directdrag.run import Run
from ddengine.models.unet import UNetOutput
from ddengine.schedule import invert_step


def invert(
    passes: Passes, latent: Tensor, times: Sequence[int], spacing: int, run: Run, *, keep_last: bool = False
) -> tuple[Tensor, UNetOutput | None]:
    """The latent [1,4,h,w] at the noisiest of the descending `times`, and the last network call's inner tensors.

    At each time t, in ascending order, ε = U(z_s, t) with z_s the latent at the level below (s = t − spacing), then

        x̂0 = (z_s − √(1−ā_s) ε)/√ā_s ;  z_t = √ā_t x̂0 + √(1−ā_t) ε                   (DirectDrag, DDIM inversion)

    keep_last=False skips those inner tensors and returns None for them.
    """
    last = None
    for step, t in enumerate(reversed(times), start=1):
        if keep_last and step == len(times):
            last = passes.reference(latent, t)
            noise = last.epsilon
        else:
            noise = passes.predict(latent, t)
        run.count("invert", forward=1)
        latent = invert_step(passes.schedule, noise, t, latent, spacing)
        run.report("invert", step, len(times))
    return latent, last
