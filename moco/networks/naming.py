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

_OUTER = [  # of a vision transformer: (name in a file, name here)
    (r"(embeddings\.)?(cls_token|class_embedding)", "class_token"),
    (r"pos_embed|embeddings\.position_embeddings?(\.weight)?|positional_embedding", vit.POSITIONS),
    (r"(embeddings\.)?(reg_token|register_tokens|storage_tokens)", "registers"),
    (r"(patch_embed\.proj|embeddings\.patch_embeddings?(\.projection)?)\.(?P<kind>\w+)", r"conv_proj.\g<kind>"),
    (r"(norm_pre|pre_layrnorm|ln_pre)\.(?P<kind>\w+)", r"encoder.ln_pre.\g<kind>"),
    (r"(norm|layernorm|post_layernorm|ln_post)\.(?P<kind>\w+)", r"encoder.ln.\g<kind>"),
    (r"head\.(?P<kind>\w+)", r"heads.head.\g<kind>"),
]
_BLOCKS = (
    r"(?:blocks\.(?:\d+\.(?=\d))?|(?:encoder\.|model\.)?layers?\.|transformer\.resblocks\.|"
    r"encoder\.layers\.encoder_layer_)(\d+)\.(.+)"
)
_INNER = [  # of a block
    (r"(norm|layer_norm|ln_)(?P<n>[12])\.(?P<kind>\w+)", r"ln_\g<n>.\g<kind>"),
    (r"layernorm_before\.(?P<kind>\w+)", r"ln_1.\g<kind>"),
    (r"layernorm_after\.(?P<kind>\w+)", r"ln_2.\g<kind>"),
    (r"attn\.(qkv\.|in_proj_)(?P<kind>\w+)", r"self_attention.in_proj_\g<kind>"),
    (
        r"(attention\.attention|attention|self_attn)\.(?P<part>[qkv])(uery|ey|alue|_proj)\.(?P<kind>\w+)",
        r"\g<part>.\g<kind>",
    ),
    (r"attn\.(?P<part>[qkv])_bias", r"\g<part>.bias"),
    (
        r"(attn\.proj|attn\.out_proj|self_attn\.out_proj|attention\.output\.dense|attention\.o_proj)\.(?P<kind>\w+)",
        r"self_attention.out_proj.\g<kind>",
    ),
    (r"mlp\.(w1|gate_proj|fc1_g)\.(?P<kind>\w+)", r"mlp.gate.\g<kind>"),
    (
        r"(mlp\.(fc1|linear_1|up_proj|c_fc|w12|weights_in|w2|fc1_x)|intermediate\.dense)\.(?P<kind>\w+)",
        r"mlp.0.\g<kind>",
    ),
    (r"(mlp\.(fc2|linear_2|down_proj|c_proj|w3|weights_out)|output\.dense)\.(?P<kind>\w+)", r"mlp.3.\g<kind>"),
    (r"(ls|layer_scale|gamma_)(?P<n>[12])(\.gamma|\.lambda1)?", r"scale\g<n>"),
]


def _rename(name, table):
    for pattern, replacement in table:
        if match := re.fullmatch(pattern, name):
            return replacement(match) if callable(replacement) else match.expand(replacement)
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
    (r"(downsample_layers\.0|stem)\.(?P<n>[01])\.(?P<kind>\w+)", lambda m: f"features.0.{m['n']}.{m['kind']}"),
    (
        r"(downsample_layers\.(?P<stage>[123])|stages\.(?P<timm>[123])\.downsample)\.(?P<n>[01])\.(?P<kind>\w+)",
        lambda m: f"features.{2 * int(m['stage'] or m['timm'])}.{m['n']}.{m['kind']}",
    ),
    (
        r"stages\.(?P<stage>\d)\.(blocks\.)?(?P<block>\d+)\.(?P<rest>.+)",
        lambda m: f"features.{2 * int(m['stage']) + 1}.{m['block']}.{_rename(m['rest'], _CONVNEXT_BLOCK)}",
    ),
    (r"(norm|head\.norm)\.(?P<kind>\w+)", lambda m: f"classifier.0.{m['kind']}"),
    (r"head\.(fc\.)?(?P<kind>weight|bias)", lambda m: f"classifier.2.{m['kind']}"),
]
_CONVNEXT_BLOCK = [
    (r"(dwconv|conv_dw)\.(?P<kind>\w+)", r"block.0.\g<kind>"),
    (r"norm\.(?P<kind>\w+)", r"block.2.\g<kind>"),
    (r"(pwconv1|mlp\.fc1)\.(?P<kind>\w+)", r"block.3.\g<kind>"),
    (r"(pwconv2|mlp\.fc2)\.(?P<kind>\w+)", r"block.5.\g<kind>"),
    (r"gamma", "layer_scale"),
]


def convnext(name):
    """The layout of Meta's and timm's ConvNeXt."""
    return _rename(name, _CONVNEXT)


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
