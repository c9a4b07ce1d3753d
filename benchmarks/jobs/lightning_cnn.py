"""The primer's job as a Lightning user writes it: a LightningModule and Trainer.fit.

    python benchmarks/jobs/lightning_cnn.py DATA STEPS [--tuned]

As shipped: float32, torch's Adam, and what the Trainer does by itself: progress bar, log, a checkpoint at the end. --tuned:
precision="bf16-mixed", channels-last, fused Adam, and none of those three.
"""

from watch import Watch, arguments, tell  # isort: skip  (its clock starts before the heavy imports)
from primer_job import BATCH, Net, loader, machine  # isort: skip  (it knows how to import torchvision, which Lightning does too)

import tempfile

import lightning.pytorch as L
import torch
from torch import Tensor
import torch.nn.functional as F


class Classifier(L.LightningModule):
    def __init__(self, tuned: bool) -> None:
        super().__init__()
        self.tuned, self.net = tuned, Net(classes=10)
        if tuned:
            self.net.to(memory_format=torch.channels_last)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        x, y = batch
        if self.tuned:
            x = x.to(memory_format=torch.channels_last)
        loss = F.cross_entropy(self.net(x), y)
        if not self.tuned:
            self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3, weight_decay=1e-4, fused=self.tuned or None)


class Timed(L.Callback):
    def __init__(self) -> None:
        self.watch, self.losses = Watch(), []

    def on_train_batch_end(self, trainer: L.Trainer, module: Classifier, outputs: dict, batch: object, index: int) -> None:
        self.watch.step()
        self.losses.append(outputs["loss"].detach())


def train(folder: str, steps: int, tuned: bool) -> dict:
    L.seed_everything(0)
    model, batches, timed = Classifier(tuned), loader(folder), Timed()
    told = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False} if tuned else {}
    with tempfile.TemporaryDirectory() as out:
        precision = "bf16-mixed" if tuned else "32-true"
        L.Trainer(max_steps=steps, max_epochs=-1, precision=precision, callbacks=[timed], default_root_dir=out, **told).fit(model, batches)
    return timed.watch.figures(BATCH, timed.losses) | machine(model, tuned)


if __name__ == "__main__":
    o = arguments(__doc__, "bf16-mixed, channels-last, fused Adam; no progress bar, log, checkpoint")
    tell(train(o.data, o.steps, o.tuned))
