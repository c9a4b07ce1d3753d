"""Pictures on the device, a whole chunk at a time: resize, rotate, brightness, contrast. No per-sample Python.

Every draw is hashed from (seed, epoch, position), so a picture is changed alike whoever computes it. All of it works element by element
(but for the mean in `contrast`, a reduction within the row), so a picture's numbers do not depend on the rows beside it.
"""

import math

import torch
from torch import Tensor
import torch.nn.functional as F

GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's convert("L")


def resize(x: Tensor, size: Tensor, pixels: int) -> Tensor:
    """Bilinear: the top-left (h, w) of each row's frame becomes pixels × pixels, as F.interpolate(align_corners=False).

    Args:
        x: (B, H, W, C) float. size: (B, 2) integer, each row's own (h, w).
    Returns: (B, pixels, pixels, C).
    """
    y = _lerp(x, size[:, 0], pixels, 1)  # (B, pixels, W, C)
    return _lerp(y, size[:, 1], pixels, 2)  # (B, pixels, pixels, C)


def _lerp(x: Tensor, side: Tensor, pixels: int, axis: int) -> Tensor:
    """Each row's first `side` places along an axis, read at `pixels` even places."""
    scale = side.to(torch.float32)[:, None] / pixels
    place = (torch.arange(pixels, device=x.device) + 0.5)[None] * scale - 0.5  # (B, pixels)
    place = torch.minimum(place.clamp(min=0), side[:, None].to(torch.float32) - 1)
    low = place.floor()
    high = torch.minimum(low + 1, side[:, None].to(torch.float32) - 1)
    shape = [len(x), 1, 1, 1]
    shape[axis] = pixels
    full = list(x.shape)
    full[axis] = pixels
    part = (place - low).view(shape)
    a = x.gather(axis, low.long().view(shape).expand(full))
    b = x.gather(axis, high.long().view(shape).expand(full))
    return a * (1 - part) + b * part


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Each picture about its centre, bilinear, black outside.

    Args:
        x: (B, C, h, w). turns: (B,) radians, positive anticlockwise.
    """
    cos, sin, zero = turns.cos(), turns.sin(), torch.zeros_like(turns)
    theta = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)  # (B, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def brightness(x: Tensor, by: Tensor) -> Tensor:
    """x · by, kept in 0..1. by: (B,)."""
    return (x * by.view(-1, 1, 1, 1)).clamp(0, 1)


def contrast(x: Tensor, by: Tensor) -> Tensor:
    """Away from or towards the mean grey of the picture, kept in 0..1. by: (B,)."""
    mean = grey(x).mean(3).flatten(1).mean(1).view(-1, 1, 1, 1)  # in two steps: one long reduction is cut by the number of threads
    return (x * by.view(-1, 1, 1, 1) + mean * (1 - by.view(-1, 1, 1, 1))).clamp(0, 1)


def grey(x: Tensor) -> Tensor:
    """(B, 3 or 1, h, w) → (B, 1, h, w)."""
    if x.shape[1] == 1:
        return x
    r, g, b = x.unbind(1)
    return (r + GREY[1] * (g - r) + GREY[2] * (b - r))[:, None]  # exact where the three are equal


def jitter(x: Tensor, u: Tensor, degrees: float, bright: float, contrasts: float, mirror: bool) -> Tensor:
    """The primer's training preparation: rotation ±degrees, brightness and contrast 1 ± share; mirror: half of them left to right.

    Args:
        x: (B, C, h, w) in 0..1. u: (B, 4) uniform draws.
    """
    if mirror:
        x = torch.where((u[:, 3] < 0.5).view(-1, 1, 1, 1), x.flip(3), x)
    if degrees:
        x = rotate(x, (2 * u[:, 0] - 1) * math.radians(degrees))
    if bright:
        x = brightness(x, 1 + (2 * u[:, 1] - 1) * bright)
    if contrasts:
        x = contrast(x, 1 + (2 * u[:, 2] - 1) * contrasts)
    return x
