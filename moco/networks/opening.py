"""The network in a file of any library, by fit, and published networks, by name.

All tensors in a file are read as one flat dictionary, so that nested dictionaries and prefixes of names are the same
thing. Where the first convolution of an architecture is found, the other tensors of its trunk are looked up beside it.
"""

import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

from moco import cli, files
from moco.cli import UserError
from moco.networks import architectures, checkpoint, vit
from moco.networks.checkpoint import CheckpointError

SECOND_CHOICE = ("student", "momentum", "target", "encoder_k")  # in a prefix, where another network fits as well
PROJECTORS = ("encoder_q", "encoder_k", "base_encoder", "momentum_encoder")  # networks whose head is no classifier


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
    digest = files.sha256(name)
    description = f"{fit.arch} from {name} (SHA-256 {digest[:12]})"
    if fit.unused:
        description += f"; network: {fit.key or 'top level'}; not used: {fit.unused}"
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
    """Add the flags of the scripts that analyze a model; open_model takes their values."""
    add = parser.add_argument
    add("--model-path", default="", metavar="FILE", help="checkpoint, 'random' or 'imagenet' (the default)")
    add("--model", type=architectures.arch_name, metavar="ARCH", help="architecture, if not stored in the checkpoint")
    add(
        "--checkpoint-key",
        metavar="KEY",
        help="for a checkpoint with several networks, the key of the one to use: teacher, encoder_k, ...",
    )
    add("--n_out", type=cli.number(int, 1), help="number of outputs; read from the checkpoint, checked if given")


def class_number(text, names, n_out):
    """The index of the output that text names or numbers. names: of the n_out outputs, or None if unknown.

    A name takes precedence over a number. UserError for an output that does not exist.
    """
    if text in (names or ()):
        return names.index(text)
    if text.isdecimal() and int(text) < n_out:
        return int(text)
    known = f" ({', '.join(names)})" if names else ""
    raise UserError(f"--class-idx {text}: the model has {n_out} outputs, 0 to {n_out - 1}{known}")


# --- the network in a file


@dataclass
class Fit:
    """How the tensors under a prefix in a file fit an architecture.

    prefix: with its last dot. state: the tensors of trunk and classifier by the architecture's names. n_out: outputs of
    the classifier, None without one. used: the names of these tensors in the file. faults: what does not fit. classes:
    names of the outputs, if stored. unused: one line that counts the other tensors of the file, such as projectors.
    """

    arch: str
    prefix: str
    state: dict
    n_out: int | None
    used: set
    faults: list
    classes: list | None = None
    unused: str = ""

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
    tensors = vit.fold_layer_scale(_flatten(content)) if isinstance(content, dict) else {}
    if not tensors:
        keys = f"its keys: {', '.join(map(str, content))[:100]}" if isinstance(content, dict) else "no state_dict()"
        raise CheckpointError(f"{path} contains no weights ({keys})")
    stored_arch = content.get("arch")
    fits = _fits(stored_arch, tensors) if architectures.is_arch(stored_arch) else []
    if all(fit.faults for fit in fits):
        archs = [arch] if arch else [*architectures.FAMILY, *vit.fitting_archs(tensors, stored_arch)]
        fits += [fit for name in archs for fit in _fits(name, tensors)]
    fit = _choose(path, fits, key, arch)
    for name, tensor in fit.state.items():
        if not tensor.isfinite().all():
            raise CheckpointError(
                f"the weights in {path} are not finite ({name} contains NaN or infinity); use another"
            )
    classes = content.get("classes")
    if isinstance(classes, list) and len(classes) == fit.n_out and all(isinstance(name, str) for name in classes):
        fit.classes = classes
    fit.unused = _count(tensors.keys() - fit.used, fit.prefix)
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


def _choose(path, fits, key, arch):
    """The Fit to use: teacher before student, query before momentum encoder; CheckpointError for none and several."""
    good = [fit for fit in fits if not fit.faults]
    if not good:
        if not fits:
            what = f"no {arch}" if arch else "none of the architectures that are recognized; name its own with --model"
            raise CheckpointError(f"{path} contains {what}")
        nearest = min(fits, key=lambda fit: len(fit.faults) / len(spec(fit.arch).shapes))
        faults = "; ".join(nearest.faults[:3]) + (f"; and {len(nearest.faults) - 3} more" if nearest.faults[3:] else "")
        raise CheckpointError(f"{path} does not fit {arch or 'any architecture; nearest: ' + nearest.arch}: {faults}")
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
        common = next((i for i, (a, b) in enumerate(zip(own, parts, strict=False)) if a != b), len(own))
        counts[".".join(parts[: common + 1])] += 1
    return ", ".join(f"{name} ({count})" for name, count in sorted(counts.items()))


@dataclass(frozen=True)
class ArchSpec:
    """Names and shapes of an architecture.

    head: the name of its linear head. in_features: inputs of the head. shapes: {name: shape} of all parameters and
    buffers of the trunk. children: the names of the model's direct children in order.
    """

    arch: str
    head: str
    in_features: int
    shapes: dict
    children: tuple


@cache
def spec(arch):
    """The ArchSpec of an architecture; allocates no memory for weights."""
    with _ParametersOnMeta():
        model = architectures.build(arch, 1)
    name = architectures.head_name(model)
    shapes = {key: value.shape for key, value in model.state_dict().items() if not key.startswith(f"{name}.")}
    children = tuple(child for child, _ in model.named_children())
    return ArchSpec(arch, name, architectures.head(model).in_features, shapes, children)


class _ParametersOnMeta(TorchFunctionMode):
    """Layers are created on the meta device and not initialized, which takes most of the time.

    torch.device("meta") would also move the numbers that RegNet computes its widths from.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.empty:
            return function(*args, **kwargs | {"device": "meta"})
        tensor = args[0] if args else kwargs.get("tensor")
        if isinstance(tensor, torch.Tensor) and tensor.is_meta and re.search(r"[^_]_$", function.__name__):
            return tensor  # an in-place operation such as nn.init.kaiming_normal_
        return function(*args, **kwargs)


def _fits(arch, tensors):
    """The Fits of arch wherever its first convolution of images is found, by whatever naming."""
    expected = spec(arch)
    first = next(name for name, shape in expected.shapes.items() if len(shape) == 4)
    images = [name for name, tensor in tensors.items() if tensor.ndim == 4 and tensor.shape[1] == 3]
    return [
        _compare(expected, tensors, name.removesuffix(file_names[first]), file_names)
        for file_names in _namings(expected)
        for name in images
        if f".{name}".endswith(f".{file_names[first]}")
    ]


def _namings(expected):
    """Ways to name an architecture's tensors in a file: {its own name: the name there}.

    These are torchvision's names; those of its children in an nn.Sequential without the head, as lightly's examples
    cut a network; and what vit.other_names gives.
    """
    names = [*expected.shapes, f"{expected.head}.weight", f"{expected.head}.bias"]
    numbers = {child: str(i) for i, child in enumerate(expected.children)}
    namings = [{name: name for name in names}]
    if all(name.split(".")[0] in numbers for name in names):
        namings += [{name: ".".join([numbers[name.split(".")[0]], *name.split(".")[1:]]) for name in names}]
    return namings + (vit.other_names(names) if vit.parse(expected.arch) else [])


def _compare(expected, tensors, prefix, file_names):
    """The Fit of an architecture (ArchSpec) to the tensors under a prefix. file_names: as in _namings."""
    under = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    state, faults = {}, []
    for name, shape in expected.shapes.items():
        file_name = file_names[name]
        if file_name in under:
            state[name] = under[file_name]
            if under[file_name].shape != shape and not (
                name == vit.POSITIONS and vit.is_square_grid(under[file_name].shape, shape)
            ):
                faults.append(f"{prefix}{file_name} is {tuple(under[file_name].shape)}, not {tuple(shape)}")
        elif not name.endswith(".num_batches_tracked"):  # which files from before PyTorch 0.4.1 do not have
            faults.append(f"{prefix}{file_name} is missing")
    used = {file_names[name] for name in state}
    head = file_names[f"{expected.head}.weight"].removesuffix(".weight")
    parts = {file_names[name].split(".")[0] for name in expected.shapes}
    others = [name for name in sorted(under.keys() - used) if not name.startswith(f"{head}.")]
    faults += [f"{prefix}{name} is not part of {expected.arch}" for name in others if name.split(".")[0] in parts]
    if vit.parse(expected.arch):
        unsupported = {vit.UNSUPPORTED.get(name.split(".")[0]) for name in others} - {None}
        faults = [f"it has {what}, which are not supported" for what in sorted(unsupported)] + faults
    n_out = None
    if not any(part in PROJECTORS for part in prefix.split(".")) and (layer := _linear_head(expected, under, head)):
        weight = under[f"{layer}.weight"]
        n_out, bias = len(weight), under.get(f"{layer}.bias", torch.zeros(len(weight)))
        state |= {f"{expected.head}.weight": weight, f"{expected.head}.bias": bias}
        used |= {f"{layer}.weight", f"{layer}.bias"}
    return Fit(expected.arch, prefix, state, n_out, {prefix + name for name in used}, faults)


def _linear_head(expected, under, head):
    """The name of the linear layer that is all of the head in a file, where dropout may precede it; None if none is."""
    there = {name for name in under if name.startswith(f"{head}.")}
    for layer in (head, f"{head}.1"):
        weight = under.get(f"{layer}.weight")
        if weight is not None and weight.ndim == 2 and there <= {f"{layer}.weight", f"{layer}.bias"}:
            return layer if weight.shape[1] == expected.in_features else None
    return None
