"""The best path: worked examples, and the same as collapsing by hand."""

from itertools import groupby

import torch

from cloche.tasks.transcribe import best_path


def path(*rows):
    return 5.0 * torch.nn.functional.one_hot(torch.tensor(rows), 6)


def test_repeats_become_one_and_blanks_fall_away():
    rows = path([0, 3, 3, 0, 3, 5, 0], [1, 1, 2, 2, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0], [4, 4, 4, 4, 4, 4, 4])
    assert best_path(rows, torch.tensor([7, 7, 7, 7])) == [[3, 3, 5], [1, 2, 1], [], [4]]


def test_steps_beyond_a_rows_own_say_nothing():
    rows = path([1, 0, 2, 2], [3, 3, 0, 3])
    assert best_path(rows, torch.tensor([2, 3])) == [[1], [3]]
    assert best_path(rows, torch.tensor([0, 4])) == [[], [3, 3]]


def test_the_same_as_by_hand():
    torch.manual_seed(0)
    logits, lengths = torch.randn(50, 12, 4), torch.randint(0, 13, (50,))
    by_hand = [[k for k, _run in groupby(row[:n].argmax(-1).tolist()) if k] for row, n in zip(logits, lengths, strict=True)]
    assert best_path(logits, lengths) == by_hand and max(map(len, by_hand)) > 5
