"""Resizing and changing pictures against torch's interpolation, rot90 and Pillow; draws that hang on nothing but their place."""

import math

import numpy as np
from PIL import Image, ImageEnhance, ImageOps
import pytest
from scipy import stats
import torch
import torch.nn.functional as F

from cloche import rng
from cloche.build import facts_of, job_of, nets_of, open_data, task_of
from cloche.config import RecipeError
from cloche.data import augment
from cloche.data.chunk import Chunk
from cloche.data.prepare import Augment, PicturesPrepare
from cloche.recipe import parse
from cloche.training.parallel import Group


def photos(n=4, c=3, h=24, w=24, seed=0):
    """(n, c, h, w) smooth pictures in 0..1, whole 255ths."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, c, 4, 4, generator=g)
    return (F.interpolate(coarse, (h, w), mode="bicubic").clamp(0, 1) * 255).round() / 255


def pillow(x):
    return [Image.fromarray((p.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy().squeeze()) for p in x]


def from_pillow(images):
    return torch.stack([torch.from_numpy(np.array(i)).float().reshape(i.height, i.width, -1).permute(2, 0, 1) / 255 for i in images])


# ---- resize


@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize("h, w, pixels", [(8, 8, 48), (5, 7, 13), (1, 1, 9), (1, 12, 12), (48, 48, 48), (12, 3, 20), (31, 17, 32)])
def test_resize_equals_torchs_bilinear_interpolation(h, w, pixels, c):
    x = torch.rand(3, h, w, c, generator=torch.Generator().manual_seed(0))
    got = augment.resize(x, torch.tensor([[h, w]] * 3), pixels)
    wanted = F.interpolate(x.permute(0, 3, 1, 2), (pixels, pixels), mode="bilinear", align_corners=False).permute(0, 2, 3, 1)
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-6)
    if h == w == pixels:
        assert torch.equal(got, x)


def test_pictures_of_many_sizes_in_one_frame_are_resized_as_if_each_were_alone():
    sizes = [(1, 1), (3, 16), (16, 3), (16, 16), (7, 9), (2, 1)]
    g = torch.Generator().manual_seed(1)
    alone = [torch.rand(1, h, w, 3, generator=g) for h, w in sizes]
    frame = torch.full((len(sizes), 16, 20, 3), 1e6)  # what lies outside a picture is never read
    for row, x in zip(frame, alone, strict=True):
        row[: x.shape[1], : x.shape[2]] = x[0]
    got = augment.resize(frame, torch.tensor(sizes), 16)
    for row, x, size in zip(got, alone, sizes, strict=True):
        assert torch.equal(row, augment.resize(x, torch.tensor([size]), 16)[0])


# ---- rotate, brightness, contrast, mirror


@pytest.mark.parametrize("c, side", [(1, 7), (3, 24)])
def test_turns_by_quarters_equal_rot90_and_positive_is_anticlockwise(c, side):
    x = photos(5, c, side, side)
    quarters = torch.arange(5) - 1
    got = augment.rotate(x, quarters * (math.pi / 2))
    for row, picture, k in zip(got, x, quarters.tolist(), strict=True):
        torch.testing.assert_close(row, torch.rot90(picture, k, (1, 2)), rtol=0, atol=1e-4)
        torch.testing.assert_close(row[None], from_pillow([pillow(picture[None])[0].rotate(90 * k)]), rtol=0, atol=1e-4)
    torch.testing.assert_close(augment.rotate(x, torch.zeros(5)), x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("degrees", [10.0, -7.0, 33.0])
def test_turns_by_degrees_equal_pillows_bilinear_rotation(degrees):
    x = photos(3, 3, 48, 48)
    got = augment.rotate(x, torch.full((3,), math.radians(degrees)))
    wanted = from_pillow([i.rotate(degrees, Image.Resampling.BILINEAR) for i in pillow(x)])
    inside = augment.rotate(torch.ones_like(x), torch.full((3,), math.radians(degrees))) > 0.999  # Pillow has no soft border
    assert inside.float().mean() > 0.5
    assert (got - wanted)[inside].abs().max() < 2 / 255
    assert (got - from_pillow([i.rotate(-degrees, Image.Resampling.BILINEAR) for i in pillow(x)]))[inside].abs().max() > 0.1
    assert (got[..., 0, 0] == 0).all()  # black outside


@pytest.mark.parametrize("h, w", [(9, 9), (24, 24), (9, 14)])
def test_moves_by_whole_pixels_are_rolls_with_black_at_the_border(h, w):
    x, moves = photos(4, 3, h, w), [(0, 0), (2, 0), (0, -3), (-1, 4)]
    got = augment.rotate(x, torch.zeros(4), torch.tensor(moves, dtype=torch.float32))
    for row, picture, (right, down) in zip(got, x, moves, strict=True):
        wanted = F.pad(picture, (right, -right, down, -down))
        torch.testing.assert_close(row, wanted, rtol=0, atol=1e-4)
    turned = augment.rotate(x, torch.full((4,), math.pi / 2), torch.tensor(moves, dtype=torch.float32))
    if h == w:  # moved first, then turned
        torch.testing.assert_close(turned, torch.rot90(got, 1, (2, 3)), rtol=0, atol=1e-3)


def test_moves_are_drawn_evenly_from_whole_pixels():
    dot = torch.zeros(4000, 1, 9, 9)
    dot[:, :, 4, 4] = 1
    got = augment.jitter(dot, rng.uniform(rng.draw(0, 0), rng.AUGMENT, torch.arange(4000), 6), 0.0, 0.0, 0.0, False, 2)
    counts = got.sum((0, 1))
    assert counts[2:7, 2:7].sum() == pytest.approx(4000, abs=1) and stats.chisquare(counts[2:7, 2:7].flatten().numpy()).pvalue > 1e-4


@pytest.mark.parametrize("c", [1, 3])
@pytest.mark.parametrize("by", [0.0, 0.8, 1.0, 1.13, 2.0])
def test_brightness_and_contrast_equal_pillows(by, c):
    x = photos(4, c)
    factor = torch.full((4,), by)
    bright = from_pillow([ImageEnhance.Brightness(i).enhance(by) for i in pillow(x)])
    torch.testing.assert_close(augment.brightness(x, factor), bright, rtol=0, atol=1.01 / 255)
    contrasted = from_pillow([ImageEnhance.Contrast(i).enhance(by) for i in pillow(x)])
    torch.testing.assert_close(augment.contrast(x, factor), contrasted, rtol=0, atol=2.01 / 255)  # Pillow rounds the mean grey
    if by == 1:
        assert torch.equal(augment.brightness(x, factor), x)


def test_each_row_has_its_own_factor():
    x, by = photos(4), torch.tensor([0.5, 1.0, 1.5, 0.8])
    for change in (augment.brightness, augment.contrast, lambda a, b: augment.rotate(a, b - 1)):
        got = change(x, by)
        for k in range(4):
            torch.testing.assert_close(got[k : k + 1], change(x[k : k + 1], by[k : k + 1]), rtol=0, atol=0)
        assert not torch.equal(got, change(x, by.flip(0)))


def test_grey_equals_pillows():
    x = photos(4)
    torch.testing.assert_close(augment.grey(x), from_pillow([i.convert("L") for i in pillow(x)]), rtol=0, atol=1.01 / 255)
    one = x[:, :1]
    assert torch.equal(augment.grey(one), one)


def test_jitter_is_mirror_then_rotation_then_brightness_then_contrast_within_their_bounds():
    x = photos(3)
    u = torch.tensor([[0.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.5, 0.5], [1.0, 1.0, 1.0, 0.4999]])
    got = augment.jitter(x, u, 10.0, 0.2, 0.3, True)
    for k, (turn, bright, contrast, mirror) in enumerate([(-10, 0.8, 0.7, True), (0, 1.0, 1.0, False), (10, 1.2, 1.3, True)]):
        wanted = (x[k : k + 1].flip(3) if mirror else x[k : k + 1]).double()
        wanted = augment.rotate(wanted, torch.tensor([math.radians(turn)], dtype=torch.float64))
        wanted = (wanted * bright).clamp(0, 1)
        mean = (wanted * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1).mean()
        torch.testing.assert_close(got[k : k + 1].double(), ((wanted - mean) * contrast + mean).clamp(0, 1), rtol=0, atol=1e-5)
    assert torch.equal(augment.jitter(x, u, 0.0, 0.0, 0.0, False), x)
    mirrored = augment.jitter(x, u, 0.0, 0.0, 0.0, True)
    torch.testing.assert_close(mirrored[0:1], from_pillow([ImageOps.mirror(pillow(x)[0])]))
    assert torch.equal(mirrored[1], x[1])


# ---- half the side in the beginning


def test_half_is_the_mean_of_each_four_and_leaves_an_odd_row_out():
    x = photos(2, 3, 9, 12)
    torch.testing.assert_close(augment.half(x), x[:, :, :8].unflatten(2, (4, 2)).unflatten(4, (6, 2)).mean((3, 5)))
    assert augment.half(torch.ones(1, 1, 7, 7)).shape == (1, 1, 3, 3)


@pytest.mark.parametrize("small, halves", [(0.0, []), (0.4, [0, 1, 2, 3]), (0.45, [0, 1, 2, 3, 4]), (0.99, list(range(10)))])
def test_the_first_share_of_the_steps_has_pictures_of_half_the_side(small, halves):
    """Five epochs of two steps: which step is small is known from its place alone, and all else is as without."""

    def pictures_of(small, chunks=1):
        augmented = {"small": small, "rotate": 5.0}
        raw = {"format": 1, "data": {"source": "digits", "pixels": 13, "augment": augmented}, "net": {"kind": "resnet", "size": "xs"}}
        recipe = parse({**raw, "train": {"epochs": 5, "batch": 700, "chunks": chunks}})
        data = open_data(recipe, torch.device("cpu"))
        recipe, task = task_of(recipe, data.prepare, facts_of(recipe, data))
        job = job_of(recipe, data, task, nets_of(recipe, task), {}, Group())
        places = [(e, i) for e in range(5) for i in range(job.order.steps(e))][::-1]  # asked for from the end: no state
        steps = [torch.cat([c.data["image"] for c in job.chunks(e, i, rng.draw(0, e))]) for e, i in places][::-1]
        assert data.part("validation").take(np.arange(3)).data["image"].shape[2:] == (13, 13)
        return steps

    plain, found, cut = pictures_of(0.0), pictures_of(small), pictures_of(small, 3)
    assert len(found) == 10
    for k, (x, y, z) in enumerate(zip(plain, found, cut, strict=True)):
        assert torch.equal(y, augment.half(x) if k in halves else x) and torch.equal(y, z)


def test_a_net_of_one_side_refuses_small_pictures():
    raw = {"format": 1, "data": {"source": "digits", "augment": {"small": 0.5}}, "net": {"kind": "cnn"}, "train": {"epochs": 1}}
    recipe = parse(raw)
    data = open_data(recipe, torch.device("cpu"))
    recipe, task = task_of(recipe, data.prepare, facts_of(recipe, data))
    with pytest.raises(RecipeError, match=r"small = 0\.5   a net of the kind cnn takes .* one side only   → leave it out, or take resnet"):
        nets_of(recipe, task)


# ---- draws


ALL = Augment(rotate=10.0, brightness=0.2, contrast=0.2, mirror=True, shift=2)


def prepare(pixels=32, channels=3, change=ALL):
    return PicturesPrepare(
        pixels=pixels, channels=channels, mean=(0.4,) * channels, std=(0.3,) * channels, labels=("a", "b"), augment=change
    )


def chunk(pictures, rows, at, draw, train=True):
    data = {"image": pictures["image"][rows], "size": pictures["size"][rows]}
    n = len(rows)
    return Chunk(data, torch.as_tensor(rows), torch.as_tensor(at), torch.ones(n), draw, train)


def pictures(n=40, side=32, c=3):
    g = np.random.default_rng(0)
    sizes = g.integers(1, side + 1, (n, 2))
    sizes[0] = side
    image = np.zeros((n, side, side, c), np.uint8)
    for row, (h, w) in zip(image, sizes, strict=True):
        row[:h, :w] = g.integers(0, 256, (h, w, c))
    return {"image": torch.from_numpy(image), "size": torch.from_numpy(sizes.astype(np.int32))}


@pytest.mark.parametrize("pixels, channels", [(32, 3), (33, 1), (200, 3)])
def test_a_picture_is_changed_to_the_same_bits_in_whatever_chunk_it_stands(pixels, channels):
    p, data, draw = prepare(pixels, channels), pictures(6), rng.draw(5, 2)
    rows, at = list(range(6)), [100 + 7 * k for k in range(6)]
    whole = p.device(chunk(data, rows, at, draw)).data["image"]
    for cut in (1, 2, 5):
        pieces = [p.device(chunk(data, rows[a : a + cut], at[a : a + cut], draw)).data["image"] for a in range(0, 6, cut)]
        assert torch.equal(torch.cat(pieces), whole), cut
    backwards = p.device(chunk(data, rows[::-1], at[::-1], draw)).data["image"]
    assert torch.equal(backwards.flip(0), whole)


def test_a_change_hangs_on_seed_epoch_and_position_and_on_nothing_else():
    p, data = prepare(), pictures(3)
    torch.manual_seed(0)

    def picture(seed=5, epoch=2, at=100, row=0, train=True, change=p):
        torch.rand(3)  # the default generator is not asked
        return change.device(chunk(data, [row], [at], rng.draw(seed, epoch), train)).data["image"]

    same = picture()
    assert torch.equal(same, picture())
    for other in ({"seed": 6}, {"epoch": 3}, {"at": 101}, {"train": False}):
        assert (picture(**other) - same).abs().max() > 0.01, other
    plain = prepare(change=Augment())
    assert torch.equal(picture(train=False), picture(change=plain))
    assert torch.equal(picture(train=False), picture(change=plain, train=False))


ALONE = {"rotate": 20.0, "brightness": 0.3, "contrast": 0.3, "mirror": True, "shift": 6}


@pytest.mark.parametrize("key", ALONE)
def test_each_key_alone_changes_pictures_while_training(key):
    only = prepare(change=Augment(**{key: ALONE[key]}))
    data, draw = pictures(20), rng.draw(0, 0)
    x, y = (only.device(chunk(data, list(range(20)), range(20), draw, train)).data["image"] for train in (False, True))
    changed = (x - y).flatten(1).abs().amax(1) > 1e-3
    assert (0.2 < changed.float().mean() < 0.8) if key == "mirror" else changed.float().mean() > 0.8


def test_draws_look_uniform_and_independent_of_stream_epoch_position_and_column():
    n = 100_000
    at = torch.arange(n)
    draws = {
        "plain": rng.uniform(rng.draw(0, 0), rng.AUGMENT, at, 4),
        "stream": rng.uniform(rng.draw(0, 0), rng.NOISE, at, 4),
        "epoch": rng.uniform(rng.draw(0, 1), rng.AUGMENT, at, 4),
        "seed": rng.uniform(rng.draw(1, 0), rng.AUGMENT, at, 4),
    }
    columns = {f"{name} {k}": u[:, k].double().numpy() for name, u in draws.items() for k in range(4)}
    for name, u in columns.items():
        assert u.min() >= 0 and u.max() < 1
        assert abs(u.mean() - 0.5) < 5 / math.sqrt(12 * n), name
        assert abs(u.var() - 1 / 12) < 5 * math.sqrt(1 / 180 / n), name
        assert stats.chisquare(np.histogram(u, 1000, (0, 1))[0]).pvalue > 1e-4, name
        for lag in (1, 2, 64, 1000):  # neighbours in the order
            assert abs(np.corrcoef(u[:-lag], u[lag:])[0, 1]) < 5 / math.sqrt(n), (name, lag)
        assert len(np.unique(u)) > 0.99 * n
    together = np.corrcoef(np.stack(list(columns.values())))
    assert np.abs(together - np.eye(16)).max() < 5 / math.sqrt(n)
    pairs = np.histogram2d(columns["plain 0"], columns["plain 1"], 20, ((0, 1), (0, 1)))[0]
    assert stats.chisquare(pairs.ravel()).pvalue > 1e-4
    assert torch.equal(rng.uniform(rng.draw(0, 0), rng.AUGMENT, at[777:780], 4), draws["plain"][777:780])
    assert torch.equal(rng.uniform(rng.draw(0, 0), rng.AUGMENT, at, 2), draws["plain"][:, :2])


def test_draws_equal_the_mixer_worked_in_python_integers():
    """lowbias32 in plain integers, for a few places."""

    def mix(x):
        x &= 0xFFFFFFFF
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
        x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
        return x ^ (x >> 16)

    draw = rng.draw(3, 4)
    low, high = int(draw) & 0xFFFFFFFF, int(draw) >> 32
    places = [0, 1, 2**31 - 1, 2**32 - 1]
    got = rng.uniform(draw, 2, torch.tensor(places), 3)
    for row, at in zip(got.tolist(), places, strict=True):
        assert row == [(mix(mix(mix(at ^ low) + k * 0x9E3779B1 + 2 * 0x85EBCA6B) ^ high) >> 8) / 2**24 for k in range(3)]


def test_hashes_and_seeds_are_known_numbers():
    """A change here changes every run that was ever trained."""
    assert rng.integer("chunk", 0, 0, 0, 0) == rng.chunk_seed(0, 0, 0, 0)
    assert len({rng.chunk_seed(s, e, i, c) for s in range(4) for e in range(4) for i in range(4) for c in range(4)}) == 256
    assert min(rng.integer(k) for k in range(1000)) >= 0 and max(rng.integer(k) for k in range(1000)) < 2**62
    assert [int(rng.draw(0, 0)), rng.chunk_seed(0, 0, 0, 0), rng.generator(rng.ORDER, 0, 0).permutation(8).tolist()] == [
        1271914924010981626,
        3086530092141673496,
        [5, 0, 6, 7, 4, 3, 2, 1],
    ]
