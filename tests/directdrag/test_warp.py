"""The warp as a stage: whole by default, fading with the soft mask, confined by a user's mask."""

from __future__ import annotations

import torch

from ddengine.config import DirectDragConfig
from ddengine.directdrag.mask import path_mask
from ddengine.directdrag.warp import warp

LATENT = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
HANDLES, TARGETS = torch.tensor([[20.0, 20.0]]), torch.tensor([[20.0, 32.0]])
GRID = (64, 64)


def moved(config: DirectDragConfig, **options: torch.Tensor) -> torch.Tensor:
    """Which latent cells [16,16] the warp changed."""
    return (warp(LATENT, HANDLES, TARGETS, GRID, config, **options) != LATENT).any(1)[0]


def test_whole_picture_or_near_the_paths() -> None:
    whole = DirectDragConfig(latent_warpage_ratio=1.0)
    near = whole.changed(warp_reach="mask")
    everywhere, around = moved(whole), moved(near)
    assert around.sum() > 4
    assert everywhere.sum() > 2 * around.sum()
    mask = path_mask(HANDLES, TARGETS, GRID, near)[::4, ::4]
    assert mask[around].min() > 0.05  # beyond that the shortened displacement rounds to nothing
    # At the handle the displacement is whole: its cell arrives three cells to the right.
    warped = warp(LATENT, HANDLES, TARGETS, GRID, near)
    assert torch.equal(warped[..., 5, 8], LATENT[..., 5, 5])


def test_a_users_mask_confines_the_warp() -> None:
    mask = torch.zeros(GRID)
    mask[8:40, 8:48] = 1
    for reach in ("picture", "mask"):
        changed = moved(DirectDragConfig(latent_warpage_ratio=1.0, warp_reach=reach), user_mask=mask)
        assert changed.any()
        assert not changed[mask[::4, ::4] == 0].any()


def test_nothing_to_warp_gives_back_the_latent() -> None:
    config = DirectDragConfig(latent_warpage_ratio=0.0)
    assert not moved(config).any()
    assert not moved(config.changed(latent_warpage_ratio=1.0), user_mask=torch.zeros(GRID)).any()
