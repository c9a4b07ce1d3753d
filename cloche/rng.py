"""Randomness with a place: pure functions of (seed, stream, epoch, position), the same whoever computes them.

Small draws (rotation, brightness) are hashed per row from `uniform`; what torch draws inside a forward pass (dropout)
comes from the default generator, which the loop alone seeds per chunk with `chunk_seed`.
"""

from contextlib import AbstractContextManager
import hashlib

import numpy as np
import torch
from torch import Tensor

ORDER, AUGMENT, NOISE = 1, 2, 3  # streams: no two uses of a position share numbers


def integer(*parts: int | str) -> int:
    """A 62-bit number that depends on every part and nothing else."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 2


def chunk_seed(seed: int, epoch: int, index: int, chunk: int) -> int:
    """What the default generator is seeded with before the forward pass of a chunk."""
    return integer("chunk", seed, epoch, index, chunk)


def draw(seed: int, epoch: int) -> Tensor:
    """The tensor that a Chunk carries for its per-row draws: () int64."""
    return torch.tensor(integer("draw", seed, epoch), dtype=torch.int64)


def apart(device: torch.device) -> AbstractContextManager:
    """Inside it torch's default generators may be seeded; afterwards the caller's are as they were."""
    return torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])


def generator(*parts: int | str) -> np.random.Generator:
    """numpy's generator for orders and made data."""
    return np.random.Generator(np.random.PCG64(integer(*parts)))


def uniform(draw: Tensor, stream: int, at: Tensor, n: int) -> Tensor:
    """(B, n) numbers in [0, 1), one row a position.

    Args:
        draw: () int64 from `draw`. at: (B,) int64 positions. stream: which use.
    Source: the 32-bit mixer "lowbias32" of C. Wellons, hash-prospector; taken twice over counter and key.
    """
    columns = torch.arange(n, device=at.device, dtype=torch.int64)
    x = _mix(at[:, None] ^ (draw & 0xFFFFFFFF)) + columns[None] * 0x9E3779B1 + stream * 0x85EBCA6B  # (B, n)
    x = _mix(_mix(x) ^ (draw >> 32))
    return (x >> 8).to(torch.float32) * 2.0**-24  # 24 bits: exact in float32


def _mix(x: Tensor) -> Tensor:
    x = x & 0xFFFFFFFF
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF  # may wrap; the low 32 bits are right all the same
    return x ^ (x >> 16)
