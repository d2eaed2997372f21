"""How the tensors in a file fit architectures.

Where the first convolution of an architecture is found among the names, the other tensors of its trunk are looked up
beside it.
"""

import re
from collections import Counter
from dataclasses import dataclass
from functools import cache

import torch
from torch.overrides import TorchFunctionMode

from moco.networks import architectures, naming, vit
from moco.networks.checkpoint import CheckpointError

SECOND_CHOICE = ("student", "momentum", "target", "encoder_k")  # in a prefix, where another network fits as well
PROJECTORS = ("encoder_q", "encoder_k", "base_encoder", "momentum_encoder")  # networks whose head is no classifier


@dataclass
class Fit:
    """How the tensors under a prefix in a file fit an architecture.

    prefix: with its last dot. state: the tensors of trunk and classifier by the architecture's names. n_out: outputs of
    the classifier, None without one. used: the names of these tensors in the file. faults: what does not fit. classes:
    names of the outputs, if stored. unused: one line that counts the other tensors of the file, such as projectors.
    normalization: the network's own mean and std in words, if they are not ImageNet's.
    """

    arch: str
    prefix: str
    state: dict
    n_out: int | None
    used: set
    faults: list
    classes: list | None = None
    unused: str = ""
    normalization: str = ""

    @property
    def key(self):
        """The prefix as a user gives it to --checkpoint-key."""
        return self.prefix.removesuffix(".")


def choose(path, fits, key, arch, stored_arch):
    """The Fit to use: teacher before student, query before momentum encoder; CheckpointError for none and several.

    key: as given by the user, or None. arch, stored_arch: the architectures that the user and the file name, or None.
    """
    good = [fit for fit in fits if not fit.faults]
    if not good:
        if not fits:
            what = f"{stored_arch}, which is not supported" if stored_arch else "no network that is recognized"
            raise CheckpointError(
                f"{path} contains {f'no {arch}' if arch else what}; --model names one of torchvision's"
            )
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


def count(names, prefix):
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


def find_all(tensors, arch, config):
    """The Fits of an architecture wherever its first convolution of images is found; arch None: of all that are known.

    config: see _config.
    """
    images = [name for name, tensor in tensors.items() if tensor.ndim == 4 and tensor.shape[1] == 3]
    fits = []
    for first, layout, archs in _layouts(arch):
        for name in images:
            if match := re.fullmatch(rf"((?:.*\.)?){first}", name):
                under = {
                    name.removeprefix(match[1]): value for name, value in tensors.items() if name.startswith(match[1])
                }
                state, files = layout(under)
                size = naming.size_of(state, match[1], config) if layout is naming.vision_transformer else None
                for each in [size.name] if size and archs is None else archs or ():
                    fits.append(_compare(spec(each), match[1], state, files))
    return fits


def _layouts(arch):
    """[(pattern of the first convolution's name, layout, architectures to try; None: as the tensors say)]."""
    transformer = (r"(?:conv_proj|patch_embed\.proj|embeddings\.patch_embeddings?(?:\.projection)?)\.weight",)
    if arch is None:
        convnexts = [f"convnext_{size}" for size in ("tiny", "small", "base", "large")]
        return [
            *(layout for each in (architectures.RESNETS, ["mobilenet_v2"], convnexts) for layout in _layouts_of(each)),
            (*transformer, naming.vision_transformer, None),
        ]
    return [(*transformer, naming.vision_transformer, [arch])] if vit.parse(arch) else _layouts_of([arch])


def _layouts_of(archs):
    """The layouts of convolutional networks of one kind."""
    expected = spec(archs[0])
    first = next(name for name, shape in expected.shapes.items() if len(shape) == 4)
    layouts = [(re.escape(first), naming.as_stored, archs)]
    if all(name.split(".")[0] in expected.children for name in expected.shapes):
        child, _, rest = first.partition(".")
        number = expected.children.index(child)
        layouts.append((rf"{number}\.{re.escape(rest)}", naming.in_sequence(expected.children), archs))
    if archs[0].startswith("convnext"):
        layouts.append((r"(?:downsample_layers\.0|stem)\.0\.weight", naming.convnext, archs))
    return layouts


def _compare(expected, prefix, state, files):
    """The Fit of an architecture (ArchSpec) to tensors under a prefix. state, files: as a layout returns them."""
    trunk, faults = {}, []
    for name, shape in expected.shapes.items():
        where = prefix + files.get(name, name)
        if name not in state:
            if not name.endswith(".num_batches_tracked"):  # which files from before PyTorch 0.4.1 do not have
                faults.append(f"{where} is missing")
            continue
        trunk[name] = state[name]
        if state[name].shape != shape and not (name == vit.POSITIONS and vit.is_square_grid(state[name].shape, shape)):
            faults.append(f"{where} is {tuple(state[name].shape)}, not {tuple(shape)}")
    head, parts = expected.head, {name.split(".")[0] for name in expected.shapes}
    others = [name for name in sorted(state) if name not in expected.shapes and not name.startswith(f"{head}.")]
    strange = [name for name in others if name.split(".")[0] in parts and not re.fullmatch(naming.IGNORED, files[name])]
    faults += [f"{prefix}{files[name]} is not part of {expected.arch}" for name in strange]
    if vit.parse(expected.arch):
        found = [what for pattern, what in naming.UNSUPPORTED.items() if any(re.fullmatch(pattern, n) for n in others)]
        found += ["no class token, as in SigLIP and I-JEPA"] if "class_token" not in state else []
        faults = [f"it has {what}, which is not supported" for what in found] + faults
    n_out = None
    if not any(part in PROJECTORS for part in prefix.split(".")) and (layer := _linear_head(expected, state)):
        weight = state[f"{layer}.weight"]
        n_out, bias = len(weight), state.get(f"{layer}.bias", torch.zeros(len(weight)))
        trunk |= {f"{head}.weight": weight, f"{head}.bias": bias}
    unused = set(others) | ({name for name in state if name.startswith(f"{head}.")} if n_out is None else set())
    used = {prefix + file_name for name, file_name in files.items() if name not in unused}
    return Fit(expected.arch, prefix, trunk, n_out, used, faults)


def _linear_head(expected, state):
    """The name of the linear layer that is all of the head, which dropout may precede; None if there is none."""
    there = {name for name in state if name.startswith(f"{expected.head}.")}
    for layer in (expected.head, f"{expected.head}.1"):
        weight = state.get(f"{layer}.weight")
        if weight is not None and weight.ndim == 2 and there <= {f"{layer}.weight", f"{layer}.bias"}:
            return layer if weight.shape[1] == expected.in_features else None
    return None
