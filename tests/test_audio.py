"""Sound: WAV files of every kind and every fault, keypad tones as promised, frames against their formula, padding that changes nothing."""

import io
import math
import wave

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from cloche.data.audio import HIGH, HOP_S, KEYS, LOW, WINDOW_S, AudioConfig, AudioPrepare, decode, mel_filters, read_audio, read_dialtones
from cloche.data.chunk import Chunk
from cloche.data.pictures import Unreadable
from cloche.data.split import split
from cloche.data.store import Store
from cloche.errors import UserError

SAMPLES = np.random.default_rng(0).integers(-(2**15), 2**15, 400).astype("<i2")


def wav(samples, width=2, channels=1, rate=8000):
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setparams((channels, width, rate, 0, "NONE", ""))
        file.writeframes(samples.tobytes() if isinstance(samples, np.ndarray) else samples)
    return out.getvalue()


def deep(width, low):
    """SAMPLES with `low` bytes below their own two."""
    return b"".join(bytes([low] * (width - 2)) + s.tobytes() for s in SAMPLES)


@pytest.mark.parametrize("width", [2, 3, 4])
def test_two_high_bytes_of_each_sample_are_kept(width):
    samples, rate = decode(wav(deep(width, 200), width, rate=11025))
    assert samples.dtype == np.int16 and rate == 11025 and (samples == SAMPLES).all()


def test_eight_bits_have_their_zero_at_128():
    assert decode(wav(np.array([0, 128, 129, 255], np.uint8), 1))[0].tolist() == [-32768, 0, 256, 32512]


def test_channels_are_mixed_down():
    both = np.stack([SAMPLES, SAMPLES // 2], 1)
    assert (decode(wav(both, channels=2))[0] == np.rint(both.mean(1))).all()


def test_the_extensible_form_of_pcm():
    plain = wav(deep(3, 7), 3)
    guid = b"\x01\x00\x00\x00\x00\x00\x10\x00\x80\x00\x00\xaa\x00\x38\x9b\x71"
    body = plain[:16] + (40).to_bytes(4, "little") + b"\xfe\xff" + plain[22:36] + b"\x16\x00\x18\x00\x04\x00\x00\x00" + guid + plain[36:]
    body = body[:4] + (len(body) - 8).to_bytes(4, "little") + body[8:]
    assert (decode(body)[0] == SAMPLES).all()


FAULTS = {
    "zero": (wav(np.zeros(50, "<i2")), "silent: every sample is 0"),
    "constant": (wav(np.full(50, 7, "<i2")), "silent: every sample is 7"),
    "antiphase": (wav(np.stack([SAMPLES, -np.maximum(SAMPLES, -32767)], 1)[SAMPLES > -32768], channels=2), "silent: every sample is 0"),
    "empty": (wav(b""), "it has no samples"),
    "cut": (wav(SAMPLES)[:-100], "it has 700 bytes of sound, its header promises 800"),
    "header": (wav(SAMPLES)[:30], "not a WAV file with PCM samples"),
    "nothing": (b"", "not a WAV file with PCM samples: it ends in its header"),
    "text": (b"hello, this is no sound at all", "not a WAV file with PCM samples: file does not start with RIFF id"),
    "floats": (wav(SAMPLES)[:20] + b"\x03\x00" + wav(SAMPLES)[22:], "not a WAV file with PCM samples: unknown format: 3"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_cannot_be_heard(name):
    with pytest.raises(Unreadable) as caught:
        decode(FAULTS[name][0])
    assert str(caught.value).startswith(FAULTS[name][1])


def folder(root, lines, **clips):
    for name, content in clips.items():
        (root / f"{name}.wav").write_bytes(content)
    (root / "transcripts.tsv").write_bytes(lines if isinstance(lines, bytes) else lines.encode())
    return root


def test_a_folder_with_good_and_bad_clips(tmp_path):
    bad = {name: content for name, (content, _told) in FAULTS.items()}
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "b.wav").write_bytes(wav(SAMPLES[::-1]))
    lines = "\ufeffa.wav\tyes \r\n\ndeep/b.wav\tcafe\u0301\na.wav\tno\nnone.wav\tyes\nempty_line.wav\t \nnotab.wav\n../x.wav\tyes\n"
    lines += "".join(f"{name}.wav\tyes\n" for name in bad)
    found = read_audio(folder(tmp_path, lines, a=wav(SAMPLES), unnamed=wav(SAMPLES), **bad))
    assert found.names == ["a.wav", "deep/b.wav"] and (found.fields["audio"][1] == SAMPLES[::-1]).all()
    assert [bytes(found.fields["text"][i]).decode() for i in range(2)] == ["yes", "caf\u00e9"]
    assert found.fields["rate"].tolist() == [8000, 8000] and found.kind == "audio"
    left = {name: why for name, why in found.left_out if name.removesuffix(".wav") not in bad}
    assert left.pop("none.wav") == "No such file or directory"
    outside = "it lies outside the folder, or has two transcripts"
    nothing = dict.fromkeys(["empty_line.wav", "notab.wav", "unnamed.wav"], "it has no transcript")
    assert left == {"a.wav": outside, "../x.wav": outside} | nothing
    assert all(dict(found.left_out)[f"{name}.wav"].startswith(told) for name, (_content, told) in FAULTS.items())


def test_what_a_clip_is_and_what_is_said_make_it(tmp_path):
    found = read_audio(folder(tmp_path, "a.wav\tyes\nb.wav\tyes\nc.wav\tno\n", a=wav(SAMPLES), b=wav(SAMPLES), c=wav(SAMPLES)))
    assert (found.digest[0] == found.digest[1]).all() and (found.digest[0] != found.digest[2]).any()
    assert (found.group[0] == found.group[2]).all()  # the same sound stays in one part, whatever is said to be in it


@pytest.mark.parametrize(
    "lines, clips, what, told",
    [
        (b"a.wav\tyes\nb.wav\t\xff", {"a": wav(SAMPLES)}, "transcripts.tsv is not UTF-8", "byte 16: 0xff"),
        ("", {}, "no clip in .* can be used", ""),
        ("a.wav\tyes", {"a": FAULTS["zero"][0]}, "no clip in .* can be used", "a.wav: silent: every sample is 0"),
        (
            "a.wav\tyes\nb.wav\tno",
            {"a": wav(SAMPLES), "b": wav(SAMPLES, rate=16000)},
            "differ in their sample rate",
            "a.wav has 8\u00a0000 Hz, b.wav has 16\u00a0000 Hz",
        ),
    ],
)
def test_a_folder_that_gives_nothing(lines, clips, what, told, tmp_path):
    with pytest.raises(UserError, match=what) as caught:
        read_audio(folder(tmp_path, lines, **clips))
    assert caught.value.found == told


def test_a_folder_without_transcripts(tmp_path):
    with pytest.raises(UserError, match="transcripts.tsv cannot be read"):
        read_audio(tmp_path)


# --- keypad tones ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def noisy():
    return read_dialtones(60, 10.0)


def test_dialtones_are_the_same_every_time(noisy):
    again, longer = read_dialtones(60, 10.0), read_dialtones(61, 10.0)
    assert Store(again).fingerprint == Store(noisy).fingerprint != Store(longer).fingerprint
    assert [len(t) for t in map(noisy.fields["text"].__getitem__, range(60))].count(3) > 2
    assert set(noisy.fields["text"].lengths.tolist()) == {3, 4, 5, 6, 7, 8}


def test_the_noise_is_ten_decibels_below_the_tones(noisy):
    clean = read_dialtones(60, 60.0)
    for i in range(20):
        tone, both = clean.fields["audio"][i].astype(float), noisy.fields["audio"][i].astype(float)
        loud = np.convolve(tone**2, np.ones(40) / 40, "same") > 0.05 * np.max(tone**2)  # a tone sounds here
        power = np.mean(tone[loud] ** 2) / np.mean((both - tone) ** 2)
        assert 10 * math.log10(power) == pytest.approx(10.0, abs=0.4)


def test_each_key_sounds_with_its_two_frequencies():
    clean = read_dialtones(20, 60.0)
    for i in range(20):
        tone, said = clean.fields["audio"][i].astype(float), ""
        loud = np.convolve(tone**2, np.ones(40) / 40, "same") > 0.02 * np.max(tone**2)
        starts, ends = (np.flatnonzero(np.diff(np.pad(loud.astype(int), 1)) == step) for step in (1, -1))
        for start, end in zip(starts, ends, strict=True):
            strength = [[abs(np.exp(-2j * np.pi * f / 8000 * np.arange(end - start)) @ tone[start:end]) for f in fs] for fs in (LOW, HIGH)]
            said += KEYS[3 * int(np.argmax(strength[0])) + int(np.argmax(strength[1]))]
        assert said == bytes(clean.fields["text"][i]).decode()


def test_no_number_stands_in_two_parts():
    found = read_dialtones(800, 10.0)
    rows = split(found.group, found.label, found.part, 0.1, 0.2, 0)
    said = {name: {bytes(found.fields["text"][i]) for i in ids} for name, ids in rows.items()}
    assert not said["train"] & said["test"] and not said["train"] & said["validation"] and not said["test"] & said["validation"]
    assert len({bytes(found.fields["text"][i]) for i in range(800)}) < 800  # some numbers were dialled twice


# --- frames ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(noisy):
    store, config = Store(noisy), AudioConfig(source="dialtones", rows=60)
    rows = {"train": np.arange(40), "validation": np.arange(40, 50), "test": np.arange(50, 60)}
    return store, AudioPrepare.fit(store, rows, config), rows


def test_mel_filters():
    """Edges from HTK's scale, 1 000 Hz being 1 000 mel; each filter a triangle through them."""
    filters, hz = mel_filters(16000, 512, 20), np.arange(257) * 16000 / 512
    mel = 2595 * math.log10(1 + 8000 / 700)
    assert 2595 * math.log10(1 + 1000 / 700) == pytest.approx(1000, abs=0.02)
    edges = [700 * (10 ** (mel * k / 21 / 2595) - 1) for k in range(22)]
    for m in range(20):
        assert_close(
            filters[:, m], torch.from_numpy(np.interp(hz, edges[m : m + 3], [0, 1, 0], left=0, right=0)).float(), rtol=0, atol=1e-6
        )
    assert mel_filters(8000, 256, 80).sum(0).min() > 0  # no band without a bin, at the most bands and the least rate of speech


def test_frames_by_hand(prepared):
    store, prepare, _rows = prepared
    audio, n = store.fields["audio"].take(np.array([3]))
    frames, length = prepare.frames(audio, n)
    x = store.fields["audio"][3].double().numpy() / 32768
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(256) / 256)
    assert round(WINDOW_S * 8000) == 256 and round(HOP_S * 8000) == 80
    assert length.item() == math.ceil((len(x) - 256) / 80) + 1
    for t in (0, 7, length.item() - 1):
        piece = np.pad(x[80 * t : 80 * t + 256], (0, max(0, 80 * t + 256 - len(x))))
        power = np.abs(np.fft.rfft(piece * window)) ** 2 / np.sum(window**2)
        wanted = (np.log(power @ mel_filters(8000, 256, 40).double().numpy() + 1e-8) - prepare.mean) / prepare.std
        assert_close(frames[0, t].double(), torch.from_numpy(wanted), rtol=1e-3, atol=1e-3)


def test_a_pure_tone_is_loudest_in_its_band(prepared):
    plain = prepared[1].model_copy(update={"mean": (0.0,) * 40, "std": (1.0,) * 40})
    for hz in (400, 1000, 2500):
        tone = torch.from_numpy(np.rint(9000 * np.sin(2 * np.pi * hz / 8000 * np.arange(2000))).astype(np.int16))[None]
        frames, _n = plain.frames(tone, torch.tensor([2000]))
        band = 2595 * math.log10(1 + hz / 700) / (2595 * math.log10(1 + 4000 / 700)) * 41 - 1
        assert abs(frames[0, 5].argmax().item() - band) < 1


def test_padding_and_neighbours_change_no_frame(prepared):
    store, prepare, _rows = prepared
    lengths = store.fields["audio"].lengths
    short, long = int(lengths.argmin()), int(lengths.argmax())
    alone, n = prepare.frames(*store.fields["audio"].take(np.array([short])))
    among, m = prepare.frames(*store.fields["audio"].take(np.array([long, short])))
    assert n[0] == m[1] < among.shape[1] and among.shape[1] % 8 == 0
    assert_close(among[1, : n[0]], alone[0, : n[0]], rtol=0, atol=1e-5)
    assert (among[1, n[0] :] == 0).all()
    tiny, n = prepare.frames(torch.ones(1, 8, dtype=torch.int16), torch.tensor([3]))
    assert n.item() == 1 and tiny.isfinite().all()


def test_what_is_fitted_comes_from_the_training_part(prepared):
    store, prepare, rows = prepared
    part = Chunk(store.rows(rows["train"]), *(torch.arange(40),) * 2, torch.ones(40), torch.tensor(0), False)
    found = prepare.device(part).data
    real = found["audio"][torch.arange(found["audio"].shape[1]) < found["audio_len"][:, None]]
    assert_close(real.mean(0), torch.zeros(40), rtol=0, atol=1e-3)
    assert_close(real.std(0), torch.ones(40), rtol=0, atol=1e-3)
    assert prepare.alphabet == "#*0123456789\ufffd" and AudioPrepare.model_validate_json(prepare.model_dump_json()) == prepare
    few = AudioPrepare.fit(store, {"train": np.array([0])}, AudioConfig(source="dialtones", rows=60))
    assert set(few.alphabet[:-1]) == set(bytes(store.fields["text"][0].tolist()).decode())
    targets = few.view(store, np.arange(60))[0].rows(np.arange(60))["target"]
    assert (targets == len(few.alphabet)).any()  # letters that it never saw


def test_rows_of_a_view_and_of_a_prediction_are_alike(prepared, tmp_path):
    store, prepare, rows = prepared
    view, ids = prepare.view(store, rows["test"])
    text = bytes(store.fields["text"][ids[0]].tolist()).decode()
    taken = view.rows(ids[:1])
    assert "".join(prepare.alphabet[k - 1] for k in taken["target"][0, : taken["target_len"][0]]) == text
    samples = store.fields["audio"][ids[0]].numpy()
    (tmp_path / "my.wav").write_bytes(wav(samples))
    for given in (samples, wav(samples), tmp_path / "my.wav", str(tmp_path / "my.wav")):
        raw = prepare.gather([prepare.encode(given)])
        assert_close(raw["audio"], taken["audio"], rtol=0, atol=0)
        assert raw["audio_len"].tolist() == taken["audio_len"].tolist()
    assert len(set((view.lengths // 8).tolist())) > 3  # what a row costs, for the order by length


@pytest.mark.parametrize("name", FAULTS)
def test_a_prediction_of_what_cannot_be_heard(name, prepared, tmp_path):
    (tmp_path / "my.wav").write_bytes(FAULTS[name][0])
    with pytest.raises(UserError, match="my.wav cannot be heard") as caught:
        prepared[1].encode(tmp_path / "my.wav")
    assert caught.value.found.startswith(FAULTS[name][1])


@pytest.mark.parametrize(
    "given, told",
    [
        (SAMPLES / 2**15, r"float64 \(400,\), not one row of int16"),
        (np.stack([SAMPLES] * 2), r"int16 \(2, 400\), not one row"),
        (SAMPLES[:0], "no samples"),
        (0 * SAMPLES, "every sample is 0"),
    ],
)
def test_an_array_that_is_no_sound(given, told, prepared):
    with pytest.raises(UserError, match=told):
        prepared[1].encode(given)


def test_another_sample_rate_is_refused(prepared, tmp_path):
    store, prepare, _rows = prepared
    with pytest.raises(UserError, match="it has 16000 Hz, the run's sound 8000"):
        prepare.encode(wav(SAMPLES, rate=16000))
    other = Store(read_audio(folder(tmp_path, "a.wav\tyes", a=wav(SAMPLES, rate=11025))))
    with pytest.raises(UserError, match="this sound has 11025 Hz, the run's 8000"):
        prepare.view(other, np.array([0]))
