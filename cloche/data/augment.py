"""Pictures on the device, a whole chunk at a time: resize, move, rotate, brightness, contrast. No per-sample Python.

Every draw is hashed from (seed, epoch, position), so a picture is changed alike whoever computes it. All of it works element by element
(but for the mean in `contrast`, a reduction within the row), so a picture's numbers do not depend on the rows beside it.
"""

import math

import torch
from torch import Tensor
import torch.nn.functional as F

GREY = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's convert("L")


def resize(x: Tensor, size: Tensor, pixels: int) -> Tensor:
    """Bilinear: the top-left `size` (B, 2) of each row's frame x (B, H, W, C) becomes pixels × pixels, as F.interpolate's."""
    alike = x.device.type == "cpu" and bool((size == size[:1]).all())  # whole lines of one size are copied three times as fast
    for axis, shape in ((1, (-1, pixels, 1, 1)), (2, (-1, 1, pixels, 1))):
        side = size[:, axis - 1, None].to(torch.float32)  # (B, 1)
        place = (torch.arange(pixels, device=x.device) + 0.5)[None] * (side / pixels) - 0.5  # (B, pixels)
        place = torch.minimum(place.clamp(min=0), side - 1)
        low = place.floor()
        high, part = torch.minimum(low + 1, side - 1), (place - low).view(shape)
        a, b = (x.index_select(axis, at[0].long()) if alike else x.take_along_dim(at.long().view(shape), axis) for at in (low, high))
        x = a * (1 - part) + b * part
    return x


def rotate(x: Tensor, turns: Tensor, shifts: Tensor | None = None) -> Tensor:
    """Each picture (B, C, h, w) moved by shifts (B, 2) pixels, then turned about its centre, bilinear, black outside.

    turns: (B,) radians, positive anticlockwise. shifts: to the right and down.
    """
    cos, sin, zero = turns.cos(), turns.sin(), torch.zeros_like(turns)
    right, down = (zero, zero) if shifts is None else (shifts[:, 0] * (-2 / x.shape[3]), shifts[:, 1] * (-2 / x.shape[2]))
    theta = torch.stack([cos, -sin, right, sin, cos, down], 1).view(-1, 2, 3)
    return F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)


def brightness(x: Tensor, by: Tensor) -> Tensor:
    """x · by, kept in 0..1. by: (B,)."""
    return (x * by.view(-1, 1, 1, 1)).clamp(0, 1)


def contrast(x: Tensor, by: Tensor) -> Tensor:
    """Away from or towards the mean grey of the picture, kept in 0..1. by: (B,)."""
    mean, by = grey(x).mean(3).flatten(1).mean(1).view(-1, 1, 1, 1), by.view(-1, 1, 1, 1)  # one long reduction is cut by threads: two steps
    return (x * by + mean * (1 - by)).clamp(0, 1)


def grey(x: Tensor) -> Tensor:
    """(B, 3 or 1, h, w) → (B, 1, h, w)."""
    if x.shape[1] == 1:
        return x
    r, g, b = x.unbind(1)
    return (r + GREY[1] * (g - r) + GREY[2] * (b - r))[:, None]  # exact where the three are equal


def half(x: Tensor) -> Tensor:
    """(B, C, h, w) → (B, C, ⌊h / 2⌋, ⌊w / 2⌋), the mean of each four; of an odd side the last row or column is left out."""
    return F.avg_pool2d(x, 2)


def jitter(x: Tensor, u: Tensor, degrees: float, bright: float, contrasts: float, mirror: bool, shift: int = 0) -> Tensor:
    """x (B, C, h, w) in 0..1, moved by ±shift whole pixels, turned by ±degrees, brightness and contrast 1 ± share, half of them mirrored.

    u: (B, 6) uniform draws.
    """
    if mirror:
        x = torch.where((u[:, 3] < 0.5).view(-1, 1, 1, 1), x.flip(3), x)
    if degrees or shift:
        moves = (u[:, 4:] * (2 * shift + 1)).floor() - shift if shift else None
        x = rotate(x, (2 * u[:, 0] - 1) * math.radians(degrees), moves)
    if bright:
        x = brightness(x, 1 + (2 * u[:, 1] - 1) * bright)
    if contrasts:
        x = contrast(x, 1 + (2 * u[:, 2] - 1) * contrasts)
    return x
