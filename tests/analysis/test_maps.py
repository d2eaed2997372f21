"""Class activation maps and masks. Their golden values are in the tests of the scripts."""

import numpy as np
import torch
from torch import nn

from moco.analysis import maps
from moco.data import augment, loader
from moco.data.frame_folder import FrameFolder


def test_the_mean_of_a_class_activation_map_is_the_logit():
    random = torch.Generator().manual_seed(0)
    last_maps, head = torch.rand(5, 6, 7, 7, generator=random), nn.Linear(6, 3)
    logits = head(last_maps.mean((2, 3)))
    found = maps.class_activation_map(last_maps, head.weight[2]).mean((1, 2)) + head.bias[2]
    torch.testing.assert_close(found, logits[:, 2])


def test_an_attention_mask_is_between_0_and_1_and_one_half_where_the_map_is_0():
    values = torch.linspace(-1, 1, 2 * 9 * 9).reshape(2, 9, 9)
    mask = maps.attention_mask(values)
    assert mask.min() < 0.01 and mask.max() > 0.99 and (mask > 0.5).equal(values > 0)
    torch.testing.assert_close(maps.attention_mask(3 * values), mask)
    assert (maps.attention_mask(torch.zeros(2, 9, 9)) == 0.5).all()


def test_denormalize_undoes_the_normalization(frames):
    images = FrameFolder(frames)
    normalized, _, _ = next(iter(loader.in_order(images, 40, torch.device("cpu"), 0).epoch(0)))
    expected = augment.decode(images.path(0).read_bytes()) / 255
    np.testing.assert_allclose(maps.denormalize(normalized)[0], expected, atol=1e-5)
