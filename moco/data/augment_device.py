"""Color jitter, grayscale and blur of a batch on its device; the same pixels as in augment."""

from typing import NamedTuple

import numpy as np
import torch

from moco.data import augment

# Columns of ColorParams.values. The first three have one column for each of the four operations, in their order.
AMOUNT, SATURATION, CONTRAST, TURN = slice(0, 4), slice(4, 8), slice(8, 12), 12
KERNEL = slice(13, 13 + 2 * augment.REACH + 1)


class ColorParams(NamedTuple):
    """The parameters of color(): two tensors, made in a worker so that they are in pinned memory, and their layout.

    values: float32 (N, columns). Operation s of an image blends it with another by AMOUNT: with its gray image where
    SATURATION is 1, with its mean gray where CONTRAST is 1, else with black. TURN: of the hue, from -255 to 255.
    KERNEL: of the blur.
    images: int64, six lists of images one after the other: those whose hue is turned as operation 0, 1, 2 and 3, those
    that become gray, and those that are blurred. counts: the lengths of the lists, known without waiting for the
    device.
    """

    values: torch.Tensor
    images: torch.Tensor
    counts: list


def color_params(factors):
    """The ColorParams of a batch with factors (N, augment.FACTORS), float32 from Recipe.sample_color_params."""
    order = factors[:, augment.ORDER : augment.ORDER + 4].astype(np.int64)
    values = np.zeros((len(factors), KERNEL.stop), np.float32)
    values[:, AMOUNT] = np.where(order == augment.HUE, 1, np.take_along_axis(factors, order, 1))
    values[:, SATURATION] = order == augment.SATURATION
    values[:, CONTRAST] = order == augment.CONTRAST
    values[:, TURN] = np.trunc(255 * factors[:, augment.HUE])
    for row, sigma in zip(values[:, KERNEL], factors[:, augment.BLUR].tolist(), strict=True):
        if sigma:
            kernel = augment.blur_kernel(sigma)
            half = len(kernel) // 2
            row[augment.REACH - half : augment.REACH + half + 1] = kernel
    turned = [(order[:, slot] == augment.HUE) & (factors[:, augment.HUE] != 0) for slot in range(4)]
    chosen = [np.flatnonzero(mask) for mask in (*turned, factors[:, augment.GRAY] > 0, factors[:, augment.BLUR] > 0)]
    images = torch.from_numpy(np.concatenate(chosen))
    return ColorParams(torch.from_numpy(values), images, [len(each) for each in chosen])


def color(images, params, gray_first=False):
    """augment.color for a batch: float (N, 3, height, width) from 0 to 255, returned in the same shape and range.

    params: ColorParams, on the device of images.
    """
    values = params.values[:, :, None, None, None]
    *turned, gray, blurred = params.images.split(params.counts)
    if gray_first:
        images = _replace(images, gray, _luma)
    for slot in range(4):
        amount, saturation, contrast = (values[:, columns][:, slot] for columns in (AMOUNT, SATURATION, CONTRAST))
        luma = _luma(images)
        other = saturation * luma + contrast * (luma.mean((1, 2, 3), keepdim=True) + 0.5).floor()
        images = (images - other).mul_(amount).add_(other).clamp_(0, 255).floor_()
        images = _replace(images, turned[slot], _turn_hue, params.values[:, TURN, None, None])
    if not gray_first:
        images = _replace(images, gray, _luma)
    return _replace(images, blurred, _blur, values[:, KERNEL])


def _replace(images, chosen, function, *values):
    """images with function(images, *values) for the chosen ones, int64 (n,)."""
    if len(chosen) == 0:
        return images
    changed = images.clone()  # index_copy would lose the channels-last layout
    changed[chosen] = function(images[chosen], *(each[chosen] for each in values))
    return changed


def _luma(images):
    """PIL's gray of images, (N, 1, height, width)."""
    red, green, blue = images.unbind(1)
    return (0.299 * red + 0.587 * green + 0.114 * blue + 0.5).floor()[:, None]


def _turn_hue(images, turn):
    """Hues turned by turn (N, 1, 1), in 255ths of the full circle, as PIL does it.

    Each color is the largest one less a share of the chroma that depends on the hue.
    """
    red, green, blue = images.unbind(1)
    largest = images.amax(1)
    chroma = largest - images.amin(1)
    sector = torch.where(
        largest == red,
        (green - blue) / chroma,
        torch.where(largest == green, (blue - red) / chroma + 2, (red - green) / chroma + 4),
    )
    hues = (255 * (torch.where(chroma == 0, 0, sector) / 6).remainder(1)).floor()  # PIL has 256 hues
    sector = (hues + turn).remainder(256) * 6 / 255
    ramps = [(start + sector).remainder(6) for start in (5, 3, 1)]
    return torch.stack([largest - chroma * torch.minimum(k, 4 - k).clamp(0, 1) for k in ramps], 1)


def _blur(images, kernels):
    """PIL's GaussianBlur: kernels (N, taps, 1, 1, 1) along the rows, then along the columns."""
    height, width = images.shape[2:]
    taps = 2 * augment.REACH + 1
    padded = torch.nn.functional.pad(images, (augment.REACH, augment.REACH, 0, 0), mode="replicate")
    images = sum(kernels[:, tap] * padded[:, :, :, tap : tap + width] for tap in range(taps))
    padded = torch.nn.functional.pad(images, (0, 0, augment.REACH, augment.REACH), mode="replicate")
    return sum(kernels[:, tap] * padded[:, :, tap : tap + height] for tap in range(taps))
