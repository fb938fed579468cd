"""A readout head trained on triplets of the embedded model tells decay from motion better than an untrained one."""

from __future__ import annotations

import torch

from ddengine.models.load import load_model
from ddengine.models.readout_io import tap_dims
from ddengine.training import diffusion, readout
from ddengine.training.loop import Plan


def test_training_widens_the_gap_between_distorted_and_preserved(tmp_path):
    model = load_model("embedded")
    members = readout.triplets(model, 16, seed=3)
    assert {name: tuple(value.shape) for name, value in members.items()} == {
        "anchor": (16, 4, 16, 16), "preserved": (16, 4, 16, 16), "distorted": (16, 4, 16, 16), "same": (16, 1, 16, 16)
    }  # fmt: skip
    assert 0.3 < members["same"].mean() < 1  # a part moved, most of the picture did not
    apart = (members["anchor"] - members["preserved"]).abs() * members["same"]
    assert apart.mean() < 0.3 * (members["anchor"] - members["distorted"]).abs().mean()

    head = readout.train(tmp_path, model, members, Plan(40, 1e-2, warmup=5, ema=0.8), batch=2)
    torch.manual_seed(0)
    untrained = type(head)(head.dims, head.time_dim, projection=64, groups=16)
    assert gap(head, model, members) > 3 * abs(gap(untrained, model, members))


def test_a_head_is_made_for_any_model_and_loads_with_it(sd15, tmp_path):
    model = load_model(sd15, device="cpu", dtype="float32")
    last = readout.make(model, tmp_path / "head.safetensors", minutes=1e-6, count=2, seed=0)
    assert last["step"] == 1 and last["hinge"] > 0
    head = load_model(sd15, device="cpu", readout=tmp_path / "head.safetensors").readout
    assert (head.dims, head.time_dim) == tap_dims(model.unet)


@torch.no_grad()
def gap(head, model, members) -> float:
    """How much farther the distorted member lies than the preserved one, at a time of little noise."""
    noise = torch.randn(members["anchor"].shape, generator=torch.Generator().manual_seed(1))
    times = torch.full((len(noise),), 101)
    maps = {}
    for name in ("anchor", "preserved", "distorted"):
        taps, embedding = readout.walk(model, diffusion.noised(members[name], noise, times, model.schedule), 101)
        maps[name] = head(taps, embedding, (16, 16))
    near = readout.distance(maps["anchor"], maps["preserved"], members["same"])
    return float((readout.distance(maps["anchor"], maps["distorted"]) - near).mean())
