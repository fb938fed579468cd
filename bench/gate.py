"""Equality before speed: another code's first drag step against this engine's eager one, update by update.

Trajectories fork on rounding (Adam's first updates follow the sign of a gradient, tracking takes an argmin), so that
whole edits need not agree. What must agree is every update from the same state: the engine is given the latent and the
handles that the other code had, and its losses and its gradient are compared; and the handles of the first trackings.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ddengine.backends.passes import Passes
from ddengine.bench.published import Update
from ddengine.config import DirectDragConfig
from ddengine.directdrag.drag import make_goal
from ddengine.directdrag.mask import edit_mask, latent_mask
from ddengine.directdrag.prepare import Prepared
from ddengine.directdrag.readout import readout_grid, uses_readout
from ddengine.directdrag.step import Rules, losses

# Largest difference of a loss, as a share of the total; usual one of the gradient, of its norm; largest one of handles,
# in feature cells. In half precision the background's gradient has the sign of rounding in too many places to compare.
LIMITS: dict[torch.dtype, tuple[float, float, float]] = {
    torch.float64: (1e-3, 1e-3, 0.0),
    torch.float32: (1e-3, 1e-2, 0.0),
    torch.float16: (2e-2, math.inf, 1.0),
    torch.bfloat16: (1e-1, math.inf, 2.0),
}
TRACKINGS = 2  # of the first drag step, whose handles must agree


@dataclass(frozen=True)
class Compared:
    """How far a code is from the engine's eager one: differences as in `LIMITS`, over so many updates."""

    updates: int
    loss: float
    gradient: float
    handles: float
    equal: bool

    def facts(self) -> dict[str, Any]:
        return asdict(self)


class Gate:
    """This engine's eager drag of one picture, to compare others with."""

    def __init__(
        self,
        passes: Passes,
        prepared: Prepared,
        handles_yx: Tensor,
        targets_yx: Tensor,
        config: DirectDragConfig,
        expected: Sequence[Update],
    ) -> None:
        """passes: eager. expected: the engine's own updates of the first drag step."""
        self._passes, self._prepared, self._config, self._expected = passes, prepared, config, expected
        grid = readout_grid(config, prepared.inverted) if uses_readout(config, passes) else None
        self._rules = Rules(config, prepared.feature_hw, grid)
        self._first, self._targets = (points.to(passes.device)[None].float() for points in (handles_yx, targets_yx))

    def compare(self, updates: Sequence[Update], edits: int = 1) -> Compared:
        """Largest differences of so many edits of a batch, over the updates of a first drag step.

        An edit that made no update is not equal to anything.
        """
        each = [self._compare([update for update in updates if update.edit == edit]) for edit in range(edits)]
        return Compared(
            min(one.updates for one in each),
            max(one.loss for one in each),
            max(one.gradient for one in each),
            max(one.handles for one in each),
            all(one.equal for one in each),
        )

    def _compare(self, updates: Sequence[Update]) -> Compared:
        """Of one edit."""
        found = [update for update in updates if update.step == 0]
        limits, gaps = LIMITS[self._passes.dtype], [self._gaps(update, found[0]) for update in found]
        loss = max((gap[0] for gap in gaps), default=math.inf)
        # Where the warp moved nothing, the first update's background has no difference but rounding, whose sign is its
        # gradient; later a single cell may be so near. The middle one of the later updates says what the code does.
        gradient = statistics.median([gap[1] for gap in gaps[1:] or gaps] or [math.inf])
        within = [update for update in found if update.number < TRACKINGS * self._config.max_drag_per_track]
        pairs = zip(within, self._expected, strict=False)
        handles = max(
            (float((one.handles_yx.cpu() - other.handles_yx.cpu()).abs().max()) for one, other in pairs),
            default=math.inf,
        )
        worst = loss, gradient, handles
        equal = bool(found) and all(gap <= limit for gap, limit in zip(worst, limits, strict=True))
        return Compared(len(found), *worst, equal)

    def _gaps(self, update: Update, first: Update) -> tuple[float, float]:
        """Of losses and gradient, from the state that an update started from."""
        prepared, config, passes = self._prepared, self._config, self._passes
        reference, t = prepared.reference, prepared.times[0]
        mask = edit_mask(self._first[0], self._targets[0], prepared.feature_hw, config)
        latent_hw = prepared.inverted.shape[-2], prepared.inverted.shape[-1]
        handles = update.handles_yx.to(passes.device)[None]
        goal = make_goal(
            passes.schedule,
            t,
            prepared.spacing,
            latent=first.latent,
            first_handles_yx=self._first,
            targets_yx=self._targets,
            valid=torch.ones_like(self._first[..., 0], dtype=torch.bool),
            features=[reference.features[0]],
            before=reference.latents[0],
            after=reference.latents[1],
            background=1 - latent_mask(mask, latent_hw),
            appearance=[reference.appearance[0]] if reference.appearance else [],
            rules=self._rules,
            rounding=passes.rounding,
        )
        leaf = update.latent.detach().clone().requires_grad_()
        with torch.enable_grad():
            seen = passes.supervise(leaf, goal.timestep, readout_hw=self._rules.readout_hw)
            terms = losses(seen, leaf, handles, goal, self._rules)
            (gradient,) = torch.autograd.grad(terms.total.sum(), leaf)
        weights = (1.0, config.lam, config.readout_weight, 1.0)
        total = max(abs(terms.total.item()), 1e-12)
        apart = [
            _or_infinite(weight * abs(ours.item() - theirs) / total)
            for weight, ours, theirs in zip(weights, terms, update.losses, strict=True)
        ]
        size = torch.linalg.vector_norm(gradient).clamp_min(1e-12)
        off = float(torch.linalg.vector_norm(gradient - update.gradient.to(gradient)) / size)
        return max(apart), _or_infinite(off)


def _or_infinite(value: float) -> float:
    return math.inf if math.isnan(value) else value
