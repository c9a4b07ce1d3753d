"""Writing a target token by token with a net of the face "pairs": the likeliest next token, or the best of several ways at once."""

import math

import torch
from torch import nn

from cloche.data.pairs import BOS, EOS, PAD
from cloche.nets.attention import Memory


@torch.no_grad()
def greedy(net: nn.Module, memory: Memory, limit: int) -> list[list[int]]:
    """Always the likeliest next token, at most `limit` of them. Returns: for each row its tokens, without BOS and EOS."""
    rows, device = len(memory[0]), memory[0].device
    carry, said = net.start(rows, limit, memory), []
    token, done = torch.full((rows, 1), BOS, device=device), torch.zeros(rows, 1, dtype=torch.bool, device=device)
    for n in range(limit):
        logits, carry = net.decode(token, memory, carry)  # (B, 1, V)
        token = logits.argmax(-1).masked_fill(done, PAD)  # (B, 1)
        said.append(token)
        done |= token == EOS
        if n % 8 == 7 and done.all():  # asking waits for the device: not at every token
            break
    return [_until_end(row) for row in torch.cat(said, 1).tolist()]


@torch.no_grad()
def beam(net: nn.Module, memory: Memory, limit: int, width: int) -> list[list[int]]:
    """The target whose mean log-probability a token, EOS counted, is highest among `width` that are followed at once.

    A target that has ended keeps its place, its score and its length as long as no other one pushes it out; one that is cut off at `limit`
    competes as it stands. Width 1 is `greedy`.

    Source: the length penalty of Wu et al. 2016, arXiv 1609.08144, section 7, with the plain mean in the place of theirs.
    """
    rows, device = len(memory[0]), memory[0].device
    memory = (memory[0].repeat_interleave(width, 0), memory[1].repeat_interleave(width, 0))  # (B·W, S, …)
    carry, first = net.start(rows * width, limit, memory), torch.arange(rows, device=device)[:, None] * width
    said = torch.full((rows, width, 1), BOS, device=device)  # (B, W, t)
    score = torch.full((rows, width), -math.inf, device=device)  # (B, W) sums of log-probabilities
    score[:, 0] = 0  # the others begin as nothing: the first step fills them
    length, done = torch.zeros_like(score), torch.zeros(rows, width, dtype=torch.bool, device=device)
    for n in range(limit):
        logits, carry = net.decode(said[:, :, -1].reshape(-1, 1), memory, carry)
        step = logits[:, 0].float().log_softmax(-1).view(rows, width, -1)  # (B, W, V)
        stay = torch.full_like(step[0, 0], -math.inf)
        stay[PAD] = 0  # what has ended has one way to go on, at no cost
        total, length = score[..., None] + torch.where(done[..., None], stay, step), length + ~done  # (B, W, V), (B, W)
        best = (total / length[..., None]).flatten(1).topk(width).indices  # (B, W)
        parent, token = best // step.shape[-1], best % step.shape[-1]
        score, length, done = total.flatten(1).gather(1, best), length.gather(1, parent), done.gather(1, parent) | (token == EOS)
        said = torch.cat([said.gather(1, parent[..., None].expand(-1, -1, said.shape[2])), token[..., None]], 2)
        carry = {name: t.index_select(0, (first + parent).flatten()) for name, t in carry.items()}
        if n % 8 == 7 and done.all():
            break
    winner = (score / length).argmax(1)
    return [_until_end(row[w][1:]) for row, w in zip(said.tolist(), winner.tolist(), strict=True)]


def _until_end(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(EOS)] if EOS in tokens else tokens
