"""Class activation maps of a network, masks made from them, and images for display."""

import torch
from torch.nn import functional

from moco.data import loader


def class_activation_map(maps, weights):
    """The evidence for a class at each location, (N, H, W): the last maps (N, C, H, W) weighted by weights (C,).

    weights are the class's row of the linear head. The mean of the map over space is the class's logit without its
    bias (Zhou et al. 2016, Learning Deep Features for Discriminative Localization).
    """
    return torch.einsum("nchw,c->nhw", maps, weights)


def upsample(maps, size):
    """Maps (N, h, w) as (N, size, size), bicubic."""
    return functional.interpolate(maps[:, None], size=(size, size), mode="bicubic", align_corners=False)[:, 0]


def attention_mask(maps):
    """Masks (N, H, W) from 0 to 1 of maps (N, H, W): sigmoid(10 m / std(m)), with the std over all maps.

    Orhan, Gupta & Lake (2020), Figure 6.
    """
    return torch.sigmoid(10 * maps / maps.std().clamp(min=1e-12))


def denormalize(images):
    """Normalized images (N, 3, H, W) as (N, H, W, 3), from 0 to 1."""
    mean, std = torch.tensor([loader.MEAN, loader.STD])
    return (images.permute(0, 2, 3, 1) * std + mean).clamp(0, 1)
