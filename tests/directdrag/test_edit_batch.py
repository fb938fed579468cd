"""Edits in a batch: each comes out as it would alone, whatever the others do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ddengine.backends.eager import EagerPasses
from ddengine.config import DirectDragConfig
from ddengine.directdrag.drag import PlainUnit
from ddengine.directdrag.edit import Edited, Task, edit, edit_batch, padded
from ddengine.directdrag.prepare import Prepared, prepare
from ddengine.errors import InputError

CONFIG = DirectDragConfig.preset(
    "default", n_inference_step=8, drag_end_step=2, track_per_step=2, max_drag_per_track=2, r2=3, reach=0.5,
    max_track_no_change=100, lam=0, latent_warpage_ratio=0.5,
)  # fmt: skip


def picture(seed: int, height: int = 64, width: int = 96) -> Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


class FixedUnit(PlainUnit):
    """The plain step, asked to keep its shapes as a compiled one does."""

    fixed = True


@pytest.fixture(scope="module")
def sources(tiny_passes: EagerPasses) -> list[Prepared]:
    return [prepare(tiny_passes, picture(seed), CONFIG) for seed in (1, 2)]


@pytest.fixture(scope="module")
def tasks(sources: list[Prepared]) -> list[Task]:
    """Two drags on one picture, one on another, one that has arrived before it starts, one with a mask."""
    one, two = torch.tensor([[20.0, 12.0]]), torch.tensor([[11.0, 30.0], [24.0, 14.0], [8.0, 9.0]])
    half = torch.zeros(32, 48, dtype=torch.bool)
    half[16:] = True
    return [
        Task(sources[0], one, one + torch.tensor([2.0, 6.0])),
        Task(sources[0], two, two + torch.tensor([-3.0, 3.0])),
        Task(sources[1], one, one + 0.1),
        Task(sources[1], one, one + torch.tensor([3.0, 3.0]), half),
    ]


@pytest.fixture(scope="module")
def alone(tiny_passes: EagerPasses, tasks: list[Task]) -> list[Edited]:
    return [
        edit(tiny_passes, task.prepared, task.handles_yx, task.targets_yx, CONFIG, user_mask=task.user_mask)
        for task in tasks
    ]


def check(found: Edited, wanted: Edited) -> None:
    """Adam's first step is the sign of the gradient, so single elements may flip: bounded in number, not in size."""
    assert torch.equal(found.handles_yx, wanted.handles_yx) and torch.equal(found.mask, wanted.mask)
    assert torch.allclose(found.unedited, wanted.unedited, atol=1e-4)
    apart = (found.latent - wanted.latent).abs()
    assert apart.quantile(0.98) < 1e-3 and apart.max() < 0.2
    assert len(found.history) == len(wanted.history)
    for one, other in zip(found.history, wanted.history, strict=True):
        assert (one.step, one.t, one.updated) == (other.step, other.t, other.updated)
        assert one.handles_yx == other.handles_yx
        assert one.total_loss == pytest.approx(other.total_loss, rel=1e-2)


@pytest.mark.parametrize("kind", [PlainUnit, FixedUnit])
def test_each_edit_is_its_single_run(
    tiny_passes: EagerPasses, tasks: list[Task], alone: list[Edited], kind: Any
) -> None:
    together = edit_batch(tiny_passes, tasks, CONFIG, unit=lambda passes, rules, _: kind(passes, rules))
    for found, wanted in zip(together, alone, strict=True):
        check(found, wanted)
    assert not together[2].history and len(together[0].history) == 8
    assert (together[0].latent - together[1].latent).abs().max() > 0.1


def test_an_edit_that_has_ended_costs_nothing(tiny_passes: EagerPasses, tasks: list[Task]) -> None:
    sizes: dict[str, list[int]] = {"supervise": [], "predict": [], "denoise": []}

    class Watched(EagerPasses):
        def supervise(self, latent: Tensor, timestep: Any, **options: Any) -> Any:
            sizes["supervise"].append(len(latent))
            return super().supervise(latent, timestep, **options)

        def denoise(self, latent: Tensor, timestep: Any, reference_kv: Any) -> Tensor:
            sizes["denoise"].append(len(latent))
            return super().denoise(latent, timestep, reference_kv)

    edit_batch(Watched(tiny_passes.model), tasks, CONFIG)
    # Found at the first look, the third edit is denoised alone while the others are dragged once more.
    assert sizes["supervise"] == [4] * 5 + [3] * 5 and sizes["denoise"] == [1, 4, 4, 4, 4]


def test_points_are_padded_and_marked() -> None:
    pairs = [(torch.ones(n, 2), 2 * torch.ones(n, 2)) for n in (1, 3)]
    handles, targets, valid = padded(pairs)
    assert handles.shape == targets.shape == (2, 3, 2) and valid.tolist() == [[True, False, False], [True] * 3]
    assert torch.equal(targets[valid], torch.full((4, 2), 2.0))
    assert [padded([pairs[1]] * 2, to_power_of_two=True)[2].shape, padded(pairs[:1])[2].shape] == [(2, 4), (1, 1)]


def test_pictures_of_one_size_only(tiny_passes: EagerPasses, tasks: list[Task]) -> None:
    tall = prepare(tiny_passes, picture(3, 96, 64), CONFIG)
    with pytest.raises(InputError, match=r"working sizes \(64, 96\) and \(96, 64\).*one size together"):
        edit_batch(tiny_passes, [tasks[0], Task(tall, tasks[0].handles_yx, tasks[0].targets_yx)], CONFIG)
    with pytest.raises(InputError, match="no edits"):
        edit_batch(tiny_passes, [], CONFIG)


def test_passes_for_single_latents_get_single_latents(
    tiny_passes: EagerPasses, tasks: list[Task], alone: list[Edited]
) -> None:
    class Single(EagerPasses):
        any_batch = False

        def denoise(self, latent: Tensor, timestep: Any, reference_kv: Any) -> Tensor:
            assert len(latent) == 1
            return super().denoise(latent, timestep, reference_kv)

    passes = Single(tiny_passes.model)
    together = edit_batch(passes, tasks[:2], CONFIG, unit=lambda given, rules, _: PlainUnit(given, rules))
    for found, wanted in zip(together, alone, strict=False):
        check(found, wanted)
