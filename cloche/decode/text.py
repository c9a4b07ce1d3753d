"""Text written token by token: which one is taken, on what the net remembers of those before, and as whole characters."""

import codecs
from collections.abc import Callable, Iterator
import math

import torch
from torch import Tensor, nn

from cloche.errors import UserError
from cloche.words import _, number


def pick(logits: Tensor, temperature: float, top_k: int, top_p: float, generator: torch.Generator) -> Tensor:
    """One token a row: (B, V) → (B,), drawn from softmax(logits / temperature).

    Args: temperature: 0 takes the likeliest. top_k: only so many of the likeliest, 0 for all. top_p: only the likeliest that together
        reach this share, at least one. generator: on the CPU, so that all devices draw the same.
    Source: top_p: Holtzman et al. 2020, arXiv 1904.09751, section 3.1.
    """
    if temperature == 0:
        return logits.argmax(1)
    below = logits.float() - logits.float().amax(1, keepdim=True)  # so that no temperature is too small
    p, token = (below / temperature).softmax(1), None  # (B, V)
    if top_k or top_p < 1:
        p, token = p.topk(min(top_k or p.shape[1], p.shape[1]))  # the likeliest first
        p = p * (p.cumsum(1) - p < top_p)  # what stands before it is less than the share
    place = torch.multinomial(p.cpu(), 1, generator=generator).to(logits.device)  # (B, 1)
    return (place if token is None else token.gather(1, place))[:, 0]


def check_prompt(length: int, context: int) -> None:
    """Raises: UserError where a net that looks back over `context` tokens (0: any number) is given more."""
    if context and length > context:
        told = _("{n} tokens, the start counted; the net looks back over {context}").format(n=number(length), context=number(context))
        raise UserError(_("the prompt is longer than the net's context"), told, _("shorten it, or train with a larger data.window"))


@torch.no_grad()
def continue_text(
    net: nn.Module, prompt: Tensor, limit: int, temperature: float, top_k: int, top_p: float, generator: torch.Generator, never: int = -1
) -> Iterator[int]:
    """The `limit` tokens that follow the prompt (1, T), one by one; `never` is one that is not written, such as the unknown word.

    What a net with a context has no more room for it forgets: it starts again from the newer half of what it sees.
    """
    check_prompt(prompt.shape[1], net.context)
    room = min(net.context or math.inf, prompt.shape[1] + limit)
    given = seen = prompt  # what comes next, and all that the carry holds with it (1, T)
    carry = net.start(1, room)
    for _n in range(limit):
        if seen.shape[1] > room:
            given = seen = seen[:, -(room // 2) :]
            carry = net.start(1, room)
        logits, carry = net(given, carry)  # (1, T, V)
        if never >= 0:
            logits[:, -1, never] = -math.inf
        given = pick(logits[:, -1], temperature, top_k, top_p, generator)[:, None]
        seen = torch.cat([seen, given], 1)
        yield int(given)


def stream(tokens: Iterator[int], decode: Callable[[list[int]], bytes]) -> Iterator[str]:
    """The text of tokens as they come, never half a character: bytes wait until theirs is whole."""
    return codecs.iterdecode((decode([token]) for token in tokens), "utf-8", "replace")
