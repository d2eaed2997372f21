"""Vision transformers of any size, from the weights that DINO, MAE, Mugs, MoCo v3 and timm write (Dosovitskiy 2021)."""

import re
from math import isqrt

import torch
from torch.nn import functional
from torchvision.models import vision_transformer

from moco.cli import UserError

SIZES = {"ti": (192, 12, 3), "s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "h": (1280, 32, 16)}
HEADS = {1280: 16, 1408: 16, 2048: 8}  # by width, where a head is not 64 wide as in all other published networks
POSITIONS = "encoder.pos_embedding"
IMAGE_SIZE = 224  # for which new position embeddings are made; other sizes interpolate them
UNSUPPORTED = {  # modules beside the blocks that change the features
    "reg_token": "register tokens",
    "register_tokens": "register tokens",
    "dist_token": "distillation tokens",
    "norm_pre": "norms before the blocks",
    "fc_norm": "averaged patch features",
    "attn_pool": "attention-pooled features",
}


class VisionTransformer(vision_transformer.VisionTransformer):
    """torchvision's VisionTransformer for images of any size that is a multiple of the patch size.

    The features are the class token after the last norm. The position embeddings are interpolated (bicubic,
    antialiased, as in timm) where the image has another number of patches. At the size the network was made for, the
    output equals torchvision's to the bit. ValueError for a size that is not a multiple of the patch size.
    """

    def forward(self, x):
        """Images (N, 3, H, W) to the head's output (N, n_out)."""
        return self.heads(self.encoder.ln(self.encoder.layers(self.tokens(x)))[:, 0])

    def tokens(self, x):
        """The first block's input of images (N, 3, H, W): class token and patches (N, 1 + h * w, width)."""
        positions = _positions(self.encoder.pos_embedding, x.shape[2], x.shape[3], self.patch_size)
        patches = self.conv_proj(x).flatten(2).permute(0, 2, 1)
        tokens = torch.cat([self.class_token.expand(x.shape[0], -1, -1), patches], dim=1)
        return self.encoder.dropout(tokens + positions)


def _positions(embedding, height, width, patch):
    """Position embeddings (1, 1 + h * w, width) of an image of height x width pixels."""
    if height % patch or width % patch:
        raise ValueError(f"the image size {height}x{width} is not a multiple of the patch size {patch}")
    h, w, side = height // patch, width // patch, isqrt(embedding.shape[1] - 1)
    if h == w == side:
        return embedding
    grid = embedding[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    grid = functional.interpolate(grid.float(), size=(h, w), mode="bicubic", antialias=True).to(embedding.dtype)
    return torch.cat([embedding[:, :1], grid.flatten(2).permute(0, 2, 1)], dim=1)


def parse(arch):
    """(width, depth, heads, patch size) of an architecture's name such as vit_s_16, or None for any other name.

    Sizes without a letter are WIDTHxDEPTHxHEADS: vit_256x6x4_8.
    """
    if match := re.fullmatch(rf"vit_({'|'.join(SIZES)})_([1-9]\d*)", arch):
        return (*SIZES[match[1]], int(match[2]))
    if match := re.fullmatch(r"vit_([1-9]\d*)x([1-9]\d*)x([1-9]\d*)_([1-9]\d*)", arch):
        width, depth, heads, patch = map(int, match.groups())
        return (width, depth, heads, patch) if width % heads == 0 else None
    return None


def name(width, depth, heads, patch):
    """The name of an architecture, which parse reads."""
    letters = {size: letter for letter, size in SIZES.items()}
    size = letters.get((width, depth, heads), f"{width}x{depth}x{heads}")
    return f"vit_{size}_{patch}"


def build(arch):
    """The vision transformer of this name, with random weights and torchvision's 1000 outputs."""
    width, depth, heads, patch = parse(arch)
    size = max(IMAGE_SIZE // patch, 1) * patch
    return VisionTransformer(size, patch, depth, heads, width, 4 * width)


def resize_positions(model, shape):
    """Give model position embeddings of another shape (1, 1 + n * n, width); their values are undefined."""
    positions = model.encoder.pos_embedding
    positions.data = positions.new_empty(shape)  # the same parameter, which an optimizer may hold already


def is_square_grid(shape, like):
    """Whether position embeddings of this shape belong to a square grid and have the width of the shape like."""
    return len(shape) == 3 and shape[::2] == like[::2] and shape[1] > 1 and isqrt(shape[1] - 1) ** 2 == shape[1] - 1


def check(model):
    """UserError if model has no class token whose attention could be shown."""
    if not isinstance(model, VisionTransformer):
        raise UserError(
            f"{type(model).__name__} has no class token; choose a vision transformer, or leave out --attention"
        )


def attention_maps(model, images):
    """How the class token attends to the patches in the last block: (N, heads, h, w), of images (N, 3, H, W).

    The values of a head and the class token's attention to itself sum to 1. What does not fill a patch at the right and
    at the bottom of an image is left out. UserError for another kind of network.
    """
    check(model)
    h, w = (side // model.patch_size for side in images.shape[2:])
    *blocks, last = model.encoder.layers
    tokens = model.tokens(images[:, :, : h * model.patch_size, : w * model.patch_size])
    for block in blocks:
        tokens = block(tokens)
    tokens = last.ln_1(tokens)
    _, weights = last.self_attention(tokens, tokens, tokens, need_weights=True, average_attn_weights=False)
    return weights[:, :, 0, 1:].unflatten(2, (h, w))


# --- the names of other libraries

_BLOCK = r"encoder\.layers\.encoder_layer_(\d+)\."
_TIMM = [  # what DINO, MAE, Mugs and MoCo v3 use, too
    (r"class_token", "cls_token"),
    (r"encoder\.pos_embedding", "pos_embed"),
    (r"conv_proj\.", "patch_embed.proj."),
    (_BLOCK + r"ln_(\d)\.", r"blocks.\1.norm\2."),
    (_BLOCK + r"self_attention\.in_proj_", r"blocks.\1.attn.qkv."),
    (_BLOCK + r"self_attention\.out_proj\.", r"blocks.\1.attn.proj."),
    (_BLOCK + r"mlp\.0\.", r"blocks.\1.mlp.fc1."),
    (_BLOCK + r"mlp\.3\.", r"blocks.\1.mlp.fc2."),
    (r"encoder\.ln\.", "norm."),
    (r"heads\.head\.", "head."),
]
_TORCHVISION_0_12 = [(r"(.*\.mlp)\.0\.", r"\1.linear_1."), (r"(.*\.mlp)\.3\.", r"\1.linear_2.")]


def other_names(names):
    """Ways that other libraries and older versions of torchvision name the same tensors: {name: the name there}."""
    return [{name: _rename(name, table) for name in names} for table in (_TIMM, _TORCHVISION_0_12)]


def _rename(name, table):
    for pattern, replacement in table:
        if match := re.match(pattern, name):
            return match.expand(replacement) + name[match.end() :]
    return name


def fold_layer_scale(tensors):
    """tensors (name -> tensor) with every LayerScale multiplied into the linear layer before it, which is the same."""
    tensors = dict(tensors)
    for gamma in [name for name in tensors if re.search(r"\.ls[12]\.gamma$", name)]:
        layer = "attn.proj" if gamma.endswith("ls1.gamma") else "mlp.fc2"
        weight, bias = (f"{gamma[: -len('ls1.gamma')]}{layer}.{kind}" for kind in ("weight", "bias"))
        if weight in tensors and bias in tensors:
            scale = tensors.pop(gamma)
            tensors |= {weight: tensors[weight] * scale[:, None], bias: tensors[bias] * scale}
    return tensors


def fitting_archs(tensors, stored_arch=None):
    """Names of the vision transformers that have the width, patch size and depth of some tensors (name -> tensor).

    stored_arch: the architecture that the file names. MoCo v3's vit_small has 12 heads, all others have 6.
    """
    archs = []
    for key, tensor in tensors.items():
        match = re.fullmatch(r"(.*?)(?:patch_embed\.proj|conv_proj)\.weight", key)
        if not match or tensor.ndim != 4 or tensor.shape[2] != tensor.shape[3]:
            continue
        block = re.compile(re.escape(match[1]) + r"(?:blocks\.|encoder\.layers\.encoder_layer_)(\d+)\.")
        depth = 1 + max((int(number[1]) for other in tensors if (number := block.match(other))), default=-1)
        width, patch = len(tensor), tensor.shape[2]
        heads = HEADS.get(width, width // 64)
        if width == 384 and (stored_arch == "vit_small" or "base_encoder." in match[1]):
            heads = 12
        if depth and heads and width % heads == 0:
            archs.append(name(width, depth, heads, patch))
    return list(dict.fromkeys(archs))
