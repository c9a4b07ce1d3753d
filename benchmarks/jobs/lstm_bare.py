"""torch.nn.LSTM in a bare loop: 2 × 650, 10 000 words, batch 20, 35 steps of time, bf16 autocast, fused AdamW. Prints JSON.

python benchmarks/jobs/lstm_bare.py STEPS
"""

import json
import sys
import time

import torch
from torch import nn
import torch.nn.functional as F

WIDTH, WORDS, BATCH, TIME, WARM = 650, 10_000, 20, 35, 10


def main(steps: int) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    embed, lstm = nn.Embedding(WORDS, WIDTH).to(device), nn.LSTM(WIDTH, WIDTH, 2, batch_first=True, dropout=0.4).to(device)
    optimizer = torch.optim.AdamW([*embed.parameters(), *lstm.parameters()], 1e-3, fused=True)
    words, state, t0 = torch.randint(WORDS, (BATCH, TIME + 1), device=device), None, 0.0
    for step in range(steps):
        if step == WARM:
            _wait(device)
            t0 = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16):
            y, state = lstm(embed(words[:, :-1]), state)
            logits = F.linear(y, embed.weight)
        loss = F.cross_entropy(logits.float().flatten(0, 1), words[:, 1:].flatten())
        state = tuple(s.detach() for s in state)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    _wait(device)
    print(json.dumps({"words_per_s": BATCH * TIME * (steps - WARM) / (time.perf_counter() - t0), "loss": loss.item()}))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(int(sys.argv[1]))
