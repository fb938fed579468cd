"""Training: the linear start is what it says, a resumed run equals an unbroken one, and two workers act as one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ddengine.errors import InputError
from ddengine.training import autoencoder, data, diffusion
from ddengine.training.linear_start import start_linear
from ddengine.training.loop import Plan, fit, run_workers


def test_linear_start_averages_cells():
    torch.manual_seed(0)
    module = start_linear(autoencoder.build())
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
    module = autoencoder.build()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    for name, value in start_linear(module).state_dict().items():
        changed = {row for row in range(len(value)) if not torch.equal(value[row], before[name][row])}
        assert changed == rewritten(name, len(value)), name
        if ".conv2." in name:
            assert not value.any()


def rewritten(name: str, rows: int) -> set[int]:
    """The output channels of one weight that the linear start sets: four in each of the first three quarters carry."""
    if ".conv2." in name or "quant_conv" in name:
        return set(range(rows))
    if "conv_out" in name:
        return {0, 1, 2}
    if any(part in name for part in ("conv_in", "samplers.0.conv", "conv_shortcut")):
        return {colour * rows // 4 + place for colour in range(3) for place in range(4)}
    return set()


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
    assert [point["step"] for point in curve] == [20, 40, 50, 60, 80, 100]
    assert curve[-1]["mse"] < 0.5

    state = (tmp_path / "parts" / "state.pt").read_bytes()
    finished = fit(fresh(), line, plan, tmp_path / "parts")
    assert torch.equal(finished.weight, whole.weight)
    assert (tmp_path / "parts" / "state.pt").read_bytes() == state  # nothing was left to train


def test_a_run_of_another_plan_is_refused_and_an_older_state_is_not(tmp_path):
    plan = Plan(steps=3, learning_rate=0.1, seed=4)
    fit(nn.Linear(2, 1), line, plan, tmp_path)
    with pytest.raises(InputError, match="a run with seed 4, this one has seed 5"):
        fit(nn.Linear(2, 1), line, Plan(steps=3, learning_rate=0.1, seed=5), tmp_path)
    with pytest.raises(InputError, match="steps 3, minutes None, this one has steps 9, minutes 2"):
        fit(nn.Linear(2, 1), line, Plan(steps=9, learning_rate=0.1, seed=4, minutes=2), tmp_path)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    del state["plan"]  # as states were written once
    torch.save(state, tmp_path / "state.pt")
    fit(nn.Linear(2, 1), line, Plan(steps=5, learning_rate=0.1, seed=5), tmp_path)
    assert torch.load(tmp_path / "state.pt", weights_only=True)["step"] == 5


def test_the_shortest_run_leaves_a_curve_and_says_nothing(tmp_path, capfd):
    fit(nn.Linear(2, 1), line, Plan(steps=10, learning_rate=0.1, minutes=1e-9), tmp_path)
    (point,) = json.loads((tmp_path / "curve.json").read_text())["curve"]
    assert point["step"] == 1 and point["mse"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curve.json", "state.pt"]
    assert capfd.readouterr().err == ""
    fit(nn.Linear(2, 1), line, Plan(steps=2, learning_rate=0.1), tmp_path / "shown", progress=True)
    assert "shown" in capfd.readouterr().err


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="folder"):
        fit(nn.Linear(2, 1), line, Plan(steps=1, learning_rate=0.1), tmp_path / "file" / "run")


def test_two_workers_average_their_gradients_and_end_equal(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)  # workers import what they run
    import two_workers

    run_workers(two_workers.work, 2, tmp_path)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert first["own"] == 1 and second["own"] == 3
    assert first["averaged"] == second["averaged"] == 2
    assert torch.equal(first["weight"], second["weight"])
    torch.testing.assert_close(first["weight"], torch.tensor([[4.0]]), atol=0.3, rtol=0)  # between 3 and 5


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
