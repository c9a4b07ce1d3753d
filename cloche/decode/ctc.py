"""From letters at each step of time to text, by the best path: A. Graves et al. 2006, "Connectionist temporal classification", 3.2.

(B, T, K) ─ likeliest of each step ─ 0 3 3 0 3 5 0 ─ repeats become one, blanks (0) fall away ─ 3 3 5
"""

import torch
from torch import Tensor


def best_path(logits: Tensor, length: Tensor) -> list[list[int]]:
    """The letters of each row; logits (B, T, K), K = 0 the blank; length (B,), how many steps are the row's own."""
    best = logits.argmax(-1)  # (B, T)
    new = torch.cat([best[:, :1] >= 0, best[:, 1:] != best[:, :-1]], 1)
    inside = torch.arange(best.shape[1], device=best.device) < length[:, None]
    return [row[kept].tolist() for row, kept in zip(best.cpu(), (new & inside & (best > 0)).cpu(), strict=True)]
