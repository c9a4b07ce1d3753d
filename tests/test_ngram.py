"""The byte n-gram baseline against a worked example and against counting in plain Python."""

from collections import Counter
import math

import numpy as np
import pytest

from cloche.tasks.ngram import probabilities

D = 0.75


def test_a_worked_example():
    """seen "abab": a and b stand twice each; before a stand a line break and b, before b only a."""
    p1 = probabilities(b"abab", b"ab", 1)
    assert p1.tolist() == pytest.approx([(2 - D) / 4 + D * 2 / 4 / 256] * 2)
    below = {c: (n - D) / 3 + D * 2 / 3 / 256 for c, n in ((ord("a"), 2), (ord("b"), 1))}  # by what stands before: 3 pairs in all
    after_a = (2 - D) / 2 + D * 1 / 2 * below[ord("b")]  # b both times
    after_break = (1 - D) / 1 + D * 1 / 1 * below[ord("a")]
    assert probabilities(b"abab", b"ab", 2).tolist() == pytest.approx([after_break, after_a])
    assert probabilities(b"abab", b"xa", 2)[1] == pytest.approx(below[ord("a")])  # nothing is known of what follows x


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_the_probabilities_of_all_bytes_sum_to_one(order):
    seen = b"the cat sat on the mat, the rat on the cat\n" * 3
    for before in (b"", b"the ", b"xyz "):
        each = [probabilities(seen, before + bytes([c]), order)[-1] for c in range(256)]
        assert sum(each) == pytest.approx(1) and min(each) > 0


def plain(seen: bytes, text: bytes, order: int) -> float:
    """The same by dictionaries, from the definition."""
    seen, text = b"\n" * (order - 1) + seen, b"\n" * (order - 1) + text
    top = Counter(seen[i : i + order] for i in range(len(seen) - order + 1))
    levels = {order: top}
    for k in range(order - 1, 0, -1):
        whole = b"\n" * k + seen[order - 1 :]
        levels[k] = Counter(g[1:] for g in {whole[i : i + k + 1] for i in range(len(whole) - k)})

    def p(context: bytes, byte: bytes, k: int) -> float:
        if k == 0:
            return 1 / 256
        after = {g: n for g, n in levels[k].items() if g[:-1] == context}
        lower, total = p(context[1:], byte, k - 1), sum(after.values())
        return (max(after.get(context + byte, 0) - D, 0) + D * len(after) * lower) / total if total else lower

    return sum(math.log2(p(text[i - order + 1 : i], text[i : i + 1], order)) for i in range(order - 1, len(text)))


def test_equals_counting_in_plain_python():
    seen, text = b"she sells sea shells by the sea shore; the shells she sells", b"the shore sells shells, he said\n"
    for order in (1, 2, 4):
        assert np.log2(probabilities(seen, text, order)).sum() == pytest.approx(plain(seen, text, order))


def test_more_context_foretells_text_better():
    seen = b"".join(f"row {n}: the square of {n} is {n * n}.\n".encode() for n in range(300))
    text = b"row 307: the square of 307 is 94249.\n"
    bits = [-np.log2(probabilities(seen, text, order)).mean() for order in (1, 2, 3)]
    assert bits == sorted(bits, reverse=True) and bits[-1] < 2
