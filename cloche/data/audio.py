"""Sound as a net hears it: samples → log-mel frames on the device, text → characters; both fitted on the training part.

    audio (B, L) ─ torch.stft ─ |·|² (B, T, bins) ─ mel filters ─ log ─ per-mel mean and std ─ audio (B, T, M), audio_len (B,)
    text ─ its characters, numbered from 1 ─ target (B, U), target_len (B,); 0 is CTC's blank
Source: S. Davis, P. Mermelstein 1980, "Comparison of parametric representations"; the mel scale of HTK: 2595 log10(1 + f / 700).
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field
import torch
from torch import Tensor
import torch.nn.functional as F

from cloche.config import Port
from cloche.data.chunk import Chunk
from cloche.data.pictures import Unreadable
from cloche.data.prepare import DataConfig, Scaled, batches, moments
from cloche.data.read.audio import decode, sounding
from cloche.data.table import Ragged, Table, on_grid, pad
from cloche.errors import UserError
from cloche.words import _

WINDOW_S, HOP_S = 0.032, 0.010  # a frame and the step to the next
UNKNOWN = "\ufffd"  # a character that the training part does not have: never learned, always an error
HEARD = ("audio", "audio_len")


class AudioConfig(DataConfig):
    kind: Literal["audio"] = "audio"
    mels: int = Field(40, ge=8, le=80, description=_("bands of the spectrogram, even on the mel scale"))
    rows: int = Field(1500, ge=20, le=1_000_000, description=_("how many clips are made"))
    snr_db: float = Field(10.0, ge=-20, le=60, description=_("power of the tones over the noise's, in dB"))


class AudioPrepare(Scaled):
    """Log-mel frames (B, T, M), T a multiple of 8, zeros after a clip's own; padding changes none of them."""

    kind: Literal["audio"] = "audio"
    rate: int = Field(ge=100, le=1_000_000)
    alphabet: str
    mean: tuple[float, ...] = Field(strict=False)
    std: tuple[float, ...] = Field(strict=False)
    labels: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def fit(cls, store: Any, rows: dict[str, np.ndarray], config: AudioConfig) -> "AudioPrepare":
        ids, text = rows["train"], store.fields["text"]
        alphabet = "".join(sorted({c for i in ids for c in bytes(text[i].tolist()).decode()} - {UNKNOWN})) + UNKNOWN
        plain = cls(rate=int(store.fields["rate"][0]), alphabet=alphabet, mean=(0.0,) * config.mels, std=(1.0,) * config.mels)
        clips = (plain.frames(*store.fields["audio"].take(i)) for i in batches(ids, 64))
        mean, std = moments(x[torch.arange(x.shape[1], device=n.device) < n[:, None]] for x, n in clips)
        return plain.model_copy(update={"mean": mean, "std": std})

    @property
    def port(self) -> Port:
        return Port("series", (None, len(self.mean)))

    def view(self, store: Any, ids: np.ndarray) -> tuple[Table, np.ndarray]:
        """Rows with `target` instead of text; a row costs its frames."""
        if (rate := int(store.fields["rate"][0])) != self.rate:
            raise UserError(_("this sound has {found} Hz, the run's {wanted}").format(found=rate, wanted=self.rate), "", _("resample it"))
        place, audio, text = {c: k for k, c in enumerate(self.alphabet, 1)}, store.fields["audio"], store.fields["text"]
        said = [[place.get(c, place[UNKNOWN]) for c in bytes(text[i].tolist()).decode()] for i in range(store.n)]
        rows = Table({"target": Ragged.of(said, np.int64)}, store.names)
        rows.fields["audio"], rows.lengths = audio, audio.lengths // round(HOP_S * self.rate)
        return rows, ids

    def encode(self, given: str | Path | bytes | np.ndarray) -> dict[str, np.ndarray]:
        """A WAV file, its bytes, or (n,) int16 samples at the run's rate."""
        name = _("the sound") if isinstance(given, bytes | np.ndarray) else given
        try:
            samples, rate = (given, self.rate) if isinstance(given, np.ndarray) else decode(Path(given) if name == given else given)
            if rate != self.rate:
                raise Unreadable(_("it has {found} Hz, the run's sound {wanted}").format(found=rate, wanted=self.rate))
            return {"audio": sounding(samples)}
        except Unreadable as fault:
            raise UserError(_("{path} cannot be heard").format(path=name), str(fault), _("give a WAV file with PCM samples")) from None

    def gather(self, encoded: list[dict[str, np.ndarray]]) -> dict[str, Tensor]:
        return dict(zip(HEARD, pad([e["audio"] for e in encoded]), strict=True))

    def device(self, chunk: Chunk) -> Chunk:
        return replace(chunk, data=chunk.data | dict(zip(HEARD, self.frames(*(chunk.data[k] for k in HEARD)), strict=True)))

    def frames(self, audio: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L) int16, (B,) → (B, T, M) float32, (B,): log (power of a Hann window in each band + 1e-8), scaled."""
        window, hop = round(WINDOW_S * self.rate), round(HOP_S * self.rate)
        T, n = (k // hop + 1 for k in (max(0, audio.shape[1] - window + hop - 1), (samples - window + hop - 1).clip(min=0)))
        T, hann = on_grid(T), torch.hann_window(window, device=audio.device)
        x = F.pad(audio.float() / 32768, (0, window + T * hop))
        x = torch.stft(x, window, hop, window=hann, center=False, return_complex=True)[..., :T]  # (B, bins, T)
        power = x.abs().square().transpose(1, 2) / hann.square().sum()  # (B, T, bins)
        mel = (power @ mel_filters(self.rate, window, len(self.mean)).to(audio.device) + 1e-8).log()  # (B, T, M)
        mean, std = torch.tensor([self.mean, self.std], device=audio.device)
        inside = torch.arange(T, device=audio.device) < n[:, None]  # (B, T)
        return torch.where(inside[..., None], (mel - mean) / std, 0.0), n


def mel_filters(rate: int, window: int, mels: int) -> Tensor:
    """(bins, M) triangles, even on the mel scale from 0 to half the rate, each rising to 1 at its middle."""
    edges = 700 * (10 ** (torch.linspace(0, 2595 * np.log10(1 + rate / 1400), mels + 2, dtype=torch.float64) / 2595) - 1)  # Hz
    hz = torch.arange(window // 2 + 1, dtype=torch.float64)[:, None] * rate / window
    low, middle, high = edges[:-2], edges[1:-1], edges[2:]
    return torch.minimum((hz - low) / (middle - low), (high - hz) / (high - middle)).clamp(min=0).float()
