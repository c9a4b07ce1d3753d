"""A small U-Net that says of a noisy picture what is noise, told how noisy it is and, if asked, what it should show.

    x (B, C, h, w) ─ conv ─ block ─────────────────────────────────── + ─ block ─ norm ─ conv ─ prediction (B, C, h, w)
                              └ half the side ─ block ──────── + ─ block ─ twice the side ┘
    level ─ sin, cos ─ dense ┐     └ … ─ block ─ block ─ … ┘
    memory (prompt) ─────────┴ into every block

A block: x + conv(f(norm(conv(f(norm(x)))))), its second norm scaled and shifted by what the level says, then a look at the prompt.
Source: Ronneberger et al. 2015, arXiv 1505.04597; Ho et al. 2020, arXiv 2006.11239; Dhariwal & Nichol 2021, arXiv 2105.05233, for the
scaled norm; Rombach et al. 2022, arXiv 2112.10752, for the look at the prompt.
"""

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field
import torch
from torch import Tensor, nn
import torch.nn.functional as F

from cloche.config import NetConfig, Port
from cloche.nets.attention import Memory, MultiHead, check_heads
from cloche.nets.parts import Dropout
from cloche.nets.textenc import TextencConfig
from cloche.words import _

WAVES = 16  # sines, and as many cosines, that spell a level


class UnetConfig(NetConfig):
    kind: Literal["unet"] = "unet"
    width: int = Field(48, ge=8, multiple_of=8, description=_("channels at the full side of the picture"))
    mults: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        (1, 2),
        strict=False,
        min_length=1,
        max_length=16,
        description=_("width of each stage, in times of net.width; each has half the side of the last"),
    )
    heads: int = Field(4, ge=1, description=_("how many places of the prompt a pixel can look at at once"))
    dropout: float = Field(0.1, ge=0, lt=1, description=_("share of values zeroed inside each block while training"))
    text: TextencConfig = Field(TextencConfig(), description=_("the net that reads the prompt; it trains along"))

    faces: ClassVar = ("denoises",)

    def build(self, inputs: Port, outputs: Port, face: str) -> "Unet":
        side, halvings = inputs.shape[-1], len(self.mults) - 1
        if side % 2**halvings:
            told = _("{n} stages halve the side {halvings} times; {side} pixels cannot be. Shorten net.mults, or change data.pixels")
            raise ValueError(told.format(n=len(self.mults), halvings=halvings, side=side))
        check_heads(self.width, self.heads)
        return Unet(inputs.shape[0], self)


def normed(channels: int, affine: bool = True) -> nn.GroupNorm:
    """Groups of 16 channels: channels-last, torch's kernel is five times as fast for them as for other sizes."""
    return nn.GroupNorm(channels // (8 if channels % 16 else 16), channels, affine=affine)


class Block(nn.Module):
    """(B, before, h, w) → (B, after, h, w) under a level (B, E) and a prompt."""

    def __init__(self, before: int, after: int, config: UnetConfig) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = normed(before), normed(after, affine=False), normed(after)
        self.conv1, self.conv2 = nn.Conv2d(before, after, 3, padding=1), nn.Conv2d(after, after, 3, padding=1)
        self.level, self.drop = nn.Linear(4 * config.width, 2 * after), Dropout(config.dropout)
        self.skip = nn.Conv2d(before, after, 1) if before != after else nn.Identity()
        self.prompt, self.look = nn.Linear(config.text.width, after), MultiHead(after, config.heads)
        for last in (self.conv2, self.look.out):  # a block begins by changing nothing
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, x: Tensor, level: Tensor, memory: Memory | None) -> Tensor:
        scale, shift = self.level(level)[:, :, None, None].chunk(2, 1)  # (B, after, 1, 1)
        y = self.norm2(self.conv1(F.silu(self.norm1(x)))) * (1 + scale) + shift  # (B, after, h, w)
        x = self.skip(x) + self.conv2(self.drop(F.silu(y)))
        if memory is None:
            return x
        places = self.norm3(x).flatten(2).transpose(1, 2)  # (B, h·w, after)
        seen = self.look(places, self.prompt(memory[0]), memory[1])
        return x + seen.transpose(1, 2).unflatten(2, x.shape[2:])  # (B, after, h, w)


class Unet(nn.Module):
    """x (B, C, h, w), level (B,) log-SNR → (B, C, h, w); memory None: without a prompt."""

    head = property(lambda self: self.leave)

    def __init__(self, channels: int, config: UnetConfig) -> None:
        super().__init__()
        widths = [config.width * m for m in config.mults]
        level = 4 * config.width
        self.spell = nn.Sequential(nn.Linear(2 * WAVES, level), nn.SiLU(), nn.Linear(level, level), nn.SiLU())
        self.enter, self.leave = nn.Conv2d(channels, widths[0], 3, padding=1), nn.Conv2d(widths[0], channels, 3, padding=1)
        self.down = nn.ModuleList(Block(a, b, config) for a, b in zip([widths[0], *widths], widths, strict=False))
        self.middle = Block(widths[-1], widths[-1], config)
        self.up = nn.ModuleList(Block(a + b, b, config) for a, b in zip([widths[-1], *widths[:0:-1]], widths[::-1], strict=True))
        self.norm = normed(widths[0])
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, x: Tensor, level: Tensor, memory: Memory | None = None) -> Tensor:
        wave = torch.exp(torch.linspace(math.log(0.1), math.log(3.0), WAVES, device=x.device))
        angle = level[:, None].float() * wave  # (B, WAVES)
        told = self.spell(torch.cat([angle.sin(), angle.cos()], 1).to(x.dtype))  # (B, E)
        h, kept = self.enter(x), []
        for i, block in enumerate(self.down):
            h = block(F.avg_pool2d(h, 2) if i else h, told, memory)
            kept.append(h)
        h = self.middle(h, told, memory)
        for i, block in enumerate(self.up):
            h = F.interpolate(h, scale_factor=2.0) if i else h
            h = block(torch.cat([h, kept.pop()], 1), told, memory)
        return self.leave(F.silu(self.norm(h)))
