"""Diffusion: the forward process, by which a picture becomes noise, and the solvers that walk back, in the letters of their papers.

    x = α·x0 + σ·ε, ε ~ N(0, 1), α² + σ² = 1;   λ (level) = log α²/σ², the log of signal to noise: noise ─ −HIGH … HIGH ─ picture
    v = α·ε − σ·x0: what a net predicts here;   x0 = α·x − σ·v,  ε = σ·x + α·v
    x_T ~ N(0, 1) ─ x0 = denoise(x, λ) ─ step to the next λ ─ … ─ x_0

λ falls with the time t as of a cosine: α = cos(πt/2), cut where a further step could be seen in no picture.
Every solver: solver(denoise, x, levels, generators) → (B, C, h, w). denoise(x, level (B,)) → the picture x0 it believes in.
x: (B, C, h, w) noise. levels: (n + 1,) rising λ, n steps. generators: one a row, so that a row's picture is its own.
Source: Ho et al. 2020, arXiv 2006.11239; Nichol & Dhariwal 2021, arXiv 2102.09672, equation 17; Kingma et al. 2021,
arXiv 2107.00630, for λ; Salimans & Ho 2022, arXiv 2202.00512, appendix D, for v.
"""

from collections.abc import Callable, Sequence
import math

import torch
from torch import Generator, Tensor

from cloche import rng

HIGH = 9.0  # σ = 0.011 of a picture from −1 to 1: a step of its 256 greys is 0.008
Denoise = Callable[[Tensor, Tensor], Tensor]
Solver = Callable[[Denoise, Tensor, Tensor, Sequence[Generator]], Tensor]


def schedule(t: Tensor) -> Tensor:
    """Time, 0 (picture) to 1 (noise) → level λ, HIGH to −HIGH, any shape: λ = −2·log tan(angle), the angle even in t."""
    low = math.atan(math.exp(-HIGH / 2))
    return -2 * torch.log(torch.tan(low + t * (math.pi / 2 - 2 * low)))


def alpha_sigma(level: Tensor) -> tuple[Tensor, Tensor]:
    """The shares of picture and noise, (B, 1, 1, 1) each, of levels (B,)."""
    level = level.view(-1, 1, 1, 1)
    return torch.sigmoid(level).sqrt(), torch.sigmoid(-level).sqrt()


def noised(x0: Tensor, level: Tensor, noise: Tensor) -> Tensor:
    alpha, sigma = alpha_sigma(level)
    return alpha * x0 + sigma * noise


def velocity(x0: Tensor, level: Tensor, noise: Tensor) -> Tensor:
    """v, which keeps its size at every level: it is the noise where the picture is clear, the picture where it is not."""
    alpha, sigma = alpha_sigma(level)
    return alpha * noise - sigma * x0


def from_velocity(x: Tensor, level: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(x0, ε) that a v at x tells of."""
    alpha, sigma = alpha_sigma(level)
    return alpha * x - sigma * v, sigma * x + alpha * v


def generators(ids: Tensor) -> list[Generator]:
    return [Generator().manual_seed(rng.integer("picture", i)) for i in ids.tolist()]


def normal(generators: Sequence[Generator], like: Tensor) -> Tensor:
    """N(0, 1) of the shape of `like`, each row from its own generator on the CPU: the same picture on every device."""
    return torch.stack([torch.randn(like.shape[1:], generator=g, dtype=like.dtype) for g in generators]).to(like.device)


def ddim(denoise: Denoise, x: Tensor, levels: Tensor, generators: Sequence[Generator]) -> Tensor:
    """x_s = α_s·x0 + σ_s·ε with the ε that x_t and x0 leave: no new noise, an Euler step of the probability flow.

    Source: Song, Meng & Ermon 2020, arXiv 2010.02502, equation 12 with σ = 0.
    """
    for t, s in zip(levels[:-1], levels[1:], strict=True):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(t), alpha_sigma(s)
        x0 = denoise(x, t.expand(len(x)))
        x = alpha_s * x0 + sigma_s * (x - alpha_t * x0) / sigma_t
    return x


def ddpm(denoise: Denoise, x: Tensor, levels: Tensor, generators: Sequence[Generator]) -> Tensor:
    """A draw of q(x_s | x_t, x0) = N(α_ts·σ_s²/σ_t²·x + α_s·σ_ts²/σ_t²·x0, σ_ts²·σ_s²/σ_t²), α_ts = α_t/α_s, σ_ts² = σ_t² − α_ts²·σ_s².

    Source: Ho et al. 2020, arXiv 2006.11239, equation 7, for any two levels as Kingma et al. 2021, arXiv 2107.00630, appendix A.2.
    """
    for t, s in zip(levels[:-1], levels[1:], strict=True):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(t), alpha_sigma(s)
        x0 = denoise(x, t.expand(len(x)))
        alpha_ts, share = alpha_t / alpha_s, sigma_s.square() / sigma_t.square()
        var_ts = sigma_t.square() - alpha_ts.square() * sigma_s.square()
        x = alpha_ts * share * x + alpha_s * var_ts / sigma_t.square() * x0 + (var_ts * share).sqrt() * normal(generators, x)
    return x


def guided(told: Tensor, untold: Tensor, guidance: float) -> Tensor:
    """The prediction under the prompt, carried on beyond the one without: untold + w·(told − untold); w = 1 leaves it.

    Source: Ho & Salimans 2022, arXiv 2207.12598, equation 6, their w being ours less one.
    """
    return untold + guidance * (told - untold)


SOLVERS: dict[str, Solver] = {"ddim": ddim, "ddpm": ddpm}
