"""Sound as a net hears it: samples → log-mel frames on the device, text → characters; both fitted on the training part.

    audio (B, L) ─ torch.stft ─ |·|² (B, T, bins) ─ mel filters ─ log ─ per-mel mean and std ─ audio (B, T, M), audio_len (B,)
    text ─ its characters, numbered from 1 ─ target (B, U), target_len (B,); 0 is CTC's blank
Source: S. Davis, P. Mermelstein 1980, "Comparison of parametric representations"; the mel scale of HTK: 2595 log10(1 + f / 700).
"""

from dataclasses import replace
import io
from pathlib import Path
from typing import Any, ClassVar, Literal
import unicodedata
import wave

import numpy as np
from pydantic import Field
import torch
from torch import Tensor
import torch.nn.functional as F

from cloche import rng
from cloche.config import Port
from cloche.data.chunk import Chunk
from cloche.data.pictures import Unreadable
from cloche.data.prepare import DataConfig, Scaled, batches, moments
from cloche.data.read.examples import Examples, digest, examples_of, utf8
from cloche.data.table import Ragged, Table, on_grid
from cloche.errors import UserError
from cloche.words import _, listed, number

WINDOW_S, HOP_S = 0.032, 0.010  # a frame and the step to the next
UNKNOWN = "\ufffd"  # a character that the training part does not have: never learned, always an error
MAX_BYTES = 1 << 28  # of a file: 46 minutes of 16 bits at 48 kHz
KEYS, LOW, HIGH = "123456789*0#", (697, 770, 852, 941), (1209, 1336, 1477)  # Hz of a keypad's rows and columns, ITU-T Q.23


class AudioConfig(DataConfig):
    kind: Literal["audio"] = "audio"
    mels: int = Field(40, ge=8, le=80, description=_("bands of the spectrogram, even on the mel scale"))
    rows: int = Field(1500, ge=20, le=1_000_000, description=_("how many clips are made"))
    snr_db: float = Field(10.0, ge=-20, le=60, description=_("power of the tones over the noise's, in dB"))


def read_audio(root: Path) -> Examples:
    """ROOT/transcripts.tsv, a line `file TAB what is said` for each WAV file below ROOT, all of one sample rate.

    Returns: `audio` int16 samples, `text` UTF-8 bytes (NFC), `rate` (n,) in Hz. Clips that cannot be used are left out by name.
    Raises: UserError when the tsv is missing or is not UTF-8, when rates differ, or when no clip is left.
    """
    lines = utf8(root / "transcripts.tsv").split("\n")
    clips, rates, left_out = {}, {}, {}
    said = [[cell.strip() for cell in line.partition("\t")[::2]] for line in lines if line.strip()]
    found = [p.relative_to(root).as_posix() for p in sorted(root.rglob("*.wav"))]
    for file, text in said + [[file, ""] for file in found if file not in dict(said)]:
        try:
            if not text or file in clips or ".." in Path(file).parts or Path(file).is_absolute():
                raise Unreadable(_("it lies outside the folder, or has two transcripts") if text else _("it has no transcript"))
            samples, rate = decode(root / file)
            clips[file] = samples, unicodedata.normalize("NFC", text)
            rates[rate] = _("{file} has {rate} Hz").format(file=file, rate=number(rate))
        except Unreadable as fault:
            left_out[file] = str(fault)
    if not clips:
        raise UserError(_("no clip in {path} can be used").format(path=root), listed(map(": ".join, left_out.items()), most=3))
    if len(rates) > 1:
        raise UserError(_("the clips differ in their sample rate"), listed(rates.values()), _("bring them all to one rate"))
    return _examples(clips, rate, 0, list(left_out.items()))


def decode(source: Path | bytes) -> tuple[np.ndarray, int]:
    """A WAV file of 8, 16, 24 or 32-bit PCM samples → ((n,) int16, channels mixed down; rate in Hz). Raises: Unreadable."""
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as file:
            content = file.read(MAX_BYTES)
        if content[12:16] == b"fmt " and content[20:22] == b"\xfe\xff":  # "extensible", which `wave` knows from Python 3.12 on:
            content = content[:20] + content[44:46] + content[22:]  # the format stands further back
        with wave.open(io.BytesIO(content)) as sound:
            channels, width, rate, n = sound.getparams()[:4]
            body = np.frombuffer(sound.readframes(n), np.uint8)
    except (OSError, EOFError, wave.Error) as fault:
        told = _("not a WAV file with PCM samples: {detail}").format(detail=str(fault) or _("it ends in its header"))
        raise Unreadable(getattr(fault, "strerror", None) or told) from None
    if len(body) < n * channels * width:
        raise Unreadable(_("it has {found} bytes of sound, its header promises {n}").format(found=len(body), n=n * channels * width))
    high = np.ascontiguousarray(body.reshape(n, channels, width)[..., -2:])  # the two high bytes of a sample; of 8 bits the one
    samples = (high.view("<i2") if width > 1 else (high.astype(np.int16) - 128) * 256)[..., 0]
    return sounding(np.rint(samples.mean(1)).astype(np.int16)), rate


def sounding(samples: np.ndarray) -> np.ndarray:
    """The samples. Raises: Unreadable where they are no sound, or there is nothing to hear in them."""
    if samples.dtype != np.int16 or samples.ndim != 1:
        raise Unreadable(_("{found}, not one row of int16 samples").format(found=f"{samples.dtype} {samples.shape}"))
    if not len(samples) or samples.min() == samples.max():
        raise Unreadable(_("silent: every sample is {value}").format(value=samples[0]) if len(samples) else _("it has no samples"))
    return samples


def read_dialtones(rows: int, snr_db: float) -> Examples:
    """Numbers of 3 to 8 keys, two sines each for 60–140 ms, 40–120 ms apart, levels within 6 dB, in white noise, at 8 kHz.

    snr_db: a clip's mean power while a tone sounds, over the noise's. Clips of one number are a group: it stands in one part only.
    """
    g, clips = rng.generator("dialtones", rows), {}
    for row in range(rows):
        keys, pieces = g.integers(0, 12, g.integers(3, 9)), [np.zeros(g.integers(320, 961))]
        for key in keys:
            t, phase = np.arange(g.integers(480, 1121)) * (2 * np.pi / 8000), g.uniform(0, 2 * np.pi, 2)
            tone = np.sin(LOW[key // 3] * t + phase[0]) + np.sin(HIGH[key % 3] * t + phase[1])
            pieces += [0.1 * 10 ** g.uniform(0, 0.3) * tone, np.zeros(g.integers(320, 961))]
        clip, power = np.concatenate(pieces), np.mean(np.concatenate(pieces[1::2]) ** 2)
        clip += np.sqrt(power / 10 ** (snr_db / 10)) * g.standard_normal(len(clip))
        clips[f"clip {row}"] = np.rint(32767 * clip.clip(-1, 1)).astype(np.int16), "".join(KEYS[key] for key in keys)
    return _examples(clips, 8000, 1, [])


def _examples(clips: dict[str, tuple[np.ndarray, str]], rate: int, alike: int, left_out: list[tuple[str, str]]) -> Examples:
    """alike: what clips of one group share, 0 their samples, 1 their text."""
    rows = [(samples, text.encode()) for samples, text in clips.values()]
    audio, text = zip(*rows, strict=True)
    fields = {"rate": np.full(len(rows), rate), "audio": Ragged.of(audio, np.int16), "text": Ragged.of(text, np.uint8)}
    return examples_of("audio", fields, list(clips), rows, left_out=left_out, group=np.stack([digest(row[alike]) for row in rows]))


class AudioPrepare(Scaled):
    """Log-mel frames (B, T, M), T a multiple of 8, zeros after a clip's own; padding changes none of them."""

    kind: Literal["audio"] = "audio"
    rate: int = Field(ge=100, le=1_000_000)
    alphabet: str
    mean: tuple[float, ...] = Field(strict=False)
    std: tuple[float, ...] = Field(strict=False)
    labels: ClassVar[tuple[str, ...]] = ()
    ragged: ClassVar[bool] = True

    @classmethod
    def fit(cls, store: Any, rows: dict[str, np.ndarray], config: AudioConfig) -> "AudioPrepare":
        alphabet = "".join(sorted(set().union(*store.fields["text"].texts(rows["train"])) - {UNKNOWN})) + UNKNOWN
        plain = cls(rate=int(store.fields["rate"][0]), alphabet=alphabet, mean=(0.0,) * config.mels, std=(1.0,) * config.mels)
        clips = (plain.frames(*store.fields["audio"].take(i)) for i in batches(rows["train"], 64))
        mean, std = moments(x[torch.arange(x.shape[1], device=n.device) < n[:, None]] for x, n in clips)
        return plain.model_copy(update={"mean": mean, "std": std})

    @property
    def port(self) -> Port:
        return Port("series", (None, len(self.mean)))

    def view(self, store: Any, ids: np.ndarray) -> tuple[Table, np.ndarray]:
        """Rows with `target` instead of text; a row costs its frames."""
        if (rate := int(store.fields["rate"][0])) != self.rate:
            raise UserError(_("this sound has {found} Hz, the run's {wanted}").format(found=rate, wanted=self.rate), "", _("resample it"))
        place, audio = {c: k for k, c in enumerate(self.alphabet, 1)}, store.fields["audio"]
        said = [[place.get(c, place[UNKNOWN]) for c in text] for text in store.fields["text"].texts(np.arange(store.n))]
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

    def device(self, chunk: Chunk) -> Chunk:
        audio, length = self.frames(chunk.data["audio"], chunk.data["audio_len"])
        return replace(chunk, data=chunk.data | {"audio": audio, "audio_len": length})

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
