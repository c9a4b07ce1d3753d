"""Sound with what is said in it, of kind "audio": WAV files beside a transcripts.tsv, and keypad tones made with a known truth."""

import io
from pathlib import Path
import unicodedata
import wave

import numpy as np

from cloche import rng
from cloche.data.pictures import Unreadable
from cloche.data.read.examples import Examples, digest, plain, utf8
from cloche.data.table import Ragged
from cloche.errors import UserError
from cloche.words import _, listed, number

MAX_BYTES = 1 << 28  # of a file: 46 minutes of 16 bits at 48 kHz
KEYS, LOW, HIGH = "123456789*0#", (697, 770, 852, 941), (1209, 1336, 1477)  # Hz of a keypad's rows and columns, ITU-T Q.23


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
    return plain("audio", fields, list(clips), rows, left_out=left_out, group=np.stack([digest(row[alike]) for row in rows]))
