"""The word-level LSTM of pytorch/examples, word_language_model/main.py, on a corpus in the form that it asks for.

    python benchmarks/jobs/lstm_peer.py EXAMPLES CORPUS STEPS [--tuned]

EXAMPLES is a checkout of github.com/pytorch/examples; CORPUS a folder with train.txt, valid.txt and test.txt. Time and loss of each
step come from the script's own log, with which it is also stopped: it knows epochs only. --tuned: bfloat16 autocast.
"""

import argparse
import os
from pathlib import Path
import tempfile

import script
import torch

BATCH, WINDOW = 20, 35
SETTINGS = "--tied --emsize 650 --nhid 650 --nlayers 2 --dropout 0.5 --lr 20 --clip 0.25 --log-interval 1".split()
TUNED = (
    ("main.py", "output, hidden = model(data, hidden)", "with torch.autocast('cpu', torch.bfloat16): output, hidden = model(data, hidden)"),
    ("model.py", "F.log_softmax(decoded, dim=1)", "F.log_softmax(decoded.float(), dim=1)"),
)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("examples", type=Path)
    p.add_argument("corpus", type=Path)
    p.add_argument("steps", type=int)
    p.add_argument("--tuned", action="store_true")
    o = p.parse_args()
    source, corpus = (path.resolve() for path in (o.examples / "word_language_model", o.corpus))
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        script.copy(source, ("main.py", "data.py", "model.py"), TUNED if o.tuned else ())
        log = script.Log(r"ms/batch +([0-9.]+) \| loss +([0-9.]+)", o.steps - 1)
        settings = [*SETTINGS, "--data", str(corpus), "--batch_size", str(BATCH), "--bptt", str(WINDOW)]
        model = script.run("main.py", settings, log)["model"]
        os.chdir("/")
    # its first line tells the sums of the first two steps
    ms, losses = ([first / 2, first / 2, *rest] for first, *rest in zip(*log.found, strict=True))
    multiplied = sum(w.numel() for name, w in model.named_parameters() if w.ndim > 1)  # tied: the embedding is the output's matrix
    params = sum(w.numel() for w in model.parameters())
    more = {"vocabulary": model.ntoken, "threads": torch.get_num_threads(), "tuned": o.tuned}
    script.tell([t / 1000 for t in ms], losses, "words", BATCH * WINDOW, 6.0 * multiplied, params, **more)


if __name__ == "__main__":
    main()
