"""The augmentation recipes against those of torchvision on PIL images, on real frames."""

import io
import itertools
import zlib
from collections import Counter

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter
from scipy import stats
from torchvision import transforms
from torchvision.transforms import functional

from moco.data import augment
from moco.data.augment import RECIPES
from tests import support

FILES = sorted((support.GOLDEN / "images").glob("*/*.jpeg"))[::4]
PHOTOS = [Image.open(path).convert("RGB") for path in FILES]
FRAMES = [np.asarray(photo) for photo in PHOTOS]
GRAY_LEVELS = 1  # tolerance


def difference(ours, theirs):
    """The largest mean absolute difference of two lists of images, in gray levels."""
    pairs = zip(ours, theirs, strict=True)
    return max(np.abs(np.asarray(a, np.float32) - np.asarray(b, np.float32)).mean() for a, b in pairs)


@pytest.mark.parametrize("name, factor, tolerance", [
    *itertools.product(("brightness", "contrast", "saturation"), (0, 0.1, 0.55, 0.9, 1.1, 1.4, 1.9), (0.1,)),
    *itertools.product(("hue",), (-0.5, -0.21, -0.02, 0.07, 0.3, 0.5), (GRAY_LEVELS,)),
])  # fmt: skip
def test_each_part_of_the_jitter_equals_that_of_torchvision(name, factor, tolerance):
    theirs = [getattr(functional, f"adjust_{name}")(photo, factor) for photo in PHOTOS]
    assert difference([getattr(augment, name)(frame, factor) for frame in FRAMES], theirs) < tolerance


def test_gray_equals_that_of_torchvision():
    assert difference(map(augment.gray, FRAMES), map(transforms.Grayscale(3), PHOTOS)) < 0.01


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.6, 1, 1.4, 1.7, 2])
def test_blur_equals_that_of_pil(sigma):
    theirs = [photo.filter(ImageFilter.GaussianBlur(sigma)) for photo in PHOTOS]
    assert difference([augment.blur(frame, sigma) for frame in FRAMES], theirs) < GRAY_LEVELS
    kernel = augment.blur_kernel(sigma)
    assert len(kernel) <= 11 and kernel.sum() == pytest.approx(1)
    offsets = np.arange(len(kernel)) - len(kernel) // 2
    assert (kernel * offsets**2).sum() == pytest.approx(sigma**2, rel=0.12, abs=0.01)


@pytest.mark.parametrize("size", [64, 224, 300])
@pytest.mark.parametrize("box", [(0, 0, 224, 224), (3, 8, 100, 131), (40, 60, 150, 61), (101, 9, 64, 200)])
def test_crop_and_resize_equal_those_of_torchvision(box, size):
    left, top, width, height = box
    theirs = [functional.resized_crop(photo, top, left, height, width, (size, size)) for photo in PHOTOS]
    ours = [augment.resize(frame[top : top + height, left : left + width], size, size) for frame in FRAMES]
    assert difference(ours, theirs) < GRAY_LEVELS


@pytest.mark.parametrize("shape", [(224, 224), (300, 200), (64, 64), (50, 97)])
@pytest.mark.parametrize("size", [64, 96])
def test_evaluation_takes_the_center(shape, size):
    photos = [photo.resize(shape) for photo in PHOTOS[:3]]
    for name, plain in [
        ("none", [transforms.Resize(size), transforms.CenterCrop(size)]),
        ("center", [transforms.Resize(int(size * 256 / 224)), transforms.CenterCrop(size)]),
    ]:
        ours = [RECIPES[name](np.asarray(photo), size, None) for photo in photos]
        assert difference(ours, map(transforms.Compose(plain), photos)) < GRAY_LEVELS


@pytest.mark.parametrize("name", ["none", "paper"])
def test_frames_of_the_right_size_are_not_cropped(name):
    assert all(np.array_equal(RECIPES[name].crop(frame, 224, None), frame) for frame in FRAMES)


def reference(photo, params, gray_first):
    """The ColorParams applied to a photo by torchvision and PIL."""
    gray = transforms.Grayscale(3) if params.gray else lambda photo: photo
    adjust = [functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation]
    adjust += [functional.adjust_hue]
    if gray_first:
        photo = gray(photo)
    for i in params.order:
        photo = adjust[i](photo, params.factors[i])
    if not gray_first:
        photo = gray(photo)
    return photo.filter(ImageFilter.GaussianBlur(params.blur))


@pytest.mark.parametrize("name", ["released", "paper", "moco_v1", "moco_v2"])
def test_a_recipe_equals_that_of_torchvision(name):
    recipe, generator = RECIPES[name], np.random.default_rng(0)
    params = [recipe.sample_color_params(generator) for _ in FRAMES]
    theirs = [reference(photo, each, recipe.gray_first) for photo, each in zip(PHOTOS, params, strict=True)]
    ours = [augment.color(frame, each, recipe.gray_first) for frame, each in zip(FRAMES, params, strict=True)]
    assert difference(ours, theirs) < 2


# The parameters in torchvision: jitter strengths and probability, gray, blur.
COLORS = {
    "released": ((0.9, 0.9, 0.9, 0.5), 0.9, 0.2, 0.5),
    "paper": ((0.8, 0.8, 0.8, 0.2), 0.8, 0.2, 0),
    "moco_v1": ((0.4, 0.4, 0.4, 0.4), 1, 0.2, 0),
    "moco_v2": ((0.4, 0.4, 0.4, 0.1), 0.8, 0.2, 0.5),
}
UNLIKELY = 1e-4  # p value at a fixed seed; a wrong distribution gives a far smaller one


@pytest.mark.parametrize("name", COLORS)
def test_color_factors_have_the_distributions_of_torchvision(name):
    strengths, jitter_p, gray_p, blur_p = COLORS[name]
    generator = np.random.default_rng(1)
    draws = [RECIPES[name].sample_color_params(generator) for _ in range(6000)]
    factors, orders, gray, sigmas = zip(*draws, strict=True)
    jittered = np.array([each for each, order in zip(factors, orders, strict=True) if order])
    sigmas = [sigma for sigma in sigmas if sigma]
    for count, p in [(len(jittered), jitter_p), (sum(gray), gray_p), (len(sigmas), blur_p)]:
        assert stats.binomtest(count, 6000, p).pvalue > UNLIKELY
    for column, strength in enumerate(strengths):
        low = max(0, 1 - strength) if column < 3 else -strength
        high = 1 + strength if column < 3 else strength
        assert stats.kstest(jittered[:, column], stats.uniform(low, high - low).cdf).pvalue > UNLIKELY
    counts = list(Counter(filter(None, orders)).values())
    assert len(counts) == 24 and stats.chisquare(counts).pvalue > UNLIKELY
    if blur_p:
        assert stats.kstest(sigmas, stats.uniform(0.1, 1.9).cdf).pvalue > UNLIKELY
    correlation = np.corrcoef(jittered.T) - np.eye(4)
    assert np.abs(correlation).max() < 0.06  # independent factors


@pytest.mark.parametrize("shape", [(224, 224), (640, 480), (300, 40), (40, 300)])
@pytest.mark.parametrize("scale", [(0.2, 1), (0.08, 1)])
def test_crops_have_the_distributions_of_torchvision(shape, scale):
    width, height = shape
    torch.manual_seed(0)
    canvas, generator = Image.new("L", shape), np.random.default_rng(2)
    theirs = [transforms.RandomResizedCrop.get_params(canvas, scale, (3 / 4, 4 / 3)) for _ in range(4000)]
    ours = [augment.random_crop(width, height, scale, generator) for _ in range(4000)]
    top, left, tall, wide = np.array(theirs).T
    for a, b in zip(np.array(ours).T, (left, top, wide, tall), strict=True):
        assert stats.ks_2samp(a, b).pvalue > UNLIKELY
    boxes = np.array(ours)
    assert stats.ks_2samp(boxes[:, 2] / boxes[:, 3], wide / tall).pvalue > UNLIKELY
    assert stats.ks_2samp(boxes[:, 2] * boxes[:, 3], wide * tall).pvalue > UNLIKELY
    assert (boxes >= 0).all() and (boxes[:, 2:] > 0).all()
    assert (boxes[:, 0] + boxes[:, 2] <= width).all() and (boxes[:, 1] + boxes[:, 3] <= height).all()


@pytest.mark.parametrize("name", ["released", "moco_v1", "moco_v2", "imagenet"])
def test_half_of_the_images_are_flipped(name):
    ramp = np.tile(np.arange(100, 200, dtype=np.uint8)[None, :, None], (100, 1, 3))
    generator = np.random.default_rng(3)
    crops = [RECIPES[name].crop(ramp, 32, generator) for _ in range(600)]
    flipped = sum(int(crop[0, 0, 0]) > int(crop[0, -1, 0]) for crop in crops)
    assert stats.binomtest(flipped, 600, 0.5).pvalue > UNLIKELY


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("shape", [(224, 224), (60, 90), (7, 300), (1, 1)])
def test_every_recipe_gives_the_size_it_promises(name, shape):
    image = np.random.default_rng(5).integers(0, 256, (*shape, 3), dtype=np.uint8)
    for seed in range(8):
        out = RECIPES[name](image, 48, np.random.default_rng(seed))
        assert out.shape == (48, 48, 3) and out.dtype == np.uint8 and out.flags.c_contiguous
        assert np.array_equal(out, RECIPES[name](image, 48, np.random.default_rng(seed)))


def stored(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees for display
    return stored(PHOTOS[0].crop((0, 0, 100, 60)), "JPEG", exif=exif)


GOOD = {
    "jpeg": lambda: FILES[0].read_bytes(),
    "progressive": lambda: stored(PHOTOS[0], "JPEG", progressive=True),
    "full chroma": lambda: stored(PHOTOS[0], "JPEG", subsampling=0, quality=30),
    "gray": lambda: stored(PHOTOS[0].convert("L"), "JPEG"),
    "cmyk": lambda: stored(PHOTOS[0].convert("CMYK"), "JPEG"),
    "rotated": rotated,
    "trailing text": lambda: FILES[0].read_bytes() + b"\n",
    "rgba": lambda: stored(PHOTOS[0].convert("RGBA"), "PNG"),
    "palette": lambda: stored(PHOTOS[0].convert("P"), "PNG", transparency=3),
    "one bit": lambda: stored(PHOTOS[0].convert("1"), "PNG"),
    "gray with alpha": lambda: stored(PHOTOS[0].convert("LA"), "PNG"),
    "palette with alpha": lambda: stored(PHOTOS[0].convert("P"), "PNG", transparency=bytes(range(256))),
    "one transparent color": lambda: stored(PHOTOS[0], "PNG", transparency=(1, 2, 3)),
    "webp with alpha": lambda: stored(PHOTOS[0].convert("RGBA"), "WEBP", lossless=True),
    "bmp": lambda: stored(PHOTOS[0], "BMP"),
    "tiff": lambda: stored(PHOTOS[0], "TIFF"),
    "ppm": lambda: stored(PHOTOS[0], "PPM"),
}


@pytest.mark.filterwarnings("ignore:Palette images")
@pytest.mark.parametrize("kind", GOOD)
def test_every_kind_of_image_is_decoded_as_by_pil(kind):
    data = GOOD[kind]()
    theirs = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    assert np.array_equal(augment.decode(data), theirs)


LEVELS = np.linspace(0, 65535, 64 * 64).reshape(64, 64)


@pytest.mark.parametrize("dtype, kind", [
    ("uint16", "PNG"), ("uint16", "TIFF"), (">u2", "TIFF"), ("uint16", "PPM"), ("int32", "TIFF"),
])  # fmt: skip
def test_16_bits_are_divided_and_not_clipped(dtype, kind):
    image = augment.decode(stored(Image.fromarray(LEVELS.astype(dtype)), kind))
    assert image.dtype == np.uint8 and image.shape == (64, 64, 3)
    assert np.abs(image - LEVELS[..., None] / 257).max() < 0.51


def test_16_bit_colors_and_alpha_are_divided():
    image = np.uint16(np.stack([LEVELS, LEVELS[::-1], 65535 - LEVELS, LEVELS], -1))
    decoded = augment.decode(cv2.imencode(".png", image)[1].tobytes())
    assert np.abs(decoded - image[..., 2::-1] / 257).max() <= 1


def test_a_transparent_image_is_named_once(monkeypatch, capsys):
    monkeypatch.setattr(augment, "_TRANSPARENCY_SAID", [False])
    opaque, image = PHOTOS[0].convert("RGBA"), PHOTOS[0].convert("RGBA")
    image.putalpha(254)
    for name, each in (("opaque.png", opaque), ("a\n.png", image), ("c.png", image)):
        assert np.array_equal(augment.decode(stored(each, "PNG"), name), FRAMES[0])
    note = "note: a\\n.png has transparent pixels; those of images count with their colors\n"
    assert capsys.readouterr().out == note


def test_ordinary_frames_are_not_decoded_by_pil(monkeypatch):
    monkeypatch.setattr(Image, "open", None)
    assert augment.decode(FILES[0].read_bytes()).shape == (224, 224, 3)


def huge_png():
    def chunk(name, data):
        return len(data).to_bytes(4) + name + data + zlib.crc32(name + data).to_bytes(4)

    header = (20000).to_bytes(4) * 2 + b"\x08\x02\x00\x00\x00"
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")


def huge_jpeg():
    data = bytearray(FILES[0].read_bytes())
    start = data.index(b"\xff\xc0") + 5
    data[start : start + 4] = (65000).to_bytes(2) * 2
    return bytes(data)


BAD = {
    "empty": lambda: b"",
    "text": lambda: b"<html>not found</html>",
    "half a jpeg": lambda: FILES[0].read_bytes()[: FILES[0].stat().st_size // 2],
    "header of a jpeg": lambda: FILES[0].read_bytes()[:200],
    "a jpeg without its last bytes": lambda: FILES[0].read_bytes()[:-3],
    "start and end of a jpeg": lambda: b"\xff\xd8\xff\xd9",
    "half a png": lambda: stored(PHOTOS[0], "PNG")[:5000],
    "huge png": huge_png,
    "huge jpeg": huge_jpeg,
    "floats": lambda: stored(Image.fromarray(np.float32(LEVELS)), "TIFF"),
    "32 bits": lambda: stored(Image.fromarray(np.int32(LEVELS * 2)), "TIFF"),
    "negative": lambda: stored(Image.fromarray(np.int32(-LEVELS)), "TIFF"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_images_raise_an_error_with_a_reason(kind):
    with pytest.raises(augment.BadImage, match=r"\w{4}"):
        augment.decode(BAD[kind]())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_bytes_give_an_image_or_a_bad_image(data):
    damaged = bytearray(stored(PHOTOS[1].resize((40, 30)), data.draw(st.sampled_from(["JPEG", "PNG"]))))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        image = augment.decode(bytes(damaged[: data.draw(st.integers(0, len(damaged)))]))
    except augment.BadImage:
        return
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
