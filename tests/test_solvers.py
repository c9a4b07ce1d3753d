"""The solvers on data whose denoiser is known in closed form, on one step worked by hand, and the law that a row is its own."""

import math

import pytest
import torch

from cloche.decode.diffusion import SOLVERS, alpha_sigma, ddim, ddpm, generators, guided, normal, schedule

MEAN, STD = 0.3, 0.5  # of data that is Gaussian in every pixel
D = torch.float64

pytestmark = pytest.mark.usefixtures("one_thread")


def exact(x, level):
    """E[x0 | x] of N(MEAN, STD²): MEAN + α·STD² / (α²·STD² + σ²) · (x − α·MEAN)."""
    alpha, sigma = alpha_sigma(level)
    return MEAN + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x - alpha * MEAN)


def levels(n):
    return schedule(torch.linspace(1, 0, n + 1, dtype=D))


def noise(rows=16, side=40):
    return normal(generators(torch.arange(rows)), torch.zeros(rows, 1, side, side, dtype=D))


def flow(x):
    """Where the probability flow takes x exactly: each pixel keeps its place among all, z = (x − α·MEAN) / √(α²·STD² + σ²)."""
    (alpha, sigma), (alpha_0, sigma_0) = alpha_sigma(levels(1)[0]), alpha_sigma(levels(1)[1])
    spread = lambda a, s: (a**2 * STD**2 + s**2).sqrt()  # noqa: E731
    return alpha_0 * MEAN + spread(alpha_0, sigma_0) * (x - alpha * MEAN) / spread(alpha, sigma)


@pytest.mark.parametrize("name", SOLVERS)
def test_samples_have_the_mean_and_variance_of_the_data(name):
    x = SOLVERS[name](exact, noise(), levels(200), generators(torch.arange(16)))
    assert float(x.mean()) == pytest.approx(MEAN, abs=0.02)
    assert float(x.std()) == pytest.approx(STD, rel=0.03)


def test_ddim_comes_to_the_exact_flow_and_its_error_halves_with_twice_the_steps():
    x = noise(2, 8)
    errors = [float((ddim(exact, x, levels(n), []) - flow(x)).abs().max()) for n in (200, 400, 800)]
    assert errors[2] < 5e-3
    assert [a / b for a, b in zip(errors, errors[1:], strict=False)] == pytest.approx([2, 2], rel=0.1)


def test_ddim_knows_no_chance_and_ddpm_does():
    x = noise(1, 8)
    other = [generators(torch.tensor([seed])) for seed in (1, 2)]
    assert torch.equal(*(ddim(exact, x, levels(20), g) for g in other))
    assert not torch.allclose(*(ddpm(exact, x, levels(20), g) for g in other))


def test_one_step_worked_by_hand():
    """From level 0 (α² = σ² = 1/2) to log 3 (3/4, 1/4), x = 1, x0 = 0.5.

    DDIM: ε = (1 − 0.35355) / 0.70711 = 0.91421; x = 0.43301 + 0.45711 = 0.89012.
    DDPM: α_ts² = 2/3, σ_ts² = 1/2 − 2/3 · 1/4 = 1/3; mean = 0.81650 · 1/2 · 1 + 0.86603 · 2/3 · 0.5 = 0.69692; var = 1/3 · 1/2 = 1/6.
    """
    x, two = torch.ones(1, 1, 1, 1, dtype=D), torch.tensor([0.0, math.log(3)], dtype=D)
    believed = lambda x, level: torch.full_like(x, 0.5)  # noqa: E731
    assert float(ddim(believed, x, two, [])) == pytest.approx(0.89012, abs=1e-5)
    z = float(normal(generators(torch.tensor([7])), x))
    assert float(ddpm(believed, x, two, generators(torch.tensor([7])))) == pytest.approx(0.69692 + z / 6**0.5, abs=1e-5)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_row_is_the_same_alone_and_among_others(name):
    ids, x = torch.tensor([3, 1, 4]), noise(3, 4)
    whole = SOLVERS[name](exact, x, levels(10), generators(ids))
    torch.testing.assert_close(SOLVERS[name](exact, x[1:2], levels(10), generators(ids[1:2])), whole[1:2])


def test_the_start_hangs_on_the_seed_alone():
    x = normal(generators(torch.tensor([5, 6, 5])), torch.zeros(3, 1, 4, 4))
    assert torch.equal(x[0], x[2]) and not torch.equal(x[0], x[1])


def test_guidance_goes_on_beyond_the_prompt():
    told, untold = torch.tensor([3.0]), torch.tensor([1.0])
    assert [float(guided(told, untold, w)) for w in (0.0, 1.0, 1.5, 2.0)] == [1.0, 3.0, 4.0, 5.0]
