"""The model and the images that golden values were computed with."""

import numpy as np
import torch

from moco.networks import architectures
from tests import support

DATA = support.GOLDEN
IMAGES = DATA / "images"  # 48 real frames of 224x224 in four classes


def fill(module, seed):
    """Fill module with weights from a frozen generator, tensor by tensor in the order of their names.

    RandomState's streams are the same in every version of NumPy, so no weights need to be stored.
    """
    draws, state = np.random.RandomState(seed), module.state_dict()
    for name in sorted(state):
        shape = state[name].shape
        if not state[name].is_floating_point():
            continue
        if name.endswith("running_var"):
            values = draws.uniform(0.5, 1.5, shape)
        elif name.endswith("running_mean"):
            values = 0.1 * draws.randn(*shape)
        elif len(shape) >= 2:
            values = draws.randn(*shape) * np.sqrt(2 / np.prod(shape[1:]))
        elif name.endswith("weight"):
            values = draws.uniform(0.8, 1.2, shape)
        else:
            values = 0.1 * draws.randn(*shape)
        state[name].copy_(torch.from_numpy(np.asarray(values, np.float32)))
    return module


def model():
    """The MobileNetV2 with 26 outputs of the golden values, frozen."""
    return architectures.freeze(fill(architectures.build("mobilenet_v2", 26), 7))
