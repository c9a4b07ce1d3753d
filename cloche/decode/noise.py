"""The forward process: how a picture becomes noise. x = α·x0 + σ·ε, ε ~ N(0, 1), α² + σ² = 1.

    λ (level) = log α²/σ², the log of signal to noise      noise ─ −HIGH … HIGH ─ picture
    v = α·ε − σ·x0: what a net predicts here               x0 = α·x − σ·v,  ε = σ·x + α·v

λ falls with the time t as of a cosine: α = cos(πt/2), cut where a further step could be seen in no picture.
Source: Ho et al. 2020, arXiv 2006.11239; Nichol & Dhariwal 2021, arXiv 2102.09672, equation 17; Kingma et al. 2021,
arXiv 2107.00630, for λ; Salimans & Ho 2022, arXiv 2202.00512, appendix D, for v.
"""

import math

import torch
from torch import Tensor

HIGH = 9.0  # σ = 0.011 of a picture from −1 to 1: a step of its 256 greys is 0.008


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
