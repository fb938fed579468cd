"""Training: the linear start is what it says, a resumed run equals an unbroken one, and every part learns."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ddengine.training import autoencoder, data, diffusion
from ddengine.training.linear_start import start_linear
from ddengine.training.loop import Plan, fit


def test_linear_start_averages_cells():
    torch.manual_seed(0)
    module = autoencoder.build()
    pictures = data.scenes(np.random.default_rng(1), 4, 128)
    with torch.no_grad():
        latent = module.encode(pictures).latent_dist.mean[:, :3]
        decoded = module.decode(F.pad(latent, (0, 0, 0, 0, 0, 1))).sample
    cells = F.avg_pool2d(pictures, 8)
    assert np.corrcoef(latent.flatten(), cells.flatten())[0, 1] > 0.97
    assert np.corrcoef(decoded.flatten(), F.interpolate(cells, scale_factor=8).flatten())[0, 1] > 0.97
    assert autoencoder.psnr(module, pictures) > 17  # grey pictures score about 14


def test_linear_start_rewrites_only_carriers_and_residual_ends():
    torch.manual_seed(0)
    a = autoencoder.build()
    before = {k: v.clone() for k, v in a.state_dict().items()}
    after = start_linear(a).state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)  # idempotent: a second start finds nothing to do


def line(module: nn.Module, numbers: np.random.Generator, noise: torch.Generator):
    x = torch.from_numpy(numbers.normal(size=(16, 2)).astype(np.float32))
    loss = F.mse_loss(module(x)[:, 0], 3 * x[:, 0] - x[:, 1] + 0.1 * torch.randn(16, generator=noise))
    return loss, {"mse": loss.item()}


def test_an_interrupted_run_continues_where_it_stopped(tmp_path):
    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return nn.Linear(2, 1)

    plan = Plan(steps=100, learning_rate=0.15, warmup=5, ema=0.9, checkpoint_every=20)
    whole = fit(fresh(), line, plan, tmp_path / "whole")

    class Stop(Exception):
        pass

    def broken(module, numbers, noise):
        broken.calls += 1
        if broken.calls > 50:
            raise Stop
        return line(module, numbers, noise)

    broken.calls = 0
    with pytest.raises(Stop):
        fit(fresh(), broken, plan, tmp_path / "parts")
    resumed = fit(fresh(), line, plan, tmp_path / "parts")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    torch.testing.assert_close(whole.weight, torch.tensor([[3.0, -1.0]]), atol=0.15, rtol=0)
    curve = json.loads((tmp_path / "parts" / "curve.json").read_text())["curve"]
    assert [point["step"] for point in curve] == [50, 100]
    assert curve[-1]["mse"] < 0.5


def test_the_clock_ends_a_run_annealed(tmp_path):
    plan = Plan(steps=10**9, learning_rate=0.05, minutes=0.02, warmup=1)
    trained = fit(nn.Linear(2, 1), line, plan, tmp_path)
    assert not trained.training
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert 0 < state["step"] < 10**6
    assert state["optimiser"]["param_groups"][0]["lr"] < 0.05 * 0.2


def test_noising_keeps_unit_variance_and_ends_in_noise():
    schedule = diffusion.Schedule.from_config({})
    clean, noise = (torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    times = torch.tensor([0, 300, 700, 999])
    z = diffusion.noised(clean, noise, times, schedule)
    torch.testing.assert_close(z.var((1, 2, 3)), torch.ones(4), atol=0.12, rtol=0)
    assert F.cosine_similarity(z[3].flatten(), noise[3].flatten(), dim=0) > 0.99
    assert F.cosine_similarity(z[0].flatten(), clean[0].flatten(), dim=0) > 0.99


def test_random_crops_are_parts_of_their_pictures():
    pictures = torch.arange(2 * 3 * 10 * 12, dtype=torch.float32).reshape(2, 3, 10, 12)
    crops = data.random_crops(pictures, 4, np.random.default_rng(0))
    for crop, picture in zip(crops, pictures, strict=True):
        row, column = divmod(int(crop[0, 0, 0] - picture[0, 0, 0]), 12)
        assert torch.equal(crop, picture[:, row : row + 4, column : column + 4])
