"""The DDIM schedule against the published code's numbers and its own algebra."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ddengine.errors import InputError, ModelError
from ddengine.schedule import Schedule, coefficients, ddim_step, invert_step, predicted_image

SCHEDULE = Schedule.from_config()


def test_the_table_and_the_times_of_stable_diffusion() -> None:
    anchors = {0: 0.99915, 1: 0.99830, 741: 0.060356, 721: 0.070514, 621: 0.141292}
    for t, alpha in anchors.items():
        assert SCHEDULE.alpha(t) == pytest.approx(alpha, abs=6e-6)
    assert SCHEDULE.alpha(-19) == SCHEDULE.alpha(0)
    assert SCHEDULE.timesteps(50) == tuple(range(981, 0, -20))
    assert SCHEDULE.timesteps(50, 0.75) == tuple(range(741, 0, -20))  # 37.5 steps round to 38, halves to even
    assert SCHEDULE.timesteps(50, 0.25) == tuple(range(221, 0, -20))  # and 12.5 to 12


@pytest.mark.parametrize(
    ("t", "a", "b"),
    [(741, 1.080881, -0.083657), (681, 1.071918, -0.075870), (621, 1.063535, -0.068925)],
)
def test_step_coefficients(t: int, a: float, b: float) -> None:
    assert coefficients(SCHEDULE.alpha(t), SCHEDULE.alpha(t - 20)) == pytest.approx((a, b), abs=1e-6)


def test_golden_inversion_and_denoising(golden: Path) -> None:
    stored = {name: torch.from_numpy(array) for name, array in np.load(golden / "units" / "ddim.npz").items()}
    assert torch.equal(SCHEDULE.alphas_cumprod, stored["alphas_cumprod"])
    assert SCHEDULE.timesteps(50) == tuple(stored["scheduler_timesteps"].tolist())
    assert SCHEDULE.timesteps(50, 0.75)[::-1] == tuple(stored["inv_timesteps"].tolist())
    for i, t in enumerate(stored["inv_timesteps"].tolist()):
        noise, below, above = stored["inv_eps"][i], stored["inv_x"][i], stored["inv_x"][i + 1]
        assert (invert_step(SCHEDULE, noise, t, below, 20) - above).abs().max() < 3e-6
        assert (ddim_step(SCHEDULE, noise, t, above, 20) - stored["step_prev"][i]).abs().max() < 3e-6
        assert (predicted_image(SCHEDULE, noise, t, above) - stored["inv_pred_x0"][i]).abs().max() < 3e-6


@given(t=st.integers(21, 999), noise=st.floats(-4, 4), latent=st.floats(-4, 4))
def test_inverting_undoes_denoising_with_the_same_noise(t: int, noise: float, latent: float) -> None:
    z, eps = torch.tensor([latent, noise], dtype=torch.float64)
    below = ddim_step(SCHEDULE, eps, t, z, 20)
    assert float(invert_step(SCHEDULE, eps, t, below, 20)) == pytest.approx(latent, abs=1e-9)


def test_configs_are_read_and_unfit_ones_refused() -> None:
    config = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "set_alpha_to_one": True}
    linear = Schedule.from_config(config)
    assert linear.alpha(0) == pytest.approx(0.9999) and linear.alpha(-1) == 1
    assert Schedule.from_config({"trained_betas": [0.5, 0.5]}).alpha(1) == pytest.approx(0.25)
    with pytest.raises(ModelError, match="v_prediction"):
        Schedule.from_config({"prediction_type": "v_prediction"})
    with pytest.raises(ModelError, match="squaredcos"):
        Schedule.from_config({"beta_schedule": "squaredcos_cap_v2"})
    with pytest.raises(InputError, match=r"start at time 1000, .* ends at 999: lower n_inference_step"):
        SCHEDULE.timesteps(1000, 1)
    assert SCHEDULE.timesteps(999, 1)[0] == 999
    for n, strength in ((50, 0.001), (2000, 0.75), (50, 1.5)):
        with pytest.raises(InputError, match="n_inference_step"):
            SCHEDULE.timesteps(n, strength)
