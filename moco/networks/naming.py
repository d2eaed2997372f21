"""One normal form of the names of a network's tensors, torchvision's, from those of other libraries.

A layout is a function from names in a file to torchvision's; those that it does not know stay as they are. normalized()
then brings the tensors into torchvision's form.
"""

import re

import torch

from moco.networks import vit

BLOCK = "encoder.layers.encoder_layer_"
UNSUPPORTED = {  # beside the blocks of a network, and changes the features
    r"(head\.)?pre_logits\..*": "an MLP between trunk and head",
    r"(embeddings\.)?dist(illation)?_token": "a distillation token",
    r"fc_norm\..*": "features that are the mean of the patches",
    r"(attn_pool|head\.attention)\..*": "features pooled by attention, as in SigLIP",
}
IGNORED = r"(embeddings\.)?mask_token|rope_embed\.periods|pooler\..*|.*\.bias_mask"  # not used for features

_OUTER = [  # of a vision transformer: (name in a file, name here), see _rename
    (r"(embeddings\.)?(cls_token|class_embedding)", "class_token"),
    (r"pos_embed|embeddings\.position_embeddings?(\.weight)?|positional_embedding", vit.POSITIONS),
    (r"(embeddings\.)?(reg_token|register_tokens|storage_tokens)", "registers"),
    (r"(patch_embed\.proj|embeddings\.patch_embeddings?(\.projection)?)\.", "conv_proj."),
    (r"(norm_pre|pre_layrnorm|ln_pre)\.", "encoder.ln_pre."),
    (r"(norm|layernorm|post_layernorm|ln_post)\.", "encoder.ln."),
    (r"head\.", "heads.head."),
]
_BLOCKS = (
    r"(?:blocks\.(?:\d+\.(?=\d))?|(?:encoder\.|model\.)?layers?\.|transformer\.resblocks\.|"
    r"encoder\.layers\.encoder_layer_)(\d+)\.(.+)"
)
_INNER = [  # of a block
    (r"(norm|layer_norm|ln_)(?P<n>[12])\.", r"ln_\g<n>."),
    (r"layernorm_before\.", "ln_1."),
    (r"layernorm_after\.", "ln_2."),
    (r"attn\.(qkv\.|in_proj_)", "self_attention.in_proj_"),
    (r"(attention\.attention|attention|self_attn)\.(?P<part>[qkv])(uery|ey|alue|_proj)\.", r"\g<part>."),
    (r"attn\.(?P<part>[qkv])_bias", r"\g<part>.bias"),
    (r"(attn\.proj|attn\.out_proj|self_attn\.out_proj|attention\.output\.dense|attention\.o_proj)\.",
     "self_attention.out_proj."),
    (r"mlp\.(w1|gate_proj|fc1_g)\.", "mlp.gate."),
    (r"(mlp\.(fc1|linear_1|up_proj|c_fc|w12|weights_in|w2|fc1_x)|intermediate\.dense)\.", "mlp.0."),
    (r"(mlp\.(fc2|linear_2|down_proj|c_proj|w3|weights_out)|output\.dense)\.", "mlp.3."),
    (r"(ls|layer_scale|gamma_)(?P<n>[12])(\.gamma|\.lambda1)?", r"scale\g<n>"),
]  # fmt: skip


def _rename(name, table):
    """name by the first entry of table whose pattern it matches; one ending in . or _ also leaves the last word."""
    for pattern, replacement in table:
        last = r"\w+" if replacement.endswith((".", "_")) else ""
        if match := re.fullmatch(f"(?:{pattern})(?P<last>{last})", name):
            return match.expand(replacement) + match["last"]
    return name


def vision_transformer(name):
    """The layout of torchvision, timm, Meta's DINO, DINOv2 and DINOv3, MAE, Mugs, MoCo v3, CLIP and transformers."""
    match = re.fullmatch(_BLOCKS, name)
    return f"{BLOCK}{match[1]}.{_rename(match[2], _INNER)}" if match else _rename(name, _OUTER)


def torchvision(children):
    """The layout of torchvision, or of nn.Sequential(*model.children()), as lightly's examples cut a network.

    children: the names of the model's children.
    """
    numbered = {str(number): child for number, child in enumerate(children)}

    def rename(name):
        first, dot, rest = name.partition(".")
        return numbered.get(first, first) + dot + rest

    return rename


_CONVNEXT = [  # Meta's, timm's and transformers' names
    (r"(downsample_layers\.0|stem)\.(?P<n>[01])\.", r"features.0.\g<n>."),
    *((rf"(downsample_layers\.{stage}|stages\.{stage}\.downsample)\.(?P<n>[01])\.", rf"features.{2 * stage}.\g<n>.")
      for stage in (1, 2, 3)),
    (r"(norm|head\.norm)\.", "classifier.0."),
    (r"head\.(fc\.)?(?P<kind>weight|bias)", r"classifier.2.\g<kind>"),
]  # fmt: skip
_CONVNEXT_BLOCK = [
    (r"(dwconv|conv_dw)\.", "block.0."),
    (r"norm\.", "block.2."),
    (r"(pwconv1|mlp\.fc1)\.", "block.3."),
    (r"(pwconv2|mlp\.fc2)\.", "block.5."),
    (r"gamma", "layer_scale"),
]


def convnext(name):
    """The layout of Meta's and timm's ConvNeXt."""
    match = re.fullmatch(r"stages\.(\d)\.(?:blocks\.)?(\d+)\.(.+)", name)
    if not match:
        return _rename(name, _CONVNEXT)
    return f"features.{2 * int(match[1]) + 1}.{match[2]}.{_rename(match[3], _CONVNEXT_BLOCK)}"


def normalized(state):
    """Tensors by torchvision's names, {name: tensor}, in torchvision's form; changes state and returns it."""
    for block in {name[: name.index(".", len(BLOCK)) + 1] for name in state if name.startswith(BLOCK)}:
        _normalize_block(state, block)
    if "class_token" in state:
        state["class_token"] = state["class_token"].reshape(1, 1, -1)
    if (positions := state.get(vit.POSITIONS)) is not None:
        if positions.ndim == 2:  # CLIP's
            positions = positions[None]
        if "registers" in state and int(positions.shape[1] ** 0.5) ** 2 == positions.shape[1]:  # timm's: patches' only
            positions = torch.cat([torch.zeros_like(positions[:, :1]), positions], 1)
        state[vit.POSITIONS] = positions
    if "conv_proj.weight" in state:
        weight = state["conv_proj.weight"]
        state.setdefault("conv_proj.bias", weight.new_zeros(len(weight)))  # CLIP's has none
    return state | {name: scale.reshape(-1, 1, 1) for name, scale in state.items() if name.endswith(".layer_scale")}


def _normalize_block(state, block):
    """Bring the tensors of a block into torchvision's form: queries, keys and values in one, no LayerScale."""

    def take(name):
        return state.pop(block + name, None)

    queries, keys, values = (take(f"{part}.weight") for part in "qkv")
    if queries is not None and keys is not None and values is not None:
        state[f"{block}self_attention.in_proj_weight"] = torch.cat([queries, keys, values])
    projection, bias = (f"{block}self_attention.in_proj_{kind}" for kind in ("weight", "bias"))
    is_eva = queries is None and vit.POSITIONS in state  # its rotary positions are not in the file
    biases = [None if is_eva else take(f"{part}.bias") for part in "qkv"]
    if projection in state and bias not in state:
        zeros = state[projection].new_zeros(len(state[projection]) // 3)  # of keys in DINOv3 and BEiT, of all in some
        state[bias] = torch.cat([zeros if part is None else part for part in biases])
    if take("self_attention.in_proj_bias_mask") is not None and bias in state:  # Meta's DINOv3: no bias of keys
        state[bias] = state[bias].clone()
        state[bias].chunk(3)[1].zero_()
    gate, up = f"{block}mlp.gate.weight", f"{block}mlp.0.weight"
    kinds = [kind for kind in ("weight", "bias") if f"{block}mlp.0.{kind}" in state]
    if gate in state and up in state and state[gate].shape != state[up].shape:  # w1 and w2 of an MLP without a gate
        for kind in kinds:
            state[f"{block}mlp.3.{kind}"] = take(f"mlp.0.{kind}")
            state[f"{block}mlp.0.{kind}"] = take(f"mlp.gate.{kind}")
    down = state.get(f"{block}mlp.3.weight")
    if up in state and down is not None and len(state[up]) == 2 * down.shape[1]:  # DINOv2's gate and W2 in one
        for kind in kinds:
            state[f"{block}mlp.gate.{kind}"], state[f"{block}mlp.0.{kind}"] = state[f"{block}mlp.0.{kind}"].chunk(2)
    for scale, layer in (("scale1", "self_attention.out_proj"), ("scale2", "mlp.3")):
        weight, bias = (f"{block}{layer}.{kind}" for kind in ("weight", "bias"))
        if weight in state and bias in state and (gamma := take(scale)) is not None:  # x + gamma * (W x + b)
            state |= {weight: state[weight] * gamma[:, None], bias: state[bias] * gamma}


def size_of(state, prefix, config):
    """The vit.Size of the vision transformer with these tensors, by normal names; None if they do not make one.

    prefix: of their names in the file. config: {"arch", "width", "heads", "eps", "activation"}, which are not in the
    weights, each None if unknown.
    """
    weight, up = state.get("conv_proj.weight"), state.get(f"{BLOCK}0.mlp.0.weight")
    if weight is None or up is None:
        return None
    width, patch = len(weight), weight.shape[2]
    depth = 1 + max(int(name[len(BLOCK) :].split(".")[0]) for name in state if name.startswith(BLOCK))
    registers = state["registers"].shape[1] if "registers" in state else 0
    rotary, pre_norm = bool(registers) and vit.POSITIONS not in state, "encoder.ln_pre.weight" in state
    if config["width"] not in (None, width):  # of another network
        config = dict.fromkeys(config)
    heads = config["heads"] or (width // 64 if rotary else vit.HEADS.get(width, width // 64))
    if width == 384 and (config["arch"] == "vit_small" or "base_encoder." in prefix):  # MoCo v3's; all others have 6
        heads = 12
    size = vit.Size(
        width,
        depth,
        heads,
        patch,
        mlp=len(up),
        gated=f"{BLOCK}0.mlp.gate.weight" in state,
        registers=registers,
        rotary=rotary,
        antialias=not config["is_cubic"] or bool(registers),
        pre_norm=pre_norm,
        quick_gelu=config["activation"] == "quick_gelu",
        eps=config["eps"] or (1e-5 if rotary or pre_norm else 1e-6),
    )
    return size if heads and vit.parse(size.name) == size else None
