"""The forward process against its definitions in float64, and a worked example."""

import math

import pytest
import torch

from cloche.decode.diffusion import HIGH, alpha_sigma, from_velocity, noised, schedule, velocity


def test_the_schedule_is_that_of_a_cosine_between_its_bounds():
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    level = schedule(t)
    low = math.atan(math.exp(-HIGH / 2))
    alpha, sigma = (v.flatten() for v in alpha_sigma(level))
    torch.testing.assert_close(alpha, torch.cos(low + t * (math.pi / 2 - 2 * low)))
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha))
    torch.testing.assert_close(torch.log(alpha**2 / sigma**2), level)
    torch.testing.assert_close(level[[0, 50, 100]], torch.tensor([HIGH, 0.0, -HIGH], dtype=torch.float64))
    assert (level.diff() < 0).all()


def test_noised_has_the_shares_that_the_level_says():
    g = torch.Generator().manual_seed(0)
    x0 = torch.full((2, 1, 200, 200), 0.5, dtype=torch.float64)
    x = noised(x0, torch.tensor([0.0, math.log(3)], dtype=torch.float64), torch.randn(x0.shape, generator=g, dtype=torch.float64))
    for row, (alpha2, sigma2) in zip(x, ((0.5, 0.5), (0.75, 0.25)), strict=True):
        assert float(row.mean()) == pytest.approx(0.5 * alpha2**0.5, abs=0.02)
        assert float(row.var()) == pytest.approx(sigma2, rel=0.03)


def test_worked_by_hand():
    """Level log 3: α² = 3/4, σ² = 1/4. x0 = 1, ε = −2: x = 0.8660 − 1 = −0.1340, v = −1.7321 − 0.5 = −2.2321."""
    level, x0, noise = torch.tensor([math.log(3)]), torch.ones(1, 1, 1, 1), torch.full((1, 1, 1, 1), -2.0)
    assert float(noised(x0, level, noise)) == pytest.approx(-0.1340, abs=1e-4)
    assert float(velocity(x0, level, noise)) == pytest.approx(-2.2321, abs=1e-4)


def test_picture_and_noise_come_back_from_v():
    g = torch.Generator().manual_seed(1)
    x0, noise = (torch.randn(5, 2, 3, 3, generator=g, dtype=torch.float64) for _ in range(2))
    level = torch.tensor([-9.0, -2.0, 0.0, 3.0, 9.0], dtype=torch.float64)
    back = from_velocity(noised(x0, level, noise), level, velocity(x0, level, noise))
    torch.testing.assert_close(back, (x0, noise))
