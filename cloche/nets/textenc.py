"""The reader of prompts: a small transformer encoder, trained along with the net that draws.

    tokens (B, L) ─ embed + place ─┐
    a learned vector before them ──┴─ [look at all ─ feed] … ─ norm ─ memory (B, 1 + L, C), mask (B, 1 + L)

The vector stands at the first place of every row; of a row of length 0, the empty prompt, it is all there is.
Source: Vaswani et al. 2017, arXiv 1706.03762; the place for the whole: Devlin et al. 2018, arXiv 1810.04805.
"""

from typing import ClassVar, Literal

from pydantic import Field
import torch
from torch import Tensor, nn

from cloche.config import NetConfig, Port
from cloche.nets.attention import sinusoid
from cloche.nets.transformer import Layer
from cloche.words import _


class TextencConfig(NetConfig):
    kind: Literal["textenc"] = "textenc"
    width: int = Field(64, ge=2, multiple_of=2, description=_("numbers that stand for one token"))
    layers: int = Field(1, ge=1, le=200, description=_("blocks"))

    faces: ClassVar = ("embeds",)

    def build(self, inputs: Port, outputs: Port, face: str) -> "Textenc":
        return Textenc(inputs.size, self)


class Textenc(nn.Module):
    """tokens (B, L), lengths (B,) → memory ((B, 1 + L, C), (B, 1 + L) bool)."""

    head = None

    def __init__(self, size: int, config: TextencConfig) -> None:
        super().__init__()
        self.embed, self.empty = nn.Embedding(size, config.width), nn.Parameter(torch.randn(config.width))
        self.layers = nn.ModuleList(Layer(config.width, 2, 0.0, decoder=False) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.cat([self.empty.expand(len(tokens), 1, -1), self.embed(tokens)], 1)  # (B, 1 + L, C)
        mask = torch.arange(x.shape[1], device=x.device) <= lengths[:, None]  # (B, 1 + L)
        x = x + sinusoid(x.shape[1], x.shape[2], x.device)
        for layer in self.layers:
            x = layer.feed(layer.look(x, mask))
        return self.norm(x), mask
