"""Pixels in, pixels out: the augmentation recipes of the paper, fast.

Images are RGB, uint8, (height, width, 3). Every random number comes from the generator that is handed in. The
recipes equal those of torchvision on PIL images: the same distributions, and for the same factors the same pixels
within two gray levels on average.
"""

import io
import math

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

RECIPES = {
    # the published temporal classification models (ResNeXt)
    "released": dict(scale=(0.2, 1), flip=0.5, jitter=(0.9, 0.9, 0.9, 0.5), jitter_p=0.9, gray=0.2, blur=0.5),
    # the temporal classification models of the paper's text (MobileNetV2): color only, frames as they are
    "paper": dict(jitter=(0.8, 0.8, 0.8, 0.2), jitter_p=0.8, gray=0.2),
    # MoCo without and with --aug-plus
    "moco_v1": dict(scale=(0.2, 1), flip=0.5, jitter=(0.4, 0.4, 0.4, 0.4), jitter_p=1, gray=0.2, gray_first=True),
    "moco_v2": dict(scale=(0.2, 1), flip=0.5, jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, gray=0.2, blur=0.5),
    # the usual crops of ImageNet training and evaluation
    "imagenet": dict(scale=(0.08, 1), flip=0.5),
    "center": dict(margin=256 / 224),
    # frames as they are: the published evaluations, and training with --no-augmentation
    "none": dict(),
}
ASPECT = (3 / 4, 4 / 3)  # of a random crop, width over height
SIGMA = (0.1, 2)  # of the blur, in pixels
REACH = 5  # pixels to either side that the widest blur looks at
BRIGHTNESS, CONTRAST, SATURATION, HUE, ORDER, GRAY, BLUR, FACTORS = 0, 1, 2, 3, 4, 8, 9, 10  # columns of the factors
_AS_STORED = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION  # PIL does not turn an image by its EXIF tag either


class BadImage(Exception):
    """Bytes that are not a whole image; the message says why."""


def decode(data):
    """The image in the bytes data, as PIL's convert("RGB") gives it: uint8 (height, width, 3).

    Ordinary JPEGs take the fast way of OpenCV, which gives PIL's pixels; everything else is read by PIL itself.
    Raises BadImage where PIL would raise: empty, cut off, too large to be honest, not an image.
    """
    if _ordinary_jpeg(data):
        image = cv2.imdecode(np.frombuffer(data, np.uint8), _AS_STORED)
        if image is not None:
            return image
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.array(image.convert("RGB"))
    except UnidentifiedImageError as error:
        raise BadImage("not an image" if data else "the file is empty") from error
    except Exception as error:  # PIL's decoders raise whatever comes up: OSError, SyntaxError, struct.error, ...
        raise BadImage(str(error) or type(error).__name__) from error


def _ordinary_jpeg(data):
    """Whether data is a whole JPEG of 8 bits, gray or in three colors, and of an ordinary size."""
    if data[:2] != b"\xff\xd8" or data[-2:] != b"\xff\xd9":  # some OpenCVs fill up a cut image with gray
        return False
    at = 2
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of frame
            height, width = int.from_bytes(data[at + 5 : at + 7]), int.from_bytes(data[at + 7 : at + 9])
            return data[at + 4] == 8 and data[at + 9] in (1, 3) and 0 < height * width <= Image.MAX_IMAGE_PIXELS
        at += 2 + int.from_bytes(data[at + 2 : at + 4])
    return False


class Recipe:
    """A recipe of RECIPES for square images of size pixels a side.

    recipe(image, generator) augments one image completely. A loader that leaves the colors to the device
    (on="device") calls the two halves apart: recipe.crop(image, generator), then
    recipe.sample_color_params(generator), whose factors augment_device.color applies to the whole batch.
    """

    def __init__(self, name, size, on="worker"):
        settings = dict(RECIPES[name])
        self.name, self.size, self.on = name, size, on
        self.scale, self.flip = settings.pop("scale", None), settings.pop("flip", 0)
        self.margin = settings.pop("margin", None)
        self.jitter, self.jitter_p = settings.pop("jitter", None), settings.pop("jitter_p", 0)
        self.gray, self.gray_first = settings.pop("gray", 0), settings.pop("gray_first", False)
        self.blur = settings.pop("blur", 0)
        self.has_color = bool(self.jitter or self.gray or self.blur)

    def __call__(self, image, generator):
        """image (height, width, 3), augmented: uint8 (size, size, 3)."""
        image = self.crop(image, generator)
        return color(image, self.sample_color_params(generator), self.gray_first) if self.has_color else image

    def crop(self, image, generator):
        """image cropped at random, resized and flipped, as the recipe has it: uint8 (size, size, 3)."""
        if self.scale is None:
            image = resize_center_crop(image, self.size, self.margin)
        else:
            left, top, width, height = random_crop(image.shape[1], image.shape[0], self.scale, generator)
            image = resize(image[top : top + height, left : left + width], self.size, self.size)
        if self.flip and generator.random() < self.flip:
            image = cv2.flip(image, 1)
        return np.ascontiguousarray(image)

    def sample_color_params(self, generator):
        """Color factors for one image: float32 (FACTORS,); what is not to be done has the factor that does nothing."""
        factors = np.array([1, 1, 1, 0, 0, 1, 2, 3, 0, 0], np.float32)
        u = generator.random(12).tolist()
        if self.jitter and u[0] < self.jitter_p:
            for column, strength in zip((BRIGHTNESS, CONTRAST, SATURATION), self.jitter, strict=False):
                factors[column] = max(0, 1 - strength) + u[column + 1] * (1 + strength - max(0, 1 - strength))
            factors[HUE] = (2 * u[4] - 1) * self.jitter[3]
            factors[ORDER : ORDER + 4] = np.argsort(u[5:9])
        factors[GRAY] = u[9] < self.gray
        if u[10] < self.blur:
            factors[BLUR] = SIGMA[0] + u[11] * (SIGMA[1] - SIGMA[0])
        return factors


def random_crop(width, height, scale, generator):
    """left, top, width, height of a random part of an image, as torchvision's RandomResizedCrop draws it.

    scale: the smallest and the largest share of the area.
    """
    for area, aspect in generator.random((10, 2)).tolist():
        area = (scale[0] + area * (scale[1] - scale[0])) * width * height
        aspect = ASPECT[0] * (ASPECT[1] / ASPECT[0]) ** aspect  # uniform in the logarithm
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            break
    else:  # the largest part in the middle whose shape is allowed
        w, h = min(width, round(height * ASPECT[1])), min(height, round(width / ASPECT[0]))
        return (width - w) // 2, (height - h) // 2, w, h
    return int(generator.integers(width - w + 1)), int(generator.integers(height - h + 1)), w, h


def resize_center_crop(image, size, margin=None):
    """The middle of image as uint8 (size, size, 3).

    An image that is size x size already is taken as it is, which is how the published evaluations read frames. Any
    other has its minor edge resized to size first, and with a margin always to int(margin * size).
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
    """image as uint8 (height, width, 3), as PIL's bilinear filter does it: smoothed first where it shrinks."""
    if width >= image.shape[1] and height >= image.shape[0]:
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def color(image, factors, gray_first=False):
    """image uint8 (height, width, 3) under factors (FACTORS,): jitter in its own order, gray, blur."""
    factors = factors.tolist()
    if factors[GRAY] and gray_first:
        image = gray(image)
    for operation in factors[ORDER : ORDER + 4]:
        if factors[int(operation)] != (1, 1, 1, 0)[int(operation)]:
            image = (brightness, contrast, saturation, hue)[int(operation)](image, factors[int(operation)])
    if factors[GRAY] and not gray_first:
        image = gray(image)
    return blur(image, factors[BLUR]) if factors[BLUR] else image


_FLOOR = -0.499  # PIL cuts the fraction off where OpenCV rounds


def brightness(image, factor):
    """image times factor."""
    return cv2.addWeighted(image, factor, image, 0, _FLOOR)


def contrast(image, factor):
    """image drawn towards (factor < 1) or away from its mean gray."""
    mean = int(cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0] + 0.5)
    return cv2.addWeighted(image, factor, image, 0, (1 - factor) * mean + _FLOOR)


def saturation(image, factor):
    """image drawn towards or away from its own gray picture."""
    return cv2.addWeighted(image, factor, gray(image), 1 - factor, _FLOOR)


def hue(image, turn):
    """image with every hue turned by turn, a share of the full circle."""
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)  # FULL: hue from 0 to 255, so that uint8 wraps as a circle does
    height, width = image.shape[:2]
    hsv = hsv.reshape(height, 3 * width) + np.tile(np.array([int(turn * 255) % 256, 0, 0], np.uint8), width)
    return cv2.cvtColor(hsv.reshape(height, width, 3), cv2.COLOR_HSV2RGB_FULL)


def gray(image):
    """image without color, still (height, width, 3)."""
    return cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)


def blur(image, sigma):
    """image under PIL's GaussianBlur(sigma), done in one pass."""
    kernel = blur_kernel(sigma)
    return cv2.sepFilter2D(image, -1, kernel, kernel, borderType=cv2.BORDER_REPLICATE)


def blur_kernel(sigma):
    """PIL's "Gaussian" of standard deviation sigma <= 2: three extended box filters in a row, float32, up to 11 taps.

    An extended box has a fractional weight at its two ends, by which its variance is exactly sigma^2 / 3
    (Gwosdek et al., Theoretical Foundations of Gaussian Convolution by Extended Box Filtering, 2011, eq. 7-14).
    """
    variance = sigma**2 / 3
    whole = int((math.sqrt(12 * variance + 1) - 1) / 2)
    end = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    box = np.array([end] + [1] * (2 * whole + 1) + [end]) / (2 * (whole + end) + 1)
    kernel = np.convolve(np.convolve(box, box), box)
    kernel = kernel[kernel > 1 / 512]  # what lies further out is less than half a gray level
    return (kernel / kernel.sum()).astype(np.float32)
