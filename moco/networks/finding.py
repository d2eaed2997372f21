"""The network in a file of any library, found by how its tensors fit architectures.

All tensors in a file are read as one flat dictionary, so that nested dictionaries and prefixes of names are the same
thing. Where the first convolution of an architecture is found, the other tensors of its trunk are looked up beside it.
"""

import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import chain
from os.path import commonprefix
from pathlib import Path

import torch

from moco import files
from moco.networks import architectures, checkpoint, naming, vit
from moco.networks.checkpoint import CheckpointError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # by which all images are normalized, see data.augment
SECOND_CHOICE = ("student", "momentum", "target", "encoder_k")  # in a prefix, where another network fits as well
PROJECTORS = ("encoder_q", "encoder_k", "base_encoder", "momentum_encoder")  # networks whose head is no classifier
CONVNEXTS = tuple(f"convnext_{size}" for size in ("tiny", "small", "base", "large"))
PATCHES = r"(?:conv_proj|patch_embed\.proj|embeddings\.patch_embeddings?(?:\.projection)?)\.weight"


@dataclass
class Fit:
    """How the tensors under a prefix in a file fit an architecture.

    prefix: with its last dot. state: the tensors of trunk and classifier by the architecture's names. n_out: outputs of
    the classifier, None without one. used: the names of these tensors in the file. faults: what does not fit.

    Of the fit that find() returns also classes: names of the outputs, if stored; unused: one line that counts the other
    tensors of the file, such as projectors; mean, std: of the pixels from 0 to 1 that the network was trained with,
    which state has in its first layer; image_size: in pixels, that it was trained at, None if unknown.
    """

    arch: str
    prefix: str
    state: dict
    n_out: int | None
    used: set
    faults: list
    classes: list | None = None
    unused: str = ""
    mean: tuple = MEAN
    std: tuple = STD
    image_size: int | None = None

    @property
    def key(self):
        """The prefix as a user gives it to --checkpoint-key."""
        return self.prefix.removesuffix(".")


def find(path, arch=None, key=None):
    """The Fit of the network in the checkpoint at path, whatever library wrote it.

    arch: the architecture, if the file stores none of torchvision's; without either the published ones, their kin and
    vision transformers are tried. key: the prefix, or a part of it, of the network in a file with several.
    CheckpointError where no network fits, where several do, and for weights that are not finite.
    """
    content = checkpoint.read(path)
    tensors = _flatten(content) if isinstance(content, dict) else {}
    if not tensors:
        keys = f"its keys: {', '.join(map(str, content))[:100]}" if isinstance(content, dict) else "no state_dict()"
        raise CheckpointError(f"{path} contains no weights ({keys})")
    config = _config(Path(path), content)
    if re.match("resnet(blur|aa)|test_vit", str(config["arch"])):  # the tensors of another network, but other features
        raise CheckpointError(f"{path} is not supported: it has timm's {config['arch']}; choose another network")
    fits = _fits(tensors, config["arch"], config) if architectures.is_arch(config["arch"]) else []
    if all(fit.faults for fit in fits):
        fits += _fits(tensors, arch, config)
    good = [fit for fit in fits if not fit.faults]
    if not good:
        others = [fit.arch for fit in _fits(tensors, None, config) if not fit.faults] if arch else []
        raise CheckpointError(f"{path} {_misfit(fits, arch, others, config['name'])}")
    fit = _choose(path, good, key)
    for name, tensor in fit.state.items():
        if not tensor.isfinite().all():
            raise CheckpointError(
                f"the weights in {path} are not finite ({name} contains NaN or infinity); use another"
            )
    classes = content.get("classes")
    if isinstance(classes, list) and len(classes) == fit.n_out and all(isinstance(name, str) for name in classes):
        fit.classes = classes
    fit.unused = _count(tensors.keys() - fit.used, fit.prefix)
    fit.mean, fit.std, fit.image_size = config["mean"], config["std"], config["image_size"]
    if (fit.mean, fit.std) != (MEAN, STD):
        _fold_normalization(path, fit)
    return fit


def _flatten(content, prefix=""):
    """{name: tensor} of nested dictionaries, with the keys of all levels joined by dots; other values are left out."""
    tensors = {}
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, torch.Tensor):
            tensors[prefix + key] = value
        elif isinstance(key, str) and isinstance(value, dict):
            tensors |= _flatten(value, f"{prefix}{key}.")
    return tensors


def _config(path, content):
    """What a file, or config.json and preprocessor_config.json beside it, say of a network that is not in its weights.

    {"arch", "width", "heads", "eps", "activation", "image_size"}, each None if unknown; "is_cubic", whether its
    positions are interpolated as in transformers; {"mean", "std"}, of the pixels from 0 to 1.
    """

    def beside(name):
        file = (path if path.is_dir() else path.parent) / name
        content = files.read_json(file) if file.is_file() else {}
        return {key: value for key, value in content.items() if value is not None} if isinstance(content, dict) else {}

    config, images = beside("config.json"), beside("preprocessor_config.json")
    is_cubic, config = "transformers_version" in config, config.get("vision_config", config)  # CLIP's
    images = images | config.get("pretrained_cfg", {}) | (content.get("pretrained_cfg") or {})  # timm's
    own = content | (content["args"] if isinstance(content.get("args"), dict) else {})
    arch = content.get("arch") or content.get("architecture") or config.get("architecture")
    sizes = [images.get(key) for key in ("input_size", "crop_size", "size")]
    sizes = [own.get("image_size"), *sizes, config.get("image_size")]
    return {
        "arch": arch,
        "name": config.get("architecture") or config.get("architectures", [None])[0] or content.get("arch"),
        "width": config.get("hidden_size", config.get("num_features")),
        "heads": config.get("num_attention_heads"),
        "eps": config.get("layer_norm_eps"),
        "activation": config.get("hidden_act") or arch and ("quick_gelu" if "quickgelu" in str(arch) else "gelu"),
        "image_size": next(filter(None, map(_pixels, sizes)), None),
        "is_cubic": is_cubic,
        "mean": tuple(images.get("mean", images.get("image_mean", MEAN))),
        "std": tuple(images.get("std", images.get("image_std", STD))),
    }


def _pixels(size):
    """A side in pixels from what libraries write: 224, [3, 224, 224], {"height": 224}, {"shortest_edge": 224}."""
    size = size.get("height", size.get("shortest_edge")) if isinstance(size, dict) else size
    size = size[-1] if isinstance(size, list | tuple) and size else size
    return size if isinstance(size, int) and size > 0 else None


# --- fits


def _fits(tensors, arch, config):
    """The Fits of an architecture, or with None of all that are known, to tensors {name: tensor}; config: see _config.

    Each is looked for at all names that its first convolution may have in a file.
    """
    families = [architectures.RESNETS, ("mobilenet_v2",), CONVNEXTS, None] if arch is None else [(arch,)]
    fits = []
    for archs, first, rename in chain.from_iterable(map(_layouts, families)):
        for name in tensors:
            if (match := re.fullmatch(rf"((?:.*\.)?){first}", name)) and tensors[name].shape[1:2] == (3,):
                prefix = match[1]
                under = [other.removeprefix(prefix) for other in tensors if other.startswith(prefix)]
                names = {rename(other): other for other in under}
                state = naming.normalized({name: tensors[prefix + other] for name, other in names.items()})
                size = naming.size_of(state, prefix, config) if rename is naming.vision_transformer else None
                chosen = archs or ([size.name] if size else [])
                fits += [_compare(each, prefix, state, names) for each in chosen]
                if chosen and "encoder.ln_pre.weight" in state and config["activation"] is None:
                    fits[-1].faults.insert(0, "it has CLIP's GELU or an approximation, as config.json may say")
    return fits


def _layouts(family):
    """[(family, pattern of the first convolution's name, layout)] of a family of architectures, None: transformers."""
    if family is None or vit.parse(family[0]):
        return [(family, PATCHES, naming.vision_transformer)]
    model, _, shapes = _trunk(family[0])
    first = next(name for name, shape in shapes.items() if len(shape) == 4)
    child, _, rest = first.partition(".")
    children = [name for name, _ in model.named_children()]
    pattern = rf"(?:{child}|{children.index(child)})\.{re.escape(rest)}"
    layouts = [(family, pattern, naming.torchvision(children))]
    if family[0].startswith("convnext"):
        layouts.append((family, r"(?:downsample_layers\.0|stem)\.0\.weight", naming.convnext))
    return layouts


@cache
def _trunk(arch):
    """An architecture without memory for its weights, the name of its head, and {name: shape} of all other tensors."""
    try:
        with torch.device("meta"):
            model = architectures.build(arch, 1)
    except NotImplementedError:  # RegNet computes its widths with tensors
        model = architectures.build(arch, 1)
    head = architectures.head_name(model)
    shapes = {name: value.shape for name, value in model.state_dict().items() if not name.startswith(f"{head}.")}
    return model, head, shapes


def _compare(arch, prefix, state, names):
    """The Fit of an architecture to tensors under a prefix. state: by its names; names: in the file."""
    model, head, shapes = _trunk(arch)
    trunk, faults = {}, []
    for name, shape in shapes.items():
        if name in state:
            trunk[name], there = state[name], state[name].shape
            if there != shape and not (name == vit.POSITIONS and vit.is_square_grid(there, shape)):
                faults.append(f"{prefix}{names.get(name, name)} is {tuple(there)}, not {tuple(shape)}")
        elif not name.endswith(".num_batches_tracked"):  # which files from before PyTorch 0.4.1 do not have
            faults.append(f"{prefix}{names.get(name, name)} is missing")
    others = [name for name in sorted(state) if name not in shapes and not name.startswith(f"{head}.")]
    parts = {name.split(".")[0] for name in shapes}
    faults += [
        f"{prefix}{names.get(name, name)} is not part of {arch}"
        for name in others
        if name.split(".")[0] in parts and not re.fullmatch(naming.IGNORED, names.get(name, name))
    ]
    found = [what for pattern, what in naming.UNSUPPORTED.items() if any(re.fullmatch(pattern, n) for n in others)]
    if vit.parse(arch) and "class_token" not in state:
        found.append("no class token, as in SigLIP and I-JEPA")
    faults = [f"it has {what}" for what in found] + faults
    n_out, unused = None, set(others)
    is_projector = any(part in PROJECTORS for part in prefix.split("."))
    if layer := None if is_projector else _linear_head(state, head, architectures.head(model).in_features):
        weight = state[f"{layer}.weight"]
        n_out, bias = len(weight), state.get(f"{layer}.bias", torch.zeros(len(weight)))
        trunk |= {f"{head}.weight": weight, f"{head}.bias": bias}
    else:
        unused |= {name for name in state if name.startswith(f"{head}.")}
    used = {prefix + in_file for name, in_file in names.items() if name not in unused}
    return Fit(arch, prefix, trunk, n_out, used, faults)


def _linear_head(state, head, in_features):
    """The name of the linear layer that is all of the head, which dropout may precede; None if there is none."""
    present = {name for name in state if name.startswith(f"{head}.")}
    for layer in (head, f"{head}.1"):
        weight = state.get(f"{layer}.weight")
        if weight is not None and weight.ndim == 2 and present <= {f"{layer}.weight", f"{layer}.bias"}:
            return layer if weight.shape[1] == in_features else None
    return None


def _misfit(fits, arch, others, name):
    """What to say of a file that none of fits fits, and what to do.

    others: architectures that it fits, but not arch. name: of the network in the file, or None.
    """
    if others:
        return f"is a {others[0]}, not a {arch}; omit --model"
    nearest = min(fits, key=lambda fit: len(fit.faults) / len(_trunk(fit.arch)[2]), default=None)
    if nearest and nearest.faults[0].startswith("it has"):
        return f"is not supported: {name or 'it'}{nearest.faults[0][2:]}; choose another network"
    is_near = nearest and len(nearest.faults) < len(_trunk(nearest.arch)[2]) / 4
    if name and not arch and not is_near and not architectures.is_arch(name):
        return f"is not supported: it has {name}; choose another network"
    if not nearest:
        return f"contains no {arch or 'network that is recognized'}; --model names one of torchvision's"
    faults = "; ".join(nearest.faults[:3]) + (f"; and {len(nearest.faults) - 3} more" if nearest.faults[3:] else "")
    return f"does not fit {arch or 'any architecture; nearest: ' + nearest.arch}: {faults}"


def _choose(path, good, key):
    """The Fit to use: teacher before student, query before momentum encoder; CheckpointError for several.

    key: as given by the user, or None.
    """
    if key is not None:
        keyed = [fit for fit in good if fit.key == key or f".{key}." in f".{fit.prefix}"]
        if not keyed:
            keys = ", ".join(fit.key or "''" for fit in good)
            raise CheckpointError(f"--checkpoint-key {key}: {path} has no such network; it has {keys}")
        good = keyed
    first, *others = [fit for fit in good if not any(word in fit.prefix for word in SECOND_CHOICE)] or good
    if not all(
        fit.state.keys() == first.state.keys()
        and all(torch.equal(tensor, first.state[name]) for name, tensor in fit.state.items())
        for fit in others
    ):
        keys = ", ".join(fit.key or "''" for fit in (first, *others))
        raise CheckpointError(f"{path} contains several networks ({keys}); choose one with --checkpoint-key")
    return first


def _count(names, prefix):
    """One line that counts names by their first part that differs from prefix; '' for no names."""
    counts, own = Counter(), prefix.split(".")
    for name in names:
        parts = name.split(".")
        counts[".".join(parts[: len(commonprefix([own, parts])) + 1])] += 1
    return ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))


def _fold_normalization(path, fit):
    """Change the first layer of a Fit, so that it expects pixels normalized by MEAN and STD, not by fit.mean, fit.std.

    With W x + b of pixels (p - mean) / std, these are (x STD + MEAN - mean) / std of pixels x = (p - MEAN) / STD. Exact
    for a layer without padding, which a patch embedding is; CheckpointError for another.
    """
    first = next(name for name, tensor in fit.state.items() if tensor.ndim == 4)
    bias = first.replace(".weight", ".bias")
    if bias not in fit.state:
        raise CheckpointError(
            f"{path}: {fit.arch} is supported with ImageNet's mean and std only, not {fit.mean}, {fit.std}"
        )
    weight, shift = fit.state[first].double(), (torch.tensor(MEAN) - torch.tensor(fit.mean)).double()
    scale = torch.tensor(fit.std, dtype=torch.float64)
    fit.state[bias] = (fit.state[bias] + (weight.sum((2, 3)) * shift / scale).sum(1)).float()
    fit.state[first] = (weight * (torch.tensor(STD, dtype=torch.float64) / scale)[:, None, None]).float()
