"""The primer's job as a Keras user writes it: layers, compile, fit, on Keras' torch backend.

    python benchmarks/jobs/keras_cnn.py DATA STEPS [--tuned]

As shipped: float32, Keras' own Adam, its progress bar. --tuned: the policy mixed_bfloat16 (logits in float32, as Keras' guide has
it), no progress bar. The layout is Keras' default, channels last. Its optimizer is Keras' own in both: it has no fused one.
"""

from watch import Watch, arguments, tell  # isort: skip  (its clock starts before the heavy imports)

import os

os.environ["KERAS_BACKEND"] = "torch"  # before keras is imported, which reads it

import keras
from keras import layers
from primer_job import BATCH, loader
import torch


def net() -> keras.Model:
    return keras.Sequential(
        [
            keras.Input((3, 48, 48)),
            layers.Permute((2, 3, 1)),  # the loader's pictures are (3, 48, 48)
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.Conv2D(64, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(128, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dropout(0.5),
            layers.Dense(512, activation="relu"),
            layers.Dropout(0.5),
            layers.Dense(10, dtype="float32"),
        ]
    )


class Timed(keras.callbacks.Callback):
    """Keras tells the mean loss of the epoch so far; each step's own is in the difference."""

    def __init__(self) -> None:
        super().__init__()
        self.watch, self.means = Watch(), [0.0]

    def on_train_batch_end(self, batch: int, logs: dict[str, float]) -> None:
        self.watch.step()
        self.means.append(logs["loss"])

    @property
    def losses(self) -> list[float]:
        return [n * mean - (n - 1) * self.means[n - 1] for n, mean in enumerate(self.means) if n]


def train(folder: str, steps: int, tuned: bool) -> dict:
    keras.utils.set_random_seed(0)
    if tuned:
        keras.config.set_dtype_policy("mixed_bfloat16")
    model, batches = net(), loader(folder)
    model.compile(
        optimizer=keras.optimizers.Adam(1e-3, weight_decay=1e-4),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    timed = Timed()
    model.fit(batches, steps_per_epoch=steps, callbacks=[timed], verbose=0 if tuned else "auto")
    return timed.watch.figures(BATCH, timed.losses) | {
        "batch": BATCH,
        "params": model.count_params(),
        "tuned": tuned,
        "device": next(model.parameters()).device.type,
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    o = arguments(__doc__, "mixed_bfloat16, no progress bar")
    tell(train(o.data, o.steps, o.tuned))
