"""One preparation for training, evaluation and prediction: the same bits for every odd picture, however it comes."""

import io
from pathlib import Path
import struct

import numpy as np
from PIL import Image
import pytest
import torch
import torch.nn.functional as F

from cloche import rng
from cloche.build import open_data
from cloche.data.chunk import Shuffled
from cloche.data.kinds import KINDS
from cloche.errors import UserError
from cloche.recipe import change, find, parse
from cloche.use.model import Model

CPU = torch.device("cpu")


def photo(h=40, w=60, seed=0):
    """(h, w, 3) uint8: waves and some noise, different for every seed."""
    g = np.random.default_rng(seed)
    y, x = np.mgrid[:h, :w] / 40
    waves = [np.sin(3 * x + y * k + seed) + np.cos(5 * y - 2 * x * k + seed * k) for k in range(3)]
    return np.clip(127 + 55 * np.stack(waves, -1) + g.normal(0, 9, (h, w, 3)), 0, 255).astype(np.uint8)


def saved(image, form, **options):
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def odd_pictures(grey_only=False):
    """name → bytes: modes, marks, sizes and formats that a person's folder may hold."""
    rgb = [Image.fromarray(photo(40 + k, 60 - k, seed=k)) for k in range(12)]
    grey = [i.convert("L") for i in rgb]
    deep = Image.fromarray(photo(30, 50, 20)[..., 0].astype(np.uint16) * 257 + 11)
    alpha = Image.fromarray(np.concatenate([photo(33, 44, 21), photo(33, 44, 22)[..., :1]], 2))
    out = {
        "grey.png": saved(grey[0], "PNG"),
        "grey.jpg": saved(grey[1], "JPEG"),
        "grey.bmp": saved(grey[2], "BMP"),
        "grey.pgm": saved(grey[3], "PPM"),
        "grey small.png": saved(grey[4].resize((9, 5)), "PNG"),
        "grey alpha.png": saved(alpha.convert("LA"), "PNG"),
        "bits.png": saved(grey[5].convert("1"), "PNG"),
        "bits.tif": saved(grey[6].convert("1"), "TIFF"),
        "deep.png": saved(deep, "PNG"),
        "deep.tif": saved(deep, "TIFF"),
        "deep.pgm": b"P5 3 2 65535\n" + struct.pack(">6H", 0, 129, 1000, 32767, 65407, 65535),
        "white.png": saved(Image.new("L", (20, 20), 255), "PNG"),
        "point.png": saved(Image.new("L", (1, 1), 77), "PNG"),
        "tall line.png": saved(Image.fromarray(photo(200, 1, 23)[..., 0]), "PNG"),
        "flat line.png": saved(Image.fromarray(photo(1, 200, 24)[..., 0]), "PNG"),
        "grey large.jpg": saved(Image.fromarray(photo(700, 500, 25)[..., 1]), "JPEG"),
    }
    for mark in (3, 6):
        exif = Image.Exif()
        exif[274] = mark
        out[f"grey turned {mark}.jpg"] = saved(grey[mark], "JPEG", exif=exif)
    if grey_only:
        return out
    out |= {
        "colour.png": saved(rgb[0], "PNG"),
        "colour.jpg": saved(rgb[1], "JPEG"),
        "progressive.jpg": saved(rgb[2], "JPEG", progressive=True),
        "colour.webp": saved(rgb[3], "WEBP"),
        "lossless.webp": saved(rgb[4], "WEBP", lossless=True),
        "colour.bmp": saved(rgb[5], "BMP"),
        "colour.gif": saved(rgb[6], "GIF"),
        "colour.tif": saved(rgb[7], "TIFF", compression="tiff_lzw"),
        "colour.ppm": saved(rgb[8], "PPM"),
        "cmyk.jpg": saved(rgb[9].convert("CMYK"), "JPEG"),
        "cmyk.tif": saved(rgb[10].convert("CMYK"), "TIFF"),
        "palette.png": saved(rgb[11].quantize(16), "PNG"),
        "palette key.png": saved(rgb[0].quantize(16), "PNG", transparency=3),
        "palette alphas.png": saved(rgb[1].quantize(8), "PNG", transparency=bytes([0, 50, 100, 150, 200, 255, 30, 9])),
        "key.gif": saved(rgb[2].quantize(16), "GIF", transparency=2),
        "moving.gif": saved(rgb[3], "GIF", save_all=True, append_images=[rgb[4].resize(rgb[3].size)]),
        "colour key.png": saved(rgb[5], "PNG", transparency=tuple(int(v) for v in photo(45, 55, 5)[0, 0])),
        "alpha.png": saved(alpha, "PNG"),
        "alpha.webp": saved(alpha, "WEBP", lossless=True),
        "alpha.tif": saved(alpha, "TIFF"),
        "colour point.png": saved(Image.new("RGB", (1, 1), (9, 99, 199)), "PNG"),
        "colour tall line.png": saved(Image.fromarray(photo(200, 1, 26)), "PNG"),
        "colour flat line.bmp": saved(Image.fromarray(photo(1, 200, 27)), "BMP"),
        "large.jpg": saved(Image.fromarray(photo(900, 1300, 28)), "JPEG", quality=85),
        "large.png": saved(Image.fromarray(photo(400, 300, 29)), "PNG"),
        "exact.png": saved(Image.fromarray(photo(48, 48, 30)), "PNG"),
        "black.png": saved(Image.new("RGB", (30, 30)), "PNG"),
    }
    for mark in range(1, 9):
        exif = Image.Exif()
        exif[274] = mark
        out[f"turned {mark}.{'jpg' if mark % 2 else 'png'}"] = saved(rgb[mark], "JPEG" if mark % 2 else "PNG", exif=exif)
    return out


def folder_of(root, pictures, classes=3):
    for k, (name, content) in enumerate(pictures.items()):
        path = root / "abc"[k % classes] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def opened(folder, **data):
    """The store and the fitted preparation of a folder, as `cloche train FOLDER --set data.…` opens them."""
    raw = find(str(folder), None)[1]
    recipe = parse(change(raw, {"data.augment": {}} | {f"data.{k}": v for k, v in data.items()}))
    return recipe, open_data(recipe, CPU)


def inputs_of(recipe, prepare, encoded):
    """What the net gets in `predict` for these encoded inputs."""
    return Model(Path(), recipe, {}, {}, prepare, None, None, CPU).chunk(prepare.gather(encoded)).data["image"]


@pytest.fixture(scope="module", params=["mixed", "grey"])
def folder(request, tmp_path_factory):
    pictures = odd_pictures(request.param == "grey")
    assert len(pictures) == (18 if request.param == "grey" else 53)
    return folder_of(tmp_path_factory.mktemp(request.param), pictures)


@pytest.mark.parametrize("keys", [{}, {"channels": 1}, {"pixels": 7}, {"pixels": 64, "channels": 1}, {"normalize": False}], ids=str)
def test_training_evaluation_and_prediction_see_the_same_bits(folder, keys):
    recipe, data = opened(folder, **keys)
    n, names, prepare = data.store.n, data.store.names, data.prepare
    assert not data.store.left_out and n == len(list(folder.glob("*/*")))
    wanted = {}  # row of the store → what evaluation sees
    for part in map(data.part, ("train", "validation", "test")):
        for batch in (1, 3, 256):
            for _i, chunk in part.once(batch):
                for row, x in zip(chunk.ids.tolist(), chunk.data["image"], strict=True):
                    assert torch.equal(wanted.setdefault(row, x), x), names[row]
        taken = part.take(np.arange(len(part))[::-1].copy())
        assert all(torch.equal(wanted[row], x) for row, x in zip(taken.ids.tolist(), taken.data["image"], strict=True))
    assert sorted(wanted) == list(range(n))
    order = Shuffled(len(data.rows["train"]), 10, 0)
    for index in range(order.steps(0)):  # training, in which nothing is augmented here
        for chunk in data.part("train").step(order, 0, index, 3, 10, rng.draw(0, 0)):
            assert chunk.train
            assert all(torch.equal(wanted[row], x) for row, x in zip(chunk.ids.tolist(), chunk.data["image"], strict=True))
    kept = KINDS["pictures"].prepare.model_validate_json(prepare.model_dump_json())  # as a later verb reads it from the run folder
    encoded = [kept.encode(folder / name) for name in names]
    differ = [name for row, name in enumerate(names) if not torch.equal(inputs_of(recipe, kept, encoded[row : row + 1])[0], wanted[row])]
    assert not differ, f"alone: {differ}"
    for rows in (list(range(n)), [*range(0, n, 2)], [5, 0, 3], [n - 1, 1]):
        together = inputs_of(recipe, kept, [encoded[row] for row in rows])
        differ = [names[row] for row, x in zip(rows, together, strict=True) if not torch.equal(x, wanted[row])]
        assert not differ, f"together with others: {differ}"
    beside = inputs_of(recipe, kept, [*encoded[:5], kept.encode(saved(Image.fromarray(photo(50, 50, 40)), "PNG"))])
    assert all(torch.equal(x, wanted[row]) for row, x in enumerate(beside[:5])), "beside a coloured one"
    from_bytes = inputs_of(recipe, prepare, [prepare.encode((folder / name).read_bytes()) for name in names])
    assert torch.equal(from_bytes, inputs_of(recipe, kept, encoded))
    again = opened(folder, **keys)[1]  # now from the cache folder
    assert again.prepare == prepare
    assert torch.equal(again.part("test").take([0, 1]).data["image"], data.part("test").take([0, 1]).data["image"])


@pytest.mark.parametrize("channels", [1, 3])
def test_mean_and_deviation_are_numpys_over_the_prepared_training_pixels(folder, channels):
    plain = opened(folder, normalize=False, channels=channels)[1]
    data = opened(folder, channels=channels)[1]
    raw = plain.part("train").take(np.arange(len(plain.rows["train"]))).data["image"].double().numpy()
    assert len(raw) < plain.store.n * 0.85
    np.testing.assert_allclose(data.prepare.mean, raw.mean((0, 2, 3)), rtol=0, atol=1e-6)
    np.testing.assert_allclose(data.prepare.std, raw.std((0, 2, 3)), rtol=0, atol=1e-6)
    x = data.part("train").take(np.arange(len(raw))).data["image"].double().numpy()
    np.testing.assert_allclose(x.mean((0, 2, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(x.std((0, 2, 3)), 1, atol=1e-5)
    everything = np.concatenate(
        [plain.part(p).take(np.arange(len(plain.rows[p]))).data["image"].double().numpy() for p in plain.rows if len(plain.rows[p])]
    )
    assert np.abs(everything.mean((0, 2, 3)) - data.prepare.mean).max() > 1e-4  # the other parts would show
    np.testing.assert_allclose(data.prepare.pixels_of(torch.from_numpy(x[0])), raw[0].transpose(1, 2, 0), atol=1e-6)


def test_nothing_of_an_official_test_part_enters_the_preparation(tmp_path):
    fitted = []
    for light in (0, 255):
        root = tmp_path / str(light)
        folder_of(root / "train", {f"{k}.png": saved(Image.fromarray(photo(seed=k)), "PNG") for k in range(30)})
        folder_of(root / "test", {f"{k}.png": saved(Image.new("RGB", (90, 90 + k), (light, 0, light)), "PNG") for k in range(9)})
        data = opened(root)[1]
        assert [len(data.rows[p]) for p in ("train", "validation", "test")] == [27, 3, 9]
        fitted.append(data.prepare)
    assert fitted[0] == fitted[1]


@pytest.mark.parametrize("h, w", [(48, 48), (130, 61), (20, 31), (1, 200)])
@pytest.mark.parametrize("channels", [1, 3])
def test_without_normalising_a_picture_is_pillows_reduction_and_torchs_enlargement_in_0_to_1(tmp_path, h, w, channels):
    pictures = {f"{k}.png": saved(Image.fromarray(photo(h, w, k)), "PNG") for k in range(12)}
    recipe, data = opened(folder_of(tmp_path, pictures), normalize=False, channels=channels)
    assert set(data.prepare.mean) == {0.0} and set(data.prepare.std) == {1.0}
    for row, name in enumerate(data.store.names):
        small = Image.open(tmp_path / name).resize((min(w, 48), min(h, 48)), Image.Resampling.BILINEAR)
        wanted = F.interpolate(
            torch.from_numpy(np.array(small)).permute(2, 0, 1)[None] / 255, (48, 48), mode="bilinear", align_corners=False
        )
        if channels == 1:
            wanted = (wanted * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
        got = inputs_of(recipe, data.prepare, [data.prepare.encode(tmp_path / name)])
        assert got.min() >= 0 and got.max() <= 1
        torch.testing.assert_close(got, wanted, rtol=0, atol=3e-6)
        assert data.store.label[row] == "abc".index(name[0])


def test_a_constant_colour_is_not_divided_by_nothing(tmp_path):
    data = opened(folder_of(tmp_path, {f"{k}.png": saved(Image.new("RGB", (8, 8 + k), (10, 0, 255)), "PNG") for k in range(30)}))[1]
    assert data.prepare.mean == pytest.approx((10 / 255, 0, 1), abs=1e-6)
    assert data.prepare.std == (1.0, 1.0, 1.0)
    assert data.part("test").take([0]).data["image"].abs().max() < 1e-6


def test_arrays_are_predicted_as_the_file_would_be(folder):
    recipe, data = opened(folder)
    for array in (photo(48, 48, 3), photo(20, 48, 4)[..., 0], photo(1, 1, 5)):
        from_file = data.prepare.encode(saved(Image.fromarray(array), "PNG"))
        assert torch.equal(inputs_of(recipe, data.prepare, [data.prepare.encode(array)]), inputs_of(recipe, data.prepare, [from_file]))


def test_what_is_no_picture_is_refused_by_name(folder, tmp_path):
    prepare = opened(folder)[1].prepare
    with pytest.raises(UserError, match=r"at most 48 pixels a side\n  uint8 \(49, 10, 3\)"):
        prepare.encode(np.zeros((49, 10, 3), np.uint8))
    for wrong in (np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 4), np.uint8), np.zeros(4, np.uint8)):
        with pytest.raises(UserError, match=rf"{wrong.dtype} \({wrong.shape[0]},"):
            prepare.encode(wrong)
    with pytest.raises(UserError, match="gone.png cannot be read as a picture\n.*No such file"):
        prepare.encode(tmp_path / "gone.png")
    with pytest.raises(UserError, match="the bytes cannot be read as a picture\n.*not a picture"):
        prepare.encode(b"<!doctype html>")


# ---- columns


@pytest.mark.parametrize("name", ["spirals", "curve"])
def test_columns_are_scaled_by_numpys_mean_and_deviation_of_the_training_part(name):
    raw = find(name, None)[1]
    data = open_data(parse(raw), CPU)
    columns = data.store.fields["columns"].double().numpy()
    train = columns[data.rows["train"]]
    np.testing.assert_allclose(data.prepare.mean, train.mean(0), atol=1e-12)
    np.testing.assert_allclose(data.prepare.std, train.std(0), atol=1e-12)
    x = data.part("test").take([0, 1, 2])
    np.testing.assert_allclose(x.data["columns"], (columns[data.rows["test"][:3]] - train.mean(0)) / train.std(0), atol=1e-6)
    kept = KINDS["columns"].prepare.model_validate_json(data.prepare.model_dump_json())
    model = Model(Path(), None, {}, {}, kept, None, None, CPU)
    for ways in (
        lambda row: row,
        lambda row: row.tolist(),
        lambda row: " ".join(map(repr, row.tolist())),
        lambda row: ", ".join(map(repr, row.tolist())),
    ):
        rows = [kept.encode(ways(row)) for row in data.store.fields["columns"].numpy()[data.rows["test"][:3]]]
        assert torch.equal(model.chunk(kept.gather(rows)).data["columns"], x.data["columns"])
    plain = open_data(parse(change(raw, {"data.normalize": False})), CPU)
    assert torch.equal(plain.part("test").take([0]).data["columns"], plain.store.fields["columns"][plain.rows["test"][:1]])


@pytest.mark.parametrize("given", ["0.5", "0.5 x", "1 2 3", "nan 1", [1.0], None, np.ones((2, 2))])
def test_a_row_that_does_not_fit_is_refused_with_what_was_given(given):
    prepare = open_data(parse(find("spirals", None)[1]), CPU).prepare
    with pytest.raises(UserError, match="a row of this run is 2 numbers") as fault:
        prepare.encode(given)
    assert str(given) in fault.value.found and '"0.5 0.5"' in fault.value.do
