"""The primer's job under Hugging Face's transformers.Trainer, with a plain torch module.

    python benchmarks/jobs/trainer_cnn.py DATA STEPS [--tuned]

As shipped: float32, its default AdamW (torch's, fused since transformers 5), clipping at 1, progress bar, log, a checkpoint at the
end. --tuned: bf16=True, channels-last, no clipping, and none of those three. A constant rate in both, since the others have no
schedule.
"""

from watch import Watch, arguments, tell  # isort: skip  (its clock starts before the heavy imports)
from primer_job import BATCH, Net, loader, machine  # isort: skip  (it knows how to import torchvision, which transformers does too)

import tempfile

import torch
from torch import Tensor, nn
import torch.nn.functional as F
from torch.utils.data import default_collate
from transformers import Trainer, TrainerCallback, TrainingArguments


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.losses = Net(classes=10), []

    def forward(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(pixels)
        loss = F.cross_entropy(logits, labels)
        self.losses.append(loss.detach())
        return {"loss": loss, "logits": logits}


class Timed(TrainerCallback):
    def __init__(self) -> None:
        self.watch = Watch()

    def on_step_end(self, *given: object, **more: object) -> None:
        self.watch.step()


def train(folder: str, steps: int, tuned: bool) -> dict:
    torch.manual_seed(0)
    model = Classifier()
    if tuned:
        model.to(memory_format=torch.channels_last)

    def collate(rows: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
        x, y = default_collate(rows)
        return {"pixels": x.to(memory_format=torch.channels_last) if tuned else x, "labels": y}

    careful = {"bf16": True, "optim": "adamw_torch_fused", "max_grad_norm": 0.0, "save_strategy": "no", "logging_strategy": "no"}
    with tempfile.TemporaryDirectory() as out:
        how = TrainingArguments(
            out,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=1e-3,
            weight_decay=1e-4,
            lr_scheduler_type="constant",
            use_cpu=not torch.cuda.is_available(),  # else bf16 is refused there
            **(careful | {"disable_tqdm": True} if tuned else {}),
        )
        timed = Timed()
        # the Trainer makes the plain DataLoader itself, of the same pictures
        Trainer(model, how, train_dataset=loader(folder).dataset, data_collator=collate, callbacks=[timed]).train()
    return timed.watch.figures(BATCH, model.losses) | machine(model, tuned)


if __name__ == "__main__":
    o = arguments(__doc__, "bf16, channels-last, fused AdamW; no clipping, progress bar, log, checkpoint")
    tell(train(o.data, o.steps, o.tuned))
