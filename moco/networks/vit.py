"""Vision transformers of any size and library (Dosovitskiy et al. 2021), on torchvision's.

Beyond torchvision's they may have registers (Darcet et al. 2024), rotary positions (Su et al. 2021, in two dimensions
as in DINOv3), a gated MLP (SwiGLU; Shazeer 2020), or CLIP's norm before the blocks and its approximation of GELU. Their
features are the class token after the last norm.
"""

import re
from dataclasses import dataclass
from functools import partial
from math import isqrt, pi

import torch
from torch import nn
from torch.nn import functional
from torchvision.models import vision_transformer

from moco.cli import UserError

SIZES = {"ti": (192, 12, 3), "s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "h": (1280, 32, 16)}
HEADS = {1280: 16, 1408: 16, 2048: 8}  # by width, where a head is not 64 wide as in all other published networks
POSITIONS = "encoder.pos_embedding"
IMAGE_SIZE = 224  # for which new position embeddings are made; other sizes interpolate them
PERIOD = 100  # base of the periods of rotary positions, in patches over the image, as in DINOv3


@dataclass(frozen=True)
class Size:
    """What the name of an architecture says: vit_s_16, or vit_WIDTHxDEPTHxHEADS_PATCH, and then in this order

    _mlp1536: width of the MLP, if not 4 times that of the tokens. _glu: a gated MLP. _reg4: number of registers.
    _rope: rotary positions. _cubic: positions are interpolated as in transformers, not as in timm. _pre: a norm before
    the blocks. _quick: the approximation of GELU. _eps1e-05: of the norms.
    """

    width: int
    depth: int
    heads: int
    patch: int
    mlp: int
    gated: bool = False
    registers: int = 0
    rotary: bool = False
    antialias: bool = True
    pre_norm: bool = False
    quick_gelu: bool = False
    eps: float = 1e-6

    @property
    def name(self):
        """The name of the architecture."""
        letters = {size: letter for letter, size in SIZES.items()}
        size = self.width, self.depth, self.heads
        options = f"_mlp{self.mlp}" if self.mlp != 4 * self.width else ""
        options += "_glu" * self.gated + (f"_reg{self.registers}" if self.registers else "") + "_rope" * self.rotary
        options += "_cubic" * (not self.antialias) + "_pre" * self.pre_norm + "_quick" * self.quick_gelu
        options += f"_eps{self.eps:g}" if self.eps != 1e-6 else ""
        return f"vit_{letters.get(size, 'x'.join(map(str, size)))}_{self.patch}{options}"


def parse(arch):
    """The Size of an architecture's name, or None for any other name."""
    match = re.fullmatch(
        rf"vit_(?:({'|'.join(SIZES)})|([1-9]\d*)x([1-9]\d*)x([1-9]\d*))_([1-9]\d*)(?:_mlp([1-9]\d*))?(_glu)?"
        r"(?:_reg([1-9]\d*))?(_rope)?(_cubic)?(_pre)?(_quick)?(?:_eps(\d[\d.e-]*))?",
        arch,
    )
    if not match:
        return None
    letter, *numbers, patch, mlp, gated, registers, rotary, cubic, pre_norm, quick, eps = match.groups()
    width, depth, heads = SIZES[letter] if letter else map(int, numbers)
    options = bool(gated), int(registers or 0), bool(rotary), not cubic, bool(pre_norm), bool(quick), float(eps or 1e-6)
    if width % heads or rotary and width // heads % 4:
        return None
    return Size(width, depth, heads, int(patch), int(mlp or 4 * width), *options)


def build(arch):
    """The vision transformer of this name, with random weights and torchvision's 1000 outputs."""
    return VisionTransformer(parse(arch))


class VisionTransformer(vision_transformer.VisionTransformer):
    """A torchvision VisionTransformer for images of any size that is a multiple of the patch size.

    Position embeddings are interpolated (bicubic, antialiased, as in timm) where the image has another number of
    patches. At the size the network was made for, the output equals torchvision's to the bit. ValueError for a size
    that is not a multiple of the patch size.
    """

    def __init__(self, size):
        image_size = max(IMAGE_SIZE // size.patch, 1) * size.patch
        norm = partial(nn.LayerNorm, eps=size.eps)
        super().__init__(image_size, size.patch, size.depth, size.heads, size.width, size.mlp, norm_layer=norm)
        if size.registers:
            self.registers = nn.Parameter(torch.randn(1, size.registers, size.width) * 0.02)
        if size.pre_norm:
            self.encoder.ln_pre = norm(size.width)
        self.antialias = size.antialias
        if size.rotary:
            self.encoder.pos_embedding = None
        for block in self.encoder.layers:
            if size.rotary:
                block.__class__ = RotaryBlock
            if size.gated:
                block.mlp = SwiGLU(size.width, size.mlp)
            elif size.quick_gelu:
                block.mlp[1] = QuickGELU()

    antialias = True  # of interpolated position embeddings

    @property
    def prefix_tokens(self):
        """The number of tokens before those of the patches: the class token and the registers."""
        return 1 + (self.registers.shape[1] if hasattr(self, "registers") else 0)

    def forward(self, x):
        """Images (N, 3, H, W) to the head's output (N, n_out)."""
        tokens, rotary = self.tokens(x)
        for block in self.encoder.layers:
            tokens = block(tokens, *rotary)
        return self.heads(self.encoder.ln(tokens)[:, 0])

    def tokens(self, x):
        """What the blocks take of images (N, 3, H, W): tokens (N, T, width), and a tuple of the rotary positions.

        The tokens are the class token, the registers and the patches, row by row.
        """
        height, width = x.shape[2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"the image size {height}x{width} is not a multiple of the patch size {self.patch_size}")
        h, w = height // self.patch_size, width // self.patch_size
        patches = self.conv_proj(x).flatten(2).permute(0, 2, 1)
        tokens = torch.cat([self.class_token.expand(x.shape[0], -1, -1), patches], dim=1)
        if self.encoder.pos_embedding is not None:
            tokens = tokens + _interpolate(self.encoder.pos_embedding, h, w, self.antialias)
        if hasattr(self, "registers"):
            registers = self.registers.expand(x.shape[0], -1, -1)
            tokens = torch.cat([tokens[:, :1], registers, tokens[:, 1:]], dim=1)
        if hasattr(self.encoder, "ln_pre"):
            tokens = self.encoder.ln_pre(tokens)
        if self.encoder.pos_embedding is not None:
            return tokens, ()
        attention = self.encoder.layers[0].self_attention
        return tokens, (_angles(h, w, attention.embed_dim // attention.num_heads, tokens.device),)


def _interpolate(embedding, h, w, antialias):
    """Position embeddings (1, 1 + n * n, width) for the class token and h x w patches: (1, 1 + h * w, width)."""
    side = isqrt(embedding.shape[1] - 1)
    if h == w == side:
        return embedding
    grid = embedding[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    grid = functional.interpolate(grid.float(), size=(h, w), mode="bicubic", antialias=antialias).to(embedding.dtype)
    return torch.cat([embedding[:, :1], grid.flatten(2).permute(0, 2, 1)], dim=1)


def _angles(h, w, width, device):
    """The angles by which the queries and keys of h x w patches are rotated: (h * w, width), width that of a head.

    The centers of the patches lie between -1 and 1 along each side (DINOv3; Siméoni et al. 2025, section 3.2).
    """
    periods = PERIOD ** (torch.arange(width // 4, device=device) / (width // 4))
    rows, columns = ((torch.arange(n, device=device) + 0.5) / n * 2 - 1 for n in (h, w))
    angles = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1)[..., None] * 2 * pi / periods
    return angles.flatten(2).flatten(0, 1).tile(2)


class RotaryBlock(vision_transformer.EncoderBlock):
    """A block whose queries and keys of patches are rotated by angles that depend on their positions."""

    def forward(self, x, angles):
        """x: tokens (N, T, width). angles: see _angles, of the last tokens; those before them are not rotated."""
        layer = self.self_attention
        query, key, value = _query_key_value(layer, self.ln_1(x), angles)
        attended = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        x = x + layer.out_proj(attended)
        return x + self.mlp(self.ln_2(x))


def _query_key_value(layer, x, angles=None):
    """Queries, keys and values (N, heads, T, width of a head) of an nn.MultiheadAttention for tokens (N, T, width)."""
    parts = functional.linear(x, layer.in_proj_weight, layer.in_proj_bias)
    query, key, value = parts.unflatten(2, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return (_rotate(query, angles), _rotate(key, angles), value) if angles is not None else (query, key, value)


def _rotate(x, angles):
    """x (N, heads, T, C) with its last tokens rotated by angles (n, C) in the planes of channels c and c + C / 2."""
    first, rest = x.split([x.shape[2] - len(angles), len(angles)], dim=2)
    a, b = rest.chunk(2, dim=3)
    rotated = rest * angles.cos().to(x.dtype) + torch.cat([-b, a], dim=3) * angles.sin().to(x.dtype)
    return torch.cat([first, rotated], dim=2)


class SwiGLU(nn.Module):
    """A gated MLP: W3 (silu(W1 x) * W2 x); W1 is gate, and W2 and W3 have the numbers of torchvision's MLP."""

    def __init__(self, width, hidden):
        super().__init__()
        self.gate = nn.Linear(width, hidden)
        self.add_module("0", nn.Linear(width, hidden))
        self.add_module("3", nn.Linear(hidden, width))

    def forward(self, x):
        up, down = self.get_submodule("0"), self.get_submodule("3")
        return down(functional.silu(self.gate(x)) * up(x))


class QuickGELU(nn.Module):
    """CLIP's approximation of GELU."""

    def forward(self, x):
        return x * torch.sigmoid(1.702 * x)


def attention_maps(model, images):
    """How the class token attends to the patches in the last block: (N, heads, h, w), of images (N, 3, H, W).

    The values of a head and the class token's attention to itself and to registers sum to 1. What does not fill a patch
    at the right and at the bottom of an image is left out. model: see check.
    """
    h, w = (side // model.patch_size for side in images.shape[2:])
    *blocks, last = model.encoder.layers
    tokens, rotary = model.tokens(images[:, :, : h * model.patch_size, : w * model.patch_size])
    for block in blocks:
        tokens = block(tokens, *rotary)
    query, key, _ = _query_key_value(last.self_attention, last.ln_1(tokens), *rotary)
    weights = (query[:, :, :1] @ key.mT / query.shape[3] ** 0.5).softmax(-1)[:, :, 0, model.prefix_tokens :]
    return weights.unflatten(2, (h, w))


def check(model):
    """UserError if model has no class token whose attention could be shown."""
    if not isinstance(model, VisionTransformer):
        raise UserError(
            f"{type(model).__name__} has no class token; choose a vision transformer, or leave out --attention"
        )


def is_square_grid(shape, like):
    """Whether position embeddings of this shape belong to a square grid and have the width of the shape like."""
    return len(shape) == 3 and shape[::2] == like[::2] and shape[1] > 1 and isqrt(shape[1] - 1) ** 2 == shape[1] - 1
