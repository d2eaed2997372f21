"""The network in a file of any library, by fit, and published networks, by name.

All tensors in a file are read as one flat dictionary, so that nested dictionaries and prefixes of names are the same
thing. Where the first convolution of an architecture is found, the other tensors of its trunk are looked up beside it.
"""

import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import torch

from moco import cli, files
from moco.cli import UserError
from moco.networks import architectures, checkpoint, fitting, released, vit
from moco.networks.checkpoint import CheckpointError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # by which all images are normalized, see data.augment


@dataclass
class OpenedModel:
    """A model that the user names, and where it comes from.

    network: the model with its head. arch: name of the architecture. path, sha256: of its checkpoint; None for
    'random' and 'imagenet'. has_head: whether the head is a classifier that was trained with the network. classes:
    names of the head's outputs, if stored. description: one line for the output of a script.
    """

    network: torch.nn.Module
    arch: str
    path: Path | None = None
    sha256: str | None = None
    has_head: bool = False
    classes: list | None = None
    description: str = ""

    @property
    def title(self):
        """A few words for figures: the name of the file, or of the weights, and the architecture."""
        name = released.stem(self.path) if self.path else self.description.split(" with ")[1]
        return f"{name} ({self.arch})"

    @property
    def checkpoints(self):
        """{path: SHA-256} of the checkpoint, for files.write_args; empty if there is none."""
        return {str(self.path): self.sha256} if self.path else {}


def open_model(name, arch=None, n_out=None, seed=0, head_required=False, key=None):
    """The OpenedModel of a name: 'random', 'imagenet' (also the empty name), or the path of a checkpoint.

    arch: the architecture, by default MobileNetV2 as published; for a checkpoint, only where the file does not store
    it. n_out: outputs of the head; checked against the checkpoint. seed: of random weights. head_required:
    CheckpointError for a checkpoint without a classification head. key: which network of a checkpoint with several.
    """
    torch.manual_seed(seed)
    if name in ("random", "imagenet", ""):
        arch = arch or "mobilenet_v2"
        if name == "random":
            return OpenedModel(architectures.build(arch, n_out), arch, description=f"{arch} with random weights")
        network = architectures.build(arch, weights="DEFAULT")
        return OpenedModel(network, arch, has_head=True, description=f"{arch} with torchvision's ImageNet weights")
    fit = find(name, arch, key)
    if n_out is not None and fit.n_out not in (None, n_out):
        raise CheckpointError(f"the head of {name} has {fit.n_out} outputs, not {n_out}")
    if head_required and fit.n_out is None:
        raise CheckpointError(f"{name} has no linear head; train one with linear_decoding.py")
    network = architectures.build(fit.arch, fit.n_out or n_out)
    load(network, fit.state, name, drop_head=fit.n_out is None)
    digest = checkpoint.sha256(name)
    description = f"{fit.arch} from {name} (SHA-256 {digest[:12]})"
    if fit.unused:
        description += f"; network: {fit.key or 'top level'}; not used: {fit.unused}"
    description += f"; {fit.normalization}" if fit.normalization else ""
    return OpenedModel(network, fit.arch, Path(name), digest, fit.n_out is not None, fit.classes, description)


def build_from(path, arch, n_out):
    """architectures.build(arch, n_out) with a random head, on the trunk of the checkpoint at path (None: random)."""
    model = architectures.build(arch, n_out)
    return load(model, find(path, arch).state, path, drop_head=True) if path else model


def load(model, state, path, drop_head=False):
    """model with the weights of state (name -> tensor) from the file at path; with drop_head its head keeps its own.

    The position embeddings of a vision transformer take the size of those in the file; counters of batch norm that the
    file does not have stay as they are. CheckpointError if anything else is missing, unexpected or of another shape.
    """
    own = model.state_dict()
    head = architectures.head_name(model) + "."
    if drop_head:
        state = {name: tensor for name, tensor in state.items() if not name.startswith(head)}
    for name in own.keys() - state.keys():
        if not (name.endswith(".num_batches_tracked") or drop_head and name.startswith(head)):
            del own[name]
    own.update(state)  # in place: it holds the versions of modules, which MNASNet needs
    if vit.POSITIONS in state:
        vit.resize_positions(model, state[vit.POSITIONS].shape)
    try:
        model.load_state_dict(own)
    except RuntimeError as error:
        faults = "; ".join(line.strip() for line in str(error).splitlines()[1:4])
        raise CheckpointError(f"{path} does not fit this {type(model).__name__}: {faults}") from error
    return model


def add_flags(parser):
    """Add the flags of the scripts that analyze a model; open_for reads them."""
    add = parser.add_argument
    add("--model-path", default="", metavar="FILE", help="checkpoint, 'random' or 'imagenet' (the default)")
    add("--model", type=architectures.arch_name, metavar="ARCH", help="architecture, if not stored in the checkpoint")
    add(
        "--checkpoint-key",
        metavar="KEY",
        help="for a checkpoint with several networks, the key of the one to use: teacher, encoder_k, ...",
    )
    add("--n_out", type=cli.number(int, 1), help="number of outputs; read from the checkpoint, checked if given")


def open_for(args, head_required=False):
    """The OpenedModel that args, with the flags of add_flags, --seed and --image-size, ask for; prints what it is.

    UserError if it cannot process images of this size. head_required: see open_model.
    """
    opened = open_model(args.model_path, args.model, args.n_out, args.seed, head_required, args.checkpoint_key)
    print(f"model: {opened.description}")
    architectures.check_image_size(opened.network, args.image_size)
    return opened


def class_number(text, names, n_out):
    """The index of the output that text names or numbers. names: of the n_out outputs, or None if unknown.

    A name takes precedence over a number. UserError for an output that does not exist.
    """
    if text in (names or ()):
        return names.index(text)
    if text.isdecimal() and int(text) < n_out:
        return int(text)
    similar = ", ".join(get_close_matches(text, names or (), 3, 0))
    known = f"; did you mean {similar}?" if similar else ""
    raise UserError(f"--class-idx {text}: the model has {n_out} outputs, 0 to {n_out - 1}{known}")


# --- the network in a file


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
    if re.match("resnet(blur|aa)", str(config["arch"])):  # the tensors of a ResNet, but other features
        raise CheckpointError(f"{path} contains timm's {config['arch']}, which is not supported")
    fits = fitting.find_all(tensors, config["arch"], config) if architectures.is_arch(config["arch"]) else []
    if all(fit.faults for fit in fits):
        fits += fitting.find_all(tensors, arch, config)
    fit = fitting.choose(path, fits, key, arch, config["arch"])
    for name, tensor in fit.state.items():
        if not tensor.isfinite().all():
            raise CheckpointError(
                f"the weights in {path} are not finite ({name} contains NaN or infinity); use another"
            )
    classes = content.get("classes")
    if isinstance(classes, list) and len(classes) == fit.n_out and all(isinstance(name, str) for name in classes):
        fit.classes = classes
    fit.unused = fitting.count(tensors.keys() - fit.used, fit.prefix)
    if (config["mean"], config["std"]) != (MEAN, STD):
        _fold_normalization(path, fit, config["mean"], config["std"])
    return fit


def _config(path, content):
    """What a file, or config.json and preprocessor_config.json beside it, say of a network that is not in its weights.

    {"arch", "width", "heads", "eps", "activation"}, each None if unknown; {"mean", "std"}, of the pixels from 0 to 1.
    """
    folder = path if path.is_dir() else path.parent
    beside = [
        files.read_json(folder / name) if (folder / name).is_file() else {}
        for name in ("config.json", "preprocessor_config.json")
    ]
    config, images = ({key: value for key, value in each.items() if value is not None} for each in beside)
    config = config.get("vision_config", config)  # CLIP's
    images = images | config.get("pretrained_cfg", {}) | (content.get("pretrained_cfg") or {})  # timm's
    return {
        "arch": content.get("arch") or content.get("architecture") or config.get("architecture"),
        "width": config.get("hidden_size", config.get("num_features")),
        "heads": config.get("num_attention_heads"),
        "eps": config.get("layer_norm_eps"),
        "activation": config.get("hidden_act"),
        "is_cubic": "transformers_version" in beside[0],
        "mean": tuple(images.get("mean", images.get("image_mean", MEAN))),
        "std": tuple(images.get("std", images.get("image_std", STD))),
    }


def _fold_normalization(path, fit, mean, std):
    """Change the first layer of a Fit, so that it expects pixels normalized by MEAN and STD, not by mean and std.

    With W x + b of pixels (p - mean) / std, these are (x STD + MEAN - mean) / std of pixels x = (p - MEAN) / STD. Exact
    for a layer without padding, which a patch embedding is; CheckpointError for another.
    """
    first = next(name for name, tensor in fit.state.items() if tensor.ndim == 4)
    bias = first.replace(".weight", ".bias")
    if bias not in fit.state:
        raise CheckpointError(f"{path}: {fit.arch} is supported with ImageNet's mean and std only, not {mean}, {std}")
    weight, shift = fit.state[first].double(), (torch.tensor(MEAN) - torch.tensor(mean)).double()
    scale = torch.tensor(std, dtype=torch.float64)
    fit.state[bias] = (fit.state[bias] + (weight.sum((2, 3)) * shift / scale).sum(1)).float()
    fit.state[first] = (weight * (torch.tensor(STD, dtype=torch.float64) / scale)[:, None, None]).float()
    numbers = [" ".join(f"{number:g}" for number in numbers) for numbers in (mean, std)]
    fit.normalization = f"pixels normalized by mean {numbers[0]} and std {numbers[1]}"


def _flatten(content, prefix=""):
    """{name: tensor} of nested dictionaries, with the keys of all levels joined by dots; other values are left out."""
    tensors = {}
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, torch.Tensor):
            tensors[prefix + key] = value
        elif isinstance(key, str) and isinstance(value, dict):
            tensors |= _flatten(value, f"{prefix}{key}.")
    return tensors
