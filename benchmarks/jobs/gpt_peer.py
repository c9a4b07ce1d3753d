"""nanoGPT's train.py on characters, its own config/train_shakespeare_char.py, on a CPU.

    python benchmarks/jobs/gpt_peer.py NANOGPT TEXT STEPS BATCH [--tuned]

NANOGPT is a checkout of github.com/karpathy/nanoGPT; TEXT a file, which its own prepare.py cuts and numbers. Time and loss of each step
come from the script's own log. --tuned: bfloat16 autocast and fused AdamW, which it keeps for CUDA, and no dropout inside the attention,
which cloche has not either and for which there is no fused kernel on a CPU.
"""

import argparse
import os
from pathlib import Path
import shutil
import sys
import tempfile
import types

import script
import torch

WINDOW, CONFIG = 256, "config/train_shakespeare_char.py"
PREPARE = "data/shakespeare_char/prepare.py"
TUNED = (
    ("train.py", "ctx = nullcontext() if device_type == 'cpu' else ", "ctx = "),
    ("model.py", "use_fused = fused_available and device_type == 'cuda'", "use_fused = fused_available"),
    ("model.py", "dropout_p=self.dropout if self.training else 0", "dropout_p=0"),
)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("nanogpt", type=Path)
    p.add_argument("text", type=Path)
    p.add_argument("steps", type=int)
    p.add_argument("batch", type=int)
    p.add_argument("--tuned", action="store_true")
    o = p.parse_args()
    source, text = o.nanogpt.resolve(), o.text.resolve()
    sys.modules.setdefault("requests", types.ModuleType("requests"))  # prepare.py imports it for a download that it has no need of
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        script.copy(source, ("train.py", "model.py", "configurator.py", CONFIG, PREPARE), TUNED if o.tuned else ())
        shutil.copy(text, Path(PREPARE).with_name("input.txt"))
        script.run(PREPARE, [], script.Log("$^"))
        log = script.Log(r"iter \d+: loss ([0-9.]+), time ([0-9.]+)ms")
        settings = [f"--batch_size={o.batch}", f"--max_iters={o.steps - 1}", "--log_interval=1", "--eval_iters=1", "--eval_interval=100000"]
        settings += ["--device=cpu", "--compile=False", *(["--dtype=bfloat16"] if o.tuned else [])]
        model = script.run("train.py", [CONFIG, *settings], log)["raw_model"]
        os.chdir("/")
    c = model.config
    flops = 6 * model.get_num_params() + 12 * c.n_layer * c.n_embd * c.block_size  # as its estimate_mfu counts them, a token
    params = sum(w.numel() for w in model.parameters())
    losses, ms = ([row[i] for row in log.found] for i in (0, 1))
    more = {"vocabulary": c.vocab_size, "threads": torch.get_num_threads(), "tuned": o.tuned}
    script.tell([t / 1000 for t in ms], losses, "tokens", o.batch * WINDOW, flops, params, **more)


if __name__ == "__main__":
    main()
