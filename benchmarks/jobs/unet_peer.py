"""GaussianDiffusion and Trainer of denoising-diffusion-pytorch, given cloche's U-Net: the same net in another trainer.

    python benchmarks/jobs/unet_peer.py PICTURES STEPS BATCH WIDTH,MULT,MULT,… [--tuned]

PICTURES is a folder of square PNGs. Of cloche only the nets are imported, not its start: the allocator is the system's. All pictures have
the same prompt of one token, read by the same small net as in unet.toml, which trains along. As shipped: float32, plain Adam. --tuned:
Trainer's amp in bfloat16, fused Adam, channels-last.
"""

import argparse
import copy
from functools import partial
import importlib
from pathlib import Path
import sys
import tempfile
import time

from PIL import Image
import script
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.flop_counter import FlopCounterMode

try:
    import torchvision  # noqa: F401
except RuntimeError:  # its CUDA build beside a CPU torch, see primer_job.py
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
ddpm = importlib.import_module("denoising_diffusion_pytorch.denoising_diffusion_pytorch")
TOKENS = 5  # of the prompts that are one letter, as cloche counts them


class Adapter(nn.Module):
    """cloche's U-Net as GaussianDiffusion calls one: time (B,) int64 → log-SNR."""

    self_condition = False

    def __init__(self, net: nn.Module, text: nn.Module, channels: int) -> None:
        super().__init__()
        self.net, self.text, self.channels, self.out_dim = net, text, channels, channels
        self.levels = torch.zeros(1000)

    def forward(self, x: Tensor, time: Tensor, x_self_cond: None = None) -> Tensor:
        one = torch.ones(len(x), dtype=torch.int64)
        return self.net(x, self.levels[time], self.text(one[:, None], one))


def flops_of(model: nn.Module, side: int) -> float:
    """Of one picture, forward and backward: matrix products and convolutions."""
    with FlopCounterMode(display=False) as counted:
        copy.deepcopy(model)(torch.randn(2, 3, side, side), torch.zeros(2, dtype=torch.int64)).sum().backward()
    return counted.get_total_flops() / 2


def main() -> None:
    from cloche.nets.textenc import Textenc
    from cloche.nets.unet import Unet, UnetConfig

    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("pictures")
    p.add_argument("steps", type=int)
    p.add_argument("batch", type=int)
    p.add_argument("widths", type=lambda text: [int(n) for n in text.split(",")])
    p.add_argument("--tuned", action="store_true")
    o = p.parse_args()
    torch.manual_seed(0)
    config = UnetConfig(width=o.widths[0], mults=tuple(o.widths[1:]), text={"width": 2})
    model = Adapter(Unet(3, config), Textenc(TOKENS, config.text), 3)
    with Image.open(next(Path(o.pictures).glob("*.png"))) as first:
        side = first.width
    flops = flops_of(model, side)
    diffusion = ddpm.GaussianDiffusion(model, image_size=side)
    diffusion.model.levels = torch.log(diffusion.alphas_cumprod / (1 - diffusion.alphas_cumprod))
    more = {}
    if o.tuned:
        ddpm.Adam = partial(torch.optim.Adam, fused=True)
        diffusion.to(memory_format=torch.channels_last)
        more = {"amp": True, "mixed_precision_type": "bf16"}
    losses, ends_s = [], []
    diffusion.register_forward_hook(lambda module, given, loss: losses.append(loss.detach()))
    register_optimizer_step_post_hook(lambda *given: ends_s.append(time.perf_counter()))
    with tempfile.TemporaryDirectory() as folder:
        settings = {"train_lr": 1e-3, "train_num_steps": o.steps, "results_folder": folder, "calculate_fid": False, **more}
        trainer = ddpm.Trainer(diffusion, o.pictures, train_batch_size=o.batch, save_and_sample_every=o.steps + 1, **settings)
        t0 = time.perf_counter()
        trainer.train()
    step_s = [b - a for a, b in zip([t0, *ends_s], ends_s, strict=False)]
    params = sum(w.numel() for w in model.parameters())
    more = {"threads": torch.get_num_threads(), "side": side, "tuned": o.tuned}
    script.tell(step_s, [float(loss) for loss in losses], "pictures", o.batch, flops, params, **more)


if __name__ == "__main__":
    main()
