"""Weights for networks of other libraries, and the names that these have for them."""

import re

import numpy as np
import torch

BLOCK = np.random.RandomState(0).standard_normal(1_000_003).astype(np.float32)  # a prime, so that no two rows repeat

TABLE = [
    (r"class_token", "cls_token"),
    (r"encoder\.pos_embedding", "pos_embed"),
    (r"conv_proj", "patch_embed.proj"),
    (r"encoder\.ln\b", "norm"),
    (r"heads\.head", "head"),
    (r"encoder\.layers\.encoder_layer_", "blocks."),
    (r"\.ln_", ".norm"),
    (r"self_attention\.in_proj_", "attn.qkv."),
    (r"self_attention\.out_proj", "attn.proj"),
    (r"mlp\.0", "mlp.fc1"),
    (r"mlp\.3", "mlp.fc2"),
]


def timm_name(name):
    """timm's name of a tensor that torchvision calls name."""
    for pattern, replacement in TABLE:
        name = re.sub(pattern, replacement, name)
    return name


def weights(shapes):
    """Weights of these shapes {name: shape}, the same on every machine: {name: tensor}."""
    state = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        values = np.resize(np.roll(BLOCK, 7919 * seed), shape)
        if len(shape) == 1 and not name.endswith(("bias", "class_embedding")):
            values = 1 + 0.2 * values
        else:
            values = values * (np.prod(shape[1:]) ** -0.5 if len(shape) in (2, 4) else 0.2)
        state[name] = torch.from_numpy(values.astype(np.float32))
    return state


def images(size):
    """Two images of size x size pixels, the same on every machine."""
    return torch.from_numpy(np.resize(BLOCK, (2, 3, size, size)))


def saved(path, content, legacy=False, **options):
    """path, to which torch.save writes content; legacy: in the format before zip files."""
    torch.save(content, path, _use_new_zipfile_serialization=not legacy, **options)
    return path
