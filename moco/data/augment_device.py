"""Color jitter, grayscale and blur of a whole batch on the device that holds it; the same pixels as augment's."""

import numpy as np
import torch

from moco.data import augment


def color(images, factors, gray_first=False):
    """augment.color for a batch, on the device that holds it.

    images: float (N, 3, height, width) from 0 to 255; factors: (N, FACTORS) on the CPU, so that who needs what is
    known without waiting for the device. Gives the same shape and range.
    """
    if gray_first:
        images = _where(factors[:, augment.GRAY] > 0, images, factors, _luma)
    order = factors[:, augment.ORDER : augment.ORDER + 4].long()
    amounts = torch.where(
        order == augment.HUE, 1, factors.gather(1, order)
    )  # of the three that blend the image with another
    steps = torch.stack([amounts, order == augment.SATURATION, order == augment.CONTRAST]).to(
        images.device, non_blocking=True
    )
    for slot in range(4):
        amount, saturate, contrast = steps[:, :, slot, None, None, None]
        luma = _luma(images)
        towards = saturate * luma + contrast * (luma.mean((1, 2, 3), keepdim=True) + 0.5).floor()
        images = (images - towards).mul_(amount).add_(towards).clamp_(0, 255).floor_()
        images = _where((order[:, slot] == augment.HUE) & (factors[:, augment.HUE] != 0), images, factors, _turn)
    if not gray_first:
        images = _where(factors[:, augment.GRAY] > 0, images, factors, _luma)
    return _where(factors[:, augment.BLUR] > 0, images, factors, _blur)


def _where(which, images, factors, function):
    """images with function(images, factors) in place of those for which `which` (on the CPU) holds."""
    at = which.nonzero().squeeze(1)
    if len(at) == 0:
        return images
    there = at.to(images.device, non_blocking=True)
    changed = images.clone()  # index_copy would lose the channels-last layout
    changed[there] = function(images[there], factors[at])
    return changed


def _luma(images, _=None):
    """PIL's gray of images, (N, 1, height, width): the same for all three colors."""
    red, green, blue = images.unbind(1)
    return (0.299 * red + 0.587 * green + 0.114 * blue + 0.5).floor()[:, None]


def _turn(images, factors):
    """Hues turned: each color is the largest one less a share of the chroma that follows the hue circle."""
    turn = (255 * factors[:, augment.HUE, None, None]).trunc().to(images.device, non_blocking=True)
    red, green, blue = images.unbind(1)
    largest = images.amax(1)
    chroma = largest - images.amin(1)
    sector = torch.where(
        largest == red,
        (green - blue) / chroma,
        torch.where(largest == green, (blue - red) / chroma + 2, (red - green) / chroma + 4),
    )
    hues = (255 * (torch.where(chroma == 0, 0, sector) / 6).remainder(1)).floor()  # in PIL's whole steps
    sector = (hues + turn).remainder(256) * 6 / 255
    ramps = [(start + sector).remainder(6) for start in (5, 3, 1)]
    return torch.stack([largest - chroma * torch.minimum(k, 4 - k).clamp(0, 1) for k in ramps], 1)


def _blur(images, factors):
    """PIL's GaussianBlur, along the rows and then along the columns."""
    kernels = np.zeros((len(images), 2 * augment.REACH + 1), np.float32)
    for row, sigma in zip(kernels, factors[:, augment.BLUR].tolist(), strict=True):
        kernel = augment.blur_kernel(sigma)
        half = len(kernel) // 2
        row[augment.REACH - half : augment.REACH + half + 1] = kernel
    kernels = torch.from_numpy(kernels).to(images.device, non_blocking=True)[:, :, None, None, None]
    height, width = images.shape[2:]
    padded = torch.nn.functional.pad(images, (augment.REACH, augment.REACH, 0, 0), mode="replicate")
    images = sum(kernels[:, tap] * padded[:, :, :, tap : tap + width] for tap in range(2 * augment.REACH + 1))
    padded = torch.nn.functional.pad(images, (0, 0, augment.REACH, augment.REACH), mode="replicate")
    return sum(kernels[:, tap] * padded[:, :, tap : tap + height] for tap in range(2 * augment.REACH + 1))
