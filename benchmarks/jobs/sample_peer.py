"""nanoGPT's GPT.generate at the shape of GPT-2 124M with random weights, in float32 as its sample.py runs on a CPU.

    python benchmarks/jobs/sample_peer.py NANOGPT PROMPT NEW [--tuned]

NANOGPT is a checkout of github.com/karpathy/nanoGPT; NEW tokens follow a prompt of PROMPT. --tuned: bfloat16 autocast.
"""

import argparse
import json
from pathlib import Path
import sys
import time

import torch

VOCABULARY, CONTEXT = 50304, 1024


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("nanogpt", type=Path)
    p.add_argument("prompt", type=int)
    p.add_argument("new", type=int)
    p.add_argument("--tuned", action="store_true")
    o = p.parse_args()
    sys.path.insert(0, str(o.nanogpt.resolve()))
    sys.dont_write_bytecode, stdout, sys.stdout = True, sys.stdout, sys.stderr  # it prints
    from model import GPT, GPTConfig

    torch.manual_seed(0)
    net = GPT(GPTConfig(CONTEXT, VOCABULARY, n_layer=12, n_head=12, n_embd=768, dropout=0.0, bias=False)).eval()
    prompt, sys.stdout = torch.randint(VOCABULARY, (1, o.prompt)), stdout

    def seconds(n: int) -> float:
        t0 = time.perf_counter()
        out = net.generate(prompt, n, temperature=0.8, top_k=200)
        assert out.shape == (1, o.prompt + n)
        return time.perf_counter() - t0

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=o.tuned):
        seconds(2)
        first_s, total_s = seconds(1), seconds(o.new)
    figures = {"total_s": total_s, "first_ms": 1000 * first_s, "next_ms": 1000 * (total_s - first_s) / (o.new - 1)}
    params = sum(w.numel() for w in net.parameters())
    print(json.dumps({**figures, "params": params, "threads": torch.get_num_threads(), "tuned": o.tuned}))


if __name__ == "__main__":
    main()
