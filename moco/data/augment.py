"""The augmentation recipes of the paper, on the CPU.

Images are RGB, uint8, (height, width, 3). All random numbers come from the generator that is passed in. The recipes
equal those of torchvision on PIL images: the same distributions, and for the same factors the same pixels within two
gray levels on average.
"""

import io
import math
import struct

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

RECIPES = {
    # the released temporal classification models (ResNeXt)
    "released": dict(scale=(0.2, 1), flip=0.5, jitter=(0.9, 0.9, 0.9, 0.5), jitter_p=0.9, gray=0.2, blur=0.5),
    # the temporal classification models in the paper's text (MobileNetV2): color only, no crop
    "paper": dict(jitter=(0.8, 0.8, 0.8, 0.2), jitter_p=0.8, gray=0.2),
    # MoCo without and with --aug-plus
    "moco_v1": dict(scale=(0.2, 1), flip=0.5, jitter=(0.4, 0.4, 0.4, 0.4), jitter_p=1, gray=0.2, gray_first=True),
    "moco_v2": dict(scale=(0.2, 1), flip=0.5, jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, gray=0.2, blur=0.5),
    # the standard crops of ImageNet training and evaluation
    "imagenet": dict(scale=(0.08, 1), flip=0.5),
    "center": dict(margin=256 / 224),
    # no augmentation: the published evaluations, and training with --no-augmentation
    "none": dict(),
}
ASPECT = (3 / 4, 4 / 3)  # range of a random crop's width over height
SIGMA = (0.1, 2)  # range of the blur's standard deviation, in pixels
REACH = 5  # the blur's largest radius, in pixels
BRIGHTNESS, CONTRAST, SATURATION, HUE, ORDER, GRAY, BLUR, FACTORS = 0, 1, 2, 3, 4, 8, 9, 10  # columns of the factors
_DECODING = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION  # PIL ignores the EXIF orientation, too


class BadImage(Exception):
    """Bytes that are not a complete image; the message is the reason."""


def decode(data):
    """The image in the bytes data, equal to PIL's convert("RGB"): uint8 (height, width, 3).

    OpenCV decodes ordinary JPEGs, faster and with the same pixels; PIL decodes everything else. Raises BadImage where
    PIL raises: for empty, truncated and suspiciously large files, and for files that are not images.
    """
    if _is_ordinary_jpeg(data):
        image = cv2.imdecode(np.frombuffer(data, np.uint8), _DECODING)
        if image is not None:
            return image
    try:
        with Image.open(io.BytesIO(data)) as image:
            return np.array(image.convert("RGB"))
    except UnidentifiedImageError as error:
        raise BadImage("not an image" if data else "the file is empty") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ...
        raise BadImage(str(error) or type(error).__name__) from error


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


class Recipe:
    """A recipe of RECIPES for square images with a side of size pixels.

    recipe(image, generator) augments an image. With on="device", a loader calls the two halves separately:
    recipe.crop(image, generator), then recipe.sample_color_params(generator), whose factors augment_device.color
    applies to a whole batch.
    """

    def __init__(self, name, size, on="worker"):
        settings = RECIPES[name]
        self.name = name
        self.size = size
        self.on = on
        self.scale = settings.get("scale")
        self.flip = settings.get("flip", 0)
        self.margin = settings.get("margin")
        self.jitter = settings.get("jitter")
        self.jitter_p = settings.get("jitter_p", 0)
        self.gray = settings.get("gray", 0)
        self.gray_first = settings.get("gray_first", False)
        self.blur = settings.get("blur", 0)
        self.has_color = bool(self.jitter or self.gray or self.blur)

    def __call__(self, image, generator):
        """Augment image (height, width, 3): uint8 (size, size, 3)."""
        image = self.crop(image, generator)
        return color(image, self.sample_color_params(generator), self.gray_first) if self.has_color else image

    def crop(self, image, generator):
        """Crop, resize and flip image (height, width, 3) as the recipe says: uint8 (size, size, 3)."""
        if self.scale is None:
            image = resize_center_crop(image, self.size, self.margin)
        else:
            left, top, width, height = random_crop(image.shape[1], image.shape[0], self.scale, generator)
            image = resize(image[top : top + height, left : left + width], self.size, self.size)
        if self.flip and generator.random() < self.flip:
            image = cv2.flip(image, 1)
        return np.ascontiguousarray(image)

    def sample_color_params(self, generator):
        """Color factors for one image: float32 (FACTORS,), neutral for operations that are not applied."""
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


def color(image, factors, gray_first=False):
    """Apply factors (FACTORS,) to image uint8 (height, width, 3): jitter in the order they give, gray, blur."""
    factors = factors.tolist()
    if factors[GRAY] and gray_first:
        image = gray(image)
    for operation in factors[ORDER : ORDER + 4]:
        if factors[int(operation)] != (1, 1, 1, 0)[int(operation)]:
            image = (brightness, contrast, saturation, hue)[int(operation)](image, factors[int(operation)])
    if factors[GRAY] and not gray_first:
        image = gray(image)
    return blur(image, factors[BLUR]) if factors[BLUR] else image


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
