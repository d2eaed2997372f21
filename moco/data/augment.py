"""The augmentation recipes of the paper.

Images are RGB, uint8, (height, width, 3). All random numbers come from the generator that is passed in. The recipes
equal those of torchvision on PIL images: the same distributions, and for the same factors the same pixels within two
gray levels on average.
"""

import io
import math
import mmap
import struct
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from moco.files import printable

ASPECT = (3 / 4, 4 / 3)  # range of a random crop's width over height
SIGMA = (0.1, 2)  # range of the blur's standard deviation, in pixels
NEUTRAL = (1, 1, 1, 0)  # factors of brightness, contrast, saturation and hue that change nothing
_DECODING = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION  # PIL ignores the EXIF orientation, too
_TRANSPARENCY_SAID = mmap.mmap(-1, 1)  # shared with the processes that are forked from this one


class BadImage(Exception):
    """Bytes that are not a complete image; the message is the reason."""


def decode(data, name="an image"):
    """The image in the bytes data, equal to PIL's convert("RGB"): uint8 (height, width, 3).

    OpenCV decodes ordinary JPEGs, faster and with the same pixels; PIL decodes everything else. But gray levels of 16
    bits, which PIL clips, are divided by 257, and the first transparent image of a run is printed with its name.
    Raises BadImage where PIL raises: for empty, truncated and suspiciously large files, and for files that are not
    images; and for pixels that are floating-point numbers or have more than 16 bits.
    """
    if _is_ordinary_jpeg(data):
        image = cv2.imdecode(np.frombuffer(data, np.uint8), _DECODING)
        if image is not None:
            return image
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode.startswith(("I", "F")):
                return _from_deep_gray(np.asarray(image))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                _print_transparent(image, name)
            return np.array(image.convert("RGB"))
    except UnidentifiedImageError as error:
        raise BadImage("not an image" if data else "the file is empty") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ...
        raise BadImage(str(error) or type(error).__name__) from error


def _from_deep_gray(levels):
    """Gray levels (height, width) of 16 bits as uint8 (height, width, 3); ValueError for others."""
    if levels.dtype.kind == "f" or levels.min() < 0 or levels.max() > 65535:
        kind = "floating-point numbers" if levels.dtype.kind == "f" else "numbers of more than 16 bits"
        raise ValueError(f"its pixels are {kind}; convert it to 8 bits")
    return np.repeat(np.uint8((levels.astype(np.int32) + 128) // 257)[..., None], 3, axis=2)


def _print_transparent(image, name):
    """Say once that an RGBA image has transparent pixels."""
    if not _TRANSPARENCY_SAID[0] and image.getextrema()[3][0] < 255:
        _TRANSPARENCY_SAID[0] = True
        print(f"note: {printable(name)} has transparent pixels; those of images count with their colors", flush=True)


def _is_ordinary_jpeg(data):
    """Whether data is a complete JPEG with 8 bits in one or three channels, and not suspiciously large."""
    if data[:2] != b"\xff\xd8" or data[-2:] != b"\xff\xd9":  # some versions of OpenCV pad truncated images with gray
        return False
    position = 2
    while position + 10 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame
            bits, height, width, channels = struct.unpack(">BHHB", data[position + 4 : position + 10])
            return bits == 8 and channels in (1, 3) and 0 < height * width <= Image.MAX_IMAGE_PIXELS
        position += 2 + int.from_bytes(data[position + 2 : position + 4])
    return False


class ColorParams(NamedTuple):
    """The color parameters of one image.

    factors: of brightness, contrast and saturation, and the turn of the hue as a fraction of the full circle. order: in
    which they are applied, as positions in factors; () for no jitter. gray: whether the image becomes gray. blur: its
    standard deviation in pixels; 0 for none.
    """

    factors: tuple
    order: tuple
    gray: bool
    blur: float


@dataclass(frozen=True)
class Recipe:
    """The augmentation of one of RECIPES; recipe(image, size, generator) augments an image.

    scale: range of the area of a random crop, as a fraction of the image's; None for the center of the image. margin:
    for that center, see resize_center_crop. flip: probability of a mirror image. jitter: strengths for brightness,
    contrast, saturation and hue, as torchvision's ColorJitter takes them, and jitter_p its probability. gray:
    probability of a gray image, gray_first whether it comes before the jitter. blur: probability of a blur.
    """

    scale: tuple | None = None
    margin: float | None = None
    flip: float = 0
    jitter: tuple = (0, 0, 0, 0)
    jitter_p: float = 0
    gray: float = 0
    gray_first: bool = False
    blur: float = 0

    def __call__(self, image, size, generator):
        """Augment image (height, width, 3): uint8 (size, size, 3)."""
        image = self.crop(image, size, generator)
        if not (self.jitter_p or self.gray or self.blur):
            return image
        return color(image, self.sample_color_params(generator), self.gray_first)

    def crop(self, image, size, generator):
        """Crop, resize and flip image (height, width, 3) as the recipe says: uint8 (size, size, 3)."""
        if self.scale is None:
            image = resize_center_crop(image, size, self.margin)
        else:
            left, top, width, height = random_crop(image.shape[1], image.shape[0], self.scale, generator)
            image = resize(image[top : top + height, left : left + width], size, size)
        if self.flip and generator.random() < self.flip:
            image = cv2.flip(image, 1)
        return np.ascontiguousarray(image)

    def sample_color_params(self, generator):
        """Draw the ColorParams of one image."""
        u = generator.random(12)
        factors, order = NEUTRAL, ()
        if u[0] < self.jitter_p:
            strengths = np.array(self.jitter[:3])
            low = np.maximum(0, 1 - strengths)
            turn = (2 * u[4] - 1) * self.jitter[3]
            factors = tuple(np.float32([*(low + u[1:4] * (1 + strengths - low)), turn]).tolist())
            order = tuple(np.argsort(u[5:9]).tolist())
        sigma = np.float32(SIGMA[0] + u[11] * (SIGMA[1] - SIGMA[0])).item() if u[10] < self.blur else 0
        return ColorParams(factors, order, bool(u[9] < self.gray), sigma)


RECIPES = {
    # the released temporal classification models (ResNeXt)
    "released": Recipe(scale=(0.2, 1), flip=0.5, jitter=(0.9, 0.9, 0.9, 0.5), jitter_p=0.9, gray=0.2, blur=0.5),
    # the temporal classification models in the paper's text (MobileNetV2): color only, no crop
    "paper": Recipe(jitter=(0.8, 0.8, 0.8, 0.2), jitter_p=0.8, gray=0.2),
    # MoCo without and with --aug-plus
    "moco_v1": Recipe(scale=(0.2, 1), flip=0.5, jitter=(0.4, 0.4, 0.4, 0.4), jitter_p=1, gray=0.2, gray_first=True),
    "moco_v2": Recipe(scale=(0.2, 1), flip=0.5, jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, gray=0.2, blur=0.5),
    # the standard crops of ImageNet training and evaluation
    "imagenet": Recipe(scale=(0.08, 1), flip=0.5),
    "center": Recipe(margin=256 / 224),
    # no augmentation: the published evaluations, and training with --no-augmentation
    "none": Recipe(),
}


def random_crop(width, height, scale, generator):
    """Sample left, top, width and height of a crop as torchvision's RandomResizedCrop does.

    scale: the range of its area, as a fraction of the image's area.
    """
    for area, aspect in generator.random((10, 2)).tolist():
        area = (scale[0] + area * (scale[1] - scale[0])) * width * height
        aspect = ASPECT[0] * (ASPECT[1] / ASPECT[0]) ** aspect  # log-uniform
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            break
    else:  # the largest center crop with an allowed aspect ratio
        w, h = min(width, round(height * ASPECT[1])), min(height, round(width / ASPECT[0]))
        return (width - w) // 2, (height - h) // 2, w, h
    return int(generator.integers(width - w + 1)), int(generator.integers(height - h + 1)), w, h


def resize_center_crop(image, size, margin=None):
    """The center of image as uint8 (size, size, 3).

    Without a margin, an image of size x size is returned unchanged, as in the published evaluations, and the minor edge
    of any other is resized to size first. With a margin, the minor edge is always resized to int(margin * size).
    """
    height, width = image.shape[:2]
    if margin is None and height == width == size:
        return image
    edge = int(size * margin) if margin else size
    short = min(height, width)
    width, height = int(edge * width / short), int(edge * height / short)
    image = resize(image, width, height)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image[top : top + size, left : left + size]


def resize(image, width, height):
    """Resize image to uint8 (height, width, 3) as PIL's bilinear filter does, with antialiasing."""
    if width >= image.shape[1] and height >= image.shape[0]:
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def color(image, params, gray_first=False):
    """Apply ColorParams to image uint8 (height, width, 3): jitter in the order they give, gray, blur."""
    if params.gray and gray_first:
        image = gray(image)
    for i in params.order:
        if params.factors[i] != NEUTRAL[i]:
            image = (brightness, contrast, saturation, hue)[i](image, params.factors[i])
    if params.gray and not gray_first:
        image = gray(image)
    return blur(image, params.blur) if params.blur else image


_FLOOR = -0.499  # PIL truncates and OpenCV rounds


def brightness(image, factor):
    """Multiply image by factor."""
    return cv2.addWeighted(image, factor, image, 0, _FLOOR)


def contrast(image, factor):
    """Blend image with its mean gray value; a factor above 1 increases the contrast."""
    mean = int(cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0] + 0.5)
    return cv2.addWeighted(image, factor, image, 0, (1 - factor) * mean + _FLOOR)


def saturation(image, factor):
    """Blend image with its gray version; a factor above 1 increases the saturation."""
    return cv2.addWeighted(image, factor, gray(image), 1 - factor, _FLOOR)


def hue(image, turn):
    """Shift all hues of image by turn, a fraction of the full circle."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)  # FULL: hues from 0 to 255, so that uint8 wraps around
    height, width = image.shape[:2]
    hsv = hsv.reshape(height, 3 * width) + np.tile(np.array([int(turn * 255) % 256, 0, 0], np.uint8), width)
    return cv2.cvtColor(hsv.reshape(height, width, 3), cv2.COLOR_HSV2RGB_FULL)


def gray(image):
    """The gray version of image, (height, width, 3)."""
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def blur(image, sigma):
    """PIL's GaussianBlur(sigma) of image, in a single pass."""
    kernel = blur_kernel(sigma)
    return cv2.sepFilter2D(image, -1, kernel, kernel, borderType=cv2.BORDER_REPLICATE)


def blur_kernel(sigma):
    """The kernel of PIL's GaussianBlur for sigma <= 2: three extended box filters in a row, float32, up to 11 taps.

    An extended box filter has fractional weights at its ends, which make its variance exactly sigma^2 / 3 (Gwosdek et
    al., Theoretical Foundations of Gaussian Convolution by Extended Box Filtering, 2011, eq. 7-14).
    """
    variance = sigma**2 / 3
    radius = int((math.sqrt(12 * variance + 1) - 1) / 2)
    end = (2 * radius + 1) * (radius * (radius + 1) - 3 * variance) / (6 * (variance - (radius + 1) ** 2))
    box = np.array([end] + [1] * (2 * radius + 1) + [end]) / (2 * (radius + end) + 1)
    kernel = np.convolve(np.convolve(box, box), box)
    kernel = kernel[kernel > 1 / 512]  # the rest contributes less than half a gray level
    return (kernel / kernel.sum()).astype(np.float32)
