"""cloche's sampling at the shape of GPT-2 124M with random weights: what `cloche generate` does once a run is loaded.

    python benchmarks/jobs/sample_cloche.py PROMPT NEW

A program of its own, since there is no run of that size: net, number format, sampling and allocator setting are those of the command.
The format is what cloche's own trial would choose on this machine.
"""
# ruff: noqa: E402  (the allocator is set before torch is imported)

from cloche import start

start.calm_threads()
start.tune_allocator()

import argparse
import json
import statistics
import time
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from cloche.config import Port
from cloche.data.chunk import Chunk
from cloche.decode.text import continue_text
from cloche.nets.gpt import GptConfig
from cloche.training.precision import Precision, trial

VOCABULARY, CONTEXT, TRIED, TIMES = 50304, 1024, 64, 3


def chosen(net: torch.nn.Module) -> tuple[Precision, dict[str, float]]:
    """cloche's trial, on one row of TRIED tokens."""
    tokens, one = torch.randint(VOCABULARY, (1, TRIED + 1)), torch.zeros(1, dtype=torch.int64)

    def loss(nets: dict, chunk: Chunk, carry: None) -> tuple:
        t = chunk.data["tokens"]
        return F.cross_entropy(nets["net"](t[:, :-1])[0].float().flatten(0, 1), t[:, 1:].flatten()), None, {}

    chunk = Chunk({"tokens": tokens}, one, one, torch.ones(1), torch.tensor(0), train=True)
    return trial({"net": net}, SimpleNamespace(loss=loss), chunk, Precision("auto", "auto", "auto"))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("prompt", type=int)
    p.add_argument("new", type=int)
    o = p.parse_args()
    torch.manual_seed(0)
    port = Port("tokens", (CONTEXT,), VOCABULARY)
    net = GptConfig(width=768, layers=12, heads=12).build(port, port, "continues")
    for w in net.parameters():
        if w.ndim > 1:
            torch.nn.init.normal_(w, std=0.02)
    precision, tried = chosen(net)
    net.eval().requires_grad_(False)  # as a run is loaded, and made ready by `cloche generate`
    precision.pack(net, torch.device("cpu"))
    prompt, device = torch.randint(VOCABULARY, (1, o.prompt)), torch.device("cpu")

    def seconds(n: int) -> tuple[float, float]:
        """To the first token, and to the last."""
        t0, ends = time.perf_counter(), []
        for _token in continue_text(net, prompt, n, 0.8, 200, 1.0, torch.Generator().manual_seed(0)):
            ends.append(time.perf_counter() - t0)
        assert len(ends) == n
        return ends[0], ends[-1]

    with torch.inference_mode(), precision.autocast(device):
        seconds(2)
        first_s, total_s = (statistics.median(each) for each in zip(*(seconds(o.new) for _ in range(TIMES)), strict=True))
    figures = {"total_s": total_s, "first_ms": 1000 * first_s, "next_ms": 1000 * (total_s - first_s) / (o.new - 1)}
    params = sum(w.numel() for w in net.parameters())
    more = {"threads": torch.get_num_threads(), "precision": f"{precision.dtype} {precision.matmul}", "tried": tried}
    print(json.dumps({**figures, "params": params, "allocator_tuned": start.tuned, **more}))


if __name__ == "__main__":
    main()
