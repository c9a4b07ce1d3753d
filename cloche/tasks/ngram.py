"""What counting gets: the probability of each byte of a text after the few before it, from counts of another text."""

import numpy as np

MOST_BYTES = 1 << 24  # counting them takes a quarter of a minute


def probabilities(seen: bytes, text: bytes, order: int, discount: float = 0.75) -> np.ndarray:
    """P of each byte of `text` (n,) after the order − 1 bytes before it, by interpolated Kneser–Ney.

        P_k(b | c) = (max(N(cb) − d, 0) + d · kinds(c) · P_{k−1}(b | c without its first byte)) / N(c),   P_0 = 1/256

    N counts how often cb stands in `seen` (its end, where it is long); below the highest order it counts the different bytes that stand
    before cb, so that a byte that is frequent after one context only is not thought likely after others. Where c was never seen,
    P_k = P_{k−1}. Before each text stand line breaks.

    Source: Chen & Goodman 1999, "An empirical study of smoothing techniques for language modeling", section 2.7.
    """
    seen = seen[-MOST_BYTES:]
    p, asked = np.full(len(text), 1 / 256), grams(text, order)
    for k in range(1, order + 1):
        given = grams(seen, k) if k == order else np.unique(grams(seen, k + 1)) % 256**k
        pairs, count = np.unique(given, return_counts=True)
        contexts, first, kinds = np.unique(pairs // 256, return_index=True, return_counts=True)
        total = np.add.reduceat(count, first)
        both, context = asked % 256**k, asked % 256**k // 256
        n, m, others = found(pairs, count, both), found(contexts, total, context), found(contexts, kinds, context)
        p = np.where(m > 0, (np.maximum(n - discount, 0) + discount * others * p) / np.maximum(m, 1), p)
    return p


def grams(text: bytes, k: int) -> np.ndarray:
    """(n,) int64: each byte with the k − 1 before it, as one number; k ≤ 7."""
    padded, out = np.frombuffer(b"\n" * (k - 1) + text, np.uint8).astype(np.int64), np.zeros(len(text), np.int64)
    for i in range(k):
        out = out * 256 + padded[i : i + len(text)]
    return out


def found(keys: np.ndarray, values: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """The value of each asked key, 0 where there is none; keys sorted."""
    at = np.searchsorted(keys, asked).clip(max=len(keys) - 1)
    return np.where(keys[at] == asked, values[at], 0)
